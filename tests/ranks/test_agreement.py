"""Names that ranks share, and sums of digests that tell whether they are the same everywhere."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from channel_metrics import ChannelTable
from channel_metrics.ranks.agreed_names import (
    DIGEST_SIZE,
    AgreedNames,
    all_equal,
    as_bytes,
    digest_of,
)

LISTS = st.lists(st.text(max_size=3), max_size=3)


def words(values: list[int]) -> torch.Tensor:
    """A digest with the 16-bit words `values`."""
    return torch.tensor([*values, *(value**2 for value in values)], dtype=torch.float64)


@given(st.lists(LISTS, min_size=1, max_size=4))
def test_equal_digests_are_equal_lists(lists: list[list[str]]) -> None:
    summed = torch.stack([digest_of(names) for names in lists]).sum(dim=0)
    assert all_equal(summed, num_ranks=len(lists)) == all(names == lists[0] for names in lists)


def test_lists_that_look_alike_differ() -> None:
    alike = [[], [""], ["ab"], ["a", "b"], ["b", "a"], ['a","b'], ["a,b"], ["ä"], ["\\u00e4"]]
    alike += [["\ud800"], ["\udfff"]]  # what UTF-8 cannot encode, as surrogateescape makes it
    assert len({as_bytes(names) for names in alike}) == len(alike)
    assert len({tuple(digest_of(names).tolist()) for names in alike}) == len(alike)


@pytest.mark.parametrize("num_ranks", [2, 3, 16_384, 2**21])
def test_sums_over_many_ranks_are_exact(num_ranks: int) -> None:
    """Also where one rank of all differs by one in one word, and where words are the largest."""
    largest = [2**16 - 1] * 8
    summed = words(largest) * num_ranks
    assert summed.max() < 2**53
    assert [int(value) for value in summed] == [int(v) * num_ranks for v in words(largest)]
    assert all_equal(summed, num_ranks=num_ranks)
    for word in range(8):
        other = list(largest)
        other[word] -= 1
        assert not all_equal(words(largest) * (num_ranks - 1) + words(other), num_ranks=num_ranks)


def test_the_order_of_adding_does_not_matter() -> None:
    """A ring and a tree add in different orders; float64 must give the same whole numbers."""
    rng = random.Random(0)
    digests = torch.stack([words([rng.randrange(2**16) for _ in range(8)]) for _ in range(16_384)])
    exact = [sum(int(value) for value in column) for column in digests.t().tolist()]
    one_by_one = torch.zeros(DIGEST_SIZE, dtype=torch.float64)
    for digest in digests:
        one_by_one += digest
    halves = digests
    while len(halves) > 1:
        halves = halves[::2] + halves[1::2]
    assert one_by_one.tolist() == halves[0].tolist() == exact


def test_rows_follow_the_table_as_it_grows() -> None:
    agreed = AgreedNames(["b", "a"])
    table = ChannelTable(["a"])
    assert agreed.rows_of(table).tolist() == [0, 2]
    table.ids(["c", "b"])
    assert agreed.rows_of(table).tolist() == [0, 2, -1, 1]
    longer = agreed.extended(["c"])
    assert longer.names == ("b", "a", "c") and agreed.names == ("b", "a")
    assert longer.rows_of(table).tolist() == [0, 2, 3, 1]
    assert agreed.rows_of(ChannelTable(["b"])).tolist() == [0, 1]
    assert longer.rows_of(table) is longer.rows_of(table)
