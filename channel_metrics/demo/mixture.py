"""Mixes sources into one annotated, tokenised dataset. The same seed gives the same records.

A record keeps its own metadata and gets that of a fusion dataset: `_fusion_source` (the name of
the source, which is the channel), `_fusion_template` and `_fusion_domain`. The sources are held in
memory, as Arrow tables.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from channel_metrics.data.jsonl import check_record, read_jsonl
from channel_metrics.demo.config import Source, TrainConfig
from channel_metrics.demo.encoding import IGNORED, check_tokenizer, encode
from channel_metrics.demo.python_corpus import read_corpus
from channel_metrics.errors import ChannelMetricsError, ConfigError
from channel_metrics.extras import need

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Mixture",
    "annotate",
    "build_mixture",
    "checked_records",
    "quotas",
    "source_records",
]


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The training and evaluation data of a run."""

    train: Dataset
    """`input_ids`, `labels` and `metadata`, mixed by the ratios."""

    val: Dataset | None
    """The same for evaluation, not mixed; None if no source has records for it."""

    num_skipped: int
    """Records left out because their answers begin after `max_length`."""

    sources: Mapping[str, Dataset]
    """The training records of each source, each of them once."""


def annotate(source: Source, record: Mapping[str, Any]) -> dict[str, Any]:
    """`record` with the metadata that a fusion dataset would give it."""
    fusion = {
        "_fusion_source": source.name,
        "_fusion_template": source.template,
        "_fusion_domain": source.domain,
    }
    return {**record, "metadata": {**(record.get("metadata") or {}), **fusion}}


def checked_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSONL file.

    Raises `ChannelMetricsError`, with file and line, for a line that is no record.
    """
    for number, record in read_jsonl(path):
        check_record(record, f"{path}:{number}")
        yield record


def source_records(source: Source, *, val: bool = False) -> Iterator[dict[str, Any]]:
    """The annotated records of a source, or of its `val_path`; errors as in `checked_records`."""
    path = source.val_path if val else source.path
    if path is None:
        records = read_corpus(source.part, max_bytes=source.max_bytes)
    else:
        records = checked_records(path)
    for record in records:
        yield annotate(source, record)


def build_mixture(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Mixture:
    """Read, check, tokenise and mix the sources of `config`."""
    # All files are read before the first is tokenised, so a broken line is found early.
    loaded = {source.name: _load(source) for source in config.sources}
    check_tokenizer(tokenizer, chat=any(map(_has_messages, itertools.chain(*loaded.values()))))
    ready = {
        name: [_tokenised(dataset, name, config, tokenizer) for dataset in pair]
        for name, pair in loaded.items()
    }
    num_loaded = sum(len(dataset) for pair in loaded.values() for dataset in pair)
    num_ready = sum(len(dataset) for pair in ready.values() for dataset in pair)
    evaluated = [dataset for pair in ready.values() for dataset in pair[1:]]
    return Mixture(
        train=_mix({name: pair[0] for name, pair in ready.items()}, config),
        val=_joined(evaluated) if evaluated else None,
        num_skipped=num_loaded - num_ready,
        sources={name: pair[0] for name, pair in ready.items()},
    )


def quotas(ratios: Sequence[float], total: int) -> list[int]:
    """Split `total` into whole parts, as near to `ratios` as possible (largest remainders)."""
    exact = [ratio / sum(ratios) * total for ratio in ratios]
    parts = [int(value) for value in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: parts[i] - exact[i])
    for index in by_rest[: total - sum(parts)]:
        parts[index] += 1
    return parts


def _load(source: Source) -> list[Dataset]:
    """The training records and, if there are any, the evaluation records."""
    train = _dataset(source, val=False)
    if source.val_path:
        return [train, _dataset(source, val=True)]
    if not source.val_samples:
        return [train]
    if source.val_samples >= len(train):
        raise ConfigError(
            f"source {source.name!r} has {len(train)} records, so val_samples = "
            f"{source.val_samples} would leave none to train on; hold out fewer."
        )
    order = random.Random(source.name).sample(range(len(train)), len(train))
    held_out, rest = order[: source.val_samples], order[source.val_samples :]
    return [train.select(sorted(rest)), train.select(sorted(held_out))]


def _dataset(source: Source, *, val: bool) -> Dataset:
    datasets = need("datasets", extra="hf")
    records = [
        {
            "messages": _plain(record.get("messages")),
            "text": record.get("text"),
            "metadata": record["metadata"],
        }
        for record in source_records(source, val=val)
    ]
    try:
        dataset: Dataset = datasets.Dataset.from_list(records)
    except (ValueError, TypeError) as error:  # pyarrow's errors are these
        raise ChannelMetricsError(
            f"source {source.name!r}: metadata must hold values of one type under each key, but "
            f"{error}."
        ) from None
    return dataset


def _has_messages(dataset: Dataset) -> bool:
    return any(messages is not None for messages in dataset["messages"])


def _plain(messages: list[dict[str, Any]] | None) -> list[dict[str, str]] | None:
    return messages and [{"role": m["role"], "content": m["content"]} for m in messages]


def _tokenised(
    dataset: Dataset, name: str, config: TrainConfig, tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    tokens: Dataset = dataset.map(
        partial(encode, tokenizer=tokenizer, max_length=config.max_length),
        remove_columns=["messages", "text"],
        keep_in_memory=True,
        load_from_cache_file=False,
        desc=f"tokenise {name}",
    )
    # The first token of a record is not predicted.
    learned = [any(label != IGNORED for label in labels[1:]) for labels in tokens["labels"]]
    if not any(learned):
        raise ConfigError(
            f"source {name!r}: no record has an answer within max_length = {config.max_length} "
            "tokens, so nothing can be learned from it; raise max_length."
        )
    return tokens.select([index for index, kept in enumerate(learned) if kept])


def _mix(ready: Mapping[str, Dataset], config: TrainConfig) -> Dataset:
    total = config.num_samples or sum(map(len, ready.values()))
    counts = quotas([source.ratio for source in config.sources], total)
    parts = []
    for (name, dataset), count in zip(ready.items(), counts, strict=True):
        if not count:
            raise ConfigError(
                f"source {name!r} gets none of the {total} records of an epoch; raise its ratio, "
                "raise num_samples, or remove it."
            )
        passes = _passes(len(dataset), random.Random(f"{config.seed} {name}"))
        parts.append(dataset.select(list(itertools.islice(passes, count))))
    return _joined(parts).shuffle(seed=config.seed)


def _passes(size: int, rng: random.Random) -> Iterator[int]:
    """Indices in random order. Each comes once before the first comes again."""
    while True:
        yield from rng.sample(range(size), size)


def _joined(parts: list[Dataset]) -> Dataset:
    try:
        joined: Dataset = need("datasets", extra="hf").concatenate_datasets(parts)
    except (ValueError, TypeError) as error:
        raise ChannelMetricsError(
            f"metadata must hold values of one type under each key in all sources, but {error}."
        ) from None
    return joined
