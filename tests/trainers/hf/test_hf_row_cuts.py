"""The slicing of rows and the layouts of ranks, alone; real ranks are in `test_hf_parallel.py`."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import faults
import pytest
import torch
from hf_case_tools import fixed_records, needs_deepspeed
from hf_tools import PaddingCollator, Record

from channel_metrics import ChannelTable, ConfigError, UnsupportedVersionError
from channel_metrics.trainers.hf.parallel import (
    RankLayout,
    RowCollator,
    TargetIdCollator,
    layout_of,
    shard_with_labels,
    target_ids,
)


def collated(kind: type[Any], records: list[Record], base: Any = None) -> dict[str, Any]:
    table = ChannelTable(("bbu", "rru", "lvis", "lang_chat"))
    collate = kind(base or PaddingCollator(), table=table, row_bounds=False)
    batch: dict[str, Any] = collate(records)
    return batch


def test_ids_stand_beside_shifted_labels() -> None:
    batch = collated(TargetIdCollator, fixed_records(4))
    assert batch["channels"].shape == batch["labels"].shape
    names = ("bbu", "rru", "lvis", "lang_chat")
    for row, record in zip(batch["channels"].tolist(), fixed_records(4), strict=True):
        assert row == [names.index(record["channel"])] * 15 + [-1]


def test_ids_of_packed_rows_are_those_of_the_targets() -> None:
    class Packed:
        def __call__(self, features: list[Record]) -> dict[str, torch.Tensor]:
            return {
                "input_ids": torch.arange(6).view(1, 6),
                "labels": torch.tensor([[-100, 1, 2, -100, 4, 5]]),
                "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]),
            }

    batch = collated(TargetIdCollator, [{"channel": ["lvis", "bbu"]}], Packed())
    # Position 2 predicts the first token of the second sequence.
    assert batch["channels"].tolist() == [[2, 2, 0, 0, 0, -1]]
    assert set(batch) == {"input_ids", "labels", "position_ids", "channels"}


def test_labels_of_tokens_are_those_of_the_targets() -> None:
    table = ChannelTable(("bbu", "rru", "lvis", "lang_chat"))
    columns = [("roles", {"user": 1, "tool": 2})]
    records = [{**one, "roles": ["user"] * 15 + ["tool"]} for one in fixed_records(2)]
    batch = TargetIdCollator(PaddingCollator(), table=table, columns=columns)(records)
    assert batch["channel_marks"].tolist() == [[1] * 14 + [2, 0]] * 2


def test_target_ids_shift_like_labels() -> None:
    assert target_ids(torch.tensor([[3, 4, 5]])).tolist() == [[4, 5, -1]]


@pytest.mark.parametrize("kind", [TargetIdCollator, RowCollator])
def test_names_cannot_be_cut(kind: type[Any]) -> None:
    with pytest.raises(ConfigError, match=r"not in the table \(fresh, rru\); declare `channels`"):
        kind(PaddingCollator(), table=ChannelTable(("rru",)))(
            [{**r, "channel": c} for r, c in zip(fixed_records(2), ("fresh", "rru"), strict=True)]
        )


def test_rows_that_pack_are_not_sent() -> None:
    class Packed:
        def __call__(self, features: list[Record]) -> dict[str, torch.Tensor]:
            return {"labels": torch.zeros(1, 4), "position_ids": torch.tensor([[0, 1, 0, 1]])}

    with pytest.raises(ConfigError, match="a batch holds 2 sequences in its rows"):
        collated(RowCollator, [{"channel": ["lvis", "bbu"]}], Packed())


def test_labels_without_rows_are_refused() -> None:
    class Flat:
        def __call__(self, features: list[Record]) -> dict[str, torch.Tensor]:
            ids = torch.arange(4)
            return {"labels": ids, "cu_seqlens": torch.tensor([0, 4], dtype=torch.int32)}

    with pytest.raises(UnsupportedVersionError, match=r"shape \[batch, sequence\], but .* \[4\]"):
        collated(TargetIdCollator, [{"channel": "bbu"}], Flat())


def test_the_context_gets_the_ids() -> None:
    labels, ids = torch.zeros(2, 4), torch.ones(2, 4)
    given = functools.partial(
        lambda **kw: kw, buffers=[labels], buffer_seq_dims=[1], no_restore_buffers={labels}
    )
    kept = shard_with_labels(given, ids)()
    assert [b is c for b, c in zip(kept["buffers"], [labels, ids], strict=True)] == [True, True]
    assert kept["buffer_seq_dims"] == [1, 1] and kept["no_restore_buffers"] == {labels, ids}
    assert given.keywords["buffers"] == [labels]
    marks = torch.ones(2, 4)
    assert [b is marks for b in shard_with_labels(given, ids, marks)()["buffers"]][2]
    assert shard_with_labels(given, ids, marks)()["buffer_seq_dims"] == [1, 1, 1]
    # Ids per sequence, names, and contexts that cut nothing stay as they are.
    for context, channels in ((given, torch.ones(2)), (given, ["bbu"]), (dict, ids)):
        assert shard_with_labels(context, channels) is context


# ---- layouts --------------------------------------------------------------------------------


class Mesh:
    def __init__(self, **ranks: int) -> None:
        self.mesh_dim_names = tuple(ranks)
        self.get_local_rank = ranks.__getitem__


def accelerator(rank: int, processes: int, mesh: Any = None, **sizes: Any) -> Any:
    config = SimpleNamespace(**{"sp_backend": "deepspeed"} | sizes) if sizes else None
    return SimpleNamespace(
        parallelism_config=config,
        torch_device_mesh=mesh,
        process_index=rank,
        num_processes=processes,
    )


def test_layouts() -> None:
    plain = layout_of(accelerator(3, 4))
    assert plain == RankLayout(data_size=4, data_rank=3)
    assert plain.counts(cut=False) and not plain.shards_rows

    tensor = layout_of(accelerator(3, 4, Mesh(dp_shard=1, tp=1), tp_size=2))
    assert (tensor.data_size, tensor.data_rank, tensor.shards_rows) == (2, 1, False)
    assert not tensor.counts(cut=False)
    assert layout_of(accelerator(2, 4, Mesh(dp_shard=1, tp=0), tp_size=2)).counts(cut=False)

    context = layout_of(accelerator(1, 4, Mesh(dp_shard=0, cp=1), cp_size=2))
    assert (context.data_size, context.data_rank, context.shards_rows) == (2, 0, True)
    assert context.counts(cut=True) and not context.counts(cut=False)


def test_a_group_that_cannot_be_seen_is_refused() -> None:
    with pytest.raises(UnsupportedVersionError, match=r"tp_size is 2, .* counted 2 times"):
        layout_of(accelerator(0, 2), tp_size=2)


def test_another_sequence_parallelism_is_refused() -> None:
    with pytest.raises(UnsupportedVersionError, match="sp_backend is 'ring'"):
        layout_of(accelerator(0, 2, sp_size=2, sp_backend="ring"))


@needs_deepspeed
def test_an_old_ulysses_is_refused() -> None:
    with (
        faults.around("ask whether Ulysses is off", lambda _: False),
        pytest.raises(UnsupportedVersionError, match="Update DeepSpeed"),
    ):
        layout_of(accelerator(0, 2, sp_size=2))
