"""Context, sequence and tensor parallelism: each token is counted by exactly one rank.

The runs on two ranks are real ones, in `hf_cases_fsdp.py` and `hf_cases_deepspeed.py`; below
them, the slicing and the layouts alone.
"""

from __future__ import annotations

import functools
import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hf_case_tools import TP_SIZES, fixed_records
from hf_launch import Launch, launch
from hf_tools import (
    PaddingCollator,
    Record,
    expected_metrics,
    make_records,
    tiny_model,
    token_table,
)

from channel_metrics import ChannelTable, ConfigError, UnsupportedVersionError
from channel_metrics.trainers.hf.parallel import (
    RankLayout,
    RowCollator,
    TargetIdCollator,
    layout_of,
    shard_with_labels,
    target_ids,
)

deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is only in the main environment (Python 3.11), which runs this",
)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return launch("sharded", tmp_path_factory)


def channel_values(entry: dict[str, float], prefix: str = "") -> dict[str, float]:
    names = tuple(f"{prefix}{name}_" for name in ("bbu", "rru", "lvis", "lang_chat", "unlabeled"))
    return {key: value for key, value in entry.items() if key.startswith(names)}


def check(ranks: list[Any], table: Any, held_out: list[Record], seen: list[list[Any]]) -> None:
    """Every train window is the oracle on `seen`, and the evaluation that on `held_out`."""
    expected_eval = expected_metrics(table, [[r["input_ids"] for r in held_out]], prefix="eval_")
    for rank in ranks:
        assert not rank["warned"]
        logs = [entry for entry in rank["logs"] if "loss" in entry]
        assert len(logs) == len(seen)
        for entry, batches in zip(logs, seen, strict=True):
            assert channel_values(entry) == pytest.approx(
                expected_metrics(table, batches), rel=1e-5
            )
        assert channel_values(rank["evaluated"], "eval_") == pytest.approx(expected_eval, rel=1e-5)


def test_context_parallel_ranks_count_their_parts(sharded: Launch) -> None:
    ranks = sharded.ranks("context_parallel")
    assert {rank["kind"] for rank in ranks} == {"FSDP"}
    # Both ranks read the same rows, and share them.
    assert ranks[0]["batches"] == ranks[1]["batches"]
    held_out = fixed_records(10, seed=1)
    table = token_table(tiny_model(attention_dropout=0.0), [*fixed_records(32), *held_out])
    batches = ranks[0]["batches"]
    check(ranks, table, held_out, [batches[:2], batches[2:4]])


def test_tensor_parallel_ranks_count_once(sharded: Launch) -> None:
    ranks = sharded.ranks("tensor_parallel")
    assert ranks[0]["batches"] == ranks[1]["batches"]
    held_out = make_records(10, seed=1)
    # transformers' saved weights are those of the model that the oracle gets.
    table = token_table(tiny_model(**TP_SIZES), [*make_records(64), *held_out])
    batches = ranks[0]["batches"]
    check(ranks, table, held_out, [batches[:2], batches[2:4]])


@deepspeed
def test_ulysses_ranks_count_their_parts(sharded: Launch) -> None:
    ranks = sharded.ranks("ulysses")
    assert {rank["kind"] for rank in ranks} == {"DEEPSPEED"}
    held_out = fixed_records(10, seed=1)
    model = tiny_model(attention_dropout=0.0, num_key_value_heads=2)
    table = token_table(model, [*fixed_records(32), *held_out])
    # A step is a batch of one of the ranks, which both work on; two steps are a window.
    first, second = (rank["batches"] for rank in ranks)
    check(ranks, table, held_out, [[first[0], second[0]], [first[1], second[1]]])


# ---- the slicing alone ----------------------------------------------------------------------


def collated(kind: type[Any], records: list[Record], base: Any = None) -> dict[str, Any]:
    table = ChannelTable(("bbu", "rru", "lvis", "lang_chat"))
    return kind(base or PaddingCollator(), table=table, row_bounds=False)(records)


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


@deepspeed
def test_an_old_ulysses_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from channel_metrics.trainers.hf import parallel as hf_parallel

    monkeypatch.setattr(hf_parallel, "_ulysses_is_off_in_evaluation", lambda: False)
    with pytest.raises(UnsupportedVersionError, match="Update DeepSpeed"):
        layout_of(accelerator(0, 2, sp_size=2))
