"""The union of the names of all ranks: what comes out, and how much is sent for it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.lockstep import in_lockstep
from channel_metrics.ranks import name_union
from channel_metrics.ranks.name_union import FIRST_BYTES, union_of_names

NAMES = st.one_of(st.text(max_size=4), st.sampled_from(["a", "b", "ü", '"', "\ud800", "\n"]))


def union(lists: list[list[str]]) -> tuple[tuple[str, ...], list[int]]:
    """The union that all ranks come to, and the bytes of the vectors they sent."""
    ranks = (union_of_names(names, rank, len(lists)) for rank, names in enumerate(lists))
    results, sent = in_lockstep(ranks)
    assert all(result == results[0] for result in results)
    found = results[0]
    assert isinstance(found, tuple)
    return found, sent


@pytest.mark.parametrize("limit", [1, 40, FIRST_BYTES])
@given(lists=st.lists(st.lists(NAMES, max_size=5), min_size=1, max_size=6))
def test_all_ranks_come_to_the_sorted_union(limit: int, lists: list[list[str]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(name_union, "FIRST_BYTES", limit)
        found, _ = union(lists)
    assert found == tuple(sorted(set().union(*lists)))


def test_one_rank_with_one_name() -> None:
    lists: list[list[str]] = [[] for _ in range(500)]
    lists[321] = ["new"]
    assert union(lists) == (("new",), [500 * 24, 8])


def test_what_all_ranks_share_is_not_sent_by_all() -> None:
    """10,000 names everywhere, and one more of its own at each of 300 ranks: 0.2 MB each."""
    shared = [f"channel{i:06}" for i in range(10_000)]
    found, sent = union([[*shared, f"own{rank:03}"] for rank in range(300)])
    assert len(found) == 10_300
    index, payload = sent[::2], sent[1::2]
    assert index == [300 * 24] * 2
    # The first round as far as its limit, the second has what nobody has sent: 8 + 4 bytes each.
    assert FIRST_BYTES // 2 < payload[0] <= FIRST_BYTES
    assert payload[1] <= 300 * 16


def test_one_list_beyond_the_limit_is_sent_all_the_same() -> None:
    names = [f"channel{i:06}" for i in range(FIRST_BYTES // 8)]
    found, sent = union([names, names, []])
    assert len(found) == len(names) and sent[0] == 3 * 24
    assert len(sent) == 2 and sent[1] > FIRST_BYTES


def test_the_limit_doubles() -> None:
    """Names of their own at all ranks: few rounds, each sends as much as its limit allows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(name_union, "FIRST_BYTES", 16)
        found, sent = union([[f"{rank:010}"] for rank in range(20)])
    assert len(found) == 20
    # 16 bytes for each of 20 names.
    assert sent[1::2] == [16, 32, 64, 128, 80]
