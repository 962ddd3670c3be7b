"""A `MixedStream` in transformers' Trainer: weights are logged and followed, on 1 and 2 ranks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hf_case_tools import NO_DISPATCH, ddp, fixed_records, told
from hf_case_tools import run as run_ranks
from hf_tools import PaddingCollator, make_records, tiny_model, train
from rank_cases import Case, RanksOf

from channel_metrics import ChannelMetricsError, MetricsConfig, MixedStream
from channel_metrics.trainers.hf import attach

NAMES = ("bbu", "rru")
SAMPLER: dict[str, Any] = {"start": {"bbu": 1, "rru": 1}, "rule": "test_hf_sampler:by_step"}
CONFIG = MetricsConfig(channels=NAMES, metrics=("loss", "samples"), sampler=SAMPLER)
ROWS = 4


def by_step(window: Any, weights: dict[str, float]) -> dict[str, float]:
    """Far from the weights at first, and another one after each window."""
    return {"bbu": 1.0, "rru": 4.0 + window.step + weights["rru"]}


def sources(make: Any = make_records) -> dict[str, Any]:
    return {name: make(20, seed=i, channels=(name,)) for i, name in enumerate(NAMES)}


def run(folder: Path, workers: int = 0, resume: Path | None = None, **arguments: Any) -> Any:
    """Eight steps with a window per step, on this process. Its collator remembers the records."""
    # One batch more than the workers are ahead.
    stream = MixedStream(sources(), batch_size=ROWS, lag=arguments.pop("lag", (2 * 2 + 1) * ROWS))
    collator = PaddingCollator()

    def prepare(trainer: Any) -> None:
        attach(trainer, CONFIG)
        stream.follow(trainer.channel_metrics)
        if resume is not None:
            trainer.train = partial(trainer.train, resume_from_checkpoint=str(resume))

    given: dict[str, Any] = {
        "max_steps": 8,
        "logging_steps": 1,
        "dataloader_num_workers": workers,
        "model": tiny_model(attention_dropout=0.0),
        "trainer_arguments": {"data_collator": collator},
    }
    return train(folder, prepare=prepare, records=stream, **(given | arguments))


def values(trainer: Any) -> list[dict[str, float]]:
    """What the windows logged of the mixture."""
    ends = ("_weight", "_samples", "_loss")
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [
        {k: v for k, v in entry.items() if k.startswith(NAMES) and k.endswith(ends)}
        for entry in logs
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder, save_strategy="steps", save_steps=5)


def test_weights_are_logged_and_followed(whole: Any) -> None:
    _, trainer = whole
    found = values(trainer)
    weights = [log["rru_weight"] for log in found]
    assert weights[:6] == [0.5] * 6, "the change after step 1 holds from its lag on"
    assert weights[6] == pytest.approx(5.5 / 6.5)
    assert weights[7] > weights[6]
    counted = {name: sum(log.get(f"{name}_samples", 0) for log in found) for name in NAMES}
    assert sum(counted.values()) == 8 * ROWS
    assert trainer.channel_metrics.sampler._counts() == counted


def test_workers_change_nothing(tmp_path: Path, whole: Any) -> None:
    assert values(run(tmp_path, workers=2)) == values(whole[1])


def test_accumulated_steps_need_no_more_lag(tmp_path: Path) -> None:
    trainer = run(tmp_path, lag=ROWS, gradient_accumulation_steps=2)
    # It holds from the middle of the second step on, which is that of the logged weight.
    weights = [log["rru_weight"] for log in values(trainer)]
    assert weights[:2] == pytest.approx([0.5, 5.5 / 6.5])
    with pytest.raises(ChannelMetricsError, match=f"its lag is {ROWS - 1}; make it at least 4"):
        run(tmp_path, lag=ROWS - 1, gradient_accumulation_steps=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_goes_on_with_the_draw(tmp_path: Path, whole: Any, workers: int) -> None:
    folder, trainer = whole
    checkpoint = folder / "checkpoint-5"
    resumed = run(tmp_path, workers, checkpoint, ignore_data_skip=True)
    assert values(resumed)[-3:] == values(trainer)[-3:]


def test_batches_that_the_trainer_skips_are_an_error(tmp_path: Path, whole: Any) -> None:
    with pytest.raises(ChannelMetricsError, match="ignore_data_skip=True"):
        run(tmp_path, resume=whole[0] / "checkpoint-5")


def on_ranks(folder: Path, workers: int, *, dispatch: bool) -> Any:
    stream = MixedStream(
        sources(fixed_records),
        batch_size=ROWS if dispatch else 2 * ROWS,
        lag=(2 * 2 + 1) * 2 * ROWS,
    )

    def follow(trainer: Any) -> None:
        stream.follow(trainer.channel_metrics)

    trainer = run_ranks(
        folder,
        config=CONFIG,
        prepare=follow,
        records=stream,
        max_steps=8,
        logging_steps=1,
        dataloader_num_workers=workers,
        accelerator_config={} if dispatch else NO_DISPATCH,
    )
    return told(trainer, values=values(trainer))


@ddp
def dispatched(folder: Path) -> Any:
    return on_ranks(folder, 0, dispatch=True)


@ddp
def dispatched_by_workers(folder: Path) -> Any:
    return on_ranks(folder, 2, dispatch=True)


@ddp
def read_by_all(folder: Path) -> Any:
    return on_ranks(folder, 0, dispatch=False)


@ddp
def read_by_all_workers(folder: Path) -> Any:
    return on_ranks(folder, 2, dispatch=False)


CASES = (dispatched, dispatched_by_workers, read_by_all, read_by_all_workers)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_together_follow_the_weights(ranks_of: RanksOf, case: Case) -> None:
    """The windows are those of one rank with twice the batch."""
    first, second = ranks_of(case)
    assert first["values"] == second["values"] and not first["warned"]
    assert first["values"] == ranks_of(dispatched)[0]["values"]
    weights = [log["rru_weight"] for log in first["values"]]
    assert weights[5] == 0.5 < weights[6] < weights[7]
    # The samples are those that the stream gives in this order.
    stream = MixedStream(sources(fixed_records), batch_size=2 * ROWS)
    entries = [(0, [0.5, 0.5])]
    for step, log in enumerate(first["values"][6:], start=6):
        entries.append((step * 2 * ROWS, [log["bbu_weight"], log["rru_weight"]]))
    stream.plan.begin(entries, 0, [0, 0])
    drawn = iter(stream)
    for log in first["values"]:
        names = [next(drawn)["channel"] for _ in range(2 * ROWS)]
        assert {n: names.count(n) for n in NAMES} == {n: log.get(f"{n}_samples", 0) for n in NAMES}
