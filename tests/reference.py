"""The naive oracle: what the metrics are, in Python floats and a loop over tokens.

It shares no code with the library. Batches are lists; a padded batch is one flat list of tokens
and one bound per row, as in the batch contract.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

IGNORED = -100


@dataclass
class Sums:
    """What is known of one channel."""

    tokens: int = 0
    samples: int = 0
    nonfinite: int = 0
    nonfinite_weights: int = 0
    correct: int = 0
    judged: int = 0
    losses: list[float] = field(default_factory=list)
    weighted: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)


@dataclass
class Batch:
    """One micro-batch: T tokens, and N sequences whose bounds are `bounds` [N + 1].

    channels: one name per sequence, None for a sequence without a channel. causal: the loss at
    position t of a row is about the token at t + 1; `row_length` says where rows end.
    """

    losses: list[float]
    channels: Sequence[str | None]
    bounds: Sequence[int]
    labels: Sequence[int] | None = None
    loss_mask: Sequence[float] | None = None
    correct: Sequence[bool] | None = None
    weights: Sequence[float] | None = None
    causal: bool = False
    row_length: int | None = None


def reference_sums(batches: Sequence[Batch]) -> dict[str, Sums]:
    """{channel: sums}; a token past the last bound, or without a channel, is `unlabeled`."""
    found: dict[str, Sums] = {}
    for batch in batches:
        for channel, start, end in _sequences(batch):
            sums = found.setdefault(channel or "unlabeled", Sums())
            for target in range(start, end):
                _add_token(sums, batch, target)
        for channel, start, end in zip(
            batch.channels, batch.bounds, batch.bounds[1:], strict=False
        ):
            found[channel or "unlabeled"].samples += end > start
    return found


def reference_metrics(
    batches: Sequence[Batch], key_format: str = "{channel}_{metric}"
) -> dict[str, float]:
    """The keys and values of `compute()` with all metrics asked for."""
    sums = {name: s for name, s in reference_sums(batches).items() if s.tokens}
    all_tokens = sum(s.tokens for s in sums.values())
    return {
        key_format.format(channel=channel, metric=metric): value
        for channel, s in sums.items()
        for metric, value in _values(s, all_tokens).items()
    }


def _sequences(batch: Batch) -> list[tuple[str | None, int, int]]:
    inside = list(zip(batch.channels, batch.bounds, batch.bounds[1:], strict=False))
    return [*inside, (None, batch.bounds[-1], len(batch.losses))]


def _add_token(sums: Sums, batch: Batch, target: int) -> None:
    at = target
    if batch.causal:
        row_length = batch.row_length or len(batch.losses)
        if target % row_length == 0:
            return  # nothing in its row predicts it
        at = target - 1
    if batch.labels is not None and batch.labels[target] == IGNORED:
        return
    if batch.loss_mask is not None and batch.loss_mask[target] == 0:
        return
    sums.tokens += 1
    if batch.correct is not None:
        sums.correct += batch.correct[at]
        sums.judged += 1
    if not math.isfinite(batch.losses[at]):
        sums.nonfinite += 1
        return
    sums.losses.append(batch.losses[at])
    if batch.weights is None:
        return
    if not math.isfinite(batch.weights[at]):
        sums.nonfinite_weights += 1
    else:
        sums.weighted.append(batch.weights[at] * batch.losses[at])
        sums.weights.append(batch.weights[at])


def _values(sums: Sums, all_tokens: int) -> dict[str, float]:
    values: dict[str, float] = {
        "tokens": float(sums.tokens),
        "samples": float(sums.samples),
        "share": sums.tokens / all_tokens,
    }
    if sums.losses:
        values["loss"] = math.fsum(sums.losses) / len(sums.losses)
        values["ppl"] = math.exp(values["loss"])
    if math.fsum(sums.weights):
        values["weighted_loss"] = math.fsum(sums.weighted) / math.fsum(sums.weights)
    if sums.judged:
        values["token_acc"] = sums.correct / sums.judged
    if sums.nonfinite + sums.nonfinite_weights:
        values["nonfinite"] = float(sums.nonfinite + sums.nonfinite_weights)
    return values
