"""The tables of the pages are those of benchmarks/results, and the benchmarks run."""

from __future__ import annotations

import json
import math
import re
from statistics import median
from typing import Any

import pytest
import torch
from paths import ROOT

from benchmarks import counts, head, scale, step
from benchmarks.__main__ import PARTS
from benchmarks.alarm_runs import share_delay, starved_delay
from benchmarks.pages import PAGES, filled
from benchmarks.peers import found_package
from channel_metrics import ChannelMetrics, MetricsConfig, MicroBatch

RESULTS = {
    path.stem: json.loads(path.read_text()) for path in (ROOT / "benchmarks/results").glob("*.json")
}


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_are_those_of_the_results(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert "<!-- benchmarks: " in text
    assert text == filled(text, RESULTS), "run: python -m benchmarks report"


def test_every_part_has_results() -> None:
    others = {"alarms", "missed"}  # they measure no costs
    assert set(RESULTS) == set(PARTS) | others


def test_the_numbers_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    ratios = {row["variant"]: row["ratio"] for row in RESULTS["step"]["rows"]}
    loss, accuracy = map(float, re.findall(r"\b1\.\d\d\b(?= times)", text))
    assert abs(loss - ratios["loss"]) < 0.01
    assert abs(accuracy - ratios["loss and accuracy"]) < 0.01
    counts = {row["variant"]: row for row in RESULTS["counts"]["rows"]}
    variants = ("ours", "ms-swift, HF", "VeOmni")
    for words, key in (
        ("waits for the device per micro-batch", "syncs_per_micro_batch"),
        ("all-reduces per log", "collectives_per_log"),
    ):
        cells = " | ".join(str(counts[variant][key]) for variant in variants)
        assert f"| {words} | {cells} |" in text


def test_the_delays_of_alerts_in_the_docs() -> None:
    def told(windows: list[int]) -> list[str]:
        return [f"{median(windows):.0f}", f"{max(windows)}"]

    text = (ROOT / "docs/acting.md").read_text(encoding="utf-8")
    rows = [
        [f"{r['part of windows']:.0%}", *told(r["windows"])] for r in RESULTS["alarms"]["starved"]
    ]
    of_share = RESULTS["alarms"]["share"]
    last = RESULTS["alarms"]["starved"][-1]
    assert starved_delay(0, 10, last["part of windows"], 0.05) == last["windows"][0]
    assert share_delay(0, 0.5, 0.05, 0.05, 300) == of_share[6]["windows"][0]
    half = len(of_share) // 2
    for first, later in zip(of_share[:half], of_share[half:], strict=True):
        assert (first["before"], later["before"]) == (0, 300)
        shares = [f"{first['target']:.0%}", f"{first['target'] + first['off']:.0%}"]
        rows.append([*shares, *told(first["windows"]), *told(later["windows"])])
    for cells in rows:
        assert f"| {' | '.join(cells)} |".replace("%", " %") in text


def test_the_rises_of_losses_in_the_docs() -> None:
    text = (ROOT / "docs/acting.md").read_text(encoding="utf-8")
    tables = re.findall(r"^\|.*correlation.*0\.3 \| 0\.5 \|\n\|[-|]+\n((?:\|.*\n)+)", text, re.M)
    columns = [0.0, 0.3, 0.5]
    wanted: list[dict[str, list[str]]] = [{}, {}]
    names = {"level": "level losses", "falling": "losses that fall from 8 to 2"}
    for place, row in enumerate(RESULTS["alarms"]["rises"]):
        assert row["correlation"] == columns[place % 3]
        wanted[0].setdefault(names[row["losses"]], []).append(f"{row['runs with a rise']}")
    for place, row in enumerate(RESULTS["alarms"]["delays"]):
        assert row["correlation"] == columns[place % 3]
        found = median(math.inf if one is None else one for one in row["windows"])
        told = "not found" if math.isinf(found) else f"{found:.0f}"
        wanted[1].setdefault(f"{row['rise']}", []).append(told)
    rows = ["".join(f"| {' | '.join([k, *v])} |\n" for k, v in of.items()) for of in wanted]
    assert tables == rows


def test_the_numbers_in_the_reference() -> None:
    text = " ".join((ROOT / "docs/REFERENCE.md").read_text(encoding="utf-8").split())
    rows = {r["variant"]: r["operators_per_micro_batch"] for r in RESULTS["counts"]["rows"]}
    accuracy, full = rows["ours, accuracy"], rows["ours, accuracy, 3 axes, error bars, bytes"]
    assert f"with accuracy {accuracy} in place of {rows['ours']}, with error bars too" in text
    assert f"bits per byte and three axes {full}, and none of them waits" in text


def test_what_alerts_add_to_a_checkpoint() -> None:
    text = (ROOT / "docs/acting.md").read_text(encoding="utf-8")
    rows = RESULTS["acting"]["kept"]
    assert len(rows) == 3
    for row in rows:
        assert f"{row['bytes'] / 1024:.1f} KB after {row['windows']:,}" in text


def test_the_operators_of_token_axes() -> None:
    by: dict[str, Any] = {
        "role": {"by": "column", "field": "roles"},
        "modality": {"by": "modality", "labels": {"image": [7]}},
        "position": {"by": "position"},
        "length": {"by": "length"},
    }
    text = (ROOT / "docs/axes.md").read_text(encoding="utf-8")
    table = text.split("| axes | operators |\n|---|---|\n")[1].split("\n\n")[0]
    rows = [row.strip("| ").split(" | ") for row in table.strip().splitlines()]
    assert len(rows) == 5
    for axes, number in rows:
        chosen = {axis: by[axis] for axis in re.findall(r"`(\w+)`", axes)}
        metrics = ChannelMetrics(MetricsConfig(channels=("a", "b"), axes=chosen, live_table=False))
        batch = MicroBatch(
            token_losses=torch.ones(64),
            labels=torch.arange(64) % 9,
            channels=torch.arange(4) % 2,
            cu_seqlens=torch.arange(0, 65, 16, dtype=torch.int32),
            marks=torch.ones(64, dtype=torch.int64) if "role" in chosen else None,
        )
        metrics.count(batch)
        with counts._Operators() as seen:
            metrics.count(batch)
        assert seen.num_operators == int(number), axes


def keys(rows: list[dict[str, Any]]) -> set[tuple[str, ...]]:
    """The columns of a table."""
    return {tuple(row) for row in rows}


def has(package: str) -> bool:
    try:
        return found_package(package) is not None
    except StopIteration:
        return False


needs_peers = pytest.mark.skipif(
    not (has("ms-swift") and has("veomni")),
    reason="ms-swift is only in the main environment: `make test` runs this",
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes of a step that takes no time."""
    for module in (step, head):
        for name, size in (("ROW_LENGTH", 16), ("HIDDEN", 16), ("VOCABULARY", 64)):
            monkeypatch.setattr(module, name, size)


@needs_peers
def test_step(tiny: None) -> None:
    parts = {"rows": step.VARIANTS, "axes": step.ON_AXES, "further": step.FURTHER}
    for part, variants in parts.items():
        rows, stored = step.run(variants, num_rounds=1, max_seconds=5), RESULTS["step"][part]
        assert [row["variant"] for row in rows] == [row["variant"] for row in stored]
        assert keys(rows) == keys(stored)
    assert keys(step.peak_memory()) == keys(RESULTS["step"]["memory"])


@needs_peers
def test_head(tiny: None) -> None:
    head._tensors.cache_clear()
    rows = head.run(max_seconds=1)
    head._tensors.cache_clear()
    assert [row["variant"] for row in rows] == [row["variant"] for row in RESULTS["head"]["rows"]]
    assert keys(rows) == keys(RESULTS["head"]["rows"])


def test_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "CHANNELS", (3,))
    rows = scale.host(num_rounds=1)
    assert keys(rows) == keys(RESULTS["scale"]["host"])
