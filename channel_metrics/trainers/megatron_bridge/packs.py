"""The channels of the conversations in gpt_sft packs: from the records to the file and the batch.

Bridge prepares packs before the training, as a Parquet file. With the patch, this file has a column
`channels` too: the names of the conversations of each pack, in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from megatron.core.msc_utils import MultiStorageClientFeature
from torch.nn.utils.rnn import pad_sequence

from channel_metrics.core.labels import UNLABELED_ID, channel_of
from channel_metrics.data.numbered import number_of, numbered, unmatched, without_numbers
from channel_metrics.errors import ConfigError
from channel_metrics.session import ChannelMetrics
from channel_metrics.trainers.megatron.data import WrappedDataset, ids_of_pack
from channel_metrics.trainers.megatron.ids import BATCH_KEY, NO_SEQUENCE, SEQUENCES_KEY

__all__ = ["PackedChannels", "fill_packing_strategy", "write_packed_parquet"]

_COLUMN = "channels"
_TYPE = pyarrow.list_(pyarrow.string())


def fill_packing_strategy(
    fields: Sequence[str], original: Any, assignments: Any, sequences: Any, *args: Any
) -> list[dict[str, Any]]:
    """Fill the packs, and name the channel of each conversation in them.

    Bridge shuffles the conversations while it packs them, so their tokens carry the numbers of the
    records, see `channel_metrics.data.numbered`.

    Args:
        fields: the fields of a record that may hold its channel.
        original: Bridge's function.
        assignments, *args: its other arguments.
        sequences: {length: tokenized records}, of which nobody else needs the tokens.

    Returns:
        The packs, each with the names under `channels`.

    Raises:
        UnsupportedVersionError: a conversation does not begin with a token of its record.
    """
    names: list[str | None] = [None]  # numbers begin with 1
    for record in chain.from_iterable(sequences.values()):
        record["input_ids"] = numbered(record["input_ids"], len(names))
        names.append(channel_of(record.get("metadata") or {}, fields))
    packs: list[dict[str, Any]] = original(assignments, sequences, *args)
    for pack in packs:
        numbers = [number_of(pack["input_ids"][start]) for start in pack["seq_start_id"]]
        if 0 in numbers:
            raise unmatched("the packs of Megatron-Bridge", "0.6")
        pack["input_ids"] = without_numbers(pack["input_ids"])
        pack[_COLUMN] = [names[number] for number in numbers]
    return packs


def write_packed_parquet(
    original: Any, rows: Any, output_path: Any, row_group_size: int = 500
) -> None:
    """Write packs to a file, with the names of their conversations."""
    original(rows, output_path, row_group_size)
    names = pyarrow.array([row.get(_COLUMN) for row in rows], _TYPE)
    with _opened(output_path, "rb") as file:
        table = pyarrow.parquet.ParquetFile(file).read().append_column(_COLUMN, names)
    with _opened(output_path, "wb") as file:
        pyarrow.parquet.write_table(table, file, row_group_size=row_group_size)


def _opened(path: Any, mode: str) -> Any:
    """A file where Bridge keeps packs: in an object store, if its client is on."""
    if MultiStorageClientFeature.is_enabled():
        return MultiStorageClientFeature.import_package().open(str(path), mode)
    return open(path, mode)


class PackedChannels(WrappedDataset):
    """Packs of gpt_sft whose batches carry the channel of each token, and of each conversation.

    Args:
        session: learns the names of the channels.
        dataset: a `GPTSFTPackedDataset`.

    Raises:
        ConfigError: the file of the packs names no channels.
    """

    def __init__(self, session: ChannelMetrics, dataset: Any) -> None:
        super().__init__(dataset, session)
        self._names = _names_of_packs(dataset)
        session.declare_names(sorted(filter(None, self._names.flatten().unique().to_pylist())))

    def __getitem__(self, index: int) -> dict[str, Any]:
        item, mapping = self._dataset[index], self._dataset.samples_mapping
        row = int(index if mapping is None else mapping[index]) % len(self._names)
        ids = self._table.ids(self._names[row].as_py() or ())
        # Bridge drops the last token of each conversation, and shifts labels inside of it.
        lengths = torch.as_tensor(item["seq_boundaries"], device="cpu").diff() - 1
        of_tokens, of_sequences = ids_of_pack(ids, lengths)
        # A row that only fills up the last batch has a negative index.
        of_sequences = of_sequences[: 0 if index < 0 else None]
        return {**item, BATCH_KEY: of_tokens, SEQUENCES_KEY: of_sequences}

    def collate_fn(self, items: list[Any]) -> dict[str, Any]:
        """Make a batch of Bridge with the ids of its tokens and conversations."""
        batch: dict[str, Any] = self._dataset.collate_fn(items)
        # The first is as long as the rows, and is only there for its length.
        tokens = [batch["tokens"][0], *(item[BATCH_KEY] for item in items)]
        batch[BATCH_KEY] = pad_sequence(tokens, True, UNLABELED_ID)[1:]
        sequences = [item[SEQUENCES_KEY] for item in items]
        batch[SEQUENCES_KEY] = pad_sequence(sequences, True, NO_SEQUENCE)
        return batch


def _names_of_packs(dataset: Any) -> Any:
    """A pyarrow `ListArray` with a list of names for each pack, the names of its conversations.

    Raises `ConfigError` if the packs were prepared without channels.
    """
    columns = []
    for path in getattr(dataset, "_parquet_paths", ()):
        with _opened(path, "rb") as file:
            columns.append(pyarrow.parquet.ParquetFile(file).read([_COLUMN]).columns)
    if all(columns):
        chunks = [chunk.cast(_TYPE) for (column,) in columns for chunk in column.chunks]
        names = pyarrow.chunked_array(chunks, _TYPE).combine_chunks()
        if len(names.flatten().drop_null()):
            return names
    raise ConfigError(
        f"the packs in {str(dataset.file_path)!r} name no channels: delete the file, so that "
        "Megatron-Bridge prepares it again with the patch, as Parquet, or add the column "
        "`channels` (a list of strings, one per conversation). If the records have no channel, add "
        "one, or name its field under `fields` in the file of CHANNEL_METRICS_CONFIG."
    )
