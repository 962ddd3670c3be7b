"""The channels of the conversations in gpt_sft packs: from the records to the file and the batch.

Bridge prepares packs before the training, as a Parquet file. With the patch, this file has a column
`channels` too: the names of the conversations of each pack, in their order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from torch.nn.utils.rnn import pad_sequence

from channel_metrics.core.labels import UNLABELED_ID, channels_of
from channel_metrics.data.numbered import number_of, numbered, without_numbers
from channel_metrics.errors import ChannelError, ConfigError, UnsupportedVersionError
from channel_metrics.session import ChannelMetrics
from channel_metrics.trainers.megatron.ids import BATCH_KEY, NO_SEQUENCE, SEQUENCES_KEY

__all__ = ["PackedChannels", "fill_packing_strategy", "write_packed_parquet"]

_COLUMN = "channels"
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

    Bridge shuffles the conversations while it packs them, so their tokens carry the numbers of the
    records, see `channel_metrics.data.numbered`.

    Args:
        original: Bridge's function.
        assignments, *args: its other arguments.
        sequences: {length: tokenized records}.
        fields: the fields of a record that may hold its channel.

    Returns:
        The packs, each with the names under `channels`.

    Raises:
        UnsupportedVersionError: a conversation does not begin with a token of its record.
    """
    names: list[str | None] = [None]  # numbers begin with 1
    carrying: dict[int, Rows] = defaultdict(list)
    for length, records in sequences.items():
        for record in records:
            ids = numbered(record["input_ids"], len(names))
            carrying[length].append({**record, "input_ids": ids})
            names.append(next(iter(channels_of(record.get("metadata") or {}, fields)), None))
    packs = original(assignments, carrying, *args)
    for pack in packs:
        numbers = [number_of(pack["input_ids"][start]) for start in pack["seq_start_id"]]
        if 0 in numbers:
            raise UnsupportedVersionError(
                "the packs of Megatron-Bridge cannot be matched with their records: this version "
                "makes them in another way than 0.6; use 0.6, or leave the patch out."
            )
        pack["input_ids"] = without_numbers(pack["input_ids"])
        pack[_COLUMN] = [names[number] for number in numbers]
    return packs


def write_packed_parquet(
    original: Callable[..., None], rows: Rows, output_path: Any, *args: Any, **kwargs: Any
) -> None:
    """Write packs to a file, with the names of their conversations."""
    original(rows, output_path, *args, **kwargs)
    names = pyarrow.array([row.get(_COLUMN) for row in rows], _TYPE)
    file = pyarrow.parquet.ParquetFile(output_path)
    size = file.metadata.row_group(0).num_rows if file.num_row_groups else None
    table = file.read().append_column(_COLUMN, names)
    pyarrow.parquet.write_table(table, output_path, row_group_size=size)


class PackedChannels(torch.utils.data.Dataset[Any]):
    """Packs of gpt_sft whose batches carry the channel of each token, and of each conversation.

    Args:
        session: learns the names of the channels.
        dataset: a `GPTSFTPackedDataset`.

    Raises:
        ConfigError: the file of the packs names no channels.
    """

    def __init__(self, session: ChannelMetrics, dataset: Any) -> None:
        self._dataset = dataset
        self._names, self._labels = _names_of_packs(dataset), session.labels
        names = self._names.flatten().unique().to_pylist()
        session.declare_names(sorted(filter(None, names)))

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item, mapping = self._dataset[index], self._dataset.samples_mapping
        # A row that only fills up the last batch has a negative index.
        row = int(index if mapping is None else mapping[index]) % len(self._names)
        names = self._names[row].as_py() or ()
        if len(names) != len(item["seq_boundaries"]) - 1:
            raise ChannelError(
                f"a pack holds {len(item['seq_boundaries']) - 1} conversations, but its column "
                f"`channels` gives {len(names)}; write one name for each, in their order."
            )
        ids = torch.tensor(self._labels.ids(names), dtype=torch.int64, device="cpu")
        return {**item, "channels": ids, "is_filler": index < 0}

    def collate_fn(self, items: list[Any]) -> dict[str, Any]:
        """Make a batch of Bridge with the ids of its tokens and conversations."""
        batch: dict[str, Any] = self._dataset.collate_fn(items)
        # Bridge drops the last token of each conversation, and shifts labels inside of it.
        bounds = [torch.as_tensor(item["seq_boundaries"], device="cpu") for item in items]
        tokens = [
            item["channels"].repeat_interleave(of_item.diff() - 1)
            for item, of_item in zip(items, bounds, strict=True)
        ]
        sequences = [item["channels"][: 0 if item["is_filler"] else None] for item in items]
        # The first is as long as the rows, and is only there for its length.
        batch[BATCH_KEY] = pad_sequence([batch["tokens"][0], *tokens], True, UNLABELED_ID)[1:]
        batch[SEQUENCES_KEY] = pad_sequence(sequences, True, NO_SEQUENCE)
        return batch


def _names_of_packs(dataset: Any) -> Any:
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
        rows = pyarrow.array([row.get(_COLUMN) for row in dataset.indexed_dataset], _TYPE)
        tables = [pyarrow.table({_COLUMN: rows})]
    else:
        tables = [pyarrow.parquet.ParquetFile(path).read([_COLUMN]) for path in paths]
    if all(table.column_names for table in tables):
        column = pyarrow.concat_tables(tables, promote_options="permissive")[_COLUMN]
        names = column.cast(_TYPE).combine_chunks()
        if len(names.flatten().drop_null()):
            return names
    raise ConfigError(_NO_CHANNELS.format(dataset.file_path))


_NO_CHANNELS = (
    "the packs in {!r} name no channels. Packs that were prepared without the patch have no column "
    "`channels`: delete the file, so that Megatron-Bridge prepares it again, or add the column (a "
    "list of strings, one per conversation). If the records have no channel in one of `fields`, "
    "add one, or name its field in the file of CHANNEL_METRICS_CONFIG."
)
