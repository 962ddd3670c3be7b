"""A whole training step of the transformers Trainer with channel metrics on, against off.

The model is all head: 4,096 tokens, hidden size 512, a vocabulary of 32,000, one layer. Nowhere do
metrics of token losses weigh more. Time is CPU time of the process: on a machine with other work
it repeats to one percent, where wall time does not.

    python -m benchmarks.step VARIANT     # one fresh process: the peak memory of that step, in KiB
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import compare, peak_kib, resident_kib

__all__ = ["peak_memory", "peak_of", "report_peak", "run", "second_cross_entropy"]

NUM_ROWS, ROW_LENGTH, HIDDEN, VOCABULARY = 4, 1_024, 512, 32_000
VARIANTS = ("off", "loss", "loss and accuracy", "second cross entropy")


def run(num_rounds: int = 6, max_seconds: float = 170) -> list[dict[str, object]]:
    """CPU time of the step, all variants in one process."""
    calls = {name: _step(name) for name in VARIANTS}
    timings = compare(
        calls,
        num_rounds=num_rounds,
        max_seconds=max_seconds,
        num_warmup=1,
        clock=time.process_time,
    )
    return [asdict(timing) for timing in timings]


def peak_memory() -> list[dict[str, object]]:
    """What the step adds to the resident memory at its peak; a fresh process for each variant."""
    peaks = {name: peak_of("benchmarks.step", name) for name in VARIANTS[:3]}
    return [
        {
            "variant": name,
            "peak_mib": round(peak / 1024, 1),
            "ratio": round(peak / peaks["off"], 4),
        }
        for name, peak in peaks.items()
    ]


def peak_of(module: str, variant: str) -> int:
    """KiB, as `python -m module variant` reports them in its last line."""
    done = subprocess.run(
        [sys.executable, "-m", module, variant],
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    return int(json.loads(done.stdout.splitlines()[-1])["peak_kib"])


def _step(variant: str) -> Any:
    """One forward and backward through `Trainer.training_step`."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments
    from transformers.utils import logging as transformers_logging

    from channel_metrics.config import MetricsConfig
    from channel_metrics.trainers.hf import attach

    quiet: Callable[[], None] = transformers_logging.set_verbosity_error
    quiet()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    arguments = TrainingArguments(tempfile.mkdtemp(), use_cpu=True, report_to=[])
    make_model: Callable[..., Any] = Qwen2ForCausalLM
    trainer: Any = Trainer(make_model(config), arguments)
    if variant in ("loss", "loss and accuracy"):
        metrics = ("loss", "tokens", "share") + (("token_acc",) if "accuracy" in variant else ())
        attach(trainer, MetricsConfig(metrics=metrics))
        for channel in ("bbu", "rru", "lvis", "lang_chat"):
            trainer.channel_metrics.table.add(channel)
    input_ids = torch.randint(VOCABULARY, (NUM_ROWS, ROW_LENGTH))
    labels = input_ids.masked_fill(torch.rand(input_ids.shape) < 0.2, -100)
    num_items = (labels[:, 1:] != -100).sum()
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()

    def step() -> None:
        inputs = {"input_ids": input_ids, "labels": labels}
        if variant in ("loss", "loss and accuracy"):
            inputs["channels"] = torch.arange(NUM_ROWS)
        if variant == "second cross entropy":
            with _last_hidden(trainer.model) as hidden:
                trainer.training_step(trainer.model, inputs, num_items)
                second_cross_entropy(hidden[0], trainer.model.lm_head.weight, labels)
        else:
            trainer.training_step(trainer.model, inputs, num_items)
        trainer.model.zero_grad()

    return step


class _last_hidden:
    """The hidden states that the head gets, as long as the block runs."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __enter__(self) -> list[Tensor]:
        found: list[Tensor] = []
        self._handle = self._model.lm_head.register_forward_pre_hook(
            lambda _, args: found.append(args[0].detach())
        )
        return found

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


@torch.no_grad()
def second_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """What VeOmni (d9774494) does beside a fused loss: project again, in chunks, detached."""
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
    rows = hidden.flatten(0, 1)
    return torch.cat(
        [
            F.cross_entropy(F.linear(part, weight).float(), wanted, reduction="none")
            for part, wanted in zip(torch.split(rows, 512), torch.split(targets, 512), strict=True)
        ]
    )


def report_peak(step: Any) -> None:
    """Print what two calls of `step` add to the memory of this process."""
    before = resident_kib()
    step()
    step()
    print(json.dumps({"peak_kib": peak_kib() - before}))


if __name__ == "__main__":
    report_peak(_step(sys.argv[1]))
