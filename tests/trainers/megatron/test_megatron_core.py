"""The adapter for loops of one's own over megatron-core's schedules, on two real processes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from distributed import run_ranks


def on_rank() -> Any:
    warnings.simplefilter("ignore")
    from megatron_lm import cpu

    cpu.install()
    import megatron_core_ranks

    return megatron_core_ranks.everything()


@pytest.fixture(scope="module")
def ranks() -> list[Any]:
    return run_ranks(on_rank, 2)


@pytest.mark.parametrize("layout", ["dp2", "tp2", "pp2"])
@pytest.mark.parametrize("case", ["rows", "packs", "wrapped"])
def test_layouts_equal_the_naive_loop(ranks: list[Any], layout: str, case: str) -> None:
    for rank in ranks:
        found = rank[layout][case]
        assert found["values"] == pytest.approx(found["naive"], rel=1e-6)
        assert found["values"] == ranks[0][layout][case]["values"]
        # Three channels, and one without a name.
        assert len(found["values"]) == 5 * (3 + (case == "packs" or layout == "dp2"))


@pytest.mark.parametrize("layout", ["dp2", "tp2", "pp2"])
def test_a_step_that_the_optimizer_skips_is_left_out(ranks: list[Any], layout: str) -> None:
    assert [rank[layout]["rows"]["skipped"] for rank in ranks] == [{}, {}]


def test_context_parallel_ids_are_cut_as_the_labels_are(ranks: list[Any]) -> None:
    for rank in ranks:
        assert rank["cp2"]["values"] == pytest.approx(rank["cp2"]["naive"], rel=1e-6)
        assert rank["cp2"]["mine"] == 16


def test_correctness_of_a_vocabulary_in_parts(ranks: list[Any]) -> None:
    for rank in ranks:
        assert len(rank["correctness"]) == 96
        assert all(rank["correctness"])
