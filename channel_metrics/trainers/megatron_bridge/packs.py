"""The channels of the conversations in gpt_sft packs, from the records to the file and back.

Bridge prepares packs before the training, as a Parquet file. With the patch, this file has a column
`channels` too: the names of the conversations of each pack, in their order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from channel_metrics.core.labels import channels_of
from channel_metrics.errors import ChannelError, ConfigError

__all__ = ["COLUMN", "fill_packing_strategy", "names_of_packs", "write_packed_parquet"]

COLUMN = "channels"
_TYPE = pyarrow.list_(pyarrow.string())
Rows = list[dict[str, Any]]


def fill_packing_strategy(
    original: Callable[..., Rows],
    assignments: Any,
    sequences: Mapping[int, Sequence[Mapping[str, Any]]],
    *args: Any,
    fields: Sequence[str],
) -> Rows:
    """Fill the packs, and name the channel of each conversation in them.

    Bridge shuffles the conversations while it packs them. It is called a second time, with the same
    random numbers, and with the number of its record in place of each token.

    Args:
        original: Bridge's function.
        assignments, *args: its other arguments.
        sequences: {length: tokenized records}.
        fields: the fields of a record that may hold its channel.

    Returns:
        The packs, each with the names under `channels`.

    Raises:
        ChannelError: the two calls packed differently.
    """
    names: list[str | None] = []
    numbered: dict[int, Rows] = defaultdict(list)
    for length, records in list(sequences.items()):
        for record in records:
            copy = {**record, "input_ids": [len(names)] * len(record["input_ids"])}
            numbered[length].append(copy)
            names.append(next(iter(channels_of(record.get("metadata") or {}, fields)), None))
    before = np.random.get_state()
    packs = original(assignments, sequences, *args)
    after = np.random.get_state()
    np.random.set_state(before)
    marks = original(assignments, numbered, *args)
    np.random.set_state(after)
    for pack, mark in zip(packs, marks, strict=True):
        if pack["loss_mask"] != mark["loss_mask"]:
            raise ChannelError(
                "Megatron-Bridge packed the conversations in another order the second time, so "
                "their channels are not known; please report this with its version."
            )
        pack[COLUMN] = [names[mark["input_ids"][start]] for start in mark["seq_start_id"]]
    return packs


def write_packed_parquet(
    original: Callable[..., None], rows: Rows, output_path: Any, *args: Any, **kwargs: Any
) -> None:
    """Write packs to a file, with the names of their conversations."""
    original(rows, output_path, *args, **kwargs)
    names = pyarrow.array([row.get(COLUMN) for row in rows], _TYPE)
    file = pyarrow.parquet.ParquetFile(output_path)
    size = file.metadata.row_group(0).num_rows if file.num_row_groups else None
    table = file.read().append_column(COLUMN, names)
    pyarrow.parquet.write_table(table, output_path, row_group_size=size)


def names_of_packs(dataset: Any) -> Any:
    """Read the names of the conversations of all packs.

    Args:
        dataset: a `GPTSFTPackedDataset` of Bridge.

    Returns:
        A pyarrow `ListArray` with one list of names per pack.

    Raises:
        ConfigError: the packs were prepared without channels.
    """
    paths = getattr(dataset, "_parquet_paths", None)
    if paths is None:
        column = pyarrow.array([row.get(COLUMN) for row in dataset.indexed_dataset], _TYPE)
    else:
        tables = [pyarrow.parquet.ParquetFile(path) for path in paths]
        if any(COLUMN not in table.schema_arrow.names for table in tables):
            raise ConfigError(_NO_CHANNELS.format(dataset.file_path))
        column = pyarrow.chunked_array(
            [c for t in tables for c in t.read([COLUMN])[COLUMN].cast(_TYPE).chunks], _TYPE
        ).combine_chunks()
    if not len(column.flatten().drop_null()):
        raise ConfigError(_NO_CHANNELS.format(dataset.file_path))
    return column


_NO_CHANNELS = (
    "the packs in {!r} name no channels. Packs that were prepared without the patch have no column "
    "`channels`: delete the file, so that Megatron-Bridge prepares it again, or add the column (a "
    "list of strings, one per conversation). If the records have no channel in one of `fields`, "
    "add one, or name its field in the file of CHANNEL_METRICS_CONFIG."
)
