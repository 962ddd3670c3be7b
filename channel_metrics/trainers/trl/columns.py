"""Which dataset columns TRL keeps when it prepares a dataset, and how to keep the channels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import datasets
from datasets import Dataset

from channel_metrics.core.labels import field_columns

__all__ = ["column_names", "columns_left", "prepare_for_liger"]


def column_names(dataset: Any) -> list[str]:
    """The columns of a dataset; of a stream without this information, those of its first record."""
    names = getattr(dataset, "column_names", None)
    return list(next(iter(dataset))) if names is None else list(names)


def columns_left(
    prepare: Callable[..., Any], arguments: dict[str, Any], columns: Collection[str]
) -> list[str]:
    """The dataset columns that TRL's `_prepare_dataset` keeps.

    Versions of TRL differ in this, so the method is called with one made-up record.

    Args:
        prepare: TRL's method, bound.
        arguments: the arguments that it was called with, by name.
        columns: the columns of the tokenised records.
    """
    args = copy.copy(arguments["args"])
    args.shuffle_dataset, args.dataset_num_proc = False, None
    if not arguments.get("packing"):
        # The record must not be cut.
        args.max_length = None
    asked = {
        "dataset": Dataset.from_list([{name: [1, 1] for name in columns}]),
        "args": args,
        "formatting_func": None,
    }
    with _no_progress_bars():
        left = set(column_names(prepare(**(arguments | asked))))
    return [name for name in columns if name in left]


def prepare_for_liger(
    prepare: Callable[..., Any], arguments: dict[str, Any], fields: Sequence[str]
) -> Any:
    """Prepare a dataset for use_liger_kernel as TRL does, and keep the columns of `fields`.

    trl 0.29 keeps only the columns that its collator knows, so it drops the channel. It also drops
    given labels, and these must stay dropped.

    Args:
        prepare, arguments: as in `columns_left`.
        fields: the fields of a record that are read.
    """
    unfused = copy.copy(arguments["args"])
    unfused.use_liger_kernel = False
    prepared = prepare(**(arguments | {"args": unfused}))
    columns = column_names(prepared)
    left = columns_left(prepare, arguments, columns)
    kept = [name for name in columns if name in {*left, *field_columns(fields)}]
    return prepared if kept == columns else prepared.select_columns(kept)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
