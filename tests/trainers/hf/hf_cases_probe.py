"""Probes on two ranks of DistributedDataParallel; what the cases of sharded models share."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from hf_case_tools import COLLECTIVES, cases_of, run, told
from hf_probe_tools import expected_values, restless_model
from hf_tools import Record, make_records, tiny_model

from channel_metrics.probes.probe import choose
from channel_metrics.trainers.hf.probe import DatasetMetricsCallback
from channel_metrics.trainers.hf.probe_forward import ProbeReader

WORLD_SIZE = 2
ENVIRON: dict[str, str] = {}

# Odd numbers: ranks get different shares, and of one record one of them gets nothing.
SOURCES = {"canary": make_records(7, seed=11), "one": make_records(1, seed=13)}


class _Watched(DatasetMetricsCallback):
    """Counts the forwards of this rank, and what it sends, in each probe."""

    def __init__(self, sources: dict[str, list[Record]], **options: Any) -> None:
        clock = options.pop("clock", None)
        super().__init__(sources, **options)
        self._clock = clock or self._clock
        self.forwards: list[int] = []
        self.sent: list[list[str]] = []
        self.next_steps: list[int] = []

    def _probe(self, step: int, control: Any) -> None:
        of_batch = ProbeReader._of_batch

        def counted(reader: ProbeReader, *args: Any) -> Any:
            self.forwards[-1] += 1
            return of_batch(reader, *args)

        self.forwards.append(0)
        with patch.object(ProbeReader, "_of_batch", counted), _collectives() as sent:
            super()._probe(step, control)
        self.sent.append(sent)
        self.next_steps.append(self._budget.next_step)


@contextmanager
def _collectives() -> Iterator[list[str]]:
    """The collectives that the block calls through torch.distributed, in order."""
    called: list[str] = []

    def wrap(name: str, original: Any) -> Any:
        def watched(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return original(*args, **kwargs)

        return watched

    with patch.multiple(dist, **{name: wrap(name, getattr(dist, name)) for name in COLLECTIVES}):
        yield called


def _probed(
    folder: Path, probe_on: bool, restless: bool = False, prepare: Any = None, **arguments: Any
) -> Any:
    """A training with dropout and accumulation; weights, random numbers, logs of this rank."""
    options = {"every": 2, "batches": 4, "batch_size": 1, "max_overhead": None}
    probe = _Watched(SOURCES, **options | arguments.pop("options", {}))
    trainer = run(
        folder,
        prepare=(lambda trainer: trainer.add_callback(probe)) if probe_on else prepare,
        dropout=0.1,
        **{
            "learning_rate": 1e-2,
            "max_steps": 5,
            "gradient_accumulation_steps": 2,
            "records": make_records(64),
        }
        | ({"model": restless_model()} if restless else {})
        | arguments,
    )
    left = [torch.rand(()).item(), float(np.random.rand()), random.random()]
    buffers = {name: buffer.tolist() for name, buffer in trainer.model.named_buffers()}
    result = told(trainer, random=left, buffers=buffers)
    if probe_on:
        result["probe"] = {
            "forwards": probe.forwards,
            "sent": probe.sent,
            "next": probe.next_steps,
            "expected": _expected(trainer),
        }
    return result


def _expected(trainer: Any) -> list[dict[str, float]]:
    """What the probes of the first and of the last step must have logged, by a naive loop."""
    ended = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    last = tiny_model()
    found = []
    for model in (tiny_model(), last):
        if model is last:
            if not ended:
                break  # only the first rank is given them
            names = model.state_dict()
            model.load_state_dict({name: ended[name].clone() for name in names if name in ended})
        values = expected_values(model, "one", SOURCES["one"])
        found.append(values | expected_values(model, "canary", _chosen()))
    return found


def _chosen() -> list[Record]:
    return [SOURCES["canary"][index] for index in choose(7, 4, seed=0, name="canary")]


def ddp_off(folder: Path) -> Any:
    """Of a model whose buffers are sent to the other rank in each training forward."""
    return _probed(folder, False, restless=True, dataloader_num_workers=1)


def ddp_on(folder: Path) -> Any:
    return _probed(folder, True, restless=True, dataloader_num_workers=1)


class _Clock:
    """Each look at it takes a second on rank 0, and on rank 1 always a second more than before."""

    def __init__(self) -> None:
        self.now, self.looks = 0.0, 0

    def __call__(self) -> float:
        self.looks += 1
        self.now += 1 + (self.looks - 1) * dist.get_rank()
        return self.now


def ddp_budget(folder: Path) -> Any:
    """Ranks whose clocks differ agree on the next step."""
    options = {"max_overhead": 0.5, "every": 1, "clock": _Clock()}
    return _probed(folder, True, options=options, max_steps=12)


def ddp_fault(folder: Path) -> Any:
    """Rank 1 has an error in its second probe, and may not end the run."""

    def prepare(trainer: Any) -> None:
        probe = DatasetMetricsCallback(SOURCES, every=2, max_overhead=None, on_error="warn")
        measure = ProbeReader.measure
        calls: list[int] = []

        def failing(reader: ProbeReader, *args: Any) -> Any:
            calls.append(1)
            if dist.get_rank() == 1 and len(calls) == 2:
                raise ZeroDivisionError("a fault of ours")
            return measure(reader, *args)

        patcher = patch.object(ProbeReader, "measure", failing)
        patcher.start()
        trainer.add_callback(probe)

    result = _probed(folder, False, restless=True, prepare=prepare)
    patch.stopall()
    return result


CASES = cases_of(globals())
