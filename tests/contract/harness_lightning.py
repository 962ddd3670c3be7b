"""Lightning, with the tiny Qwen2 of the Trainer's harness."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from lightning_tools import Kept
from torch.utils.data import DataLoader, IterableDataset

from channel_metrics.trainers.lightning import ChannelMetricsCallback
from contract.harness import Forking, watch_windows
from contract.harness_hf import Records, collate, nll_of, nlls_of, tiny_qwen2, token_ids
from contract.script import ROWS, OneSequence, Ran, Script, flat

__all__ = ["LightningHarness"]


class LightningHarness(Forking):
    """A step that is run again is one that the optimizer repeats; a skipped one returns None."""

    name = "lightning"
    can = frozenset({"rerun", "skip", "ranks", "stops", "columns"})
    reserved = "val"
    eval_prefix = "val_"

    def train(self, script: Script, folder: Path, ran: Ran) -> None:
        if dist.is_initialized():
            rank, size = str(dist.get_rank()), str(dist.get_world_size())
            os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size)
        _train(script, ran)

    def nll(self, sequence: OneSequence) -> float:
        return nll_of(sequence)

    def losses(self, sequence: OneSequence) -> list[float]:
        return nlls_of(sequence)

    def tokens(self, sequence: OneSequence) -> list[int]:
        return token_ids(sequence)[1:]


def _train(script: Script, ran: Ran) -> None:
    size = dist.get_world_size() if dist.is_initialized() else 1
    callback = ChannelMetricsCallback(script.config)
    watch_windows(callback.metrics, ran)
    logger = Kept()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=size,
        strategy="auto" if size == 1 else DDPStrategy(process_group_backend="gloo"),
        callbacks=[callback],
        max_epochs=1,
        accumulate_grad_batches=len(script.steps[0]) // size,
        log_every_n_steps=script.every,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=1,
        use_distributed_sampler=False,
        logger=logger,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    batches = [batch for step in script.steps for batch in step]
    mine = batches[dist.get_rank() :: size] if size > 1 else batches
    module = _Module(script, ran)
    collated = callback.collator(collate)
    train = DataLoader(Records(flat(mine)), ROWS, collate_fn=collated)
    held_out = DataLoader(module.held_out, ROWS, collate_fn=collated)
    try:
        trainer.fit(module, train, held_out if script.evaluations else None)
    finally:
        ran.logs = [v for _, v in logger.entries if not any(k.startswith("val_") for k in v)]


class _HeldOut(IterableDataset[Any]):
    """The evaluation of the current step, if there is one."""

    sequences: tuple[OneSequence, ...] = ()

    def __iter__(self) -> Iterator[Any]:
        records = Records(list(self.sequences))
        return (records[index] for index in range(len(records)))


class _Module(L.LightningModule):
    def __init__(self, script: Script, ran: Ran) -> None:
        super().__init__()
        self.model, self.script, self.ran = tiny_qwen2(), script, ran
        self.held_out = _HeldOut()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.model(**batch).loss
        return None if self.global_step + 1 in self.script.skips else loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.model(**batch)

    def on_train_batch_end(self, *args: Any) -> None:
        if self.ran.steps < self.global_step:
            self.ran.steps = self.global_step
            after = [e for e in self.script.evaluations if e.after == self.global_step]
            self.held_out.sequences = tuple(s for e in after for s in flat(e.batches))

    def on_validation_end(self) -> None:
        if self.held_out.sequences:
            logged = self.trainer.callback_metrics.items()
            values = {k: v.item() for k, v in logged if k.startswith("val_")}
            # The cases ask for `eval_`.
            self.ran.evaluations.append({f"eval_{k[4:]}": v for k, v in values.items()})
            self.held_out.sequences = ()

    def configure_optimizers(self) -> Any:
        return _Repeating(self.parameters(), self)


class _Repeating(torch.optim.SGD):
    """Runs the closure again in the steps that are run again."""

    def __init__(self, parameters: Any, module: _Module) -> None:
        super().__init__(parameters, lr=0.0)
        self.module = module

    def step(self, closure: Any = None) -> Any:
        if self.module.global_step + 1 in self.module.script.reruns:
            closure()
        return super().step(closure)
