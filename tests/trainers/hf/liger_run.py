"""Trains with use_liger_kernel=True, Liger's kernels run by Triton's interpreter: for a test.

    python liger_run.py FOLDER

Prints JSON. A process of its own, because Triton decides when a kernel is defined whether it will
be interpreted.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from datasets import Dataset
from hf_tools import (
    PaddingCollator,
    channel_logs,
    expected_metrics,
    make_records,
    tiny_model,
    token_table,
    train,
)
from liger_kernel.transformers.model import loss_utils
from liger_tools import LOSS_ONLY, Largest

from channel_metrics.capture.liger import liger_cross_entropy
from channel_metrics.config import MetricsConfig
from channel_metrics.trainers.hf import attach

# Wide enough that the logits of a batch are by far its largest tensor.
VOCABULARY = 512
METRICS = MetricsConfig(metrics=("loss", "token_acc", "tokens", "share"))


def run(folder: Path, *, use_liger: bool, metrics: bool) -> dict[str, Any]:
    """What a run logged, its weights, and how many rows of logits existed at once."""
    collator = PaddingCollator()
    model = tiny_model(vocab_size=VOCABULARY, attention_dropout=0.0)
    with Largest(VOCABULARY) as largest:
        trainer = train(
            folder,
            prepare=(lambda trainer: attach(trainer, METRICS)) if metrics else None,
            model=model,
            records=make_records(8),
            use_liger_kernel=use_liger,
            liger_kernel_config=LOSS_ONLY if use_liger else None,
            logging_steps=1,
            max_steps=2,
            trainer_arguments={"data_collator": collator},
        )
    return {
        "loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "channels": channel_logs(trainer),
        "weights": [value for p in model.parameters() for value in p.flatten().tolist()],
        "norms": [float(p.detach().double().norm()) for p in model.parameters()],
        "rows": largest.num_rows,
        "tokens": max(len(batch) * max(map(len, batch)) for batch in collator.batches),
    }


def with_own_function(folder: Path) -> dict[str, Any]:
    """A script has put its own function, ten times Liger's, where Liger's loss stands."""
    ligers = loss_utils.fixed_fused_linear_cross_entropy
    loss_utils.fixed_fused_linear_cross_entropy = lambda *a, **k: 10 * ligers(*a, **k)
    try:
        off = run(folder, use_liger=True, metrics=False)
        return {"own_off": off, "own_on": run(folder, use_liger=True, metrics=True)}
    finally:
        loss_utils.fixed_fused_linear_cross_entropy = ligers


def against_the_oracle(folder: Path) -> dict[str, Any]:
    """One window at learning rate 0, and an evaluation; and what a naive loop finds."""
    records, collator = make_records(8), PaddingCollator()
    model = tiny_model(vocab_size=VOCABULARY, attention_dropout=0.0)
    # So that some of its predictions are right.
    train(folder, model=model, records=records, max_steps=12, learning_rate=3e-2)
    plain = copy.deepcopy(model)
    trainer = train(
        folder,
        prepare=lambda trainer: attach(trainer, METRICS),
        model=model,
        records=records,
        learning_rate=0.0,
        logging_steps=2,
        max_steps=2,
        use_liger_kernel=True,
        liger_kernel_config=LOSS_ONLY,
        trainer_arguments={
            "data_collator": collator,
            "eval_dataset": Dataset.from_list(records),
        },
    )
    trained = list(collator.batches)
    trainer.evaluate()
    entry, evaluated = channel_logs(trainer)
    table = token_table(plain, records)
    return {
        "trained": entry,
        "expected": expected_metrics(table, trained),
        "evaluated": evaluated,
        "expected_evaluated": expected_metrics(table, trained, "eval_"),
    }


def against_liger(**options: Any) -> list[float]:
    """Largest differences to Liger's own function: loss, gradients, token accuracy."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 32, generator=generator).requires_grad_()
    weight = torch.randn(40, 32, generator=generator).requires_grad_()
    target = (hidden @ weight.t()).argmax(-1)
    target[3:6], target[7:] = 1, -100
    if options.pop("nothing_counted", False):
        target[:] = -100
    given = (hidden, weight, target)
    own = loss_utils.fixed_fused_linear_cross_entropy
    found = []
    for result in (own(*given, **options), liger_cross_entropy(own, True, *given, **options)[0]):
        loss = getattr(result, "loss", result)
        values = [loss.detach(), *torch.autograd.grad(loss * 0.5, [hidden, weight])]
        if options.get("return_token_accuracy"):
            assert 0 < result.token_accuracy < 1
            values.append(result.token_accuracy)
        found.append(values)
    return [float((a - b).abs().max()) for a, b in zip(*found, strict=True)]


def main() -> None:
    folder = Path(sys.argv[1])
    results = {
        "off": run(folder, use_liger=True, metrics=False),
        "on": run(folder, use_liger=True, metrics=True),
        "plain": run(folder, use_liger=False, metrics=True),
        **with_own_function(folder),
        **against_the_oracle(folder),
        "against_liger": {
            "mean": against_liger(),
            "sum": against_liger(num_items_in_batch=torch.tensor(11)),
            "token scaling": against_liger(use_token_scaling=True),
            "accuracy": against_liger(return_token_accuracy=True, num_items_in_batch=7),
            "nothing": against_liger(nothing_counted=True),
        },
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
