"""What the accumulator refuses, and how it takes masks, weights and states of other versions."""

from __future__ import annotations

import math
import re
from typing import Any, cast

import pytest
import torch
from reference import Batch, reference_metrics

from channel_metrics import ChannelLossAccumulator, ChannelMetricsError, ChannelTable, ConfigError
from channel_metrics.core.schema import TOKENS, Column

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
    good: dict[str, Any] = {"token_losses": ONES, "channels": IDS, "cu_seqlens": BOUNDS}
    before = accumulator.update(**good).compute()
    with pytest.raises(ChannelMetricsError, match=re.escape(message)):
        accumulator.update(**{**good, **given})
    assert accumulator.compute() == before
    assert accumulator.mismatch() == 0
    # The table has not grown, and any of the names may still join.
    assert list(accumulator.table.names) == ["a", "b"]
    accumulator.update(ONES, channels=["a?", "new"], cu_seqlens=BOUNDS)
    assert list(accumulator.table.names) == ["a", "b", "a?", "new"]


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
    # A percentile is exact to its bin only.
    metrics = [name for name in TOKENS.window_metrics if not name.startswith("loss_p")]
    accumulator = ChannelLossAccumulator(["a"], metrics=metrics)
    accumulator.update(torch.tensor(losses), channels=["a"], weights=torch.tensor(weights))
    batch = Batch(losses, ["a"], [0, 4], weights=weights)
    expected = reference_metrics([batch])
    expected = {key: v for key, v in expected.items() if not key.startswith("a_loss_p")}
    assert accumulator.compute() == pytest.approx(expected)
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
        {"mismatch": 10**400},
        {"sums": [[10**400]]},
        {"names": [{}, []]},
        {"names": [1, 2]},
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
    with pytest.raises(ChannelMetricsError, match="must be a mapping, but is list"):
        accumulator.load_state_dict(cast(Any, [state]))
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
