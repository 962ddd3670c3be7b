"""A whole training step of the transformers Trainer with channel metrics on, against off.

The model is all head: 4,096 tokens, hidden size 512, a vocabulary of 32,000, one layer. Nowhere do
metrics of token losses weigh more. Time is CPU time of the process: on a machine with other work
it repeats to one percent, where wall time does not.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import Call
from benchmarks.swift_peer import SwiftLoop, swift_token_losses
from benchmarks.timing import compare, peak_mib
from benchmarks.veomni_peer import VeOmni

__all__ = ["FURTHER", "ON_AXES", "peak_memory", "peaks_of", "run"]

NUM_ROWS, ROW_LENGTH, HIDDEN, VOCABULARY = 4, 1_024, 512, 32_000
CHANNELS = ("bbu", "rru", "lvis", "lang_chat")
BARS = ("loss_se", "loss_low", "loss_high")
ACCURACY_BARS = ("token_acc", "token_acc_se", "token_acc_low", "token_acc_high")
OURS = {
    "loss": ("loss", "tokens", "share"),
    "loss and accuracy": ("loss", "token_acc", "tokens", "share"),
    "3 axes, error bars, bytes": ("loss", "tokens", *BARS, "bits_per_byte"),
    "3 axes, error bars, bytes, accuracy": (
        *("loss", "tokens", *BARS, "bits_per_byte"),
        *ACCURACY_BARS,
    ),
    "loss and entropy": ("loss", "tokens", "share", "entropy"),
    "loss and gradients": ("loss", "tokens", "share", "grad_share", "grad_cosine", "grad_noise"),
}
# The labels of three more axes follow from the channel.
AXES = {
    "domain": {"bbu": "target", "rru": "target", "lvis": "source", "lang_chat": "source"},
    "template": {"bbu": "short", "rru": "long", "lvis": "short", "lang_chat": "chat"},
    "language": {"bbu": "zh", "rru": "zh", "lvis": "en", "lang_chat": "en"},
}
VARIANTS = ("off", "loss", "loss and accuracy", "ms-swift, HF", "VeOmni, each step")
ON_AXES = ("off", "3 axes, error bars, bytes", "3 axes, error bars, bytes, accuracy")
FURTHER = ("off", "loss and entropy", "loss and gradients")


def run(
    variants: Sequence[str] = VARIANTS, num_rounds: int = 9, max_seconds: float = 170
) -> list[dict[str, object]]:
    """CPU time of the step, all variants in one process."""
    calls = {name: _step(name) for name in variants}
    timings = compare(
        calls,
        num_rounds=num_rounds,
        max_seconds=max_seconds,
        num_warmup=1,
        clock=time.process_time,
    )
    return [asdict(timing) for timing in timings]


def peak_memory() -> list[dict[str, object]]:
    """What the tensors of a step hold at their peak, beside the model and its gradients."""
    return peaks_of({name: _step(name) for name in dict.fromkeys((*VARIANTS, *ON_AXES, *FURTHER))})


def peaks_of(calls: Mapping[str, Call]) -> list[dict[str, object]]:
    """The peak memory of each call, and its ratio to the first one."""
    peaks = {}
    for name, call in calls.items():
        call()
        peaks[name] = peak_mib(call)
    first = next(iter(peaks.values()))
    return [
        {"variant": name, "peak_mib": round(peak, 3), "ratio": round(peak / first, 4)}
        for name, peak in peaks.items()
    ]


def _step(variant: str) -> Call:
    """One forward and backward through `Trainer.training_step`."""
    torch.manual_seed(0)
    input_ids = torch.randint(VOCABULARY, (NUM_ROWS, ROW_LENGTH))
    labels = input_ids.masked_fill(torch.rand(input_ids.shape) < 0.2, -100)
    num_items = (labels[:, 1:] != -100).sum()
    trainer = _trainer(variant)
    batch: dict[str, Any] = {"input_ids": input_ids, "labels": labels}
    if variant in OURS:
        records = [{"channel": CHANNELS[i % len(CHANNELS)]} for i in range(NUM_ROWS)]
        batch = dict(trainer.channel_metrics.collator(lambda _: batch)(records))

    def step() -> None:
        inputs = dict(batch)
        trainer.training_step(trainer.model, inputs, num_items)
        trainer.model.zero_grad()

    if not variant.startswith("VeOmni"):
        return step
    positions = torch.arange(ROW_LENGTH).expand(NUM_ROWS, -1)
    veomni = VeOmni(list(range(NUM_ROWS)), positions)
    veomni.computer.install(trainer.model)

    def observed_step() -> None:
        with veomni.observing():
            step()

    return observed_step


def _trainer(variant: str) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments
    from transformers.utils import logging as transformers_logging

    from channel_metrics.config import MetricsConfig
    from channel_metrics.core.text_sizes import TextSizes
    from channel_metrics.trainers.hf import attach

    quiet: Callable[[], None] = transformers_logging.set_verbosity_error
    quiet()
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    make_model: Callable[..., Any] = Qwen2ForCausalLM
    arguments = TrainingArguments(tempfile.mkdtemp(), use_cpu=True, report_to=[])
    kind = _with_swift_loss(Trainer) if variant.startswith("ms-swift") else Trainer
    trainer: Any = kind(make_model(config), arguments)
    if variant in OURS:
        axes = AXES if variant.startswith("3 axes") else {}
        attach(trainer, MetricsConfig(metrics=OURS[variant], channels=CHANNELS, axes=axes))
        if "bits_per_byte" in OURS[variant]:
            sizes = torch.randint(1, 9, (VOCABULARY,))
            trainer.channel_metrics.text_sizes = TextSizes(sizes, sizes)
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()
    return trainer


def _with_swift_loss(base: Any) -> Any:
    """What ms-swift's trainer computes with `--enable_channel_loss true`."""
    token_losses, loop = swift_token_losses(), SwiftLoop(list(CHANNELS), None)

    class SwiftTrainer(base):  # type: ignore[misc]  # a class that is given
        def compute_loss(
            self, model: Any, inputs: dict[str, Tensor], num_items_in_batch: Tensor
        ) -> Tensor:
            labels = inputs.pop("labels")
            losses = token_losses(model(**inputs), labels)
            loop.update(losses, labels)
            return losses.sum() / num_items_in_batch

    return SwiftTrainer
