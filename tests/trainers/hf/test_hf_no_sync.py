"""From the batch to the accumulator, no step of the Trainer's loss waits for the device.

The `meta` device holds no values: what would have to be read cannot be. A model there runs all
operators, and `NoSync` names the one that would have had to wait.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faults
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from hf_tools import CHANNELS, PaddingCollator, make_records, tiny_model
from no_sync import HostSyncError, NoSync
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments, masking_utils

from channel_metrics.capture.logits import shifted_labels
from channel_metrics.config import MetricsConfig
from channel_metrics.trainers.hf import attach


class OwnLoss(Trainer):
    """Token losses are measured on the logits; at the first batch, the loss is compared."""

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        labels = shifted_labels(inputs["labels"]).flatten()
        logits = model(inputs["input_ids"], inputs["attention_mask"]).logits
        return F.cross_entropy(logits.flatten(0, 1), labels)


def trainer_after_one_batch(
    folder: Path, collator: Any, kind: type[Trainer] = Trainer
) -> tuple[Any, Any]:
    """A trainer whose first micro-batch was seen, on the host, and a batch for the next.

    At the first batch, and only then, the labels of the loss are compared with those of the batch.
    """
    trainer = kind(
        # Eager attention: transformers itself looks into the mask for others.
        tiny_model(attn_implementation="eager"),
        TrainingArguments(str(folder), use_cpu=True, report_to=[]),
        train_dataset=Dataset.from_list(make_records(8)),
        data_collator=collator,
    )
    attach(trainer, MetricsConfig(channels=CHANNELS))
    batch = next(iter(trainer.get_train_dataloader()))
    loss_of(trainer, trainer.model, dict(batch))
    return trainer, batch


def loss_of(trainer: Any, model: Any, batch: dict[str, Any]) -> torch.Tensor:
    model.train()
    num_items = (batch["labels"][:, 1:] != -100).sum()
    inputs = trainer._prepare_inputs(batch)
    loss: torch.Tensor = trainer.compute_loss(
        model, inputs, num_items_in_batch=num_items.to(trainer.args.device)
    )
    return loss


def on_meta(trainer: Any) -> Any:
    """Let the trainer take `meta` for its device; the model there."""
    vars(trainer.args)["_setup_devices"] = torch.device("meta")
    return trainer.model.to("meta")


@pytest.mark.parametrize(("flat", "kind"), [(False, Trainer), (True, Trainer), (False, OwnLoss)])
def test_no_sync_from_the_batch_to_the_accumulator(
    flat: bool, kind: type[Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if flat:
        # transformers' own sync: it looks whether the position ids restart.
        monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda _: None)
    collator: Any = DataCollatorWithFlattening() if flat else PaddingCollator()
    trainer, batch = trainer_after_one_batch(tmp_path, collator, kind)
    model = on_meta(trainer)
    state: Any = trainer.channel_metrics
    with NoSync():
        loss_of(trainer, model, batch).backward()
    assert state._train.table.device.type == "meta"
    assert model.lm_head.weight.grad is not None


def test_a_sync_would_be_seen(tmp_path: Path) -> None:
    trainer, batch = trainer_after_one_batch(tmp_path, PaddingCollator())
    model = on_meta(trainer)

    def reading(record: Any, batch: Any, *where: Any) -> None:
        record(batch, *where)
        batch.token_losses.sum().item()

    with (
        faults.around("record a micro-batch", reading),
        NoSync(),
        pytest.raises(HostSyncError, match="_local_scalar_dense"),
    ):
        loss_of(trainer, model, batch)
