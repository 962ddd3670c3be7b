"""The data of a probe: datasets or JSONL files -> the batches that this rank runs.

Nothing here goes through a data loader: no worker is started, no sampler and no state of
accelerate is touched, and the trainer's own collator is copied, not called.
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
    """A batch on the host. inputs: what the model takes. cu_seqlens: where its sequences end.
    counts: False for one that only keeps this rank in step with the others."""

    inputs: dict[str, Any]
    cu_seqlens: Tensor
    counts: bool


def read_sources(sources: Mapping[str, Any]) -> dict[str, Any]:
    """{name: records with a length and numbers}; a path is read as a JSONL file.

    Raises `ConfigError` for what is no such dataset, or has no record, and
    `ChannelMetricsError` with file and line for what is no JSONL.
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
    """What makes a batch of records: `given`, or a copy of the trainer's own.

    Records are stripped of the columns that the trainer would keep from its collator. Raises
    `ConfigError` if the trainer's collator cannot be copied.
    """
    base = given
    if base is None:
        try:
            # Collators have state, such as a generator: that of the training must not move.
            base = copy.deepcopy(trainer.data_collator)
        except Exception as error:
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
        fields=state.config.fields if state else DEFAULT_FIELDS,
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
    """The batches of this rank; all ranks get the same number of them, and share the samples.

    The samples do not depend on the number of ranks. Collators may draw random numbers: they get
    the same ones for the same `draw`. Raises `ConfigError` if nothing in the samples of all ranks
    is supervised, at the first drawing.
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
                # All ranks look at all samples: they must agree on whether there is an error.
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
