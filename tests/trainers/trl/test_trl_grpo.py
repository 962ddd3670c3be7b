"""GRPOTrainer: rewards of the completions per channel, against the rewards one by one."""

from __future__ import annotations

import random
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from packaging.version import Version
from trl import GRPOConfig, GRPOTrainer
from trl_tools import ALPHABETS, CHANNELS, arguments, logs, run, weights, windows, word

from channel_metrics import (
    ChannelError,
    ConfigError,
    MetricsConfig,
    UnsupportedVersionError,
    Window,
)
from channel_metrics.trainers.hf import attach
from channel_metrics.trainers.trl.grpo import GRPOChannelMetricsMixin

# trl 1.16 reads a property that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated")

WEIGHTED = Version(trl.__version__) >= Version("1")
WEIGHTS = [1.0, 0.5]
COUNTED = MetricsConfig(metrics=("samples", "share"))
OF_LETTER = {letter: name for name, letters in ALPHABETS.items() for letter in letters}


def prompts(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    names = [rng.choice(CHANNELS) for _ in range(count)]
    return [{"prompt": word(rng, name, 2, 5), "channel": name} for name in names]


class Scores:
    """Two reward functions, and what they said of each prompt; the second skips some."""

    def __init__(self) -> None:
        self.given: list[tuple[str, float]] = []
        self.skipping: list[float | None] = []

    def functions(self) -> list[Any]:
        def spread(prompts: list[str], completion_ids: list[list[int]], **kwargs: Any) -> Any:
            scores = [sum(ids) / 1000 + len(ids) for ids in completion_ids]
            self.given += [(OF_LETTER[p[0]], s) for p, s in zip(prompts, scores, strict=True)]
            return scores

        def parity(completion_ids: list[list[int]], **kwargs: Any) -> Any:
            scores = [None if ids[0] % 3 == 0 else float(ids[0] % 2) for ids in completion_ids]
            self.skipping += scores
            return scores

        return [spread, parity]


def grpo(folder: Path, records: Any = None, scores: Scores | None = None, **options: Any) -> Any:
    names = ("prepare", "before", "eval_dataset", "model")
    keywords = {name: options.pop(name) for name in names if name in options}
    given = {
        "num_generations": 2,
        "max_completion_length": 6,
        "max_steps": 4,
        "gradient_accumulation_steps": 2,
        "reward_weights": WEIGHTS,
        **options,
    }
    return run(
        GRPOTrainer,
        GRPOConfig(**arguments(folder, **given)),
        prompts(32) if records is None else records,
        reward_funcs=(scores or Scores()).functions(),
        **keywords,
    )


def expected(given: Any, skipping: Any, prefix: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    rows = [(name, a, b) for (name, a), b in zip(given, skipping, strict=True)]
    for name in CHANNELS:
        mine = [(a, b) for channel, a, b in rows if channel == name]
        if not mine:
            continue
        weight = WEIGHTS[1] if WEIGHTED else 1.0
        series = {
            "reward": [a + weight * (b or 0.0) for a, b in mine],
            "rewards/spread": [a for a, _ in mine],
            "rewards/parity": [b for _, b in mine if b is not None],
        }
        for key, values in series.items():
            mean, std = ("", "_std") if key == "reward" else ("/mean", "/std")
            if values:
                found[f"{prefix}{name}_{key}{mean}"] = statistics.fmean(values)
            if len(values) > 1:
                found[f"{prefix}{name}_{key}{std}"] = statistics.stdev(values)
        found[f"{prefix}{name}_samples"] = len(mine)
        found[f"{prefix}{name}_share"] = len(mine) / len(rows)
    return found


def test_windows_hold_every_completion_once(tmp_path: Path) -> None:
    """Two generations of 8 completions per window, each used in two micro-batches."""
    scores = Scores()
    trainer = grpo(
        tmp_path,
        scores=scores,
        prepare=lambda trainer: attach(trainer, COUNTED),
        eval_dataset=Dataset.from_list(prompts(6, seed=4)),
        eval_strategy="steps",
        eval_steps=4,
        per_device_eval_batch_size=4,
    )
    found, entries = logs(trainer), [e for e in trainer.state.log_history if "loss" in e]
    assert len(found) == 2
    given = list(zip(windows(scores.given, 16), windows(scores.skipping, 16), strict=True))
    for entry, whole, window in zip(found, entries, given, strict=False):
        assert entry == pytest.approx(expected(*window), rel=1e-5, abs=1e-6)
        together = sum(
            entry[f"{name}_reward"] * entry[f"{name}_share"]
            for name in CHANNELS
            if f"{name}_share" in entry
        )
        assert together == pytest.approx(float(whole["reward"]), rel=1e-5)
    (evaluated,) = logs(trainer, "eval_")
    rest = expected(scores.given[32:], scores.skipping[32:], "eval_")
    assert evaluated == pytest.approx(rest, rel=1e-5, abs=1e-6)


def test_completions_that_no_function_scored(tmp_path: Path) -> None:
    """They count as TRL counts them in its own mean: not at all, or with a reward of 0."""
    found: list[Window] = []

    def prepare(trainer: Any) -> None:
        attach(trainer, COUNTED)
        trainer.channel_metrics.on_window.append(found.append)

    # Each step is a generation, and a window: TRL's value is a mean over generations.
    given = {"num_generations": 2, "max_completion_length": 6, "max_steps": 4, "logging_steps": 1}
    trainer = run(
        GRPOTrainer,
        GRPOConfig(**arguments(tmp_path, **given)),
        prompts(32),
        reward_funcs=Scores().functions()[1:],
        prepare=prepare,
    )
    whole = [e["reward"] for e in trainer.state.log_history if "loss" in e]
    assert len(whole) == 4
    for window, reward in zip(found, whole, strict=False):
        sums = [window.sums(name) for name in window.names]
        total, count = (sum(s[f"{part} reward"] for s in sums) for part in ("sum", "count"))
        assert total / count == pytest.approx(float(reward), rel=1e-5)


def test_training_is_the_same_with_and_without(tmp_path: Path) -> None:
    """Completions are sampled: a disturbed random state would give others."""
    runs = [grpo(tmp_path, prepare=prepare) for prepare in (None, attach)]
    assert not logs(runs[0]) and logs(runs[1])
    assert torch.equal(weights(runs[0]), weights(runs[1]))
    rewards = [[e["reward"] for e in r.state.log_history if "loss" in e] for r in runs]
    assert rewards[0] == rewards[1]


def test_reused_completions_count_once(tmp_path: Path) -> None:
    scores = Scores()
    trainer = grpo(
        tmp_path,
        scores=scores,
        prepare=lambda trainer: attach(trainer, COUNTED),
        num_iterations=2,
        logging_steps=4,
    )
    (entry,) = logs(trainer)
    assert sum(v for k, v in entry.items() if k.endswith("_samples")) == len(scores.given) == 16


def test_functions_of_one_name_are_one_series(tmp_path: Path) -> None:
    """As in TRL, whose mean of both is over all of their scores."""
    scores = Scores()
    first, _ = scores.functions()

    def more(completion_ids: list[list[int]], **kwargs: Any) -> Any:
        return [float(len(ids) + 3) for ids in completion_ids]

    more.__name__ = first.__name__
    config = GRPOConfig(
        **arguments(tmp_path, num_generations=2, max_completion_length=6, max_steps=2)
    )
    trainer = run(
        GRPOTrainer,
        config,
        prompts(32),
        reward_funcs=[first, more],
        prepare=lambda trainer: attach(trainer, COUNTED),
    )
    (entry,), (whole,) = logs(trainer), [e for e in trainer.state.log_history if "loss" in e]
    together = sum(
        entry[f"{name}_rewards/spread/mean"] * entry[f"{name}_share"]
        for name in CHANNELS
        if f"{name}_share" in entry
    )
    assert together == pytest.approx(float(whole["rewards/spread/mean"]), rel=1e-5)


def test_what_cannot_be_right_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="set remove_unused_columns=False"):
        grpo(tmp_path, prepare=attach, remove_unused_columns=True)

    class Other(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            output = super()._generate_and_score_completions(inputs)
            self._metrics["train"]["reward"][-1] += 1.0
            return output

    scores = Scores()
    config = GRPOConfig(**arguments(tmp_path, num_generations=2, max_completion_length=6))
    with pytest.raises(UnsupportedVersionError, match="adds up rewards in another way"):
        run(Other, config, prompts(32), reward_funcs=scores.functions(), prepare=attach)


def test_rewards_of_other_completions_are_refused() -> None:
    """Completions are matched to their prompts by order, and by their number."""
    trainer: Any = SimpleNamespace(
        accelerator=SimpleNamespace(num_processes=2, process_index=0), reward_func_names=["one"]
    )
    with pytest.raises(ChannelError, match="expected rewards of 2 x 3 completions by 1 functions"):
        GRPOChannelMetricsMixin._values(trainer, torch.zeros(5, 1), torch.zeros(5), 3)


def test_a_way_to_add_up_rewards_that_was_ruled_out_stays_so() -> None:
    """In the second batch, weighted and plain rewards differ, but have the same mean."""
    trainer: Any = SimpleNamespace(
        model=SimpleNamespace(training=True),
        reward_weights=torch.tensor([2.0, 0.0]),
        channel_scratch=SimpleNamespace(formulas=("weighted", "plain")),
        _metrics={"train": {"reward": []}},
    )
    for logged, rewards in ((3.0, [[1.0, 2.0]]), (1.0, [[1.0, 0.0], [0.0, 1.0]])):
        trainer._metrics["train"]["reward"].append(logged)
        found = GRPOChannelMetricsMixin._total_rewards(trainer, torch.tensor(rewards))
        assert found.tolist() == [sum(of_one) for of_one in rewards]
