"""What a training step asks of the accumulator: precision, growth, no waiting, determinism."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from no_sync import HostSyncError, NoSync
from torch import Tensor

from channel_metrics import ChannelLossAccumulator, ChannelTable

LIMIT = 2**24  # from here on, float32 cannot count by one


def tokens(accumulator: ChannelLossAccumulator) -> dict[str, float]:
    return {name: v["tokens"] for name, v in accumulator.compute_by_channel().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counts_beyond_what_float32_holds(dtype: torch.dtype) -> None:
    """A state of 2**24 - 1 tokens, then updates, merges and round trips of single tokens."""
    one = ChannelLossAccumulator(["a"], metrics=["tokens"], dtype=dtype)
    one.update(torch.ones(1), channels=torch.tensor([0]))
    state = one.state_dict()
    state["sums"] = state["sums"] * (LIMIT - 1)
    accumulator = ChannelLossAccumulator(["a"], metrics=["tokens"], dtype=dtype)
    accumulator.load_state_dict(state)
    for _ in range(5):
        accumulator.update(torch.ones(1), channels=torch.tensor([0]))
    assert tokens(accumulator) == {"a": LIMIT + 4}
    accumulator.merge_state([accumulator])
    assert tokens(accumulator) == {"a": 2 * LIMIT + 8}
    accumulator.update(torch.ones(1), channels=torch.tensor([0]))
    again = ChannelLossAccumulator(["b", "a"], metrics=["tokens"], dtype=dtype)
    assert tokens(again.load_state_dict(accumulator.state_dict())) == {"a": 2 * LIMIT + 9}
    assert not again.reset().sums().any()


def test_a_small_sum_that_a_large_one_joins() -> None:
    accumulator = ChannelLossAccumulator(["a"], metrics=["loss"], dtype=torch.float32)
    for loss in (0.5, float(LIMIT)):
        accumulator.update(torch.tensor([loss]), channels=["a"])
    assert accumulator.compute() == {"a_loss": (LIMIT + 0.5) / 2}


def test_one_update_beyond_what_float32_holds() -> None:
    accumulator = ChannelLossAccumulator(["a"], metrics=["tokens"])
    losses = torch.ones((), dtype=torch.bfloat16).expand(LIMIT + 1)
    assert accumulator.update(losses, channels=["a"]).compute() == {"a_tokens": LIMIT + 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_table_grows_and_keeps_the_sums(dtype: torch.dtype) -> None:
    accumulator = ChannelLossAccumulator(dtype=dtype)
    names = [f"n{i}" for i in range(40)]
    for i, name in enumerate(names):
        accumulator.update(torch.ones(i + 1), channels=[name])
    assert tokens(accumulator) == {name: i + 1 for i, name in enumerate(names)}


def test_a_shared_table_grows_for_all() -> None:
    table = ChannelTable()
    first, second = (ChannelLossAccumulator(table, metrics=["tokens"]) for _ in range(2))
    first.update(torch.ones(2), channels=["a"])
    assert second.compute() == {}
    assert second.sums().shape == first.sums().shape
    second.update(torch.ones(3), channels=torch.tensor([0]))
    assert tokens(second) == {"a": 3}
    assert tokens(first.merge_state([second])) == {"a": 5}


def test_ids_that_only_the_device_saw_outside_the_table_are_unlabeled() -> None:
    """Off the host nobody checks the ids; under compile neither, which a CPU can show."""
    accumulator = ChannelLossAccumulator(["a"], metrics=["tokens"])
    update = torch.compile(accumulator.update, fullgraph=True, backend="eager")
    update(torch.ones(3, 2), channels=torch.tensor([0, 1, -9]))
    assert tokens(accumulator) == {"a": 2, "unlabeled": 4}
    accumulator.update(torch.ones(1), channels=["b"])
    assert tokens(accumulator) == {"a": 2, "b": 1, "unlabeled": 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inference_mode_and_training_share_an_accumulator(dtype: torch.dtype) -> None:
    with torch.inference_mode():
        accumulator = ChannelLossAccumulator(metrics=["tokens"], dtype=dtype)
        accumulator.update(torch.ones(2), channels=["a"], reported_sum=torch.tensor(2.0))
    accumulator.update(torch.ones(2), channels=["a"], reported_sum=torch.tensor(2.0))
    with torch.inference_mode():
        accumulator.update(torch.ones(2), channels=["b"])
    assert accumulator.update(torch.ones(1), channels=["b"]).compute() == {
        "a_tokens": 4.0,
        "b_tokens": 3.0,
    }
    accumulator.reset()


def test_to_moves_the_sums_and_keeps_them() -> None:
    accumulator = ChannelLossAccumulator(["a"], metrics=["tokens"])
    accumulator.update(torch.ones(2), channels=["a"])
    assert accumulator.to("cpu") is accumulator
    assert tokens(accumulator) == {"a": 2}
    assert accumulator.to("meta").device == torch.device("meta")
    accumulator.update(torch.ones(2, device="meta"), channels=torch.tensor([0], device="meta"))


@pytest.mark.parametrize(
    ("shape", "id_shape", "samples"),
    [((1,), (1,), 1), ((1, 1), (1,), 1), ((1, 1), (1, 1), 0), ((2,), (2,), 0), ((2, 2), (2,), 2)],
)
def test_one_id_per_sequence_or_per_token(
    shape: tuple[int, ...], id_shape: tuple[int, ...], samples: int
) -> None:
    accumulator = ChannelLossAccumulator(["a"], metrics=["samples", "tokens"])
    ids = torch.zeros(id_shape, dtype=torch.int64)
    accumulator.update(torch.ones(shape), channels=ids)
    assert accumulator.compute() == {"a_samples": samples, "a_tokens": torch.Size(shape).numel()}


@pytest.mark.parametrize(
    ("reported", "mismatch"),
    [(6.0, 0.0), (6.06, 0.06 / 6.06), (3.0, 0.5), (0.0, 1.0), (-6.0, 2.0), (float("nan"), 0.0)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mismatch(reported: float, mismatch: float, dtype: torch.dtype) -> None:
    accumulator = ChannelLossAccumulator(dtype=dtype)
    losses = torch.tensor([1.0, 2.0, 3.0, 9.0])
    labels = torch.tensor([1, 1, 1, -100])
    given: dict[str, Any] = {"channels": [None, "a"], "labels": labels.view(2, 2)}
    accumulator.update(losses.view(2, 2), **given, reported_sum=torch.tensor(reported))
    assert accumulator.mismatch() == pytest.approx(mismatch, rel=1e-5)
    accumulator.update(losses.view(2, 2), **given, reported_sum=torch.tensor(6.0))
    assert accumulator.mismatch() == pytest.approx(mismatch, rel=1e-5)  # the largest stays
    merged = ChannelLossAccumulator(dtype=dtype).merge_state([accumulator])
    assert merged.merge_state([ChannelLossAccumulator()]).mismatch() == accumulator.mismatch()


def test_mismatch_of_nothing_and_of_nonfinite_tokens() -> None:
    accumulator = ChannelLossAccumulator()
    accumulator.update(torch.ones(0), channels=["a"], reported_sum=torch.tensor(0.0))
    odd = torch.tensor([1.0, float("nan")])
    accumulator.update(odd, channels=["a"], reported_sum=torch.tensor(5.0))
    assert accumulator.mismatch() == 0


def test_masked_positions_may_hold_anything() -> None:
    losses = torch.tensor([[1.0, float("nan")], [float("inf"), float("nan")]])
    weights = torch.tensor([[2.0, float("nan")], [float("nan"), float("inf")]])
    accumulator = ChannelLossAccumulator(["a", "b"], metrics=["loss", "weighted_loss", "tokens"])
    accumulator.update(
        losses,
        channels=torch.tensor([0, 1]),
        loss_mask=torch.tensor([[1, 0], [0, 0]]),
        weights=weights,
    )
    assert accumulator.compute() == {"a_loss": 1.0, "a_weighted_loss": 1.0, "a_tokens": 1.0}


def batches(device: str) -> Iterator[dict[str, Any]]:
    """Every way to call `update` with ids."""

    def tensor(values: Any, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(device)

    losses = tensor([0.5, 1.5, 2.5, 3.5, 4.5, 5.5], torch.float32)
    ids, bounds = tensor([1, 0], torch.int64), tensor([0, 2, 5], torch.int32)
    yield {"token_losses": losses, "channels": ids, "cu_seqlens": bounds}
    yield {"token_losses": losses.view(2, 3).bfloat16(), "channels": ids.int()}
    yield {
        "token_losses": losses.view(1, 6),
        "channels": ids,
        "cu_seqlens": bounds,
        "labels": tensor([[1, -100, 1, 1, 1, 1]], torch.int64),
        "loss_mask": tensor([[1, 1, 0, 1, 1, 1]], torch.float32),
        "correct": tensor([[1, 0, 0, 1, 1, 0]], torch.bool),
        "weights": losses.view(1, 6) / 4,
        "reported_sum": losses.sum(),
    }
    yield {"token_losses": losses, "channels": tensor([0, 1, -1, 0, 1, 1], torch.int64)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", range(4))
def test_update_with_ids_waits_for_no_device(form: int, dtype: torch.dtype) -> None:
    accumulator = ChannelLossAccumulator(["a", "b"], device="meta", dtype=dtype)
    given = list(batches("meta"))[form]
    with NoSync():
        accumulator.update(**given)
        accumulator.table.add("c")
        accumulator.update(**given)
        accumulator.reset()


SOME = torch.ones(3, device="meta")


@pytest.mark.parametrize(
    "waits",
    [
        lambda: SOME.sum().item(),
        lambda: bool(SOME.any()),
        SOME.nonzero,
        lambda: SOME[SOME > 0],
        lambda: SOME.masked_select(SOME > 0),
        lambda: torch.equal(SOME, SOME),
        SOME.unique,
        lambda: SOME.repeat_interleave(SOME.long()),
        lambda: SOME.to("cpu"),
        lambda: torch.ones(3).copy_(SOME),
        lambda: torch.segment_reduce(SOME, "sum", lengths=SOME.long()),
        ChannelLossAccumulator(["a"], device="meta").sums,
    ],
)
def test_the_mode_sees_what_waits(waits: Any) -> None:
    with NoSync(), pytest.raises(HostSyncError):
        waits()


def test_the_mode_sees_the_checks_that_update_does_on_the_host() -> None:
    with NoSync(), pytest.raises(HostSyncError):
        ChannelLossAccumulator(["a"]).update(torch.ones(2), channels=torch.tensor([0]))


@pytest.mark.parametrize("form", range(4))
def test_deterministic_algorithms(form: int) -> None:
    given = list(batches("cpu"))[form]
    runs = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            runs.append(ChannelLossAccumulator(["a", "b"]).update(**given).sums())
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(*runs)
    assert torch.equal(runs[0], ChannelLossAccumulator(["a", "b"]).update(**given).sums())


@pytest.mark.slow  # The compilers take seconds.
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("aot_eager", torch.float32), ("aot_eager", torch.float64), ("inductor", torch.float64)],
)
def test_compiled_update_equals_eager(backend: str, dtype: torch.dtype) -> None:
    torch.compiler.reset()
    eager = ChannelLossAccumulator(["a", "b"], dtype=dtype)
    compiled = ChannelLossAccumulator(["a", "b"], dtype=dtype)
    update = torch.compile(compiled.update, fullgraph=True, backend=backend)
    forms = list(batches("cpu"))
    # The code generator takes seconds per form: it gets the one with all arguments.
    for given in forms if backend == "aot_eager" else forms[2:3] * 2:
        eager.update(**given)
        update(**given)
    torch.testing.assert_close(compiled.sums(), eager.sums(), rtol=1e-6, atol=0)
    assert compiled.sums()[:, 0].sum() > 0
