"""The accumulator against the oracle, and the monoid laws."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import reference_metrics
from strategies import NAMES, TEXT_SIZES, Case, accumulate, cases

from channel_metrics import ChannelLossAccumulator, ChannelTable
from channel_metrics.core.boundaries import token_channel_ids
from channel_metrics.core.schema import DEFAULT_METRICS, TOKENS

streams = st.lists(cases(), max_size=4)
finite_streams = st.lists(cases(finite=True), min_size=1, max_size=4)


ERROR_BARS = ("_se", "_low", "_high")
PERCENTILES = ("_p10", "_p50", "_p90")


def assert_values(found: dict[str, float], wanted: dict[str, float], rtol: float) -> None:
    """Squares that cancel leave the root of the rounding of float64: losses go up to 100.
    Percentiles are exact to half a bin, 2^(1/16)."""
    tolerances = {ERROR_BARS: (rtol, 1e-4), PERCENTILES: (0.0445, 0.0), ("",): (rtol, 1e-12)}
    assert set(found) == set(wanted)
    left = set(found)
    for ends, (rel, near) in tolerances.items():
        keys = {key for key in left if key.endswith(ends)}
        parts = [{key: values[key] for key in keys} for values in (found, wanted)]
        assert parts[0] == pytest.approx(parts[1], rel=rel, abs=near)
        left -= keys


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
    accumulator.text_sizes = TEXT_SIZES
    for case in stream:
        given = case.tensors(dtype)
        if form != "names":
            ids = torch.tensor(accumulator.table.ids(given["channels"]), dtype=torch.int64)
            given["channels"] = ids if form == "ids" else ids.int()
        accumulator.update(**given)
    assert_values(accumulator.compute(), reference_metrics([case.batch for case in stream]), 1e-9)


@given(finite_streams)
def test_float32_fallback_equals_the_oracle(stream: list[Case]) -> None:
    # exp() of losses up to 100, and columns of whole sequences, need float64.
    left_out = ("ppl", "excess_loss", *ERROR_BARS, *PERCENTILES)
    metrics = [name for name in TOKENS.window_metrics if not name.endswith(left_out)]
    accumulator = ChannelLossAccumulator(NAMES, metrics=metrics, dtype=torch.float32)
    accumulator.text_sizes = TEXT_SIZES
    for case in stream:
        accumulator.update(**case.tensors(torch.float32))
    reference = reference_metrics([case.batch for case in stream])
    expected = {key: value for key, value in reference.items() if not key.endswith(left_out)}
    assert accumulator.compute() == pytest.approx(expected, rel=1e-5)


@given(streams)
def test_token_ids_equal_sequence_ids(stream: list[Case]) -> None:
    metrics = ("loss", "weighted_loss", "token_acc", "share", "bits_per_byte", "entropy")
    by_token, by_sequence = (ChannelLossAccumulator(NAMES, metrics=metrics) for _ in range(2))
    by_token.text_sizes = by_sequence.text_sizes = TEXT_SIZES
    for case in stream:
        given = case.tensors()
        ids = torch.tensor(by_token.table.ids(given["channels"]), dtype=torch.int64)
        by_sequence.update(**given)
        bounds = torch.tensor(case.batch.bounds)
        expanded = token_channel_ids(ids, bounds, len(case.batch.losses)).view(case.shape)
        own = {"channels": expanded, "cu_seqlens": None, "reference": None}  # that of sequences
        by_token.update(**{**given, **own})
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
@pytest.mark.parametrize("metrics", [DEFAULT_METRICS, TOKENS.window_metrics], ids=["few", "all"])
def test_split_and_order_do_not_matter(
    metrics: tuple[str, ...], stream: list[Case], random: Any, cut: int
) -> None:
    whole = accumulate(stream, metrics=metrics)
    shuffled = random.sample(stream, len(stream))
    first, second = (accumulate(s, metrics=metrics) for s in (shuffled[:cut], shuffled[cut:]))
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
