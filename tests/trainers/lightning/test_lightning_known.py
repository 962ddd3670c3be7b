"""What can be known before the first batch is used: class names, and keys that cannot come."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from datasets import ClassLabel, Dataset
from hf_tools import PaddingCollator, make_records
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_tools import OPTIONS, Module, loader, quiet, run
from torch.utils.data import DataLoader, Subset

from channel_metrics import (
    ChannelError,
    ConfigError,
    MetricsConfig,
    UnsupportedVersionError,
    Window,
)
from channel_metrics.trainers.lightning import ChannelMetricsCallback

pytestmark = quiet

RECORDS = make_records(16)
HELD_OUT = make_records(10, seed=1)
NAMES = sorted({record["channel"] for record in RECORDS})


def numbered(names: list[str]) -> Any:
    return Dataset.from_list(RECORDS).cast_column("channel", ClassLabel(names=names))


def channels_of_run(make: Any) -> list[str]:
    """Train on the loaders that `make` gives, as those of a data module."""

    class Data(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return make(callback.collator(PaddingCollator()))

    callback, windows = ChannelMetricsCallback(), list[Window]()
    callback.metrics.on_window.append(windows.append)
    trainer = L.Trainer(callbacks=[callback], **(OPTIONS | {"logger": False}))
    trainer.fit(Module(), datamodule=Data())
    return sorted({name for window in windows for name in window.values})


@pytest.mark.parametrize("workers", [0, 1])
def test_class_numbers_are_logged_by_name(workers: int) -> None:
    def whole(collate: Any) -> Any:
        return DataLoader(numbered(NAMES), batch_size=4, collate_fn=collate, num_workers=workers)

    assert channels_of_run(whole) == NAMES


def test_class_numbers_in_a_part_of_a_data_set() -> None:
    def part(collate: Any) -> Any:
        return DataLoader(Subset(numbered(NAMES), range(12)), batch_size=4, collate_fn=collate)

    assert channels_of_run(part) == sorted({record["channel"] for record in RECORDS[:12]})


def test_one_collator_for_two_orders_of_classes_is_refused() -> None:
    callback = ChannelMetricsCallback()
    collate = callback.collator(PaddingCollator())
    sets = [DataLoader(numbered(n), batch_size=4, collate_fn=collate) for n in (NAMES, NAMES[::-1])]
    trainer = L.Trainer(callbacks=[callback], **(OPTIONS | {"logger": False}))
    with pytest.raises(ChannelError, match="number the classes of 'channel' in different ways"):
        trainer.fit(Module(), sets[0], sets[1])


def test_a_release_without_a_name_that_is_used_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.loops.fit_loop import _FitLoop

    monkeypatch.delattr(_FitLoop, "_should_accumulate")
    with pytest.raises(UnsupportedVersionError) as error:
        run(RECORDS)
    said = f"lightning {version('lightning')} has a Trainer without fit_loop._should_accumulate"
    assert str(error.value) == f"{said}; use lightning 2.6, or remove ChannelMetricsCallback."


def test_an_entry_of_eval_channels_that_is_no_channel() -> None:
    with pytest.raises(ConfigError, match="'bbbu', which is no channel; did you mean 'bbu'"):
        run(RECORDS, held_out=[HELD_OUT], config=MetricsConfig(eval_channels=("bbbu",)))


@pytest.mark.parametrize("sanity", [0, 2])
def test_a_channel_with_the_key_of_an_evaluation(sanity: int) -> None:
    config = MetricsConfig(channels=(*NAMES, "val_bbu"))
    with pytest.raises(ChannelError, match="would both be logged as 'val_bbu_loss'"):
        run(RECORDS, held_out=[HELD_OUT], config=config, num_sanity_val_steps=sanity)
    # Without an evaluation, there is no such key.
    run(RECORDS[:8], config=config)


def monitors(key: str, folder: Path, config: MetricsConfig, **options: Any) -> None:
    watching = ModelCheckpoint(folder, monitor=key)
    run(
        RECORDS[:8],
        held_out=[HELD_OUT],
        config=config,
        callbacks=[watching],
        enable_checkpointing=True,
        **options,
    )


def test_a_monitor_that_no_evaluation_logs_is_named_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Stops(Module):
        def training_step(self, *args: Any) -> Any:
            raise RuntimeError("the first step")

    chosen = MetricsConfig(eval_channels=("bbu",), metrics=("loss", "tokens_total"))
    for key, why in {
        "val_rru_loss": "eval_channels leaves out 'rru'",
        "val_bbu_token_acc": "an evaluation logs only loss",
        "rru_ppl": "the training logs only loss, nonfinite, tokens_total",
    }.items():
        caplog.clear()
        with pytest.raises(RuntimeError, match="the first step"):
            monitors(key, tmp_path, chosen, module=Stops())
        said = [r.getMessage() for r in caplog.records if r.name == "channel_metrics"]
        assert [f"`monitor` of ModelCheckpoint is '{key}', but {why}" in one for one in said] == [
            True
        ]
    caplog.clear()
    for key in ("val_bbu_loss", "rru_loss", "bbu_tokens_total", "anything"):
        with pytest.raises(RuntimeError, match="the first step"):
            monitors(key, tmp_path, chosen, module=Stops())
    assert not [r for r in caplog.records if "monitor" in r.getMessage()]


@pytest.mark.filterwarnings("ignore:ReduceLROnPlateau conditioned on metric:RuntimeWarning")
def test_the_monitor_of_a_scheduler_is_looked_at(caplog: pytest.LogCaptureFixture) -> None:
    class Scheduled(Module):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.0)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            plan = {"scheduler": scheduler, "monitor": "val_rru_loss", "strict": False}
            return {"optimizer": optimizer, "lr_scheduler": plan}

    chosen = MetricsConfig(eval_channels=("bbu",))
    run(RECORDS[:8], held_out=[HELD_OUT], config=chosen, module=Scheduled())
    said = [r.getMessage() for r in caplog.records]
    assert sum("`monitor` of ReduceLROnPlateau is 'val_rru_loss'" in one for one in said) == 1


def test_data_that_cannot_be_scanned_is_let_be() -> None:
    class Lazy(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> Any:
            return RECORDS[index]

    callback = ChannelMetricsCallback(MetricsConfig(eval_channels=("bbbu",)))
    collate = callback.collator(PaddingCollator())
    trainer = L.Trainer(callbacks=[callback], **(OPTIONS | {"logger": False}))
    trainer.fit(
        Module(), DataLoader(Lazy(), batch_size=4, collate_fn=collate), loader(HELD_OUT, collate)
    )
    assert any("'bbbu', which is no channel" in said for said in callback.metrics.warned)
