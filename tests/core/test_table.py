"""`SumTable`: sums of named columns per label, whatever is counted."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from channel_metrics import ChannelError, ChannelMetricsError
from channel_metrics.core.labels import LabelTable
from channel_metrics.core.schema import Column, Metric, Schema, ratio
from channel_metrics.core.table import SumTable, values_by_channel

COLUMNS = ("pairs", "margin")
DTYPES = [torch.float64, torch.float32]


def new(*names: str, columns: tuple[str, ...] = COLUMNS, **options: Any) -> SumTable:
    return SumTable(LabelTable(names), columns, **options)


def pairs(*margins: float) -> dict[str, torch.Tensor]:
    return {"pairs": torch.ones(len(margins)), "margin": torch.tensor(margins)}


def rows(table: SumTable) -> dict[str, list[float]]:
    return dict(zip(("unlabeled", *table.labels.names), table.sums().tolist(), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ids_and_names(dtype: torch.dtype) -> None:
    table = new("a", "b", dtype=dtype)
    table.add(torch.tensor([1, 0, -1]), pairs(1.5, 2.0, 4.0))
    table.add(["b", None, "new", "unlabeled"], pairs(0.5, 8.0, 16.0, 32.0))
    assert rows(table) == {"unlabeled": [3, 44], "a": [1, 2], "b": [2, 2], "new": [1, 16]}
    assert table.sums().dtype == torch.float64 and table.sums().device.type == "cpu"
    table.add([], pairs())
    assert table.reset() is table
    assert not table.sums().any() and table.labels.names == ("a", "b", "new")


def test_columns_that_are_not_given_or_not_known() -> None:
    table = new("a")
    table.add(["a", "a"], {"margin": torch.tensor([1.0, 2.0]), "other": torch.ones(2)})
    table.add(["a"], {"pairs": torch.tensor([True])})
    assert rows(table) == {"unlabeled": [0, 0], "a": [1, 3]}


def test_what_names_do_that_are_not_in_the_table() -> None:
    unlabeled = SumTable(LabelTable(["a"], unknown="unlabeled"), COLUMNS)
    unlabeled.add(["a", "b"], pairs(1.0, 2.0))
    assert rows(unlabeled) == {"unlabeled": [1, 2], "a": [1, 1]}
    strict = SumTable(LabelTable(["a"], unknown="error"), COLUMNS)
    with pytest.raises(ChannelError, match="'b' is not in the declared table"):
        strict.add(["a", "b"], pairs(1.0, 2.0))
    assert not strict.sums().any()


@pytest.mark.parametrize(
    ("labels", "values", "message"),
    [
        (
            ["a"],
            pairs(1.0, 2.0),
            "one value per label and column for 1 labels, but got {'pairs': [2]",
        ),
        (["a", "a"], {**pairs(1.0, 2.0), "margin": torch.ones(3)}, "'margin': [3]}"),
        (["a", "new"], {**pairs(1.0, 2.0), "margin": torch.ones(2, 1)}, "'margin': [2, 1]}"),
        (["a"], {}, "for 1 labels, but got {}"),
        (torch.tensor([0, 1]), pairs(1.0, 2.0), "-1 (unlabeled) or 0 to 0, but range from 0 to 1"),
        (torch.tensor([0.0]), pairs(1.0), "a list of names, but is torch.float32"),
        ("a", pairs(1.0), "is the string 'a'; pass a list"),
    ],
)
def test_refuses_and_loses_nothing(labels: Any, values: Any, message: str) -> None:
    table = new("a")
    table.add(["a"], pairs(7.0))
    with pytest.raises(ChannelError, match=re.escape(message)):
        table.add(labels, values)
    assert rows(table) == {"unlabeled": [0, 0], "a": [1, 7]} and "new" not in table.labels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other_dtype", DTYPES)
def test_merge_matches_labels_and_columns_by_name(
    dtype: torch.dtype, other_dtype: torch.dtype
) -> None:
    table = new("a", "b", dtype=dtype)
    table.add(["a", "b", None], pairs(1.0, 2.0, 3.0))
    other = new("c", "b", columns=("margin", "unknown here", "pairs"), dtype=other_dtype)
    other.add(["b", "c", None], {**pairs(10.0, 20.0, 30.0), "unknown here": torch.ones(3)})
    other.compare(torch.tensor(1.0), torch.tensor(4.0))
    table.merge(other)
    assert rows(table) == {"unlabeled": [2, 33], "a": [1, 1], "b": [2, 12], "c": [1, 20]}
    assert table.mismatch() == 0.75


def test_merge_of_tables_that_share_labels_but_not_columns() -> None:
    labels = LabelTable(["a"])
    table, other = SumTable(labels, COLUMNS), SumTable(labels, COLUMNS[::-1])
    other.add(["a"], pairs(5.0))
    table.merge(other)
    assert rows(table) == {"unlabeled": [0, 0], "a": [1, 5]}


def test_tables_that_share_labels_grow_together() -> None:
    labels = LabelTable()
    first, second = SumTable(labels, COLUMNS), SumTable(labels, COLUMNS)
    first.add(["a"], pairs(1.0))
    second.add(["b", "a"], pairs(2.0, 3.0))
    first.merge(second)
    second.reset()
    second.add(["c"], pairs(4.0))
    second.merge(first)
    assert rows(second) == {"unlabeled": [0, 0], "a": [2, 4], "b": [1, 2], "c": [1, 4]}


def test_to_a_device_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """MPS cannot be had here; what moves there are the two tensors that are looked at."""
    table = new("a")
    table.add(["a"], {"pairs": torch.tensor([2.0**24 + 1], dtype=torch.float64)})
    to = torch.Tensor.to

    def without_mps(tensor: torch.Tensor, device: Any, *args: Any) -> torch.Tensor:
        return to(tensor, "cpu" if device == torch.device("mps") else device, *args)

    monkeypatch.setattr(torch.Tensor, "to", without_mps)
    assert table.to("mps").dtype == torch.float32
    for tensor in (table._sums, table._lost, table._mismatch):
        assert tensor.dtype == torch.float32
    table.add(["a"], {"pairs": torch.ones(1)})
    assert rows(table)["a"] == [2**24 + 2, 0]


@given(st.lists(st.integers(1, 2**23), min_size=1, max_size=30))
def test_float32_keeps_what_one_number_loses(counts: list[int]) -> None:
    table = new("a", dtype=torch.float32)
    for count in counts:
        table.add(["a"], {"pairs": torch.tensor([count], dtype=torch.float32)})
    assert table.sums()[1, 0].item() == sum(counts)
    again = new("a", dtype=torch.float32)
    again.merge(table)
    again.load_state_dict(table.state_dict()).merge(table)
    assert again.sums()[1, 0].item() == 2 * sum(counts)


def test_a_state_names_its_columns() -> None:
    table = new("a", "b")
    table.add(["a", "b", None], pairs(1.0, 2.0, 3.0))
    table.compare(torch.tensor(1.0), torch.tensor(2.0))
    state = table.state_dict()
    assert (state["columns"], state["names"]) == (["pairs", "margin"], ["a", "b"])
    later = new("b", columns=("new column", "margin", "pairs"))
    later.add(["b"], {"new column": torch.ones(1)})
    later.load_state_dict(state)
    assert rows(later) == {"unlabeled": [0, 3, 1], "b": [0, 2, 1], "a": [0, 1, 1]}
    assert later.mismatch() == 0.5
    earlier = new(columns=("pairs",)).load_state_dict(state)
    assert rows(earlier) == {"unlabeled": [1], "a": [1], "b": [1]}


@pytest.mark.parametrize("change", [{"version": 0}, {"version": None}, {"columns": None}])
def test_states_without_columns_are_refused(change: dict[str, Any]) -> None:
    table = new("a")
    table.add(["a"], pairs(1.0))
    state = {**table.state_dict(), **change}
    state = {key: value for key, value in state.items() if value is not None}
    with pytest.raises(ChannelMetricsError, match="written by another version"):
        table.load_state_dict(state)
    assert rows(table)["a"] == [1, 1]


@pytest.mark.parametrize(
    ("ours", "theirs", "mismatch"),
    [(1.0, 1.0, 0), (1.0, 0.5, 0.5), (0.0, 0.0, 0), (0.0, 1.0, 1), (float("nan"), 1.0, 0),
     (1.0, float("inf"), 0)],
)  # fmt: skip
def test_compare(ours: float, theirs: float, mismatch: float) -> None:
    table = new("a")
    table.compare(torch.tensor(ours), torch.tensor(theirs))
    table.compare(torch.tensor(2.0), torch.tensor(2.0))
    assert table.mismatch() == mismatch
    assert table.reset().mismatch() == 0


def test_values_by_channel() -> None:
    schema = Schema("pairs", count="pairs")
    schema.register(
        Column("margin", "reward", ""),
        Column("pairs", "pairs", ""),
        Metric("mean", ("margin", "pairs"), lambda s: ratio(s["margin"], s["pairs"])),
        Metric("share", ("pairs", "all"), lambda s: ratio(s["pairs"], s["all"])),
    )
    sums = torch.tensor([[4.0, 1.0], [3.0, 0.0], [6.0, 3.0]])
    values = values_by_channel(schema, ["none", "b"], sums, schema.metrics)
    # One without pairs is absent, whatever else it has.
    assert values == {
        "b": {"mean": 2.0, "share": 0.75},
        "unlabeled": {"mean": 4.0, "share": 0.25},
    }
    assert list(values) == ["b", "unlabeled"]
