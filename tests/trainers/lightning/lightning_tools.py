"""A LightningModule around a tiny transformers model, a run of it, and what the run should log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import lightning.pytorch as L
import pytest
import torch
from hf_tools import PaddingCollator, Record, expected_metrics, tiny_model, token_table
from lightning.pytorch.loggers.logger import Logger
from torch import distributed as dist
from torch.utils.data import DataLoader, DistributedSampler

from channel_metrics import MetricsConfig, Window
from channel_metrics.trainers.lightning import ChannelMetricsCallback

__all__ = [
    "Kept",
    "Module",
    "Run",
    "check",
    "flattened",
    "loader",
    "quiet",
    "run",
    "still_model",
    "weights",
]

# What Lightning says of small runs on a CPU, and of its own imports.
_SAYS = (
    "ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning",
    "ignore:.*does not have many workers:UserWarning",
    "ignore:.*is smaller than the logging interval:UserWarning",
    "ignore:Checkpoint directory .* exists and is not empty:UserWarning",
    "ignore:.*your dataloader is not resumable:UserWarning",
    "ignore:The dirpath has changed from:UserWarning",
    "ignore:You defined a .validation_step. but have no:UserWarning",
    "ignore:.training_step. returned .None.:UserWarning",
    "ignore:Be aware that when using .ckpt_path:UserWarning",
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning",
    "ignore:.*no logger configured:UserWarning",
    "ignore:Found .* module.s. in eval mode at the start of training:UserWarning",
    "ignore:.*It is recommended to use a single device.*:UserWarning",
    "ignore:Using .DistributedSampler. with the dataloaders:UserWarning",
    "ignore:.*You have overridden .on_.*:UserWarning",
)
quiet = [pytest.mark.filterwarnings(said) for said in _SAYS]

OPTIONS: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": 1,
    "log_every_n_steps": 2,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


class Module(L.LightningModule):
    """Trains the model as it is used most: `self.model(**batch).loss`."""

    def __init__(self, model: Any = None, learning_rate: float = 0.0) -> None:
        super().__init__()
        self.model = still_model() if model is None else model
        self.learning_rate = learning_rate
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.log("val_loss", self.model(**batch).loss, sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.log("test_loss", self.model(**batch).loss, sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


class Kept(Logger):
    """A logger that keeps what it is given: (step, values)."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[int, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "kept"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.entries.append((step, dict(metrics)))


@dataclass
class Run:
    """A run, and what came of it."""

    trainer: L.Trainer
    module: Any
    callback: ChannelMetricsCallback | None
    windows: list[Window]
    entries: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    def logs(self, split: str) -> list[dict[str, float]]:
        """What the windows of a split were logged as."""
        return [window.logs for window in self.windows if window.split == split]


def still_model(**overrides: Any) -> Any:
    """The tiny model without dropout: what it computes can be computed again."""
    return tiny_model(attention_dropout=0.0, **overrides)


def flattened(records: list[Record]) -> dict[str, torch.Tensor]:
    """A collator that packs all records into one row."""
    ids = [i for record in records for i in record["input_ids"]]
    labels = [i for r in records for i in (-100, *r["labels"][1:])]
    positions = [p for r in records for p in range(len(r["input_ids"]))]
    keys = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return {key: torch.tensor([values]) for key, values in keys.items()}


def loader(records: Sequence[Record], collate: Any = None, **options: Any) -> Any:
    """Batches of 4, in order."""
    given: dict[str, Any] = {"batch_size": 4, "collate_fn": collate or PaddingCollator()}
    dataset: Any = list(records)
    return DataLoader(dataset, **(given | options))


def run(
    records: Sequence[Record],
    *,
    held_out: Sequence[Sequence[Record]] = (),
    config: MetricsConfig | None = None,
    on: bool = True,
    module: Any = None,
    callback: ChannelMetricsCallback | None = None,
    callbacks: Sequence[Any] = (),
    collate: Any = None,
    workers: int = 0,
    in_order: bool = True,
    ckpt_path: Any = None,
    **options: Any,
) -> Run:
    """Train on `records`, with a validation set for each entry of `held_out`.

    in_order: whether several ranks take the records in turn. Lightning's own sampler shuffles them.
    """
    windows: list[Window] = []
    if on:
        callback = callback or ChannelMetricsCallback(config)
        callback.metrics.on_window.append(windows.append)
    torch.manual_seed(0)
    logger = Kept()
    trainer = L.Trainer(
        callbacks=[*([callback] if callback else []), *callbacks],
        **(OPTIONS | {"logger": logger} | options),
    )
    module = Module() if module is None else module
    base = collate or PaddingCollator()
    collate = callback.collator(base) if callback else base
    ordered, dataset = dist.is_initialized() and in_order, cast("Any", records)
    sampler: Any = DistributedSampler(dataset, shuffle=False) if ordered else None
    sets = [loader(records, collate, num_workers=workers, sampler=sampler)]
    sets += [loader(one, collate) for one in held_out]
    trainer.fit(module, sets[0], sets[1:] or None, ckpt_path=ckpt_path, weights_only=True)
    return Run(trainer, module, callback, windows, logger.entries)


def check(
    found: dict[str, float],
    records: Sequence[Record],
    prefix: str = "",
    rel: float = 1e-5,
) -> None:
    """The default metrics of these records, as a forward of each one alone gives them."""
    table = token_table(still_model(), records)
    wanted = expected_metrics(table, [[record["input_ids"] for record in records]], prefix)
    assert found == pytest.approx(wanted, rel=rel)


def weights(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])
