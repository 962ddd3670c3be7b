"""The totals of a run go on from a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_tools import make_records
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_tools import Run, quiet, run

from channel_metrics import ChannelMetricsError, MetricsConfig

pytestmark = quiet

RECORDS = make_records(24)
HELD_OUT = make_records(6, seed=1)
TOTALS = MetricsConfig(metrics=("loss", "tokens", "tokens_total", "samples_total"))


def tokens(records: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for record in records:
        supervised = sum(label != -100 for label in record["labels"][1:])
        found[record["channel"]] = found.get(record["channel"], 0) + supervised
    return found


def totals(found: Run) -> dict[str, int]:
    assert found.callback is not None
    of_run = found.callback.metrics.totals
    return {name: of_run.of(name)["tokens_total"] for name in tokens(RECORDS)}


def saving(folder: Path, **when: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **when)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints after each step, and others at the end of each epoch of six steps."""
    folder = tmp_path_factory.mktemp("checkpoints")
    found = run(
        RECORDS,
        held_out=[HELD_OUT],
        config=TOTALS,
        max_epochs=2,
        log_every_n_steps=4,
        enable_checkpointing=True,
        callbacks=[
            saving(folder / "steps", every_n_train_steps=1, save_on_train_epoch_end=False),
            saving(folder / "epochs", every_n_epochs=1),
        ],
    )
    assert totals(found) == {name: 2 * count for name, count in tokens(RECORDS).items()}
    return folder


@pytest.mark.parametrize("step", [3, 4, 6])
def test_a_checkpoint_holds_all_that_was_trained_on(folder: Path, step: int) -> None:
    """In mid-window, at a log point, and at the end of an epoch, which is in mid-window too."""
    name = "epochs" if step == 6 else "steps"
    path = folder / name / f"step={step}.ckpt"
    stored = torch.load(path, weights_only=True)["callbacks"]["ChannelMetricsCallback"]
    channels = stored["totals"]["channels"]
    assert {name: of["tokens_total"] for name, of in channels.items()} == tokens(
        RECORDS[: 4 * step]
    )

    resumed = run(RECORDS, config=TOTALS, max_epochs=2, log_every_n_steps=4, ckpt_path=path)
    assert resumed.trainer.global_step == 12
    # After a checkpoint inside an epoch, Lightning starts with the first records again.
    rest = [*RECORDS[: 4 * (6 - step)], *RECORDS]
    wanted = [tokens(part) for part in (RECORDS[: 4 * step], rest)]
    assert totals(resumed) == {n: sum(part.get(n, 0) for part in wanted) for n in tokens(RECORDS)}
    # Windows show what was trained since the resume.
    assert sum(
        v for w in resumed.windows for k, v in w.logs.items() if k.endswith("_tokens")
    ) == sum(tokens(rest).values())


def test_a_checkpoint_without_metrics_starts_at_zero_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(
        RECORDS,
        on=False,
        enable_checkpointing=True,
        callbacks=[saving(tmp_path, every_n_train_steps=6)],
    )
    resumed = run(RECORDS, config=TOTALS, max_epochs=2, ckpt_path=tmp_path / "step=6.ckpt")
    assert totals(resumed) == tokens(RECORDS)
    said = [r.getMessage() for r in caplog.records if r.name == "channel_metrics"]
    assert len(said) == 1 and "tokens_total and samples_total count from here" in said[0]


@pytest.mark.parametrize(
    "damaged",
    [
        {"totals": {"version": 99, "channels": {}}},
        {"totals": {"version": 1, "channels": {"bbu": {"tokens_total": -1}}}},
        {"totals": {"version": 1, "channels": {"bbu": {"tokens_total": float("nan")}}}},
        {"totals": None},
        {"other": 1},
        ["totals"],
        "totals",
    ],
    ids=str,
)
def test_a_damaged_state_is_named(folder: Path, tmp_path: Path, caplog: Any, damaged: Any) -> None:
    checkpoint = torch.load(folder / "steps" / "step=4.ckpt", weights_only=True)
    checkpoint["callbacks"]["ChannelMetricsCallback"] = damaged
    path = tmp_path / "damaged.ckpt"
    torch.save(checkpoint, path)
    with pytest.raises(ChannelMetricsError, match=r"damaged\.ckpt cannot be read: .*on_error="):
        run(RECORDS, config=TOTALS, max_epochs=2, ckpt_path=path)
    warning = replace(TOTALS, on_error="warn")
    warned = run(RECORDS, config=warning, max_epochs=2, ckpt_path=path)
    assert sum("start at zero" in record.getMessage() for record in caplog.records) == 1
    assert totals(warned) == tokens([*RECORDS[:8], *RECORDS])


def test_testing_a_checkpoint_leaves_the_totals(folder: Path) -> None:
    from hf_tools import PaddingCollator
    from lightning_tools import loader

    found = run(RECORDS[:8], config=TOTALS)
    assert found.callback is not None
    before = totals(found)
    collate = found.callback.collator(PaddingCollator())
    found.trainer.test(
        found.module,
        loader(HELD_OUT, collate),
        ckpt_path=folder / "steps" / "step=4.ckpt",
        verbose=False,
        weights_only=True,
    )
    assert totals(found) == before and found.logs("test")


def test_a_callback_in_a_new_trainer_starts_anew() -> None:
    first = run(RECORDS[:8], config=TOTALS)
    second = run(RECORDS[:8], callback=first.callback)
    assert totals(second) == {name: tokens(RECORDS[:8]).get(name, 0) for name in tokens(RECORDS)}
