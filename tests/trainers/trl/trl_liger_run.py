"""Trains TRL's SFTTrainer with use_liger_kernel=True, in Triton's interpreter: for a test.

    python trl_liger_run.py FOLDER

Prints JSON: for each layout the run without and with metrics, and what a naive loop over the
batches that the model met finds.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
import trl.trainer.utils
from datasets import Dataset
from liger_tools import LOSS_ONLY, Largest
from trl import SFTTrainer
from trl_liger_layouts import LAYOUTS
from trl_sft_tools import MySFT, Seen, expected, sft
from trl_tools import logs, text_records, tiny_model, token_records

# Wide enough that the logits of a batch are by far its largest tensor.
VOCABULARY = 512
RUN: dict[str, Any] = {
    # The interpreter takes its time for every token.
    "max_steps": 2,
    "logging_steps": 1,
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 3,
    "per_device_eval_batch_size": 3,
    "use_liger_kernel": True,
    "liger_kernel_config": LOSS_ONLY,
}
TOLD = ("loss", "grad_norm", "eval_loss", "mean_token_accuracy", "eval_mean_token_accuracy")
# Newer TRL has a fused head of its own, which takes so many of the vocabulary at a time.
utils: Any = trl.trainer.utils
utils._CHUNKED_LOGPROB_CHUNK_SIZE = 16


def records_of(layout: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Tokens where pieces of texts must tell their channel, with labels where these are given."""
    if layout not in ("split", "labels"):
        return text_records(count, seed)
    records = token_records(count, seed)
    if layout == "labels":
        for record in records:
            ids = record["input_ids"]
            record["labels"] = [-100] * (len(ids) // 2) + ids[len(ids) // 2 :]
    return records


def trained_model(folder: Path) -> dict[str, torch.Tensor]:
    """Weights some of whose predictions are right."""
    trainer = sft(folder, model=tiny_model(vocab_size=VOCABULARY), max_steps=12, learning_rate=3e-2)
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def run(
    folder: Path, layout: str, weights: dict[str, torch.Tensor], metrics: bool, **options: Any
) -> tuple[Any, Seen, dict[str, Any]]:
    """The trainer, what its model met, and what it logged, its weights, and how many rows of
    logits existed at once."""
    seen = Seen()
    with Largest(VOCABULARY) as largest:
        trainer = sft(
            folder,
            MySFT if metrics else SFTTrainer,
            records_of(layout, 24),
            model=model_of(weights),
            before=seen,
            eval_dataset=Dataset.from_list(records_of(layout, 5, seed=5)),
            eval_strategy="steps",
            eval_steps=2,
            **{**RUN, **LAYOUTS[layout], **options},
        )
    log = trainer.state.log_history
    told = {key: [entry[key] for entry in log if key in entry] for key in TOLD}
    norms = [float(p.detach().double().norm()) for p in trainer.model.parameters()]
    found = {
        "rows": largest.num_rows,
        "tokens": max(b["labels"].numel() for b in seen.batches[True]),
    }
    return trainer, seen, found | {"told": told, "norms": norms, "channels": len(logs(trainer))}


def compared(folder: Path, layout: str, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Both runs; the first window, and the evaluation at the end, as a naive loop finds them."""
    *_, off = run(folder, layout, weights, metrics=False)
    trainer, seen, on = run(folder, layout, weights, metrics=True)
    return {
        "off": off,
        "on": on,
        "found": [logs(trainer)[0], *logs(trainer, "eval_")],
        "expected": [
            expected(model_of(weights), seen.batches[True][:1]),
            expected(trainer.model, seen.batches[False], "eval_"),
        ],
    }


def model_of(weights: dict[str, torch.Tensor]) -> Any:
    model = tiny_model(vocab_size=VOCABULARY)
    model.load_state_dict(weights)
    return model


def patched(folder: Path) -> Any:
    """An unmodified SFTTrainer after the import of the patch, and the mixin."""
    options: dict[str, Any] = {"records": text_records(24), **RUN, "max_steps": 1}
    import channel_metrics.patches.trl as patch

    try:
        found = logs(sft(folder, SFTTrainer, **options))
    finally:
        patch.revert()
    return {"patch": found, "mixin": logs(sft(folder, MySFT, **options))}


def main() -> None:
    folder = Path(sys.argv[1])
    weights = trained_model(folder)
    results: dict[str, Any] = {"patched": patched(folder)}
    for layout in LAYOUTS:
        results[layout] = compared(folder, layout, weights)
    *_, results["unfused"] = run(folder, "padded", weights, True, use_liger_kernel=False)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
