"""Losses over more or fewer positions than the labels of the batch; results that are no mapping."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import GradientState
from datasets import Dataset
from hf_tools import PaddingCollator, channel_logs, make_records, tiny_model, train
from peft import PromptEncoderConfig, PromptTuningConfig, TaskType, get_peft_model
from test_hf_losses import run_with_oracle
from torch import Tensor
from transformers import (
    ModernBertConfig,
    ModernBertForMaskedLM,
    Qwen2ForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.loss import loss_utils

from channel_metrics.capture.observation import current_observation
from channel_metrics.capture.reader import TokenLossReader
from channel_metrics.trainers.hf import attach


def counted(trainer: Trainer) -> dict[str, tuple[float, float, float]]:
    """{channel: (tokens, nll, correct)} of the first window."""
    entry = trainer.state.log_history[0]
    names = {key[: -len("_tokens")] for key in entry if key.endswith("_tokens")}
    return {
        name: (
            entry[f"{name}_tokens"],
            entry[f"{name}_loss"] * entry[f"{name}_tokens"],
            entry[f"{name}_token_acc"] * entry[f"{name}_tokens"],
        )
        for name in names
    }


def one_by_one(model: torch.nn.Module, records: list[dict[str, Any]]) -> dict[str, list[float]]:
    """The same, from the model's own loss of each record alone, without a batch."""
    sums: dict[str, list[float]] = {}
    model.eval()
    for record in records:
        batch = PaddingCollator()([record])
        with torch.no_grad():
            output = model(**batch)
        extra = output.logits.shape[1] - batch["labels"].shape[1]
        labels = F.pad(batch["labels"], (extra, 0), value=-100)[0, 1:]
        kept = labels != -100
        best = output.logits[0, :-1].argmax(-1)
        entry = sums.setdefault(record["channel"], [0.0, 0.0, 0.0])
        entry[0] += int(kept.sum())
        entry[1] += float(output.loss) * int(kept.sum())
        entry[2] += int((best == labels)[kept].sum())
    return sums


# PEFT asks transformers 5.23 in a way that it deprecates.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("padding_left", [False, True])
@pytest.mark.parametrize("kind", [PromptTuningConfig, PromptEncoderConfig])
def test_virtual_tokens_are_cut_off(kind: Any, padding_left: bool, tmp_path: Path) -> None:
    """A first label that is not -100 is trained on: the last virtual token predicts it."""
    records = make_records(16)
    for record in [] if padding_left else records[::3]:
        record["labels"] = list(record["input_ids"])
    base = tiny_model(attention_dropout=0.0)
    model = get_peft_model(base, kind(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3))
    trainer = train(
        tmp_path,
        prepare=attach,
        model=model,
        records=records,
        learning_rate=0.0,
        logging_steps=4,
        trainer_arguments={"data_collator": PaddingCollator(padding_left)},
    )
    found, expected = counted(trainer), one_by_one(model, records)
    assert found == {name: pytest.approx(sums, rel=1e-4) for name, sums in expected.items()}


class Trims(Qwen2ForCausalLM):
    """As transformers up to 4.50: the last position is cut off, not padded."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None) -> Any:
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask)
        logits, targets = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        output.loss = loss_utils.fixed_cross_entropy(logits, targets)
        return output


def test_a_loss_that_trims_the_last_position(tmp_path: Path) -> None:
    model = tiny_model(kind=Trims, attention_dropout=0.0)
    trainer = run_with_oracle(tmp_path, model)
    assert trainer.channel_scratch.reader.captured


def test_a_head_on_the_supervised_positions_only(tmp_path: Path) -> None:
    def model(sparse: bool) -> Any:
        torch.manual_seed(0)
        make_config: Any = ModernBertConfig
        config = make_config(
            vocab_size=61,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            pad_token_id=0,
            cls_token_id=1,
            sep_token_id=2,
            bos_token_id=1,
            eos_token_id=2,
            sparse_prediction=sparse,
            reference_compile=False,
        )
        return ModernBertForMaskedLM._from_config(config, attn_implementation="eager")

    def logs(sparse: bool) -> Any:
        trainer = train(
            tmp_path,
            prepare=attach,
            model=model(sparse),
            records=make_records(16),
            learning_rate=0.0,
            logging_steps=4,
        )
        assert trainer.channel_scratch.reader.captured
        return channel_logs(trainer)[0]

    assert logs(True) == pytest.approx(logs(False), rel=1e-5)


class Tuple(Qwen2ForCausalLM):
    """Returns a tuple, and its loss is not seen."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None) -> Any:
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask)
        loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return loss, output.logits


def test_a_model_that_returns_a_tuple(tmp_path: Path) -> None:
    run_with_oracle(tmp_path, tiny_model(kind=Tuple, attention_dropout=0.0))


class Replicas(torch.nn.Module):
    """What nn.DataParallel does, on a CPU: halves of the batch, each in a thread of its own."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.module = model
        self.config = model.config

    def forward(self, **inputs: Any) -> dict[str, Tensor]:
        inputs.pop("num_items_in_batch", None)
        parts = [
            {key: value.chunk(2)[index] for key, value in inputs.items()} for index in range(2)
        ]
        outputs: list[Any] = [None, None]

        def run(index: int) -> None:
            with torch.enable_grad() if self.training else torch.no_grad():
                outputs[index] = self.module(**parts[index])

        threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {
            "loss": torch.stack([output.loss for output in outputs]),
            "logits": torch.cat([output.logits for output in outputs]),
        }


def test_replicas_in_threads(tmp_path: Path) -> None:
    """The losses of the replicas are a vector; the token losses come from their logits."""

    model = tiny_model(attention_dropout=0.0)

    class OnTwoDevices(Trainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Tensor:
            losses: Any = self.compute_loss(Replicas(model), self._prepare_inputs(inputs))
            loss: Tensor = losses.mean()
            loss.backward()
            return loss.detach()

    trainer = run_with_oracle(tmp_path, model, trainer_class=OnTwoDevices)
    assert trainer.channel_scratch.reader.captured is False


def test_observations_of_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """They overlap, and the one that came first ends first."""
    own = loss_utils.fixed_cross_entropy
    first_ends, second_began, second_ends = (threading.Event() for _ in range(3))
    seen: dict[str, int] = {}
    batch = PaddingCollator()(make_records(3))

    def second() -> None:
        model, reader = tiny_model(), TokenLossReader()
        with reader.observe(model) as observation:
            second_began.set()
            assert first_ends.wait(60)
            model(**batch)
        seen["second"] = len(observation.losses)
        second_ends.set()

    thread = threading.Thread(target=second)
    model, reader = tiny_model(), TokenLossReader()
    with reader.observe(model) as observation:
        thread.start()
        assert second_began.wait(60)
        model(**batch)
    seen["first"] = len(observation.losses)
    first_ends.set()
    assert second_ends.wait(60)
    thread.join()
    assert seen == {"first": 1, "second": 1}
    assert loss_utils.fixed_cross_entropy is own
    assert current_observation() is None


def test_somebody_wraps_the_watching_function() -> None:
    """What they put there stays, and a loss is seen once."""
    own = loss_utils.fixed_cross_entropy
    model, reader, batch = tiny_model(), TokenLossReader(), PaddingCollator()(make_records(3))
    calls = []
    try:
        with reader.observe(model):
            watching = loss_utils.fixed_cross_entropy

            def theirs(*args: Any, **kwargs: Any) -> Any:
                calls.append(1)
                return watching(*args, **kwargs)

            loss_utils.fixed_cross_entropy = theirs
        assert loss_utils.fixed_cross_entropy is theirs
        with reader.observe(model) as observation:
            model(**batch)
        assert len(observation.losses) == len(calls) == 1
        assert loss_utils.fixed_cross_entropy is theirs
    finally:
        loss_utils.fixed_cross_entropy = own


def test_a_trainer_with_metrics_can_be_pickled(tmp_path: Path) -> None:
    # It remembers the data loaders of trainings before by references that cannot be pickled.
    GradientState._reset_state()
    arguments = TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, max_steps=2, logging_steps=1, save_strategy="no"
    )
    records = Dataset.from_list(make_records(16))
    model, collator = tiny_model(attention_dropout=0.0), PaddingCollator()
    trainer = Trainer(model, arguments, train_dataset=records, data_collator=collator)
    copy = pickle.loads(pickle.dumps(attach(trainer)))
    copy.train()
    trainer.train()
    assert channel_logs(copy) == channel_logs(trainer) != []
