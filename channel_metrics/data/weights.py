"""How the weights of channels follow from what a window has counted. No torch.

A rule gives a score to each channel of the window. `followed` makes weights of the scores: with
smoothing, and within bounds. Channels that are not in the window keep their weights: what is not
known of them is not guessed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

__all__ = ["POINTS", "Point", "add_point", "bounded", "excess_scores", "followed", "speed"]

POINTS = 64
"""How many points the learning curve of a channel has at most."""

_LEAST_POINTS = 4
_FLOORS = 20
_STEEPEST = 0.8
_TINY = 1e-12

Weights = Mapping[str, float]
# [tokens * log(tokens of the run so far), nll, tokens]: sums, so that two points can be added.
Point = list[float]


def followed(
    weights: Weights, scores: Weights, *, smoothing: float, least: float, most: float
) -> dict[str, float]:
    """The weights that follow from scores.

    Args:
        weights: those so far; their sum is 1.
        scores: {channel: 0 or more}. The channels in it share the weight that they have so far
            in proportion to their scores.
        smoothing: the part of the old weights that is kept, 0 to below 1.
        least, most: bounds of each weight.
    """
    whole = math.fsum(scores.values())
    share = math.fsum(weights[name] for name in scores)
    target = {name: share * score / whole for name, score in scores.items()} if whole else {}
    new = {n: smoothing * w + (1 - smoothing) * target.get(n, w) for n, w in weights.items()}
    return bounded(new, least, most)


def bounded(weights: Weights, least: float, most: float) -> dict[str, float]:
    """Weights with the sum 1, within bounds. Those inside the bounds keep their ratios.

    >>> {n: round(w, 9) for n, w in bounded({"a": 0.9, "b": 0.08, "c": 0.02}, 0.1, 0.6).items()}
    {'a': 0.6, 'b': 0.3, 'c': 0.1}
    """
    given = {name: max(weight, _TINY) for name, weight in weights.items()}
    low, high = 0.0, 1.0 / min(given.values())
    for _ in range(100):  # halves the interval of the factor
        factor = (low + high) / 2
        found = {n: min(max(factor * w, least), most) for n, w in given.items()}
        low, high = (low, factor) if math.fsum(found.values()) > 1 else (factor, high)
    whole = math.fsum(found.values())
    return {name: weight / whole for name, weight in found.items()}


def excess_scores(weights: Weights, excess: Weights, rate: float) -> dict[str, float]:
    """One step of exponentiated gradient, as in DoReMi: weight * exp(rate * excess above 0)."""
    return {n: weights[n] * math.exp(min(rate * max(e, 0.0), 500.0)) for n, e in excess.items()}


def add_point(points: list[Point], so_far: float, nll: float, tokens: float) -> None:
    """Add what a window has counted. If there are too many points, neighbours are added up."""
    points.append([tokens * math.log(so_far), nll, tokens])
    if len(points) > POINTS:
        pairs = zip(points[::2], points[1::2], strict=False)
        rest = points[len(points) // 2 * 2 :]
        points[:] = [[*map(math.fsum, zip(*pair, strict=True))] for pair in pairs] + rest


def speed(points: Sequence[Point], so_far: float) -> float | None:
    """How fast the loss falls, in nats per token of the run, by a power law through the points.

    The law is loss = floor + factor * n ** -power, where n are the tokens of the run so far. Of
    some floors below the lowest loss, the one with the smallest squared error is taken; the rest
    is a straight line through the logarithms. None if there are too few points.
    """
    if len(points) < _LEAST_POINTS:
        return None
    curve = [(at / tokens, nll / tokens, tokens) for at, nll, tokens in points]
    lowest = min(loss for _, loss, _ in curve)
    if lowest <= 0:
        return 0.0
    # From 0 on, nearer and nearer to the lowest loss.
    fits = [_fit(curve, lowest * (1 - 0.5 ** (k / 2))) for k in range(_FLOORS)]
    _, power, factor = min(fits)
    return float(power * factor * so_far ** (-power - 1))


def _fit(curve: Sequence[tuple[float, float, float]], floor: float) -> tuple[float, float, float]:
    """(squared error of the loss, power, factor) of the law with this floor."""
    whole = math.fsum(tokens for *_, tokens in curve)
    xs = [(at, math.log(loss - floor), tokens) for at, loss, tokens in curve]
    x = math.fsum(t * a for a, _, t in xs) / whole
    y = math.fsum(t * b for _, b, t in xs) / whole
    spread = math.fsum(t * (a - x) ** 2 for a, _, t in xs)
    slope = math.fsum(t * (a - x) * (b - y) for a, b, t in xs) / spread if spread else 0.0
    power = min(max(-slope, 0.0), _STEEPEST)
    factor = math.exp(y + power * x)
    error = math.fsum(
        t * (floor + factor * math.exp(-power * at) - loss) ** 2 for at, loss, t in curve
    )
    return error, power, factor
