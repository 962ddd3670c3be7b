"""Loops of one's own that lie, die, and leave channels out: two real processes, a naive loop."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import pytest
from distributed import run_ranks

COUNTS = ("_tokens", "_samples")


def on_rank() -> Any:
    warnings.simplefilter("ignore")
    from megatron_lm import cpu

    cpu.install()
    import megatron_gaps_ranks

    return megatron_gaps_ranks.everything()


@pytest.fixture(scope="module")
def ranks() -> list[Any]:
    return run_ranks(on_rank, 2)


def check(values: dict[str, float], wanted: dict[str, float]) -> None:
    """All but the totals."""
    assert len(wanted) == 5 * 4
    found = {key: value for key, value in values.items() if not key.endswith("_total")}
    assert found == pytest.approx(wanted, rel=1e-6)


def test_a_loss_function_that_lies_is_told_once(ranks: list[Any]) -> None:
    """On one of two ranks, by one per cent; the values are those of the tokens all the same."""
    honest, lying = (
        ["".join(rank["lie"][kind]).count("do not add up") for rank in ranks]
        for kind in ("honest", "lying")
    )
    assert max(honest) == 0 and max(lying) == 1
    for rank in ranks:
        for values, wanted in rank["lie"]["windows"]:
            check(values, wanted)


def test_an_evaluation_that_dies_leaves_nothing(ranks: list[Any]) -> None:
    """Nor does a pass for data other than losses."""
    for rank in ranks:
        found = rank["evaluation"]
        assert found["died"] == 1 and found["outputs"] == 2
        check(*found["eval"])
        check(*found["train"])


def test_totals_go_on_after_a_window_without_the_channel(ranks: list[Any]) -> None:
    for rank in ranks:
        so_far: Counter[str] = Counter()
        for values, wanted in rank["totals"]:
            present = {key: int(n) for key, n in wanted.items() if key.endswith(COUNTS)}
            so_far.update(present)
            assert {key: values[f"{key}_total"] for key in present} == {
                key: so_far[key] for key in present
            }
        assert ["lvis_tokens" in wanted for _, wanted in rank["totals"]] == [True, False, True]


def test_a_channel_that_is_absent_has_no_total(ranks: list[Any]) -> None:
    values, wanted = ranks[0]["totals"][1]
    totals = {key for key in values if key.endswith("_total")}
    assert totals == {f"{key}_total" for key in wanted if key.endswith(COUNTS)}


def test_a_window_without_any_channel_is_told(ranks: list[Any]) -> None:
    said = [message for rank in ranks for message in rank["unlabeled"]]
    assert any("all tokens" in message and "unlabeled" in message for message in said)


def test_values_in_the_middle_of_a_window_count_nothing_twice(ranks: list[Any]) -> None:
    for rank in ranks:
        values, wanted = rank["peek"]["middle"]
        ratios = {key: n for key, n in wanted.items() if not key.endswith(COUNTS)}
        assert {key: values[key] for key in ratios} == pytest.approx(ratios, rel=1e-6)
        check(*rank["peek"]["end"])
        values, wanted = rank["peek"]["end"]
        counts = {key: n for key, n in wanted.items() if key.endswith(COUNTS)}
        assert {key: values[f"{key}_total"] for key in counts} == counts
