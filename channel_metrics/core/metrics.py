"""What the metrics are: sums of one channel over a window -> values. Pure Python floats.

| name | value |
|---|---|
| loss | nll / tokens, in nats; raw: before weights, label smoothing, loss scaling |
| weighted_loss | weighted nll / weight; only where tokens are weighted |
| token_acc | correct / tokens; a target that ties for the maximum counts as correct |
| ppl | exp(loss) |
| tokens, samples | supervised tokens, sequences in the window |
| share | tokens / tokens of all channels, `unlabeled` among them |
| tokens_total, samples_total | the same since the run began, across checkpoints; by trainers only |
| nonfinite | tokens whose loss is NaN or infinite; present when there are any |

Tokens with a non-finite loss count in `tokens` and `share`, and take no part in the loss.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from channel_metrics.errors import ConfigError

__all__ = [
    "ALL_METRICS",
    "DEFAULT_METRICS",
    "RUN_METRICS",
    "WINDOW_METRICS",
    "channel_values",
    "check_metrics",
]

WINDOW_METRICS = ("loss", "weighted_loss", "token_acc", "ppl", "tokens", "samples", "share")
RUN_METRICS = ("tokens_total", "samples_total")
ALL_METRICS = (*WINDOW_METRICS, *RUN_METRICS)
DEFAULT_METRICS = ("loss", "token_acc", "tokens", "share")


def check_metrics(metrics: Iterable[str], known: Sequence[str] = WINDOW_METRICS) -> tuple[str, ...]:
    """The metrics, each once; raises `ConfigError` for one that is not `known`."""
    chosen = tuple(dict.fromkeys(metrics))
    for name in chosen:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"unknown metric {name!r}; {hint}Known: {', '.join(known)}.")
    return chosen


def channel_values(
    sums: Mapping[str, float], all_tokens: float, metrics: Iterable[str]
) -> dict[str, float]:
    """The values of one channel from its sums, by column name (see `statistics.COLUMNS`).

    A value without a denominator (accuracy that nobody measured) is absent. `all_tokens` are
    the supervised tokens of all channels in the window.
    """
    chosen: dict[str, float] = {}
    for name in metrics:
        value = _VALUES[name](sums, all_tokens)
        if value is not None:
            chosen[name] = value
    if sums["nonfinite"]:
        chosen["nonfinite"] = sums["nonfinite"]
    return chosen


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None


def _loss(sums: Mapping[str, float]) -> float | None:
    return _ratio(sums["nll"], sums["tokens"] - sums["nonfinite"])


def _ppl(sums: Mapping[str, float]) -> float | None:
    loss = _loss(sums)
    try:
        return None if loss is None else math.exp(loss)
    except OverflowError:
        return math.inf


# One function per metric: with many channels, what nobody asked for is a large part of the time.
_VALUES: dict[str, Callable[[Mapping[str, float], float], float | None]] = {
    "loss": lambda sums, all_tokens: _loss(sums),
    "weighted_loss": lambda sums, all_tokens: _ratio(sums["weighted_nll"], sums["weight"]),
    "token_acc": lambda sums, all_tokens: _ratio(sums["correct"], sums["judged"]),
    "ppl": lambda sums, all_tokens: _ppl(sums),
    "tokens": lambda sums, all_tokens: sums["tokens"],
    "samples": lambda sums, all_tokens: sums["samples"],
    "share": lambda sums, all_tokens: _ratio(sums["tokens"], all_tokens),
}
