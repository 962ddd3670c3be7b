"""Where channel ids can get lost on their way: each way is right, or refused at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_case_tools import fixed_records
from hf_tools import (
    PaddingCollator,
    Record,
    channel_logs,
    expected_metrics,
    make_records,
    tiny_model,
    token_table,
    train,
)
from transformers import (
    Qwen2ForCausalLM,
    Trainer,
)
from transformers.modeling_outputs import CausalLMOutput

from channel_metrics import UnsupportedVersionError
from channel_metrics.trainers.hf import attach


def counted(records: list[Record]) -> dict[str, int]:
    """{channel: supervised targets} by counting."""
    totals: dict[str, int] = {}
    for record in records:
        supervised = sum(label != -100 for label in record["labels"][1:])
        totals[record["channel"]] = totals.get(record["channel"], 0) + supervised
    return totals


def logged(entries: list[dict[str, float]]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for entry in entries:
        for key, value in entry.items():
            if key.endswith("_tokens") and not key.startswith("eval_"):
                name = key.removesuffix("_tokens")
                totals[name] = totals.get(name, 0) + int(value)
    return totals


def run_with_oracle(
    folder: Path, model: torch.nn.Module, plain: Any = None, rel: float = 1e-5, **arguments: Any
) -> Any:
    """Train with lr 0 on 16 records, one window; assert the metrics equal the oracle."""
    records, collator = fixed_records(16), PaddingCollator()
    table = token_table(plain or model, records)
    trainer = train(
        folder,
        prepare=attach,
        model=model,
        records=records,
        learning_rate=0.0,
        logging_steps=4,
        trainer_arguments={"data_collator": collator},
        **arguments,
    )
    (entry,) = channel_logs(trainer)
    expected = expected_metrics(table, collator.batches)
    for key, value in expected.items():
        if key.endswith("_token_acc") and rel > 1e-5:
            continue  # in bfloat16 the largest logit may be another
        assert entry[key] == pytest.approx(value, rel=rel)
    assert not trainer.channel_metrics.warned and not trainer.channel_scratch.reader.warned
    return trainer


def check_own_loss(trainer: Trainer, rel: float = 1e-6) -> None:
    """Windows of one step: the channels add up to the loss that the trainer logged."""
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in entries:
        total = sum(
            value * entry[key.removesuffix("_loss") + "_share"]
            for key, value in entry.items()
            if key.endswith("_loss")
        )
        assert total == pytest.approx(entry["loss"], rel=rel)


def test_auto_find_batch_size_starts_a_new_window(tmp_path: Path) -> None:
    """The first try ends in its second step, after a window was logged; nothing of it counts."""
    sizes: list[int] = []

    def out_of_memory(trainer: Any) -> None:
        attach(trainer)
        step = trainer.training_step

        def failing(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            sizes.append(len(inputs["input_ids"]))
            if sizes == [4, 4]:
                raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return step(model, inputs, *args, **kwargs)

        trainer.training_step = failing

    records = make_records(16)
    trainer = train(
        tmp_path,
        prepare=out_of_memory,
        records=records,
        auto_find_batch_size=True,
        max_steps=-1,
        num_train_epochs=1,
        logging_steps=100,
    )
    smaller = sizes[2]
    assert smaller < 4 and sizes == [4, 4] + [smaller] * (len(sizes) - 3) + [sizes[-1]]
    assert logged(channel_logs(trainer)) == counted(records)
    totals = {
        name: trainer.channel_metrics.totals.of(name)["tokens_total"] for name in counted(records)
    }
    assert totals == counted(records)


def test_label_names(tmp_path: Path) -> None:
    run_with_oracle(tmp_path, tiny_model(attention_dropout=0.0), label_names=["labels"])


# peft asks the model under the older name, which the newest transformers deprecates.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft(tmp_path: Path) -> None:
    import peft

    plain = tiny_model(attention_dropout=0.0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_model(attention_dropout=0.0), config)
    run_with_oracle(tmp_path, model, plain)


@pytest.mark.parametrize("reentrant", [True, False])
# The newest transformers calls it activation checkpointing; the older name still works.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")
def test_gradient_checkpointing(tmp_path: Path, reentrant: bool) -> None:
    trainer = run_with_oracle(
        tmp_path,
        tiny_model(attention_dropout=0.0, use_cache=False),
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    assert trainer.channel_scratch.reader.captured


def test_bf16_autocast(tmp_path: Path) -> None:
    """The channels are those of the bfloat16 logits, and add up to the trainer's own loss."""
    model = tiny_model(attention_dropout=0.0)
    run_with_oracle(tmp_path, model, rel=5e-3, bf16=True)
    trainer = train(tmp_path, prepare=attach, bf16=True, logging_steps=1)
    check_own_loss(trainer)
    assert not trainer.channel_metrics.warned and not trainer.channel_scratch.reader.warned


def test_torch_compile(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A graph cannot be looked into: the token losses come from the logits."""
    caplog.set_level("INFO", "channel_metrics")
    trainer = run_with_oracle(
        tmp_path,
        tiny_model(attention_dropout=0.0),
        torch_compile=True,
        torch_compile_backend="inductor",
    )
    assert trainer.channel_scratch.reader.captured is False
    assert "second softmax" in caplog.text
    torch._dynamo.reset()


class PartOfTheLogits(Qwen2ForCausalLM):
    """Computes the logits, and so the loss, of the last tokens only."""

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **kwargs: Any
    ) -> Any:
        output = super().forward(
            input_ids, attention_mask, labels=labels[:, -4:], logits_to_keep=4, **kwargs
        )
        return CausalLMOutput(loss=output.loss, logits=output.logits)


def test_logits_to_keep_is_refused(tmp_path: Path) -> None:
    model = tiny_model(kind=PartOfTheLogits, attention_dropout=0.0)
    with pytest.raises(
        UnsupportedVersionError, match=r"over 16 positions: .* logits_to_keep, leave it out"
    ):
        train(tmp_path, prepare=attach, model=model, records=fixed_records(16))


# ---- encoder-decoder ------------------------------------------------------------------------
