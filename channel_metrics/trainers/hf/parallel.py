"""Which rank counts which tokens, if ranks share a batch or a part of each row.

| mode | what a rank sees | who counts |
|---|---|---|
| data parallel, ZeRO, FSDP | its own rows | every rank |
| tensor parallel | the rows of its group | the first rank of the group |
| context parallel (torch) | a part of each row of its group | every rank, its part |
| sequence parallel (DeepSpeed Ulysses) | in training a part of each row | every rank, its part |

In an evaluation, Ulysses is off and each rank has its own rows. If transformers does not cut the
rows of an evaluation for context parallelism, all ranks of the group hold the same rows, and the
first rank counts them.

Boundaries cannot describe parts of rows. If rows are cut, the batch holds one id per token, in the
shape of the labels. The id at a position is that of the target that this position predicts, so the
function that cuts `shift_labels` can cut the ids too.

Letters: B rows, S row length, N = num_sequences.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening

from channel_metrics.core.boundaries import rows_as_sequences, token_channel_ids
from channel_metrics.data.carried import RECORD_IDS_KEY
from channel_metrics.data.collator import ChannelCollator
from channel_metrics.data.reference import REFERENCE_KEY
from channel_metrics.data.token_marks import MARKS_KEY, marks_of_targets
from channel_metrics.errors import ConfigError, UnsupportedVersionError

__all__ = [
    "RankLayout",
    "RowCollator",
    "TargetIdCollator",
    "check_keeps_rows",
    "layout_of",
    "shard_with_labels",
    "target_ids",
]


@dataclass(frozen=True, kw_only=True)
class RankLayout:
    """How the ranks of this run divide the batches.

    `tp`, `cp` and `sp` stand for tensor, context and sequence parallelism.
    """

    tp_size: int = 1
    tp_rank: int = 0
    cp_size: int = 1
    cp_rank: int = 0
    sp_size: int = 1
    data_size: int = 1
    """How many ranks, or groups of ranks, read different rows."""
    data_rank: int = 0

    @property
    def shards_rows(self) -> bool:
        """Whether a rank trains on a part of each row."""
        return self.cp_size > 1 or self.sp_size > 1

    def counts(self, *, cut: bool) -> bool:
        """Whether this rank counts its tokens. Each token must be counted by only one rank.

        Args:
            cut: whether the rows of the batch are cut between the context parallel ranks.
        """
        return self.tp_rank == 0 and (cut or self.cp_rank == 0)


def layout_of(accelerator: Any, *, tp_size: int = 1) -> RankLayout:
    """Find the layout of a run.

    Args:
        accelerator: the accelerator of the trainer.
        tp_size: the size that the trainer found in the model or in the config of DeepSpeed.

    Raises:
        UnsupportedVersionError: it cannot be found out which ranks share a batch.
    """
    sizes = getattr(accelerator, "parallelism_config", None)  # older accelerate has none
    mesh = getattr(accelerator, "torch_device_mesh", None)
    dims: Sequence[str] = () if mesh is None else mesh.mesh_dim_names or ()
    tp_size = max(tp_size, getattr(sizes, "tp_size", None) or 1)
    cp_size = getattr(sizes, "cp_size", None) or 1
    sp_size = getattr(sizes, "sp_size", None) or 1
    for name, size in (("tp", tp_size), ("cp", cp_size)):
        if size > 1 and name not in dims:
            raise UnsupportedVersionError(
                f"{name}_size is {size}, but the device mesh of accelerate has the dimensions "
                f"{list(dims)}: which ranks share a batch cannot be told, and tokens would be "
                f"counted {size} times. Set the size in accelerate's ParallelismConfig, or "
                "detach the metrics."
            )
    if sp_size > 1:
        _check_ulysses(sizes)
    shared = tp_size * cp_size
    return RankLayout(
        tp_size=tp_size,
        tp_rank=mesh.get_local_rank("tp") if mesh is not None and tp_size > 1 else 0,
        cp_size=cp_size,
        cp_rank=mesh.get_local_rank("cp") if mesh is not None and cp_size > 1 else 0,
        sp_size=sp_size,
        data_size=accelerator.num_processes // shared,
        data_rank=accelerator.process_index // shared,
    )


def _check_ulysses(sizes: Any) -> None:
    """Raise `UnsupportedVersionError` unless a supported DeepSpeed cuts the rows."""
    if sizes.sp_backend != "deepspeed":
        raise UnsupportedVersionError(
            f"sequence parallelism was expected from DeepSpeed, but sp_backend is "
            f"{sizes.sp_backend!r}; channel ids are cut with the labels by DeepSpeed only."
        )
    if not _ulysses_is_off_in_evaluation():
        raise UnsupportedVersionError(
            "sequence parallelism needs a DeepSpeed whose Ulysses can be off in evaluation "
            "(register_with_transformers lacks disable_in_eval): there, the rows of different "
            "ranks would attend to each other. Update DeepSpeed."
        )


@functools.cache
def _ulysses_is_off_in_evaluation() -> bool:
    ulysses = importlib.import_module("deepspeed.runtime.sequence_parallel.ulysses_sp")
    register = ulysses.UlyssesSPAttentionHF.register_with_transformers
    return "disable_in_eval" in inspect.signature(register).parameters


def target_ids(ids: Tensor) -> Tensor:
    """Shift ids by one position, as `shift_labels` is shifted.

    Args:
        ids: the id of each token, int64 [B, S].

    Returns:
        The id of the target that each position predicts, int64 [B, S]; -1 at the last position.
    """
    return torch.nn.functional.pad(ids[..., 1:], (0, 1), value=-1)


class TargetIdCollator(ChannelCollator):
    """Gives `channels` as int64 [B, S]: at each position, the id of the target it predicts."""

    def _added_keys(
        self,
        batch: Mapping[str, Any],
        channels: list[list[str | None]],
        records: Sequence[Mapping[str, Any]] = (),
    ) -> dict[str, Any]:
        """One id per token, in place of one per sequence and the boundaries."""
        added = super()._added_keys(batch, channels, records)
        ids = _as_ids(added, "a batch is cut along the sequence (cp_size or sp_size > 1)")
        labels = batch.get("labels")
        if not isinstance(labels, Tensor) or labels.dim() != 2:
            came = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise UnsupportedVersionError(
                "to cut channels along the sequence, the batch must have labels of shape "
                f"[batch, sequence], but they are {came}."
            )
        bounds = added.pop(self.bounds_key, None)
        for key in (REFERENCE_KEY, RECORD_IDS_KEY):
            added.pop(key, None)  # whole sequences only
        bounds = rows_as_sequences(*labels.shape) if bounds is None else bounds
        of_tokens = token_channel_ids(ids, bounds, labels.numel()).view(labels.shape)
        if MARKS_KEY in added:
            added[MARKS_KEY] = marks_of_targets(added[MARKS_KEY])
        return {**added, "channels": target_ids(of_tokens)}


class RowCollator(ChannelCollator):
    """Adds tensors with one entry per row, for batches that one process sends to the others."""

    def _added_keys(
        self,
        batch: Mapping[str, Any],
        channels: list[list[str | None]],
        records: Sequence[Mapping[str, Any]] = (),
    ) -> dict[str, Any]:
        """The channels. Raises `ConfigError` if a row holds several sequences."""
        added = super()._added_keys(batch, channels, records)
        # Not needed: the repeated records of such an evaluation are always the last rows.
        added.pop(self.records_key or "", None)
        _as_ids(added, "one process sends its batches to the others (dispatch_batches)")
        if self.bounds_key in added:
            raise ConfigError(_NOT_BY_ROWS.format(f"holds {len(added['channels'])} sequences"))
        return added


_NOT_BY_ROWS = (
    "one process sends its batches to the others, cut by rows (dispatch_batches), so every row "
    "must be one sequence, but a batch {} in its rows; set "
    'accelerator_config={{"dispatch_batches": False}}.'
)


def check_keeps_rows(collator: Any) -> None:
    """Refuse a collator that packs rows, before any batch is made.

    Later, only the process that makes the batch would raise, and the others would wait for it.

    Args:
        collator: the collator of the trainer.

    Raises:
        ConfigError: this collator is known to put several sequences into a row.
    """
    if isinstance(collator, DataCollatorWithFlattening) or getattr(collator, "padding_free", False):
        name = type(collator).__name__
        raise ConfigError(_NOT_BY_ROWS.format(f"of {name} holds several sequences"))


def _as_ids(added: Mapping[str, Any], reason: str) -> Tensor:
    channels = added["channels"]
    if not isinstance(channels, Tensor):
        raise ConfigError(
            f"{reason}, so channels must be ids, but the batch has names that are not in the "
            f"table ({', '.join(sorted({str(name) for name in channels})[:8])}); declare "
            '`channels` in the metrics config, with unknown="unlabeled" or "error".'
        )
    return channels


def shard_with_labels(context: Callable[..., Any], *of_tokens: Any) -> Any:
    """Let context parallelism cut the channel ids together with the labels.

    Args:
        context: what `Trainer._prepare_context_parallel_inputs` returns.
        *of_tokens: the channels of the batch, and what else to cut like them. They are cut if the
            channels are int64 [B, S]. Nothing, without channels.

    Returns:
        A context that also cuts the ids; `context` itself if nothing is cut.
    """
    if not of_tokens or not isinstance(of_tokens[0], Tensor) or of_tokens[0].dim() != 2:
        return context
    if not isinstance(context, functools.partial) or "buffers" not in context.keywords:
        return context
    cut, ours = context.keywords, [one for one in of_tokens if one is not None]
    return functools.partial(
        context.func,
        *context.args,
        **cut
        | {
            "buffers": [*cut["buffers"], *ours],
            "buffer_seq_dims": [*cut["buffer_seq_dims"], *[1] * len(ours)],
            "no_restore_buffers": {*cut["no_restore_buffers"], *ours},
        },
    )
