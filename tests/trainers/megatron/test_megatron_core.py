"""The adapter for loops of one's own over megatron-core, on two real processes."""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron_tools import on_two
from rank_cases import Case, RanksOf
from reference import bucket

from channel_metrics import MetricsConfig

BOUNDS = [0, 5, 16, 30, 33, 48]


@on_two
def dp2(folder: Path) -> dict[str, Any]:
    return in_layout()


@on_two
def tp2(folder: Path) -> dict[str, Any]:
    return in_layout(tensor_model_parallel_size=2)


@on_two
def pp2(folder: Path) -> dict[str, Any]:
    return in_layout(pipeline_model_parallel_size=2)


def in_layout(**sizes: int) -> dict[str, Any]:
    from megatron_loop import start

    start(**sizes)
    return {"rows": rows(), "packs": packs(), "wrapped": wrapped()}


@on_two
def cp2(folder: Path) -> dict[str, Any]:
    from megatron_loop import start

    start(context_parallel_size=2)
    return context_parallel()


@on_two
def vocabulary_in_parts(folder: Path) -> list[bool]:
    from megatron_loop import start

    start(tensor_model_parallel_size=2)
    return correctness()


def rows() -> dict[str, Any]:
    """One channel per row; then again, with an optimizer that skips each step."""
    from megatron_loop import Loop, forward, loss_func

    loop = Loop()

    def forward_step(data_iterator: Any, model: Any) -> Any:
        batch = next(data_iterator)
        loop.metrics.watch(model)
        loss = partial(loss_func, batch["loss_mask"])
        counted = loop.metrics.count(loss, channels=batch["channels"], loss_mask=batch["loss_mask"])
        return forward(model, batch), loop.recorded(batch, counted)

    loop.run(forward_step)
    values = loop.metrics.compute()
    wanted = loop.naive()
    loop.run(forward_step, discard=True)
    return {"values": values, "naive": wanted, "skipped": loop.metrics.compute()}


def packs() -> dict[str, Any]:
    """Rows flattened into one, with the padded bounds of `PackedSeqParams`."""
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron_loop import LENGTH, ROWS, Loop, forward, loss_func

    loop = Loop()
    # Where the tokens sit; what attention sees of each sequence is one token shorter.
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    packed = PackedSeqParams(cu_seqlens_q=bounds - torch.arange(6), cu_seqlens_q_padded=bounds)

    def forward_step(data_iterator: Any, model: Any) -> Any:
        batch = next(data_iterator)
        loop.metrics.watch(model)
        loss = partial(loss_func, batch["loss_mask"])
        counted = loop.metrics.count(
            loss,
            channels=["bbu", "lvis", "bbu", None, "rru"],
            loss_mask=batch["loss_mask"],
            packed_seq_params=packed,
        )
        ids = [[0, 2, 0, -1, 1][sum(b <= t for b in BOUNDS[1:])] for t in range(BOUNDS[-1])]
        batch["token_ids"] = torch.tensor(ids).reshape(ROWS, LENGTH)
        return forward(model, batch), loop.recorded(batch, counted)

    loop.run(forward_step)
    return {"values": loop.metrics.compute(), "naive": loop.naive(samples=[0, 2, 0, -1, 1])}


def wrapped() -> dict[str, Any]:
    """A forward step that knows no channels; with a state in front, as in Megatron-Bridge."""
    from megatron_loop import Loop, forward, loss_func

    from channel_metrics.trainers.megatron.step import counting_forward_step

    loop = Loop()

    def forward_step(state: Any, data_iterator: Any, model: Any) -> Any:
        assert state == "state"
        batch = next(data_iterator)
        assert "channel_ids" not in batch
        return forward(model, batch), loop.recorded(batch, partial(loss_func, batch["loss_mask"]))

    step = counting_forward_step(partial(forward_step, "state"), loop.metrics)
    loop.run(step)
    return {"values": loop.metrics.compute(), "naive": loop.naive()}


def context_parallel() -> dict[str, Any]:
    """Ids per token, cut by megatron-core's own function with the labels: values and naive."""
    from megatron_loop import LENGTH, NAMES, loss_func

    from channel_metrics.trainers.megatron import MegatronChannelMetrics
    from channel_metrics.trainers.megatron.cuts import follow_cuts
    from channel_metrics.trainers.megatron.step import counting_forward_step

    follow_cuts()
    axes = {"position": {"by": "position"}, "length": {"by": "length"}}
    config = MetricsConfig(metrics=("loss", "tokens"), axes=axes)
    metrics = MegatronChannelMetrics(NAMES, config=config)
    labels = torch.arange(2 * LENGTH, dtype=torch.int64).reshape(2, LENGTH)
    whole = {
        "tokens": labels.clone(),
        "labels": labels.clone(),
        "loss_mask": (labels % 5 > 0).float(),
        "position_ids": labels.clone(),
        "attention_mask": None,
        "channels": torch.tensor([2, 0]),
    }

    def forward_step(data_iterator: Any, model: Any) -> Any:
        batch = next(data_iterator)
        batch.pop("channels")
        batch = cut_batch(batch)
        return batch["labels"].float(), partial(loss_func, batch["loss_mask"])

    output, loss = counting_forward_step(forward_step, metrics)(iter([whole]), torch.nn.Module())
    loss(output)
    of_rows: dict[str, list[int]] = {}
    for row, name in ((0, "lvis"), (1, "bbu")):
        # The losses at a position are about the token after it.
        for position, label in enumerate(labels[row].tolist(), start=1):
            if label % 5:
                for one in (name, f"position/{bucket(position)}", f"length/{bucket(LENGTH)}"):
                    of_rows.setdefault(one, []).append(label)
    naive: dict[str, float] = {}
    for name, kept in of_rows.items():
        naive |= {f"{name}_loss": sum(kept) / len(kept), f"{name}_tokens": len(kept)}
    return {"values": metrics.compute(), "naive": naive, "mine": output.numel()}


def cut_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """By megatron-core's function, which since 0.17 wants to be told how."""
    from megatron.core import parallel_state, utils

    cut = utils.get_batch_on_this_cp_rank
    needs = inspect.signature(cut).parameters
    options = {
        "is_hybrid_cp": False,
        "cp_group": parallel_state.get_context_parallel_group(),
        "use_per_sequence_balancing": True,
    }
    given = {name: value for name, value in options.items() if name in needs}
    found: dict[str, Any] = cut(batch, **given)
    return found


def correctness() -> list[bool]:
    """Whether `vocab_parallel_correct` on two parts is that on the whole, with ties and without."""
    from megatron.core import parallel_state
    from megatron_loop import LENGTH, ROWS

    from channel_metrics.losses.vocab_parallel import vocab_parallel_correct

    group, rank = parallel_state.get_tensor_model_parallel_group(), dist.get_rank()
    same = []
    for highest in (3, 1000):
        generator = torch.Generator().manual_seed(highest)
        logits = torch.randint(0, highest, (LENGTH, ROWS, 8), generator=generator).float()
        labels = torch.randint(0, 8, (ROWS, LENGTH), generator=generator)
        labels[0, :3] = -100
        found = vocab_parallel_correct(logits[..., 4 * rank : 4 * rank + 4], labels, group)
        for row in range(ROWS):
            for t in range(LENGTH):
                label = int(labels[row, t])
                values = logits[t, row].tolist()
                same.append(bool(found[row, t]) == (label >= 0 and values[label] == max(values)))
    return same


@pytest.mark.parametrize("of", [dp2, tp2, pp2])
@pytest.mark.parametrize("case", ["rows", "packs", "wrapped"])
def test_layouts_equal_the_naive_loop(ranks_of: RanksOf, of: Case, case: str) -> None:
    first = ranks_of(of)[0][case]
    for rank in ranks_of(of):
        found = rank[case]
        assert found["values"] == pytest.approx(found["naive"], rel=1e-6)
        assert found["values"] == first["values"]
        # Three channels, and one without a name.
        assert len(found["values"]) == 5 * (3 + (case == "packs" or of is dp2))


@pytest.mark.parametrize("of", [dp2, tp2, pp2])
def test_a_step_that_the_optimizer_skips_is_left_out(ranks_of: RanksOf, of: Case) -> None:
    assert [rank["rows"]["skipped"] for rank in ranks_of(of)] == [{}, {}]


def test_context_parallel_ids_are_cut_as_the_labels_are(ranks_of: RanksOf) -> None:
    for rank in ranks_of(cp2):
        assert rank["values"] == pytest.approx(rank["naive"], rel=1e-6)
        assert rank["mine"] == 16


def test_correctness_of_a_vocabulary_in_parts(ranks_of: RanksOf) -> None:
    for rank in ranks_of(vocabulary_in_parts):
        assert len(rank) == 96
        assert all(rank)
