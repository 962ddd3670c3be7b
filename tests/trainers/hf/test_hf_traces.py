"""What metrics leave in the model, the collator, the batch and the metrics of others: nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hf_tools import (
    PaddingCollator,
    channel_logs,
    make_records,
    tiny_model,
    train,
)
from transformers import (
    Qwen2ForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutput

from channel_metrics import ChannelMetricsError, MetricsConfig
from channel_metrics.trainers.hf import attach

RECORDS = make_records(64)


def hooks(model: torch.nn.Module) -> dict[str, list[Any]]:
    return {
        f"{name}.{kind}": list(getattr(module, kind).values())
        for name, module in model.named_modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    }


def test_the_model_and_the_collator_are_left_as_they_were(tmp_path: Path) -> None:
    """After a training, an evaluation, a prediction, and a step that was broken off."""
    model, collator = tiny_model(), PaddingCollator()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(len(hooks(model))))
    before, forward = hooks(model), model.forward
    trainer = train(
        tmp_path,
        prepare=attach,
        model=model,
        records=RECORDS,
        trainer_arguments={"data_collator": collator, "eval_dataset": Dataset.from_list(RECORDS)},
    )

    def check() -> None:
        assert hooks(model) == before and model.forward == forward
        assert trainer.data_collator is collator

    check()
    trainer.evaluate()
    trainer.predict(trainer.eval_dataset)
    check()
    # The user's own hook saw every forward pass of it all.
    assert len(calls) == 4 + 16 + 16

    def broken(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(broken)
    with pytest.raises(KeyboardInterrupt):
        type(trainer).train(trainer)
    handle.remove()
    check()


class Strict(Qwen2ForCausalLM):
    """Takes no other arguments; from its third step on, nothing shows the losses of its tokens."""

    steps = 0

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None) -> Any:
        self.steps += self.training
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask)
        logits = output.logits.float()
        loss: Any = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        )
        return CausalLMOutput(loss=loss, logits=None if self.steps > 2 else logits)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fault_leaves_no_key_of_ours_in_the_batch(
    tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Batches that were made before the fault, and those of a worker that knows of none."""
    held_out = Dataset.from_list(make_records(10, seed=1))
    found = []
    for prepare in (None, lambda t: attach(t, MetricsConfig(on_error="warn"))):
        model = tiny_model(kind=Strict)
        trainer = train(
            tmp_path,
            prepare=prepare,
            model=model,
            records=RECORDS,
            max_steps=6,
            dataloader_num_workers=workers,
            eval_strategy="steps",
            eval_steps=2,
            trainer_arguments={"eval_dataset": held_out},
        )
        found.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert torch.equal(*found)
    warned = [r.getMessage() for r in caplog.records if r.name == "channel_metrics"]
    assert len([text for text in warned if "training goes on" in text]) == 1, warned
    # One window and one evaluation before the fault.
    assert len(channel_logs(trainer)) == 2


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_a_key_of_the_users_own_metrics_is_not_overwritten(
    tmp_path: Path, on_error: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """It stays, and the run is told; or there is an error that names it."""
    trainer = train(
        tmp_path,
        prepare=lambda t: attach(t, MetricsConfig(on_error=on_error)),
        records=RECORDS,
        max_steps=1,
        trainer_arguments={
            "eval_dataset": Dataset.from_list(RECORDS[:8]),
            "compute_metrics": lambda _predictions: {"bbu_loss": 123.0},
        },
    )
    metrics = {"eval_bbu_loss": 123.0}
    try:
        metrics = trainer.evaluate()
        text = caplog.text
    except ChannelMetricsError as error:
        text = str(error) if on_error == "raise" else ""
    assert metrics["eval_bbu_loss"] == 123.0
    assert "'eval_bbu_loss'" in text
