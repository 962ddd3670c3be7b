"""A sequential test: has a loss risen? For many losses, at each window, with one rate of error.

Windows are merged in twos again and again, so scale j holds means of 2^j windows. At each scale,
with each second new mean, the last four means are compared with the twelve before them:

    t = (mean of the last 4 - mean of the 12 before) / (f * s * sqrt(1/4 + 1/12))

s^2 is half the mean square of the differences within pairs of neighbours, of the last 24 to 47
pairs. There is a rise where the chance of so large a t, by Student's distribution with one degree
of freedom per pair, is below the rate of this test. These rates add up to that of the whole run:

    rate of the run / (g (g + 1)) / n / ((j + 1) (j + 2)) / (i (i + 1))

for the i-th test at scale j of a loss that came up as one of n, the g-th such group; each of the
sums over g, j and i is 1.

Why the rate holds: let each mean be a level that never rises, plus independent normal noise of one
variance. Falling levels can only lower the numerator and raise s (a non-central chi-square is
larger than a central one). The differences within pairs are independent of the means of whole
pairs. So without falls t / f has Student's distribution, with them a lower one, and the chance that
any of the tests errs is at most the sum of their rates. The tests may depend on each other.

Neighbouring windows may correlate, because a model changes slowly: then s is too small, and the
means scatter more. f makes up for it if windows correlate by up to a half, and less the further
they are apart. `benchmarks/alarms.py` measures the rate there.

The state is plain values, for the checkpoint. Its size does not depend on the length of the run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Block", "Rise", "add", "forget", "group_rate", "merged", "new_state", "short", "tail"]

# Pairs of means that are compared: the last ones, and those before them.
_LAST, _BEFORE = 2, 6
# The squares of so many pairs are added up; then the sum before it is forgotten.
_PAIRS = 24
# The means of the last scale are those of 128 windows.
_SCALES = 8
# How much neighbouring windows may correlate.
_CORRELATION = 0.5
# A change of 1 % is what another seed brings. Smaller ones are no finding.
_LEAST = 0.01

Block = list[Any]
"""[loss, its weight, losses of partners ...]: a mean of windows. A partner may be None."""


@dataclass(frozen=True)
class Rise:
    """A loss that has risen.

    before, now: its means. windows: how many windows `now` is the mean of. partners: for each
    partner how much it has changed in the meantime; None if this is not known.
    """

    before: float
    now: float
    windows: int
    partners: tuple[float | None, ...]


def new_state(rate: float) -> dict[str, Any]:
    """The state of a new loss. rate: of all tests of this loss together."""
    return {"rate": rate, "scales": []}


def group_rate(rate: float, group: int, size: int) -> float:
    """The part of the rate of a run for each of the `size` losses of a group, from 1 on."""
    return rate / (group * (group + 1)) / size


def add(state: dict[str, Any], block: Block) -> Rise | None:
    """Add a window to a loss.

    Args:
        state: of the loss, which is changed.
        block: the values of the window; the loss must be finite.

    Returns:
        The rise that the test has found, if any. It is found again, until the old level is
        forgotten; `forget` does so at once.
    """
    scales, found = state["scales"], None
    for number in range(_SCALES):
        if number == len(scales):
            scales.append({"tests": 0})
            _empty(scales[number])
        scale = scales[number]
        first, scale["waiting"] = scale["waiting"], None
        if first is None:
            scale["waiting"] = block
            break
        merged_pair = merged(first, block)
        # The tests take both means of a pair for equally sure.
        pair = [short((first[0] + block[0]) / 2), *merged_pair[2:]]
        scale["pairs"] = [*scale["pairs"], pair][-_LAST - _BEFORE :]
        _add_square(scale, (block[0] - first[0]) ** 2)
        found = found or _tested(state["rate"], number, scale)
        block = merged_pair
    return found


def forget(state: dict[str, Any]) -> None:
    """Forget the windows so far. The count of the tests goes on, because their rates are used."""
    for scale in state["scales"]:
        _empty(scale)


def merged(first: Block, second: Block) -> Block:
    """The mean of two means: of the loss by weight, of each partner where it is known."""
    weight = first[1] + second[1]
    loss = short((first[0] * first[1] + second[0] * second[1]) / weight)
    return [loss, weight, *map(_mean, zip(first[2:], second[2:], strict=True))]


def _empty(scale: dict[str, Any]) -> None:
    """waiting: a mean without its neighbour. pairs: the means of pairs. squares: [sum, how many] of
    the differences within pairs, those before and those now."""
    scale.update(waiting=None, pairs=[], squares=[[0.0, 0], [0.0, 0]])


def _add_square(scale: dict[str, Any], square: float) -> None:
    before, (total, count) = scale["squares"]
    now = [total + square, count + 1]
    scale["squares"] = [before, now] if count + 1 < _PAIRS else [now, [0.0, 0]]


def _tested(rate: float, number: int, scale: dict[str, Any]) -> Rise | None:
    pairs = scale["pairs"]
    if len(pairs) < _LAST + _BEFORE:
        return None
    scale["tests"] += 1
    before, last = pairs[:_BEFORE], pairs[_BEFORE:]
    level = sum([pair[0] for pair in before]) / _BEFORE
    now = sum([pair[0] for pair in last]) / _LAST
    if now - level <= _LEAST * abs(level):
        return None
    tests = scale["tests"]
    allowed = rate / ((number + 1) * (number + 2)) / (tests * (tests + 1))
    squares, count = map(sum, zip(*scale["squares"], strict=True))
    error = _widening(2**number) * math.sqrt(squares / 2 / count)
    error *= math.sqrt(1 / (2 * _LAST) + 1 / (2 * _BEFORE))
    # One degree of freedom less is on the safe side, see `tail`.
    if error and tail((now - level) / error, count - count % 2) > allowed:
        return None
    changes = [
        _change(values[:_BEFORE], values[_BEFORE:])
        for values in zip(*(pair[1:] for pair in pairs), strict=True)
    ]
    return Rise(level, now, 2 * _LAST * 2**number, tuple(changes))


def tail(t: float, freedom: int) -> float:
    """The chance that a value of Student's distribution is above t > 0.

    freedom: even. The series is 26.7.4 in Abramowitz and Stegun, Handbook of Mathematical
    Functions.
    """
    angle = math.atan(t / math.sqrt(freedom))
    term = total = 1.0
    for number in range(1, freedom // 2):
        term *= math.cos(angle) ** 2 * (2 * number - 1) / (2 * number)
        total += term
    return max(0.0, (1 - math.sin(angle) * total) / 2)


@functools.cache
def _widening(size: int) -> float:
    """f for means of `size` windows, for noise in which windows k apart correlate by 0.5^k.

    It is the standard error of the difference that is tested / what it is taken for.
    """

    def variance(count: int) -> float:
        """Of the sum of consecutive values, each with the variance 1."""
        r = _CORRELATION
        return count * (1 + r) / (1 - r) - 2 * r * (1 - r**count) / (1 - r) ** 2

    def of_difference(first: int, second: int) -> float:
        """The variance of the difference of two means, over stretches side by side."""
        both = (variance(first + second) - variance(first) - variance(second)) / (first * second)
        return variance(first) / first**2 + variance(second) / second**2 - both

    true = of_difference(2 * _BEFORE * size, 2 * _LAST * size)
    taken = of_difference(size, size) / 2 * (1 / (2 * _LAST) + 1 / (2 * _BEFORE))
    return math.sqrt(true / taken)


def _change(before: Sequence[float | None], last: Sequence[float | None]) -> float | None:
    first, second = _mean(before), _mean(last)
    return None if first is None or second is None else second - first


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return short(sum(known) / len(known)) if known else None


def short(value: float) -> float:
    """A value with seven digits, for small checkpoints."""
    return float(f"{value:.7g}")
