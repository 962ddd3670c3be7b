"""The data of a probe: it makes the batches of this rank from datasets or JSONL files.

No data loader is used, so no worker is started, and no sampler or state of accelerate changes. The
trainer's collator is copied, and only the copy is called.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from channel_metrics.core.boundaries import boundaries_from_batch
from channel_metrics.core.checks import IGNORE_INDEX
from channel_metrics.core.labels import DEFAULT_FIELDS
from channel_metrics.data.collator import ChannelCollator
from channel_metrics.data.jsonl import read_jsonl
from channel_metrics.errors import ChannelMetricsError, ConfigError
from channel_metrics.probes.probe import ProbeConfig, choose, deal
from channel_metrics.probes.without_trace import keep_random_state
from channel_metrics.trainers.hf.data import wrap_collator
from channel_metrics.trainers.hf.parallel import RankLayout

__all__ = ["Collate", "ProbeBatch", "collator_of", "draw_batches", "read_sources"]

Collate = Callable[[list[Any]], Any]


@dataclass(frozen=True)
class ProbeBatch:
    """A batch on the host.

    Args:
        inputs: what the model takes.
        cu_seqlens: the boundaries of its sequences, int32 [num_sequences + 1].
        counts: False for a batch that only keeps the number of forwards equal on all ranks.
    """

    inputs: dict[str, Any]
    cu_seqlens: Tensor
    counts: bool


def read_sources(sources: Mapping[str, Any]) -> dict[str, Any]:
    """Check the datasets of a probe, and read those that are paths.

    Args:
        sources: {name: dataset or path of a JSONL file}.

    Returns:
        {name: dataset}; each has a length and gives records by number.

    Raises:
        ConfigError: a source is no such dataset, is empty, or is a file that is not JSONL.
    """
    if not isinstance(sources, Mapping) or not sources:
        raise ConfigError(
            "sources of a probe must be a mapping from name to dataset (or JSONL path) with at "
            f"least one entry, but is {sources!r:.80}."
        )
    return {name: _read(name, source) for name, source in sources.items()}


def _read(name: str, source: Any) -> Any:
    if isinstance(source, (str, PathLike)):
        try:
            return [record for _, record in read_jsonl(Path(source))]
        except ChannelMetricsError as error:
            raise ConfigError(f"dataset {name!r} of the probe: {error}") from None
    if not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
        raise ConfigError(
            f"dataset {name!r} of the probe must be a path of a JSONL file, or have a length and "
            f"records by number, but is a {type(source).__name__}; take a list of its first "
            "records."
        )
    if isinstance(source, Mapping):
        raise ConfigError(
            f"dataset {name!r} of the probe must be one dataset, but is a mapping of "
            f"{', '.join(map(str, source)) or 'nothing'}; name each of them in sources."
        )
    if not len(source):
        raise ConfigError(f"dataset {name!r} of the probe is empty; remove it, or give it records.")
    return source


def collator_of(trainer: Any, given: Collate | None) -> Collate:
    """Find the collator of a probe. It gets the same columns as in the training.

    Args:
        trainer: the trainer whose model is measured.
        given: the collator of the user; None means a copy of the trainer's own.

    Raises:
        ConfigError: the trainer's collator cannot be copied.
    """
    base = given
    if base is None:
        try:
            # A collator may have state, such as a generator, which the probe must not change.
            base = copy.deepcopy(trainer.data_collator)
        except Exception as error:  # whatever a class raises when it is copied
            raise ConfigError(
                f"the trainer's collator ({type(trainer.data_collator).__name__}) cannot be "
                f"copied ({error}); give the probe a `collator` of its own."
            ) from error
    strip: frozenset[str] = frozenset()
    if isinstance(base, ChannelCollator):
        strip, base = base.strip, base.base
    trainer._set_signature_columns_if_needed()
    state = getattr(trainer, "channel_metrics", None)
    strip |= wrap_collator(
        base,
        fields=state.config.record_fields if state else DEFAULT_FIELDS,
        table=None,
        signature_columns=trainer._signature_columns or (),
        remove_unused_columns=trainer.args.remove_unused_columns,
    ).strip
    collate = trainer._get_collator_with_removed_columns(base, description="probe")

    def collated(features: list[Any]) -> Any:
        return collate([_without(feature, strip) for feature in features])

    return collated


def _without(feature: Any, names: frozenset[str]) -> Any:
    if not isinstance(feature, Mapping):
        return feature
    return {key: value for key, value in feature.items() if key not in names}


def draw_batches(
    name: str,
    records: Any,
    *,
    config: ProbeConfig,
    batch_size: int,
    collate: Collate,
    encode: Callable[[Any], Any] | None,
    layout: RankLayout,
    draw: int,
) -> list[ProbeBatch]:
    """Draw the samples of a dataset, and make the batches of this rank.

    The samples are the same for any number of ranks, which divide them. All ranks get the same
    number of batches. If the collator draws random numbers, they depend only on the seed, the
    draw, the name and the rank.

    Args:
        name: the name of the dataset.
        records: the dataset.
        config: the settings of the probe.
        batch_size: records per batch of one rank.
        collate: makes a batch of records.
        encode: see `DatasetMetricsCallback`.
        layout: how the ranks share the samples.
        draw: the number of this drawing.

    Raises:
        ConfigError: in the first drawing, no token of any rank is supervised.
    """
    chosen = choose(
        len(records), config.batches * batch_size, seed=config.seed, name=name, draw=draw
    )
    num_forwards = -(-len(chosen) // (batch_size * layout.data_size))
    batches: list[ProbeBatch] = []
    num_supervised = 0
    with keep_random_state():
        for rank in range(layout.data_size):
            _seed_all(f"{config.seed} {draw} {name} {rank}")
            for part in deal(
                len(chosen), num_forwards=num_forwards, num_ranks=layout.data_size, rank=rank
            ):
                # All ranks make all batches, so that an error is raised on all of them.
                features = [records[chosen[position]] for position in part or range(1)]
                batch = _batch(name, features, collate, encode, counts=bool(part))
                num_supervised += int((batch.inputs["labels"] != IGNORE_INDEX).sum())
                if rank == layout.data_rank:
                    batches.append(batch)
    if not num_supervised and draw == 0:
        raise ConfigError(
            f"no token of the {len(chosen)} samples of dataset {name!r} of the probe is "
            f"supervised: all their labels are {IGNORE_INDEX}; check how its records are prepared."
        )
    return batches


def _batch(
    name: str,
    features: Sequence[Any],
    collate: Collate,
    encode: Callable[[Any], Any] | None,
    *,
    counts: bool,
) -> ProbeBatch:
    ready = [encode(feature) if encode else feature for feature in features]
    inputs = collate(ready)
    if not isinstance(inputs, MutableMapping) or not isinstance(inputs.get("labels"), Tensor):
        came = ", ".join(inputs) if isinstance(inputs, Mapping) else type(inputs).__name__
        raise ConfigError(
            f"a batch of dataset {name!r} of the probe must have `labels`, but holds {came}; its "
            "records must be what the trainer's collator takes: prepare them like the training "
            "set, or pass `encode` or `collator`."
        )
    inputs = dict(inputs)
    return ProbeBatch(inputs, boundaries_from_batch(inputs).cu_seqlens, counts)


def _seed_all(seed: str) -> None:
    number = random.Random(seed).randrange(2**32)
    random.seed(number)
    np.random.seed(number)
    torch.default_generator.manual_seed(number)
