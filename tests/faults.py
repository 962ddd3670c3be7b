"""The places in the library at which tests put faults and observers.

A function of ours that moves, or gets another name, is one line here. Tests name places, never
modules: `with faults.inject("record a micro-batch"): ...`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

# {place: (module, attribute)}
PLACES: dict[str, tuple[str, str]] = {
    # transformers, TRL, ms-swift
    "start": ("channel_metrics.session", "ChannelMetrics.start"),
    "scan the data": ("channel_metrics.session", "scan_channels"),
    "collate": ("channel_metrics.data.collator", "ChannelCollator._added_keys"),
    "see the model's loss": ("channel_metrics.capture.transformers", "_two_steps"),
    "record a micro-batch": ("channel_metrics.core.micro_batch", "MicroBatch.add_to"),
    "sum over ranks": ("channel_metrics.session", "sum_over_ranks"),
    "log": ("channel_metrics.window_maker", "WindowMaker.make"),
    "save": ("channel_metrics.core.totals", "RunTotals.save"),
    "ask whether Ulysses is off": (
        "channel_metrics.trainers.hf.parallel",
        "_ulysses_is_off_in_evaluation",
    ),
    # windows
    "add to a window": ("channel_metrics.core.accumulator", "ChannelLossAccumulator.update"),
    "read a window": ("channel_metrics.core.table", "SumTable.sums"),
    # probes
    "probe": ("channel_metrics.trainers.hf.probe_forward", "ProbeReader.measure"),
    "run a probe's batch": ("channel_metrics.trainers.hf.probe_forward", "ProbeReader._of_batch"),
    # ms-swift, Megatron, ms-swift's Megatron side
    "collate for ms-swift": (
        "channel_metrics.trainers.swift.collator",
        "SwiftCollator._with_channels",
    ),
    "count the records of rlhf": (
        "channel_metrics.trainers.trl.records",
        "RecordsMixin._count_records",
    ),
    "find Megatron's loss mask": ("channel_metrics.trainers.megatron.step", "loss_mask_of"),
    "read ms-swift's Megatron batch": (
        "channel_metrics.trainers.swift_megatron.mixin",
        "sequence_channels",
    ),
}


def install(place: str, function: Callable[..., Any]) -> Callable[[], None]:
    """Call `function(original, *args, **kwargs)` in place of what stands at `place`.

    Returns:
        A function that puts the original back.
    """
    module, attribute = PLACES[place]
    *owners, name = attribute.split(".")
    owner: Any = functools.reduce(getattr, owners, importlib.import_module(module))
    original = getattr(owner, name)

    @functools.wraps(original)
    def instead(*args: Any, **kwargs: Any) -> Any:
        return function(original, *args, **kwargs)

    patcher = patch.object(owner, name, instead)
    patcher.start()
    return patcher.stop


@contextmanager
def around(place: str, function: Callable[..., Any]) -> Iterator[None]:
    """`install`, for the length of a block."""
    undo = install(place, function)
    try:
        yield
    finally:
        undo()


@contextmanager
def inject(place: str, when: Callable[..., bool] | None = None) -> Iterator[list[int]]:
    """Raise `ZeroDivisionError("a fault of ours")` at a place.

    Args:
        place: a key of `PLACES`.
        when: given the number of the call, from 1, and its arguments; by default each call fails.

    Yields:
        The numbers of the calls so far.
    """
    calls: list[int] = []

    def failing(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        calls.append(len(calls) + 1)
        if when is None or when(calls[-1], *args):
            raise ZeroDivisionError("a fault of ours")
        return original(*args, **kwargs)

    with around(place, failing):
        yield calls
