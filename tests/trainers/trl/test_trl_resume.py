"""TRL's trainers: resumed, evaluated in part, alone in a crowd; and packs of two sets."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import trl_tools
from datasets import Dataset
from test_trl_grpo import OF_LETTER as OF_PROMPT
from test_trl_grpo import Scores, grpo, prompts
from test_trl_reward import Batches as RewardBatches
from test_trl_reward import reward_records
from test_trl_reward import train as reward
from trl_dpo_tools import Batches as DPOBatches
from trl_dpo_tools import dpo, pairs_of
from trl_sft_tools import MySFT, Seen, expected, sft
from trl_tools import CHANNELS, logs, pair_records, text_records, windows

from channel_metrics import MetricsConfig
from channel_metrics.trainers.hf import attach

# trl 1.16 reads a property that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated")

CHOSEN = ("bbu", "lvis")
CONFIG = MetricsConfig(metrics=("loss", "samples", "share", "samples_total"), eval_channels=CHOSEN)
# The window since step 0 is open at the checkpoint of step 2.
STEPS: dict[str, Any] = {
    "max_steps": 4,
    "gradient_accumulation_steps": 1,
    "logging_steps": 3,
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "learning_rate": 0.0,
}

# Of each training step, and of the evaluation: the channel of each sample, by its first letter.
Samples = tuple[list[list[str]], list[str]]
Run = Callable[..., tuple[Any, Samples]]


def _pairs(batches: Any) -> Samples:
    channels = {
        training: [[first_letter(pair) for pair in pairs_of([rows])] for rows in seen]
        for training, seen in batches.seen.items()
    }
    return channels[True], [name for of_batch in channels[False] for name in of_batch]


def first_letter(pair: Any) -> str:
    return OF_PROMPT[chr(pair[0][0])]


def dpo_run(folder: Path, **options: Any) -> tuple[Any, Samples]:
    batches, held_out = DPOBatches(), Dataset.from_list(pair_records(11, seed=3))
    trainer = dpo(folder, before=batches, eval_dataset=held_out, **options)
    return trainer, _pairs(batches)


def reward_run(folder: Path, **options: Any) -> tuple[Any, Samples]:
    batches, held_out = RewardBatches(), Dataset.from_list(reward_records(11, seed=3))
    trainer = reward(folder, before=batches, eval_dataset=held_out, **options)
    return trainer, _pairs(batches)


def grpo_run(folder: Path, **options: Any) -> tuple[Any, Samples]:
    scores, held_out = Scores(), Dataset.from_list(prompts(6, seed=4))
    trainer = grpo(folder, scores=scores, eval_dataset=held_out, **options)
    names = [name for name, _ in scores.given]
    # Twelve completions of six prompts were evaluated.
    return trainer, (windows(names[:-12], 4), names[-12:])


RUNS: dict[str, Run] = {"dpo": dpo_run, "reward": reward_run, "grpo": grpo_run}

OTHER_RANK = """
import sys
from datetime import timedelta
import torch.distributed as dist
dist.init_process_group(
    "gloo", init_method=f"file://{sys.argv[1]}", rank=1, world_size=2,
    timeout=timedelta(seconds=60),
)
sys.stdin.read()
"""


@contextmanager
def another_process(folder: Path) -> Iterator[Callable[[], None]]:
    """What it gives makes a process group of two; the other one takes part in no collective."""
    store = folder / "store"

    def join() -> None:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=0,
            world_size=2,
            timeout=timedelta(seconds=60),
        )

    with subprocess.Popen([sys.executable, "-c", OTHER_RANK, str(store)], stdin=-1) as other:
        try:
            yield join
        finally:
            assert other.stdin is not None
            other.stdin.close()
            if dist.is_initialized():
                dist.destroy_process_group()


def resuming(checkpoint: Path | None) -> Callable[[Any], None]:
    def prepare(trainer: Any) -> None:
        attach(trainer, CONFIG)
        if checkpoint is not None:
            original = trainer.train
            trainer.train = lambda: original(resume_from_checkpoint=str(checkpoint))

    return prepare


def totals(steps: list[list[str]]) -> Counter[str]:
    return Counter(name for of_step in steps for name in of_step)


def check_log(entry: dict[str, float], window: list[list[str]], so_far: list[list[str]]) -> None:
    """The samples of a window, and the totals of its channels."""
    here, all_of_run = totals(window), totals(so_far)
    want = {f"{name}_samples": float(count) for name, count in here.items()}
    want |= {f"{name}_samples_total": float(all_of_run[name]) for name in here}
    assert {k: v for k, v in entry.items() if "_samples" in k} == want


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any, Samples]]:
    """{trainer: run at once, run from its checkpoint, samples}.

    The second ones run in a process that has a process group, and yet trains by itself.
    """
    folder = tmp_path_factory.mktemp("runs")
    with another_process(folder) as join:
        whole = {n: run(folder / n, prepare=resuming(None), **STEPS) for n, run in RUNS.items()}
        join()
        found = {}
        for name, (first, samples) in whole.items():
            again = resuming(folder / name / "checkpoint-2")
            second, _ = RUNS[name](folder / f"{name} resumed", prepare=again, **STEPS)
            assert first.accelerator.num_processes == second.accelerator.num_processes == 1
            found[name] = (first, second, samples)
    return found


@pytest.mark.parametrize("name", RUNS)
def test_totals_go_on_and_evaluation_logs_what_was_chosen(runs: Any, name: str) -> None:
    first, second, (steps, evaluated) = runs[name]
    assert len(steps) == 4
    checkpoint = Path(first.args.output_dir) / "checkpoint-2" / "channel_metrics.json"
    in_file = json.loads(checkpoint.read_text())["channels"]
    assert {n: values["samples_total"] for n, values in in_file.items()} == totals(steps[:2])
    for trainer, start in ((first, 0), (second, 2)):
        at_3, at_4 = logs(trainer)
        check_log(at_3, steps[start:3], steps[:3])
        check_log(at_4, steps[3:], steps)
        (found,) = logs(trainer, "eval_")
        counts = Counter(evaluated)
        assert set(CHOSEN) < set(counts)
        assert {key.split("_")[1] for key in found} == set(CHOSEN)
        for channel in CHOSEN:
            assert found[f"eval_{channel}_samples"] == counts[channel]
            share = counts[channel] / len(evaluated)
            assert found[f"eval_{channel}_share"] == pytest.approx(share)


# ---- packing --------------------------------------------------------------------------------


def of_channels(names: tuple[str, ...], count: int, seed: int) -> list[trl_tools.Record]:
    assert set(names) < set(CHANNELS)
    return [r for r in text_records(count, seed) if r["channel"] in names]


def test_packs_of_sets_with_other_channels(tmp_path: Path) -> None:
    """The sets have other channels, which by name stand before, between and behind."""
    train = of_channels(("lvis", "rru"), 96, 0)
    sets = {"near": ("bbu", "rru", "lang_chat"), "far": ("rru", "bbu")}
    seen = Seen()
    trainer = sft(
        tmp_path,
        MySFT,
        train,
        packing=True,
        before=seen,
        learning_rate=0.0,
        eval_dataset={
            name: Dataset.from_list(of_channels(names, 40, 5)) for name, names in sets.items()
        },
        eval_strategy="steps",
        eval_steps=4,
    )
    found = logs(trainer)
    assert len(found) == 2
    for entry, window in zip(found, windows(seen.batches[True], 4), strict=True):
        assert entry == pytest.approx(expected(trainer.model, window), rel=2e-5)
    start = 0
    for name, channels in sets.items():
        (entry,) = logs(trainer, f"eval_{name}_")
        end = start - (-len(trainer.eval_dataset[name]) // 4)
        batches = seen.batches[False][start:end]
        want = expected(trainer.model, batches, f"eval_{name}_")
        assert entry == pytest.approx(want, rel=2e-5)
        assert {key.removeprefix(f"eval_{name}_") for key in want if key.endswith("_loss")} == {
            f"{channel}_loss" for channel in channels
        }
        start = end
    assert start == len(seen.batches[False])
