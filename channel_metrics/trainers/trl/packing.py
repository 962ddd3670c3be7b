"""TRL's packing, with one more dataset column: the channel of every token.

TRL packs inside the constructor of SFTTrainer, and keeps only the columns of the tokens. Here its
steps run one by one. First comes everything before packing (template, tokens, masks). Then we add
a column with a channel index per token. Then come the same shuffle, TRL's own `pack_dataset` with
the same arguments, and the same shuffle again. TRL's own columns stay identical.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import trl
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets

from channel_metrics.config import MetricsConfig
from channel_metrics.core.labels import LabelTable, channel_of, field_columns
from channel_metrics.core.token_axes import TokenAxes, TokenColumn
from channel_metrics.data.scan import class_names, scan_channels
from channel_metrics.data.token_marks import MARKS_KEY, marks_of_record
from channel_metrics.errors import ChannelError, UnsupportedVersionError
from channel_metrics.trainers.trl.collator import TOKEN_FIELD
from channel_metrics.trainers.trl.columns import column_names, columns_left

__all__ = ["check_packing", "pack_with_channels"]

_PREPARE_PARAMETERS = (
    "dataset",
    "processing_class",
    "args",
    "packing",
    "formatting_func",
    "dataset_name",
)
_PACK_PARAMETERS = ("dataset", "seq_length", "strategy", "map_kwargs")

Prepare = Callable[..., Any]


def check_packing(prepare: Prepare | None, pack: Callable[..., Any] | None) -> None:
    """Raise `UnsupportedVersionError` if this trl prepares or packs data in another way.

    prepare: `SFTTrainer._prepare_dataset`, bound or not. pack: the `pack_dataset` that it calls.
    """
    for name, function, expected in (
        ("SFTTrainer._prepare_dataset", prepare, _PREPARE_PARAMETERS),
        ("pack_dataset", pack, _PACK_PARAMETERS),
    ):
        parameters = inspect.signature(function).parameters if function else ()
        found = tuple(parameter for parameter in parameters if parameter != "self")
        if found != expected:
            raise UnsupportedVersionError(
                f"{name} of trl must have the parameters {expected}, but trl {trl.__version__} "
                f"has {found}; packing with channels needs a tested version (see docs/trl.md)."
            )


def pack_with_channels(
    trainer: Any,
    prepare: Prepare,
    arguments: dict[str, Any],
    config: MetricsConfig,
    known: Sequence[str] = (),
) -> tuple[Any, tuple[str, ...]]:
    """Pack a dataset as TRL does, with the dataset column `channel_ids`.

    Args:
        trainer: the SFTTrainer.
        prepare, arguments: TRL's own `_prepare_dataset`, bound, and its arguments by name.
        config: the fields, and the declared channels.
        known: the names in datasets that were packed before. They keep their indices.

    Returns:
        The packed dataset, and the names that the indices stand for.

    Raises:
        ChannelError: for a stream without declared channels.
        UnsupportedVersionError: if this trl packs in another way.
    """
    pack = _pack_dataset_of(type(trainer))
    check_packing(prepare, pack)
    args, dataset = arguments["args"], arguments["dataset"]
    if args.max_length is None:
        raise ValueError("When packing is enabled, `max_length` can't be `None`.")
    table = LabelTable([*config.channels, *known], unknown=config.unknown)
    scanned = scan_channels(dataset, config.label_fields, arguments["dataset_name"])
    table.ids(scanned or ())
    if scanned is None and not config.channels:
        raise ChannelError(
            "a stream that is packed must have declared channels, because they get their numbers "
            "before it is read; set `channels` in the metrics config, or packing=False."
        )
    # Without packing, TRL would cut long records. Packing has its own way with them.
    unpacked = copy.copy(args)
    unpacked.max_length, unpacked.shuffle_dataset, unpacked.use_liger_kernel = None, False, False
    tokens = prepare(**(arguments | {"args": unpacked, "packing": False}))
    map_kwargs: dict[str, Any] = {}
    if isinstance(dataset, Dataset):
        map_kwargs["desc"] = f"Packing {arguments['dataset_name']} dataset"
        map_kwargs["num_proc"] = args.dataset_num_proc
    kept = columns_left(prepare, arguments, column_names(tokens))
    # trl has this option since 0.25.
    shuffles = getattr(args, "shuffle_dataset", False)
    with PartialState().main_process_first():
        columns = TokenAxes(config.axes).columns
        rows = _with_token_channels(tokens, kept, config.label_fields, table, columns)
        if shuffles:
            rows = rows.shuffle(seed=args.seed)
        packed = pack(rows, args.max_length, args.packing_strategy, map_kwargs)
    return packed.shuffle(seed=args.seed) if shuffles else packed, table.names


def _pack_dataset_of(trainer_class: type) -> Any:
    owner = next(c for c in trainer_class.__mro__ if c.__name__ == "SFTTrainer")
    return getattr(sys.modules[owner.__module__], "pack_dataset", None)


def _with_token_channels(
    tokens: Any,
    kept: list[str],
    fields: Sequence[str],
    table: LabelTable,
    columns: Sequence[TokenColumn],
) -> Any:
    read = field_columns([*fields, *(field for field, _ in columns)])
    sources = [name for name in column_names(tokens) if name in read]
    added_fields = [TOKEN_FIELD, *([MARKS_KEY] if columns else [])]
    options = {
        "columns": tuple(columns),
        "fields": tuple(fields),
        "names": table.names,
        "unknown": table.unknown,
        "classes": class_names(tokens, fields),
    }
    if not isinstance(tokens, Dataset):
        added = tokens.map(_channels_of_batch, batched=True, fn_kwargs=options)
        return added.select_columns([*kept, *added_fields])
    column = tokens.select_columns(list(dict.fromkeys(["input_ids", *sources])))
    column = column.with_format("arrow").map(
        _channels_of_table,
        batched=True,
        fn_kwargs=options,
        remove_columns=column.column_names,
        desc="Channels of the tokens",
    )
    kept_rows = tokens.select_columns(kept)
    joined = concatenate_datasets([kept_rows.with_format(None), column.with_format(None)], axis=1)
    form = kept_rows.format
    if form["type"] in (None, "custom"):
        return joined
    return joined.with_format(form["type"], **form["format_kwargs"])


def _channels_of_table(rows: pa.Table, columns: Sequence[TokenColumn], **options: Any) -> pa.Table:
    """One dataset column: the index of a record's channel, once per token, like `input_ids`.

    With `columns` a second one: the labels of the tokens, as marks.
    """
    ids = rows.column("input_ids").combine_chunks()
    ids = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids
    sizes = np.diff(np.asarray(ids.offsets))
    sources = rows.drop_columns(["input_ids"])
    records = sources.to_pylist() if sources.num_columns else [{}] * len(rows)
    offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]), type=ids.offsets.type)
    indices = np.repeat(np.array(_indices(records, **options), np.int32), sizes)
    found = {TOKEN_FIELD: type(ids).from_arrays(offsets, pa.array(indices))}
    if columns:
        marks = [mark for one in _marks(records, columns, sizes.tolist()) for mark in one]
        found[MARKS_KEY] = type(ids).from_arrays(offsets, pa.array(marks, pa.int64()))
    return pa.table(found)


def _channels_of_batch(
    batch: dict[str, list[Any]], columns: Sequence[TokenColumn], **options: Any
) -> dict[str, list[Any]]:
    """The same for a batch of a stream."""
    values = zip(*batch.values(), strict=True)
    records = [dict(zip(batch, of_record, strict=True)) for of_record in values]
    indices = _indices(records, **options)
    sizes = [len(ids) for ids in batch["input_ids"]]
    found = {TOKEN_FIELD: [[i] * n for i, n in zip(indices, sizes, strict=True)]}
    return {**found, MARKS_KEY: _marks(records, columns, sizes)} if columns else found


def _marks(
    records: Sequence[Any], columns: Sequence[TokenColumn], sizes: Sequence[int]
) -> list[list[int]]:
    pairs = zip(records, sizes, strict=True)
    return [marks_of_record(record, columns, size).tolist() for record, size in pairs]


def _indices(
    records: Sequence[Any],
    fields: tuple[str, ...],
    names: tuple[str, ...],
    unknown: Any,
    classes: dict[str, tuple[str, ...]],
) -> list[int]:
    found = [channel_of(record, fields, classes) for record in records]
    # All names have their numbers already. A name that would be added now is an error.
    table = LabelTable(names, unknown="error" if unknown == "add" else unknown)
    indices = table.ids(found)
    if len(table) > len(names):
        raise ChannelError(
            "a stream that is packed can have no labels of further axes in its records, because "
            "combinations get their numbers before it is read; map channels to labels in `axes`, "
            "or set packing=False."
        )
    return indices
