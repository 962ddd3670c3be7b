"""The accumulator against the oracle, the monoid laws, state, and what it refuses."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import Batch, reference_metrics
from strategies import NAMES, Case, accumulate, cases

from channel_metrics import ChannelLossAccumulator, ChannelMetricsError, ChannelTable, ConfigError
from channel_metrics.core.boundaries import token_channel_ids
from channel_metrics.core.schema import TOKENS, Column

streams = st.lists(cases(), max_size=4)
finite_streams = st.lists(cases(finite=True), min_size=1, max_size=4)


def assert_same_sums(
    left: ChannelLossAccumulator, right: ChannelLossAccumulator, rtol: float = 1e-13
) -> None:
    assert set(left.table.names) == set(right.table.names)
    rows = [0, *(right.table.ids([name])[0] + 1 for name in left.table.names)]
    torch.testing.assert_close(left.sums(), right.sums()[rows], rtol=rtol, atol=0)


@given(streams, st.sampled_from(["names", "ids", "int32 ids"]))
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_equals_the_oracle(dtype: torch.dtype, stream: list[Case], form: str) -> None:
    stream = [case.in_dtype(dtype) for case in stream]
    accumulator = ChannelLossAccumulator(NAMES, metrics=TOKENS.window_metrics)
    for case in stream:
        given = case.tensors(dtype)
        if form != "names":
            ids = torch.tensor(accumulator.table.ids(given["channels"]), dtype=torch.int64)
            given["channels"] = ids if form == "ids" else ids.int()
        accumulator.update(**given)
    expected = reference_metrics([case.batch for case in stream])
    assert accumulator.compute() == pytest.approx(expected, rel=1e-9)


@given(finite_streams)
def test_float32_fallback_equals_the_oracle(stream: list[Case]) -> None:
    metrics = [name for name in TOKENS.window_metrics if name != "ppl"]  # exp() of up to 100
    accumulator = ChannelLossAccumulator(NAMES, metrics=metrics, dtype=torch.float32)
    for case in stream:
        accumulator.update(**case.tensors(torch.float32))
    reference = reference_metrics([case.batch for case in stream])
    expected = {key: value for key, value in reference.items() if not key.endswith("_ppl")}
    assert accumulator.compute() == pytest.approx(expected, rel=1e-5)


@given(streams)
def test_token_ids_equal_sequence_ids(stream: list[Case]) -> None:
    by_token = ChannelLossAccumulator(
        NAMES, metrics=("loss", "weighted_loss", "token_acc", "share")
    )
    by_sequence = ChannelLossAccumulator(NAMES, metrics=by_token.metrics)
    for case in stream:
        given = case.tensors()
        ids = torch.tensor(by_token.table.ids(given["channels"]), dtype=torch.int64)
        by_sequence.update(**given)
        bounds = torch.tensor(case.batch.bounds)
        expanded = token_channel_ids(ids, bounds, len(case.batch.losses)).view(case.shape)
        by_token.update(**{**given, "channels": expanded, "cu_seqlens": None})
    assert by_token.compute() == pytest.approx(by_sequence.compute(), rel=1e-12)


@given(finite_streams)
def test_shares_add_up_and_losses_weigh_to_the_loss_of_all(stream: list[Case]) -> None:
    accumulator = accumulate(stream)
    values = accumulator.compute_by_channel()
    if values:
        assert sum(v["share"] for v in values.values()) == pytest.approx(1)
    tokens = sum(v["tokens"] for v in values.values())
    weighed = sum(v["loss"] * v["tokens"] for v in values.values())
    assert tokens == accumulator.sums()[:, 0].sum()
    assert weighed == pytest.approx(accumulator.sums()[:, 2].sum().item(), rel=1e-12)


@given(streams)
def test_identity(stream: list[Case]) -> None:
    filled = accumulate(stream)
    empty = ChannelLossAccumulator()
    assert_same_sums(copy.deepcopy(filled).merge_state([empty]), filled, rtol=0)
    assert_same_sums(empty.merge_state([filled]), filled, rtol=0)


@given(streams, streams, streams)
def test_associative_and_commutative(a: list[Case], b: list[Case], c: list[Case]) -> None:
    def merged(*parts: ChannelLossAccumulator) -> ChannelLossAccumulator:
        return ChannelLossAccumulator(["z"]).merge_state(parts)

    x, y, z = (
        accumulate(part, ChannelTable(names)) for part, names in ((a, "abc"), (b, "cba"), (c, ""))
    )
    assert_same_sums(merged(x, merged(y, z)), merged(merged(x, y), z))
    assert_same_sums(merged(x, y), merged(y, x))


@given(streams, st.randoms(use_true_random=False), st.integers(0, 4))
def test_split_and_order_do_not_matter(stream: list[Case], random: Any, cut: int) -> None:
    whole = accumulate(stream)
    shuffled = random.sample(stream, len(stream))
    first, second = accumulate(shuffled[:cut]), accumulate(shuffled[cut:])
    assert_same_sums(first.merge_state([second]), whole)


@given(streams, streams)
def test_merge_before_update_equals_merge_after(first: list[Case], second: list[Case]) -> None:
    before = ChannelLossAccumulator().merge_state([accumulate(first)])
    after = accumulate(second)
    for case in second:
        before.update(**case.tensors())
    assert_same_sums(before, after.merge_state([accumulate(first)]))


def round_trips() -> list[Callable[[ChannelLossAccumulator], ChannelLossAccumulator]]:
    def saved(accumulator: ChannelLossAccumulator) -> ChannelLossAccumulator:
        file = io.BytesIO()
        torch.save(accumulator.state_dict(), file)
        file.seek(0)
        return ChannelLossAccumulator().load_state_dict(torch.load(file, weights_only=True))

    return [
        saved,
        copy.deepcopy,
        lambda accumulator: pickle.loads(pickle.dumps(accumulator)),
        lambda accumulator: ChannelLossAccumulator("xc").load_state_dict(accumulator.state_dict()),
    ]


@given(streams)
@pytest.mark.parametrize("trip", round_trips(), ids=["save", "deepcopy", "pickle", "other-table"])
def test_round_trip(
    trip: Callable[[ChannelLossAccumulator], ChannelLossAccumulator], stream: list[Case]
) -> None:
    accumulator = accumulate(stream)
    accumulator.update(torch.ones(2), channels=["a"], reported_sum=torch.tensor(4.0))
    back = trip(accumulator)
    assert back.compute_by_channel() == accumulator.compute_by_channel()
    assert back.mismatch() == accumulator.mismatch() == 0.5
    assert back.update(torch.ones(2), channels=["b"]).compute() != accumulator.compute()


def test_loading_replaces_the_sums_and_survives_other_ids() -> None:
    state = ChannelLossAccumulator().update(torch.ones(3), channels=["rru"]).state_dict()
    accumulator = ChannelLossAccumulator(["bbu"], metrics=["tokens"])
    accumulator.update(torch.ones(1, 2), channels=["bbu"], reported_sum=torch.tensor(7.0))
    assert accumulator.load_state_dict(state).compute() == {"rru_tokens": 3.0}
    assert accumulator.table.names == ("bbu", "rru")
    assert accumulator.mismatch() == 0


def test_reset_forgets_sums_and_keeps_names() -> None:
    accumulator = ChannelLossAccumulator(metrics=["tokens"], dtype=torch.float32)
    accumulator.update(torch.ones(2), channels=["a"], reported_sum=torch.tensor(9.0))
    assert accumulator.reset() is accumulator
    assert (accumulator.compute(), accumulator.mismatch()) == ({}, 0.0)
    assert accumulator.update(torch.ones(2), channels=torch.tensor([0])).compute() == {
        "a_tokens": 2.0
    }


ONES = torch.ones(4)
IDS = torch.tensor([0, 1])
BOUNDS = torch.tensor([0, 2, 4], dtype=torch.int32)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"channels": IDS[:1]}, "1 entries but the batch holds 2 sequences (cu_seqlens has 3"),
        ({"channels": ["a", "b", "a"]}, "channels has 3 entries but the batch holds 2"),
        ({"channels": IDS.view(1, 2)}, "channels has shape [1, 2] but the batch holds 2"),
        ({"cu_seqlens": None}, "(token_losses has shape [4] and cu_seqlens is not given)"),
        ({"cu_seqlens": None, "token_losses": ONES.view(4, 1)}, "2 entries but the batch holds 4"),
        ({"channels": torch.tensor([0, 2])}, "-1 (unlabeled) or 0 to 1, but range from 0 to 2"),
        ({"channels": torch.tensor([0, -2])}, "but range from -2 to 0"),
        ({"channels": torch.tensor([0.0, 1.0])}, "a list of names, but is torch.float32"),
        ({"channels": "ab"}, "is the string 'ab'; pass a list"),
        ({"channels": ["a", ""]}, "must be a non-empty string, but is ''"),
        ({"channels": ["a!", "a?"]}, "'a!' and 'a?' would both be logged as 'a_'"),
        ({"cu_seqlens": torch.tensor([1, 2, 4])}, "must start at 0, but starts at 1"),
        ({"cu_seqlens": torch.tensor([0, 4, 3])}, "must not decrease, but goes from 4 to 3"),
        ({"cu_seqlens": torch.tensor([0, 2, 5])}, "ends at 5, but the batch holds 4 tokens"),
        ({"cu_seqlens": torch.tensor([0.0, 2, 4])}, "int32 or int64, but is torch.float32"),
        ({"cu_seqlens": torch.tensor([[0, 2, 4]])}, "[num_sequences + 1], but has [1, 3]"),
        ({"token_losses": torch.ones(())}, "[num_tokens] or [batch, sequence], but has []"),
        ({"token_losses": torch.ones(1, 2, 2)}, "but has [1, 2, 2]; a reduced loss"),
        ({"token_losses": IDS}, "floating point tensor of nll in nats, but is torch.int64"),
        ({"token_losses": [1.0]}, "but is list"),
        ({"token_losses": ONES.to(torch.float8_e4m3fn)}, "but is torch.float8_e4m3fn; pass"),
        ({"cu_seqlens": [0, 2, 4]}, "cu_seqlens must be an int32 tensor, but is list; pass"),
        ({"labels": [1, 2, 3, 4]}, "labels must be a tensor, but is list"),
        ({"reported_sum": 4.0}, "reported_sum must be a tensor of one number, but is float; pass"),
        ({"reported_sum": ONES}, "reported_sum must be a tensor of one number, but is shape [4]"),
        ({"channels": ["new", "a!"], "reported_sum": 4.0}, "reported_sum must be"),
        ({"channels": ["new", "b", "a"]}, "channels has 3 entries but the batch holds 2"),
        ({"channels": ["new", ""]}, "must be a non-empty string, but is ''"),
        ({"labels": IDS}, "labels must have the shape of token_losses [4], but has [2]; shift"),
        ({"labels": ONES}, "labels must be integer token ids, but is torch.float32"),
        ({"loss_mask": ONES.view(2, 2)}, "loss_mask must have the shape of token_losses [4]"),
        ({"weights": ONES[:3]}, "weights must have the shape of token_losses [4], but has [3]"),
        ({"correct": ONES[:3].bool()}, "correct must have the shape"),
        ({"correct": ONES}, "correct must be bool, but is torch.float32"),
    ],
)  # fmt: skip
def test_refuses_and_loses_nothing(given: dict[str, Any], message: str) -> None:
    accumulator = ChannelLossAccumulator(["a", "b"])
    good = {"token_losses": ONES, "channels": IDS, "cu_seqlens": BOUNDS}
    before = accumulator.update(**good).compute()  # type: ignore[arg-type]
    with pytest.raises(ChannelMetricsError, match=re.escape(message)):
        accumulator.update(**{**good, **given})
    assert accumulator.compute() == before
    assert accumulator.mismatch() == 0
    # The table has not grown, and any of the names may still join.
    assert accumulator.table.names == ("a", "b")
    accumulator.update(ONES, channels=["a?", "new"], cu_seqlens=BOUNDS)
    assert accumulator.table.names == ("a", "b", "a?", "new")


def test_a_column_of_the_wrong_shape_is_refused() -> None:
    for broken in (
        Column("broken", "tokens", "", per_token=lambda view: view.losses[..., :1]),
        Column("broken", "sequences", "", per_sequence=lambda view: view.lengths[:1]),
    ):
        accumulator = ChannelLossAccumulator(["a", "b"], schema=TOKENS.extended(broken))
        with pytest.raises(ChannelMetricsError, match=r"column 'broken' must give values of shape"):
            accumulator.update(ONES.view(2, 2), channels=["a", "new"])
        assert not accumulator.sums().any() and accumulator.table.names == ("a", "b")


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.bfloat16])
def test_sums_are_kept_in_float64_or_float32(dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match=f"float64 or torch.float32, but is {dtype}"):
        ChannelLossAccumulator(dtype=dtype)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_left_out_and_shown(odd: float) -> None:
    losses, weights = [1.0, 2.0, 0.0, math.nan], [0.5, 1.5, odd, odd]
    accumulator = ChannelLossAccumulator(["a"], metrics=TOKENS.window_metrics)
    accumulator.update(torch.tensor(losses), channels=["a"], weights=torch.tensor(weights))
    batch = Batch(losses, ["a"], [0, 4], weights=weights)
    assert accumulator.compute() == pytest.approx(reference_metrics([batch]))
    values = accumulator.compute_by_channel()["a"]
    assert (values["weighted_loss"], values["loss"]) == (3.5 / 2, 1.0)
    assert (values["nonfinite"], values["tokens"]) == (2.0, 4.0)


def odd_bytes(*values: int) -> torch.Tensor:
    """bool, whose bytes are neither 0 nor 1."""
    return torch.tensor(values, dtype=torch.uint8).view(torch.bool)


@pytest.mark.parametrize(
    "given",
    [{}, {"channels": torch.zeros(1, 5, dtype=torch.int64)}, {"cu_seqlens": torch.tensor([0, 5])}],
    ids=["rows", "tokens", "bounds"],
)
@pytest.mark.parametrize("labels", [None, torch.ones(1, 5, dtype=torch.int64)])
def test_masks_whose_bytes_are_neither_0_nor_1(
    given: dict[str, Any], labels: torch.Tensor | None
) -> None:
    accumulator = ChannelLossAccumulator(["a"])
    accumulator.update(
        **{"token_losses": torch.arange(5.0).view(1, 5), "channels": ["a"], **given},
        labels=labels,
        loss_mask=odd_bytes(2, 0, 255, 0, 128).view(1, 5),
        correct=odd_bytes(2, 2, 0, 0, 4).view(1, 5),
    )
    values = accumulator.compute_by_channel()["a"]
    assert values == {"loss": 2.0, "token_acc": 2 / 3, "tokens": 3.0, "share": 1.0}


def test_a_loss_mask_is_0_or_it_is_not() -> None:
    """Entries below 0 count, like any other that is not 0."""
    mask = torch.tensor([-1.0, 0.0, -0.25, -0.0, 3.0])
    accumulator = ChannelLossAccumulator(["a"], metrics=["tokens", "loss"])
    accumulator.update(torch.arange(5.0), channels=["a"], loss_mask=mask)
    assert accumulator.compute() == {"a_tokens": 3.0, "a_loss": 2.0}


@pytest.fixture
def other_default_device() -> Iterator[None]:
    """What is made without a device lands where nothing can be read."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.usefixtures("other_default_device")
def test_another_default_device() -> None:
    accumulator = ChannelLossAccumulator(["a"], metrics=["loss", "tokens"])
    losses = torch.arange(4.0, device="cpu")
    bounds = torch.tensor([0, 1, 4], device="cpu", dtype=torch.int32)
    accumulator.update(losses, channels=["a", "b"], cu_seqlens=bounds)
    accumulator.update(losses.view(2, 2), channels=["a", None])
    other = ChannelLossAccumulator(["c"]).load_state_dict(accumulator.state_dict())
    accumulator.merge_state([other])
    assert accumulator.compute_by_channel() == {
        "a": {"loss": 1 / 3, "tokens": 6.0},
        "b": {"loss": 2.0, "tokens": 6.0},
        "unlabeled": {"loss": 2.5, "tokens": 4.0},
    }


@pytest.mark.parametrize(
    "change",
    [
        {"sums": None},
        {"sums": torch.ones(1, 2)},
        {"sums": "?"},
        {"names": ["b", ""]},
        {"names": ["a!", "a?"]},
        {"names": None},
        {"columns": 3},
        {"mismatch": "?"},
    ],
)
def test_a_damaged_state_leaves_the_old_one(change: dict[str, Any]) -> None:
    accumulator = ChannelLossAccumulator(["z"]).update(ONES, channels=["a"])
    accumulator.update(ONES, channels=["a"], reported_sum=torch.tensor(8.0))
    before = accumulator.compute()
    state = ChannelLossAccumulator().update(ONES, channels=["a"]).state_dict()
    state["names"], state["sums"] = ["a", "b"], torch.ones(3, len(state["columns"]))
    with pytest.raises(ChannelMetricsError):
        accumulator.load_state_dict({**state, **change})
    with pytest.raises(ChannelMetricsError, match=r"is damaged \(KeyError\('sums'\)\)"):
        accumulator.load_state_dict({k: v for k, v in state.items() if k != "sums"})
    assert (accumulator.compute(), accumulator.mismatch()) == (before, 0.5)
    assert accumulator.table.names == ("z", "a")


def test_refuses_other_metrics_and_foreign_states() -> None:
    with pytest.raises(ConfigError, match="unknown metric 'acc'"):
        ChannelLossAccumulator(metrics=["acc"])
    accumulator = ChannelLossAccumulator().update(ONES, channels=["a"])
    before = accumulator.compute()
    with pytest.raises(ChannelMetricsError, match="written by another version"):
        accumulator.load_state_dict({**accumulator.state_dict(), "version": 99})
    with pytest.raises(ChannelMetricsError, match="has version None"):
        accumulator.load_state_dict({})
    assert accumulator.compute() == before


def test_a_state_of_other_columns_loads_what_it_has() -> None:
    state = ChannelLossAccumulator().update(ONES, channels=["a"]).state_dict()
    columns = ["of another version", *reversed(state["columns"])]
    sums = torch.cat([torch.full((2, 1), 7.0).double(), state["sums"].flip(1)], dim=1)
    accumulator = ChannelLossAccumulator(["b"], metrics=TOKENS.window_metrics)
    accumulator.load_state_dict({**state, "columns": columns, "sums": sums})
    expected = {"loss": 1.0, "ppl": math.e, "tokens": 4.0, "samples": 1.0, "share": 1.0}
    assert accumulator.compute_by_channel() == {"a": pytest.approx(expected)}
    accumulator.load_state_dict({**state, "columns": ["tokens"], "sums": state["sums"][:, :1]})
    expected = {"loss": 0.0, "ppl": 1.0, "tokens": 4.0, "samples": 0.0, "share": 1.0}
    assert accumulator.compute_by_channel() == {"a": expected}


def test_unknown_error_refuses_a_name() -> None:
    table = ChannelTable(["a"], unknown="error")
    with pytest.raises(ChannelMetricsError, match=r"'b' is not in the declared table \['a'\]"):
        ChannelLossAccumulator(table).update(ONES, channels=["b"])
