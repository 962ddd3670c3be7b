"""Probes on two processes: values of one process, one all-reduce, training as if they never ran.

The runs themselves are the cases in `hf_cases_probe*.py`.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from hf_launch import Launch, launch
from hf_probe_tools import other_logs, probe_logs

NEVER_RUN = ("weights", "random", "buffers", "batches", "kind")
MODES = {"ddp": "MULTI_CPU", "fsdp2": "FSDP"}

deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is only in the main environment (Python 3.11), which runs this",
)
ALL_MODES = [*MODES.items(), pytest.param("zero3", "DEEPSPEED", marks=deepspeed)]


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return launch("probe", tmp_path_factory)


@pytest.mark.parametrize(("mode", "kind"), ALL_MODES)
def test_values_are_those_of_one_process(probe: Launch, mode: str, kind: str) -> None:
    ranks = probe.ranks(f"{mode}_on")
    expected = ranks[0]["probe"]["expected"]
    assert len(expected) == 2
    for rank in ranks:
        assert rank["kind"] == kind and rank["processes"] == 2
        logs = probe_logs(rank["logs"])
        assert list(logs) == [0, 2, 4, 5]
        for step, values in zip((0, 5), expected, strict=True):
            assert logs[step] == pytest.approx(values, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(("mode", "kind"), ALL_MODES)
def test_training_is_as_if_the_probe_had_never_run(probe: Launch, mode: str, kind: str) -> None:
    for on, off in zip(probe.ranks(f"{mode}_on"), probe.ranks(f"{mode}_off"), strict=True):
        assert off["kind"] == kind and off["batches"] == on["batches"]
        assert [on[key] for key in NEVER_RUN] == [off[key] for key in NEVER_RUN]
        assert other_logs(on["logs"]) == other_logs(off["logs"])
        assert not probe_logs(off["logs"])


@pytest.mark.parametrize("mode", ["ddp", "fsdp2", pytest.param("zero3", marks=deepspeed)])
def test_ranks_run_the_same_forwards_and_send_once(probe: Launch, mode: str) -> None:
    found: list[Any] = [rank["probe"] for rank in probe.ranks(f"{mode}_on")]
    # Four batches of one record on two ranks, and one record: two forwards and one.
    assert [rank["forwards"] for rank in found] == [[3] * 4] * 2
    for rank in found:
        assert [[name for name in sent if "reduce" in name] for sent in rank["sent"]] == (
            [["all_reduce"]] * 4
        )
    if mode == "ddp":
        # Of sharded models, the forwards themselves gather weights.
        assert all(sent == ["all_reduce"] for rank in found for sent in rank["sent"])


def test_ranks_agree_on_the_distance(probe: Launch) -> None:
    ranks = probe.ranks("ddp_budget")
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


def test_an_error_on_one_rank_ends_the_probes_of_all(probe: Launch) -> None:
    for rank, off in zip(probe.ranks("ddp_fault"), probe.ranks("ddp_off"), strict=True):
        assert list(probe_logs(rank["logs"])) == [0]
        assert rank["weights"] == off["weights"]
        assert other_logs(rank["logs"]) == other_logs(off["logs"])
