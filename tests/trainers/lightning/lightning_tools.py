"""A LightningModule around a tiny transformers model, and a run of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from hf_tools import PaddingCollator, Record, tiny_model
from torch.utils.data import DataLoader

from channel_metrics import MetricsConfig, Window
from channel_metrics.trainers.lightning import ChannelMetricsCallback

__all__ = ["Module", "OPTIONS", "loader"]


class Module(L.LightningModule):
    """Trains the model as it is used most: `self.model(**batch).loss`."""

    def __init__(self, model: Any = None, learning_rate: float = 0.0) -> None:
        super().__init__()
        self.model = tiny_model() if model is None else model
        self.learning_rate = learning_rate

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.model(**batch).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.log("val_loss", self.model(**batch).loss, sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.log("test_loss", self.model(**batch).loss, sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def loader(records: Sequence[Record], collate: Any = None, **options: Any) -> DataLoader[Any]:
    """Batches of 4, in order."""
    given: dict[str, Any] = {"batch_size": 4, "collate_fn": collate or PaddingCollator()}
    return DataLoader(list(records), **(given | options))  # type: ignore[arg-type]


OPTIONS: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": 1,
    "log_every_n_steps": 2,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}
