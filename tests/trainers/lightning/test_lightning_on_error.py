"""`on_error` in Lightning: an error in the metrics ends the run, or leaves it as it would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faults
import pytest
import torch
from hf_tools import PaddingCollator, make_records, tiny_model
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_tools import Module, Run, loader, quiet, run, weights

from channel_metrics import MetricsConfig

pytestmark = quiet

RECORDS, HELD_OUT = make_records(24), make_records(6, seed=1)

FAULTS = ("start", "collate", "see the model's loss", "record a micro-batch", "log")


def trained(folder: Path, on_error: Any = None, records: Any = RECORDS, **options: Any) -> Run:
    return run(
        records,
        held_out=[HELD_OUT],
        module=Module(tiny_model(), 1e-2),
        on=on_error != "off",
        config=MetricsConfig(on_error=None if on_error == "off" else on_error),
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=2)],
        enable_checkpointing=True,
        **options,
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return trained(tmp_path_factory.mktemp("plain"), "off")


@pytest.mark.parametrize("place", FAULTS)
def test_warn_leaves_the_training_as_it_was(
    place: str, tmp_path: Path, plain: Run, caplog: pytest.LogCaptureFixture
) -> None:
    with faults.inject(place):
        found = trained(tmp_path, "warn")
    assert torch.equal(weights(found.module), weights(plain.module))
    assert found.module.losses == plain.module.losses
    assert not found.windows
    said = [r.getMessage() for r in caplog.records if r.name == "channel_metrics"]
    assert len(said) == 1 and "training goes on: ZeroDivisionError: a fault of ours" in said[0]


@pytest.mark.parametrize("place", FAULTS)
def test_raise_ends_the_run(place: str, tmp_path: Path) -> None:
    with faults.inject(place), pytest.raises(ZeroDivisionError, match="a fault of ours"):
        trained(tmp_path, "raise")


def test_by_default_an_error_after_the_first_window_ends_the_metrics_only(
    tmp_path: Path, plain: Run, caplog: pytest.LogCaptureFixture
) -> None:
    with faults.inject("record a micro-batch", lambda call, *_: call == 4):
        found = trained(tmp_path)
    assert torch.equal(weights(found.module), weights(plain.module))
    assert [(window.split, window.step) for window in found.windows] == [("train", 2)]
    assert any("training goes on" in record.getMessage() for record in caplog.records)
    # A checkpoint of metrics that have ended holds no totals.
    (path,) = tmp_path.glob("*.ckpt")
    assert "ChannelMetricsCallback" not in torch.load(path, weights_only=True)["callbacks"]
    # A second fit of the same trainer runs without them.
    assert found.callback is not None
    again = loader(RECORDS, found.callback.collator(PaddingCollator()))
    found.trainer.fit_loop.max_epochs = 2
    found.trainer.fit(found.module, again)
    assert found.trainer.global_step == 12 and len(found.windows) == 1


def test_a_fault_in_a_worker_reaches_the_main_process(tmp_path: Path, plain: Run) -> None:
    """The channels of the records are lists that fit no batch."""
    records = [{**record, "channel": ["bbu", "rru"]} for record in RECORDS]
    found = trained(tmp_path, "warn", records, workers=1)
    assert torch.equal(weights(found.module), weights(plain.module))
    assert not found.windows
    with pytest.raises(ValueError, match="channels"):
        trained(tmp_path, "raise", records, workers=1)
