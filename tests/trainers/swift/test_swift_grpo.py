"""`swift rlhf` grpo on a CPU, without vLLM: rewards per channel, against the completions.

The oracle keeps what the reward functions were given and returned.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
from rank_cases import RanksOf, case
from swift_checks import check_training
from swift_rlhf_files import CHANNELS, given
from swift_tools import SWIFT, needs_swift, run

pytestmark = needs_swift
alone = case(SWIFT, ranks=1)
on_two = case(SWIFT, ranks=2)

GENERATIONS = 3
WEIGHTS = (1.0, 0.5)
Seen = list[tuple[str, float, float | None]]


def reward_functions(seen: Seen) -> list[str]:
    """Register two reward functions; the second one scores only some completions."""
    from swift.rewards import ORM, orms

    lengths: list[float] = []

    class Length(ORM):  # type: ignore[misc]  # ms-swift has no types
        def __call__(self, completions: list[str], **kwargs: Any) -> list[float]:
            lengths[:] = [len(text) / 10 for text in completions]
            return list(lengths)

    class Vowels(ORM):  # type: ignore[misc]  # ms-swift has no types
        def __call__(
            self, completions: list[str], messages: list[Any], **kwargs: Any
        ) -> list[float | None]:
            # A prompt begins with the name of its channel.
            asked = [next(m for m in said if m["role"] == "user") for said in messages]
            channels = [message["content"].split()[0] for message in asked]
            found = [float(sum(char in "aeiou" for char in text)) for text in completions]
            scores = [None if n == "rru" else v for n, v in zip(channels, found, strict=True)]
            seen.extend(zip(channels, lengths, scores, strict=True))
            return scores

    orms.update(length=Length, vowels=Vowels)
    return ["length", "vowels"]


def grpo_given(folder: Path, **overrides: Any) -> dict[str, Any]:
    options = {
        "reward_weights": list(WEIGHTS),
        "num_generations": GENERATIONS,
        "max_completion_length": 12,
        "per_device_train_batch_size": GENERATIONS,
        "per_device_eval_batch_size": GENERATIONS,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "log_completions": False,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_on_start": False,
    }
    return given(folder, "grpo", **options | overrides)


def both(folder: Path, **overrides: Any) -> Any:
    found: dict[str, Any] = {}
    for who, metrics in (("off", False), ("on", True)):
        seen: Seen = []
        options = grpo_given(folder, reward_funcs=reward_functions(seen), **overrides)
        found[who] = run(options) if metrics else run(options, None)
        trainer = found[who].pop("trainer")
        found[who]["names"] = list(trainer.reward_func_names)
        found[who]["seen"] = seen
    return found


@alone
def grpo(folder: Path) -> Any:
    return both(folder)


@alone
def grpo_with_kl(folder: Path) -> Any:
    """The reward that ms-swift logs has the KL in it."""
    return both(folder, kl_in_reward=True, beta=0.5, eval_strategy="no")


@on_two
def grpo_on_two(folder: Path) -> Any:
    return both(folder, ddp_backend="gloo", eval_strategy="no")


def expected(seen: Seen, names: list[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in {name for name, *_ in seen}:
        mine = [(one, two) for channel, one, two in seen if channel == name]
        found[f"{name}_samples"] = len(mine)
        for at, function in enumerate(names):
            scores = [score for of_both in mine if (score := of_both[at]) is not None]
            if scores:
                found[f"{name}_rewards/{function}/mean"] = statistics.fmean(scores)
            if len(scores) > 1:
                found[f"{name}_rewards/{function}/std"] = statistics.stdev(scores)
        totals = [a * WEIGHTS[0] + (b or 0.0) * WEIGHTS[1] for a, b in mine]
        found[f"{name}_reward"] = statistics.fmean(totals)
        found[f"{name}_reward_std"] = statistics.stdev(totals)
    return found


def ours(entry: dict[str, float], prefix: str = "") -> dict[str, float]:
    names = tuple(f"{prefix}{name}_" for name in CHANNELS)
    return {
        key.removeprefix(prefix): value
        for key, value in entry.items()
        if key.startswith(names) and not key.endswith("_share")
    }


def test_rewards(ranks_of: RanksOf) -> None:
    """Two windows of training and then an evaluation, in the order of the reward functions."""
    (found,) = ranks_of(grpo)
    check_training(found["off"], found["on"])
    seen, names = found["on"]["seen"], found["on"]["names"]
    windows = [entry for entry in found["on"]["log"] if "loss" in entry]
    (evaluated,) = [entry for entry in found["on"]["log"] if "eval_loss" in entry]
    size = 2 * GENERATIONS
    assert len(windows) == 2
    for number, entry in enumerate(windows):
        of_window = seen[number * size : (number + 1) * size]
        assert ours(entry) == pytest.approx(expected(of_window, names), rel=1e-6, abs=1e-7)
    of_evaluation = expected(seen[2 * size :], names)
    assert ours(evaluated, "eval_") == pytest.approx(of_evaluation, rel=1e-6, abs=1e-7)


def test_with_kl_in_the_reward(ranks_of: RanksOf) -> None:
    """The rewards of the channels, weighted by their samples, are the one that ms-swift logs."""
    (found,) = ranks_of(grpo_with_kl)
    check_training(found["off"], found["on"])
    for entry in found["on"]["log"]:
        if "loss" in entry:
            rewards = {n: entry[f"{n}_reward"] for n in CHANNELS if f"{n}_reward" in entry}
            total = sum(entry[f"{n}_share"] * reward for n, reward in rewards.items())
            assert total == pytest.approx(entry["reward"], rel=1e-5)
    last = [entry for entry in found["on"]["log"] if "loss" in entry][-1]
    plain = expected(found["on"]["seen"][-2 * GENERATIONS :], found["on"]["names"])
    assert any(abs(last[k] - plain[k]) > 1e-4 for k in plain if k.endswith("_reward"))


def test_two_ranks(ranks_of: RanksOf) -> None:
    both = ranks_of(grpo_on_two)
    size = 2 * GENERATIONS
    for found in both:
        check_training(found["off"], found["on"])
        windows = [entry for entry in found["on"]["log"] if "loss" in entry]
        for number, entry in enumerate(windows):
            seen = [one for rank in both for one in rank["on"]["seen"][number * size :][:size]]
            of_window = expected(seen, found["on"]["names"])
            assert ours(entry) == pytest.approx(of_window, rel=1e-6, abs=1e-7)
