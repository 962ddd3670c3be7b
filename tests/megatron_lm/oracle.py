"""What a run with channels must log, found without the library: observers and a naive loop."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from megatron_lm.launch import Run
from megatron_lm.layouts import GLOBAL_BATCH, ITERATIONS, SEQ_LENGTH

Result = Callable[[], Any]
NAMES = ("web", "code", "math")


def sample_order() -> Result:
    """The data set of each sample of the training blend, in the order of training."""
    from megatron.core.datasets import blended_dataset

    made: list[Any] = []
    init = blended_dataset.BlendedDataset.__init__

    @functools.wraps(init)
    def remembering(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        made.append(self)

    blended_dataset.BlendedDataset.__init__ = remembering
    wanted = GLOBAL_BATCH * ITERATIONS
    return lambda: [int(i) for i in made[0].dataset_index[:wanted]] if made else None


def token_losses() -> Result:
    """Every token that the language model was trained on: [[[loss, correct], ...] per row].

    For one process, whose rows come in the order of the samples. The predictions are the argmax of
    the whole logits, taken before the cross entropy overwrites them.
    """
    from megatron.core.models.common.language_module.language_module import LanguageModule

    rows: list[Any] = []
    compute = LanguageModule.compute_language_model_loss

    @functools.wraps(compute)
    def recording(self: Any, labels: Any, logits: Any) -> Any:
        predicted = logits.argmax(-1).transpose(0, 1)
        correct = (predicted == labels).tolist()
        losses = compute(self, labels, logits)
        for row_losses, row_correct in zip(losses.tolist(), correct, strict=True):
            rows.append(list(zip(row_losses, row_correct, strict=True)))
        return losses

    LanguageModule.compute_language_model_loss = recording
    return lambda: rows


def naive(
    order: list[int], rows: list[Any], names: tuple[str, ...] = NAMES
) -> list[dict[str, float]]:
    """Per iteration `{"web_loss": ..., "web_token_acc": ..., ...}`, by loops over tokens.

    names: of each data set of the blend, its channel or its label on an axis.
    """
    logs = []
    for step in range(ITERATIONS):
        at = range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)
        log: dict[str, float] = {}
        for name in dict.fromkeys(names):
            tokens = [token for k in at if names[order[k]] == name for token in rows[k]]
            if not tokens:
                continue
            log[f"{name}_loss"] = math.fsum(loss for loss, _ in tokens) / len(tokens)
            log[f"{name}_token_acc"] = sum(correct for _, correct in tokens) / len(tokens)
            log[f"{name}_tokens"] = len(tokens)
            log[f"{name}_samples"] = sum(names[order[k]] == name for k in at)
            log[f"{name}_share"] = len(tokens) / (GLOBAL_BATCH * SEQ_LENGTH)
        logs.append(log)
    return logs


def logged(run: Run, names: tuple[str, ...] = NAMES) -> list[dict[str, float]]:
    """Our keys per iteration, as TensorBoard has them."""
    logs: dict[int, dict[str, float]] = {}
    for key, curve in run.scalars.items():
        if key.startswith(tuple(f"{name}_" for name in names)):
            for step, value in curve.items():
                logs.setdefault(step, {})[key] = value
    return [logs[step] for step in sorted(logs)]


def total_loss(log: dict[str, float]) -> float:
    """What the channels of one line add up to."""
    tokens = {key.removesuffix("_tokens"): n for key, n in log.items() if key.endswith("_tokens")}
    return sum(log[f"{name}_loss"] * n for name, n in tokens.items()) / sum(tokens.values())
