"""Probes on two processes: values of one process, one all-reduce, training as if they never ran."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import faults
import numpy as np
import pytest
import torch
import torch.distributed as dist
from collectives import watched
from hf_case_tools import (
    FSDP2,
    ddp,
    fsdp,
    needs_deepspeed,
    run,
    told,
    zero,
    zero_config,
)
from hf_probe_tools import expected_values, other_logs, probe_logs, restless_model
from hf_tools import Record, make_records, tiny_model
from rank_cases import Case, RanksOf

from channel_metrics.probes.probe import choose
from channel_metrics.trainers.hf.probe import DatasetMetricsCallback

NEVER_RUN = ("weights", "random", "buffers", "batches", "kind")


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
        def counted(of_batch: Any, *args: Any) -> Any:
            self.forwards[-1] += 1
            return of_batch(*args)

        self.forwards.append(0)
        with faults.around("run a probe's batch", counted), _collectives() as sent:
            super()._probe(step, control)
        self.sent.append(sent)
        self.next_steps.append(self._budget.next_step)


@contextmanager
def _collectives() -> Iterator[list[str]]:
    """The collectives that the block calls through torch.distributed, in order."""
    called: list[str] = []

    with patch.multiple(dist, **watched(lambda name, *_, **__: called.append(name))):
        yield called


def _probed(
    folder: Path, probe_on: bool, restless: bool = False, prepare: Any = None, **arguments: Any
) -> Any:
    """A training with dropout and accumulation; weights, random numbers, logs of this rank."""
    options: dict[str, Any] = {"every": 2, "batches": 4, "batch_size": 1, "max_overhead": None}
    probe = _Watched(SOURCES, **options | arguments.pop("options", {}))
    given: dict[str, Any] = {
        "learning_rate": 1e-2,
        "max_steps": 5,
        "gradient_accumulation_steps": 2,
        "records": make_records(64),
        **({"model": restless_model()} if restless else {}),
        **arguments,
    }
    trainer = run(
        folder,
        prepare=(lambda trainer: trainer.add_callback(probe)) if probe_on else prepare,
        dropout=0.1,
        **given,
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


@ddp
def ddp_off(folder: Path) -> Any:
    """Of a model whose buffers are sent to the other rank in each training forward."""
    return _probed(folder, False, restless=True, dataloader_num_workers=1)


@ddp
def ddp_on(folder: Path) -> Any:
    return _probed(folder, True, restless=True, dataloader_num_workers=1)


@fsdp
def fsdp2_off(folder: Path) -> Any:
    return _probed(folder, False, **FSDP2)


@fsdp
def fsdp2_on(folder: Path) -> Any:
    return _probed(folder, True, **FSDP2)


def _zero3(folder: Path, probe_on: bool) -> Any:
    config = zero_config(3)
    # The oracle asks for the whole weights.
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    return _probed(folder, probe_on, use_cpu=False, ddp_backend=None, deepspeed=config)


@zero
def zero3_off(folder: Path) -> Any:
    return _zero3(folder, False)


@zero
def zero3_on(folder: Path) -> Any:
    return _zero3(folder, True)


ALL_MODES = [
    (ddp_off, ddp_on, "MULTI_CPU"),
    (fsdp2_off, fsdp2_on, "FSDP"),
    pytest.param(zero3_off, zero3_on, "DEEPSPEED", marks=needs_deepspeed),
]


@pytest.mark.parametrize(("off", "on", "kind"), ALL_MODES)
def test_values_are_those_of_one_process(ranks_of: RanksOf, off: Case, on: Case, kind: str) -> None:
    ranks = ranks_of(on)
    expected = ranks[0]["probe"]["expected"]
    assert len(expected) == 2
    for rank in ranks:
        assert rank["kind"] == kind and rank["processes"] == 2
        logs = probe_logs(rank["logs"])
        assert list(logs) == [0, 2, 4, 5]
        for step, values in zip((0, 5), expected, strict=True):
            assert logs[step] == pytest.approx(values, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(("off", "on", "kind"), ALL_MODES)
def test_training_is_as_if_the_probe_had_never_run(
    ranks_of: RanksOf, off: Case, on: Case, kind: str
) -> None:
    for ours, plain in zip(ranks_of(on), ranks_of(off), strict=True):
        assert plain["kind"] == kind and plain["batches"] == ours["batches"]
        assert [ours[key] for key in NEVER_RUN] == [plain[key] for key in NEVER_RUN]
        assert other_logs(ours["logs"]) == other_logs(plain["logs"])
        assert not probe_logs(plain["logs"])


@pytest.mark.parametrize("on", [ddp_on, fsdp2_on, pytest.param(zero3_on, marks=needs_deepspeed)])
def test_ranks_run_the_same_forwards_and_send_once(ranks_of: RanksOf, on: Case) -> None:
    found: list[Any] = [rank["probe"] for rank in ranks_of(on)]
    # Four batches of one record on two ranks, and one record: two forwards and one.
    assert [rank["forwards"] for rank in found] == [[3] * 4] * 2
    for rank in found:
        assert [[name for name in sent if "reduce" in name] for sent in rank["sent"]] == (
            [["all_reduce"]] * 4
        )
    if on is ddp_on:
        # Of sharded models, the forwards themselves gather weights.
        assert all(sent == ["all_reduce"] for rank in found for sent in rank["sent"])


class _Clock:
    """Each look at it takes a second on rank 0, and on rank 1 always a second more than before."""

    def __init__(self) -> None:
        self.now, self.looks = 0.0, 0

    def __call__(self) -> float:
        self.looks += 1
        self.now += 1 + (self.looks - 1) * dist.get_rank()
        return self.now


@ddp
def ddp_budget(folder: Path) -> Any:
    """Ranks whose clocks differ agree on the next step."""
    options = {"max_overhead": 0.5, "every": 1, "clock": _Clock()}
    return _probed(folder, True, options=options, max_steps=12)


def test_ranks_agree_on_the_distance(ranks_of: RanksOf) -> None:
    ranks = ranks_of(ddp_budget)
    assert ranks[0]["probe"]["next"] == ranks[1]["probe"]["next"]
    first, second = (list(probe_logs(rank["logs"])) for rank in ranks)
    assert first == second and first[:2] == [0, 1] and first[-1] == 12
    overheads = [
        [entry["probe_overhead"] for entry in rank["logs"] if "probe_overhead" in entry]
        for rank in ranks
    ]
    assert overheads[0] == overheads[1]
    # Seconds of rank 0: probes 1, then 1 + 1; one step, 1, and 1 to wait for the device. Rank 1
    # looks at its clock as often: 3, then 4 + 9; 6 and 8.
    assert overheads[0][0] == (3 + 16) / (2 + 14)


@ddp
def ddp_fault(folder: Path) -> Any:
    """Rank 1 has an error in its second probe, and may not end the run."""

    def prepare(trainer: Any) -> None:
        options: dict[str, Any] = {"every": 2, "max_overhead": None, "on_error": "warn"}
        trainer.add_callback(DatasetMetricsCallback(SOURCES, **options))

    with faults.inject("probe", lambda call, *_: dist.get_rank() == 1 and call == 2):
        return _probed(folder, False, restless=True, prepare=prepare)


def test_an_error_on_one_rank_ends_the_probes_of_all(ranks_of: RanksOf) -> None:
    for rank, off in zip(ranks_of(ddp_fault), ranks_of(ddp_off), strict=True):
        assert list(probe_logs(rank["logs"])) == [0]
        assert rank["weights"] == off["weights"]
        assert other_logs(rank["logs"]) == other_logs(off["logs"])
