"""More than one forward in a step: the labels belong to one of them, or it is an error."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_tools import PaddingCollator, make_records, tiny_model, train
from test_hf_losses import run_with_oracle
from torch import Tensor
from transformers import Trainer

from channel_metrics import UnsupportedVersionError
from channel_metrics.capture.logits import shifted_labels
from channel_metrics.trainers.hf import attach

TEACHER = tiny_model(seed=5)


def corrupted(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "input_ids": inputs["input_ids"].flip(-1),
        "attention_mask": inputs["attention_mask"],
    }


class Distils(Trainer):
    """A frozen teacher, called with the labels too, before or after the student."""

    teacher_first = True
    without_gradients = True

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        def teach() -> Any:
            with torch.no_grad() if self.without_gradients else nullcontext():
                return TEACHER(**inputs)

        taught = teach() if self.teacher_first else None
        student = model(**inputs)
        taught = taught or teach()
        loss = student.loss + F.mse_loss(student.logits, taught.logits.detach())
        return (loss, student) if kwargs.get("return_outputs") else loss


class TeacherLast(Distils):
    teacher_first = False


class TeacherWithGradients(Distils):
    teacher_first = without_gradients = False


class SecondForward(Trainer):
    """A forward on corrupted inputs comes after the one with the labels."""

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        return model(**inputs).loss - 0.01 * model(**corrupted(inputs)).logits.logsumexp(-1).mean()


class SecondForwardFirst(Trainer):
    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        other = model(**corrupted(inputs)).logits.logsumexp(-1).mean()
        return model(**inputs).loss - 0.01 * other


class OverItsLogits(Trainer):
    """The labels are not passed; transformers' loss is computed over the first logits."""

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        logits, other = model(**inputs).logits, model(**corrupted(inputs)).logits
        loss = model.loss_function(logits, labels, vocab_size=model.config.vocab_size)
        return loss - 0.01 * other.logsumexp(-1).mean()


class SelfDistils(Trainer):
    """The same model, without gradients, is the teacher."""

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        student = model(**inputs)
        with torch.no_grad():
            taught = model(**inputs)
        return student.loss + F.mse_loss(student.logits, taught.logits)


class InnerModel(Trainer):
    """Calls the model that the trainer holds, not the one that it is given."""

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        held: Any = self.model
        return held(**inputs).loss


@pytest.mark.parametrize(
    "kind",
    [
        Distils,
        TeacherLast,
        TeacherWithGradients,
        SecondForward,
        SecondForwardFirst,
        OverItsLogits,
        SelfDistils,
        InnerModel,
    ],
)
def test_the_labels_belong_to_one_forward(kind: type[Trainer], tmp_path: Path) -> None:
    trainer = run_with_oracle(tmp_path, tiny_model(attention_dropout=0.0), trainer_class=kind)
    assert trainer.channel_scratch.reader.captured


class RDrop(Trainer):
    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        first, second = model(**inputs), model(**inputs)
        return (first.loss + second.loss) / 2 + F.mse_loss(first.logits, second.logits)


class LabelsByHand(Trainer):
    """Which logits the labels stand beside cannot be seen: torch's own cross entropy."""

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        inputs = dict(inputs)
        labels = shifted_labels(inputs.pop("labels"))
        logits, other = model(**inputs).logits, model(**corrupted(inputs)).logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()) - other.mean()


@pytest.mark.parametrize("kind", [RDrop, LabelsByHand])
def test_two_forwards_that_cannot_be_told_apart(kind: type[Trainer], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedVersionError, match="ran 2 forwards in one step, and 2 of them"):
        train(tmp_path, prepare=attach, trainer_class=kind)


class MasksMore(Trainer):
    """Trains on the second half of the labels only."""

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        labels = inputs["labels"].clone()
        labels[:, : labels.shape[1] // 2] = -100
        return model(**dict(inputs) | {"labels": labels}).loss


def test_labels_that_compute_loss_masks_further_are_not_counted(tmp_path: Path) -> None:
    collator = PaddingCollator()
    records = make_records(16)
    trainer = train(
        tmp_path,
        prepare=attach,
        trainer_class=MasksMore,
        records=records,
        logging_steps=4,
        trainer_arguments={"data_collator": collator},
    )
    by_ids = {tuple(record["input_ids"]): record for record in records}
    expected: dict[str, int] = {}
    for batch in collator.batches:
        half = max(map(len, batch)) // 2
        for ids in batch:
            record = by_ids[tuple(ids)]
            kept = [label for label in record["labels"][max(half, 1) :] if label != -100]
            expected[record["channel"]] = expected.get(record["channel"], 0) + len(kept)
    entry = trainer.state.log_history[0]
    assert {name: entry[f"{name}_tokens"] for name in expected} == expected


class PopsLabels(Trainer):
    """The labels are popped, and torch's own cross entropy is trained on; `half` masks more."""

    half = False

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **kwargs: Any) -> Any:
        inputs = dict(inputs)
        labels = shifted_labels(inputs.pop("labels"))
        if self.half:
            labels[:, : labels.shape[1] // 2] = -100
        logits = model(**inputs).logits.flatten(0, 1)
        if kwargs.get("num_items_in_batch") is None:
            return F.cross_entropy(logits, labels.flatten())
        total = F.cross_entropy(logits, labels.flatten(), reduction="sum")
        return total / kwargs["num_items_in_batch"]


class PopsAndMasks(PopsLabels):
    half = True


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("kind", [PopsLabels, PopsAndMasks])
def test_popped_labels_that_are_masked_further_are_said_once(
    kind: type[PopsLabels], accumulated: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = run_with_oracle(
        tmp_path,
        tiny_model(attention_dropout=0.0),
        trainer_class=kind,
        gradient_accumulation_steps=accumulated,
        max_steps=4 // accumulated,
    )
    assert trainer.channel_scratch.reader.captured is False
    said = [r.getMessage() for r in caplog.records if "compute_loss returned" in r.getMessage()]
    assert len(said) == kind.half
    assert not said or "pass the masked labels to the model" in said[0]
