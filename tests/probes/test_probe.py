"""The parts of a probe that know no framework: config, keys, choice of samples, budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from channel_metrics.core.labels import LabelTable
from channel_metrics.core.table import SumTable
from channel_metrics.errors import ConfigError
from channel_metrics.probes.probe import (
    PROBE_COLUMNS,
    ProbeBudget,
    ProbeConfig,
    choose,
    deal,
    probe_keys,
)
from channel_metrics.ranks.agreed_names import Agreement
from channel_metrics.ranks.ranks import Ranks
from channel_metrics.ranks.sync import sum_over_ranks


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"every": 0}, "every must be a whole number of at least 1, but is 0"),
        ({"every": True}, "every must be"),
        ({"batches": 1.5}, "batches must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"max_overhead": 0}, "max_overhead must be above 0"),
        ({"max_overhead": float("inf")}, "max_overhead"),
        ({"max_overhead": "5%"}, "max_overhead"),
        ({"seed": None}, "seed"),
        ({"on_error": "ignore"}, "on_error"),
        ({"evry": 3}, "did you mean 'every'"),
    ],
)
def test_bad_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ProbeConfig.from_mapping(values)


def test_config_from_a_mapping() -> None:
    given_values: dict[str, Any] = {
        "every": 5,
        "batches": 2,
        "max_overhead": None,
        "resample": True,
    }
    assert ProbeConfig.from_mapping(given_values) == ProbeConfig(**given_values)


def test_keys_of_datasets() -> None:
    assert probe_keys(["my set"])["my set"] == {
        "loss": "dataset_my_set_loss",
        "loss_low": "dataset_my_set_loss_low",
        "loss_high": "dataset_my_set_loss_high",
        "token_acc": "dataset_my_set_token_acc",
        "token_acc_low": "dataset_my_set_token_acc_low",
        "token_acc_high": "dataset_my_set_token_acc_high",
        "nonfinite": "dataset_my_set_nonfinite",
    }


@pytest.mark.parametrize(
    ("names", "message"),
    [(["a b", "a_b"], "'a b' and 'a_b'"), ([""], "non-empty name"), ([3], "non-empty name")],
)
def test_names_that_cannot_be_are_refused(names: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        probe_keys(names)


def test_choice_is_fixed_by_seed_name_and_draw() -> None:
    first = choose(100, 8, seed=0, name="a")
    assert first == choose(100, 8, seed=0, name="a") == sorted(set(first))
    others = [
        choose(100, 8, seed=1, name="a"),
        choose(100, 8, seed=0, name="b"),
        choose(100, 8, seed=0, name="a", draw=1),
    ]
    assert first not in others and len({tuple(other) for other in others}) == 3
    assert choose(3, 8, seed=0, name="a") == [0, 1, 2]


@given(st.integers(0, 200), st.integers(1, 6), st.integers(1, 5))
def test_every_sample_is_dealt_once(count: int, num_forwards: int, num_ranks: int) -> None:
    parts = [
        part
        for rank in range(num_ranks)
        for part in deal(count, num_forwards=num_forwards, num_ranks=num_ranks, rank=rank)
    ]
    assert len(parts) == num_forwards * num_ranks
    assert [position for part in parts for position in part] == list(range(count))
    sizes = {len(part) for part in parts}
    assert max(sizes) - min(sizes) <= 1


def test_sums_come_back_by_name_with_the_clock() -> None:
    rows = torch.arange(24, dtype=torch.float64).view(2, 12)
    table = SumTable(LabelTable(["canary", "mmlu"]), PROBE_COLUMNS)
    table.add(["canary", "mmlu"], dict(zip(PROBE_COLUMNS, rows.unbind(1), strict=True)))
    found = sum_over_ranks(table, Agreement(), Ranks(alone=True), riders=(3.0, 4.0))
    assert found.names == ("canary", "mmlu") and found.riders == (3.0, 4.0)
    assert torch.equal(found.sums[1:], rows) and not found.sums[0].any()


# ---- the budget -----------------------------------------------------------------------------


def test_without_a_limit_every_multiple_is_probed() -> None:
    budget = ProbeBudget(10, None)
    for step in (0, 10, 20):
        assert budget.next_step == (step or 10)
        budget.add(step, train_seconds=1.0, probe_seconds=100.0)
    assert budget.next_step == 30


def test_a_run_that_goes_on_keeps_to_the_multiples() -> None:
    assert ProbeBudget(10, None, step=25).next_step == 30
    assert ProbeBudget(10, None, step=30).next_step == 40


def run_budget(
    every: int, limit: float, step_seconds: float, costs: list[float], num_steps: int
) -> tuple[list[int], ProbeBudget]:
    """The steps that are probed; the i-th probe costs costs[i], later ones the last."""
    budget = ProbeBudget(every, limit)
    probed: list[int] = []
    for step in range(num_steps + 1):
        if step in (0, budget.next_step):
            since = (step - probed[-1]) * step_seconds if probed else 0.0
            cost = costs[min(len(probed), len(costs) - 1)]
            budget.add(step, train_seconds=since, probe_seconds=cost)
            probed.append(step)
    return probed, budget


def test_cheap_probes_run_as_often_as_asked() -> None:
    probed, budget = run_budget(10, 0.05, step_seconds=1.0, costs=[0.2], num_steps=100)
    assert probed == list(range(0, 101, 10))
    assert budget.overhead == pytest.approx(11 * 0.2 / 100)


@given(st.integers(1, 20), st.floats(0.01, 0.5), st.floats(0.01, 2), st.floats(0.01, 3))
def test_overhead_stays_within_the_limit(
    every: int, limit: float, step_seconds: float, cost: float
) -> None:
    """From the third probe on: the first two run before anything was measured."""
    budget = ProbeBudget(every, limit)
    budget.add(0, train_seconds=0.0, probe_seconds=cost)
    step = 0
    for number in range(8):
        since, step = budget.next_step - step, budget.next_step
        assert step % every == 0 and since > 0
        budget.add(step, train_seconds=since * step_seconds, probe_seconds=cost)
        assert budget.overhead is not None
        if number >= 1:
            assert budget.overhead <= limit * (1 + 1e-9)
            # And no probe was left out that the budget had room for.
            spent = (number + 2) * cost
            before = (step - every) * step_seconds
            assert since == every or spent / before > limit * (1 - 1e-9)


def test_a_dear_first_probe_is_paid_back() -> None:
    """One that compiles something: after it, the limit holds again, and every N in the end."""
    probed, budget = run_budget(10, 0.1, step_seconds=0.1, costs=[2.0, 0.05], num_steps=1000)
    # With the next one, probes take 2.1 seconds: a tenth of 21 seconds, of 210 steps.
    assert probed[:4] == [0, 10, 210, 220]
    assert budget.overhead is not None and budget.overhead < 0.1
