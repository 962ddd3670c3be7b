"""Whole runs of the transformers Trainer with a probe, against the same runs without.

    python -m benchmarks.probe

Rounds of all variants alternate, and ratios are taken per round, so that a busy moment of the
machine hits all alike. Time is CPU time of the process. `expected` is what the forwards alone must
cost: a training step is about three of them (one forward, a backward of two).
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from typing import Any

import torch

__all__ = ["run"]

NUM_ROWS, ROW_LENGTH, HIDDEN, VOCABULARY, NUM_STEPS = 4, 128, 128, 2_000, 50
BATCHES = 2
VARIANTS: dict[str, dict[str, Any] | None] = {
    "off": None,
    "every 10 steps": {"every": 10, "max_overhead": None},
    "every 25 steps": {"every": 25, "max_overhead": None},
    "every step, max_overhead 0.05": {"every": 1, "max_overhead": 0.05},
}


def run(num_rounds: int = 3) -> list[dict[str, object]]:
    """Per variant: ratio of its time to that without a probe, and what the log says of it."""
    torch.set_num_threads(1)
    _train(None)
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    logs: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for _ in range(num_rounds):
        for name, options in VARIANTS.items():
            seconds, probed = _train(options)
            times[name].append(seconds)
            logs[name] = probed
            _check(name, probed)
    return [_row(name, times[name], times["off"], logs[name]) for name in VARIANTS]


def _row(
    name: str, times: list[float], off: list[float], probed: list[dict[str, float]]
) -> dict[str, object]:
    ratios = [seconds / base for seconds, base in zip(times, off, strict=True)]
    return {
        "variant": name,
        "seconds": round(statistics.median(times), 2),
        "ratio": round(statistics.median(ratios), 3),
        "expected": round(1 + len(probed) * BATCHES / 3 / NUM_STEPS, 3),
        "num_probes": len(probed),
        "probe_overhead": round(probed[-1]["probe_overhead"], 3) if probed else 0.0,
    }


def _check(name: str, probed: list[dict[str, float]]) -> None:
    """A probe that measured nothing would be fast."""
    options = VARIANTS[name]
    if options is None:
        assert not probed
        return
    assert [entry["step"] for entry in (probed[0], probed[-1])] == [0, NUM_STEPS]
    assert all(entry["dataset_held_out_loss"] > 0 for entry in probed)


def _train(options: dict[str, Any] | None) -> tuple[float, list[dict[str, float]]]:
    """CPU seconds of a training, and the log entries of its probe."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    from channel_metrics.trainers.hf import attach_probe

    torch.manual_seed(0)
    config: Any = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    model_class: Any = Qwen2ForCausalLM
    arguments = TrainingArguments(
        tempfile.mkdtemp(),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        max_steps=NUM_STEPS,
        per_device_train_batch_size=NUM_ROWS,
        per_device_eval_batch_size=NUM_ROWS,
        logging_steps=NUM_STEPS,
        save_strategy="no",
    )
    trainer: Any = Trainer(model_class(config), arguments, train_dataset=_records(64))
    trainer.remove_callback(PrinterCallback)
    if options is not None:
        sources = {"held_out": _records(NUM_ROWS * BATCHES)}
        attach_probe(trainer, sources, batches=BATCHES, **options)
    started = time.process_time()
    trainer.train()
    seconds = time.process_time() - started
    return seconds, [entry for entry in trainer.state.log_history if "probe_every" in entry]


def _records(count: int) -> list[dict[str, list[int]]]:
    rows = torch.randint(VOCABULARY, (count, ROW_LENGTH)).tolist()
    return [{"input_ids": row, "labels": row} for row in rows]


if __name__ == "__main__":
    for row in run():
        print(json.dumps(row))
