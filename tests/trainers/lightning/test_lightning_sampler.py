"""A `MixedStream` in a Lightning Trainer, on one rank and two, with workers and a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
from hf_case_tools import ddp
from hf_tools import PaddingCollator
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning_tools import OPTIONS, Module, quiet
from rank_cases import Case, RanksOf
from sampler_tools import CONFIG, check_draws, sources, values
from torch.utils.data import DataLoader

from channel_metrics import ChannelMetricsError, MixedStream
from channel_metrics.trainers.lightning import ChannelMetricsCallback

pytestmark = quiet
ROWS = 4
# Two workers are two batches ahead each, and Lightning one.
LAG = (2 * 2 + 1) * ROWS


class Data(L.LightningDataModule):
    """Made where the rank is known."""

    def __init__(self, callback: ChannelMetricsCallback, workers: int, lag: int) -> None:
        super().__init__()
        self.callback, self.workers, self.lag = callback, workers, lag

    def train_dataloader(self) -> Any:
        trainer: Any = self.trainer
        ranks = {"rank": trainer.global_rank, "ranks": trainer.world_size}
        stream = MixedStream(sources(), batch_size=ROWS, lag=self.lag, **ranks)
        stream.follow(self.callback.metrics)
        collate: Any = self.callback.collator(PaddingCollator())
        return DataLoader(stream, ROWS, num_workers=self.workers, collate_fn=collate)


def fit(workers: int = 0, lag: int = LAG, resume: Any = None, **options: Any) -> Any:
    """Eight steps with a window per step."""
    logs: list[dict[str, float]] = []
    callback = ChannelMetricsCallback(CONFIG, on_window=[lambda w: logs.append(dict(w.logs))])
    callbacks = [callback, *options.pop("callbacks", ())]
    given: dict[str, Any] = {"max_steps": 8, "log_every_n_steps": 1, "max_epochs": None}
    trainer = L.Trainer(callbacks=callbacks, **(OPTIONS | {"logger": False} | given | options))
    trainer.fit(Module(), Data(callback, workers, lag), ckpt_path=resume, weights_only=True)
    return values(logs)


@pytest.mark.parametrize("workers", [0, 2])
def test_one_rank_with_a_resume(tmp_path: Path, workers: int) -> None:
    saving = ModelCheckpoint(
        tmp_path, filename="{step}", every_n_train_steps=5, save_on_train_epoch_end=False
    )
    whole = fit(workers, callbacks=[saving], enable_checkpointing=True)
    check_draws(whole, ROWS, LAG)
    assert fit(workers, resume=tmp_path / "step=5.ckpt") == whole[5:]


def test_lightning_is_one_batch_ahead() -> None:
    check_draws(fit(lag=ROWS), ROWS, ROWS)
    with pytest.raises(ChannelMetricsError, match="its lag is 3; make it at least 4"):
        fit(lag=ROWS - 1)


def on_ranks(workers: int) -> Any:
    strategy = DDPStrategy(process_group_backend="gloo")
    return fit(workers, 2 * LAG, strategy=strategy, devices=2)


@ddp
def without_workers(folder: Path) -> Any:
    return on_ranks(0)


@ddp
def with_workers(folder: Path) -> Any:
    return on_ranks(2)


@pytest.mark.parametrize("of", [without_workers, with_workers])
def test_two_ranks(ranks_of: RanksOf, of: Case) -> None:
    first, second = ranks_of(of)
    assert first == second
    check_draws(first, 2 * ROWS, 2 * LAG)
