"""Alerts that need no test of a loss: how sure they are, by formula and by simulation."""

from __future__ import annotations

import math
import random

import pytest

from channel_metrics.acting import Budget
from channel_metrics.observers.window_alerts import chance_of_absence, evidence, shares, starved


def test_the_chance_of_an_absence() -> None:
    assert chance_of_absence(1, 1, 5) == pytest.approx(1), "nothing is known yet"
    # Of the 6 orders of two windows with it and two without, one ends with these two.
    assert chance_of_absence(3, 3, 2) == pytest.approx(1 / 6)
    assert chance_of_absence(4, 3, 1) == pytest.approx(3 / 6)


def test_at_most_the_stated_rate_of_runs_has_a_false_absence() -> None:
    """Nine channels, in a tenth to nine tenths of the windows: 200 runs of 200 windows."""
    names, runs = [f"c{i}" for i in range(1, 10)], 0
    for seed in range(200):
        draw, presence = random.Random(seed), dict[str, list[int]]()
        runs += any(
            reason.text
            for _ in range(200)
            for reason in starved(
                {name: float(draw.random() < int(name[1]) / 10) for name in names}, 0.05, presence
            )
        )
    assert runs <= 10, "a rate of 0.05"


def test_labels_of_axes_are_not_in_the_whole_of_shares() -> None:
    """Each record has a label, which would be counted as a second channel."""
    totals = {name: {"samples_total": 1000} for name in ("a", "lang/en")}
    found = shares(
        totals, lambda row: "/" in row, Budget(ratios={"a": 1}, unit="samples"), 0.05, 0.05
    )
    assert list(found) == []


def test_the_evidence_against_a_share() -> None:
    # All chances of two heads are equally likely beforehand: 1/3 on average, 1/4 for a fair coin.
    assert evidence(2, 2, 0.5) == pytest.approx(math.log((1 / 3) / (1 / 4)))
    assert evidence(1, 2, 0.25) == pytest.approx(math.log((1 / 6) / (0.25 * 0.75)))
    assert evidence(3, 3, 1.0) == 0.0 and evidence(2, 3, 1.0) == math.inf


def test_the_evidence_is_a_martingale_with_mean_one() -> None:
    for target in (0.1, 0.5):
        mean = sum(
            math.comb(9, k) * target**k * (1 - target) ** (9 - k) * math.exp(evidence(k, 9, target))
            for k in range(10)
        )
        assert mean == pytest.approx(1)
