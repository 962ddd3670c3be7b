"""The tables in narrow terminals: which columns go first, and that numbers stay whole."""

from __future__ import annotations

import time
from pathlib import Path

from rich.cells import cell_len

from analysis.analysis_tools import make_history, write_jsonl
from analysis.test_watch import in_a_terminal
from analysis.watch_tools import printed
from channel_metrics.analysis.watch.screen import view_of
from channel_metrics.analysis.watch.traces import traces_of

LONG = "the_channel_with_a_long_name_that_is_cut_last"


def test_at_80_columns_numbers_stay_whole_in_the_order_of_the_issue() -> None:
    """At step goes first, then token accuracy, then the curve; names are cut last."""
    history = make_history(12_345, channels=("bbu", LONG))[-60:]
    view = view_of(traces_of((e["step"], k, v) for e in history for k, v in e.items()))
    heads = {}
    for width in (160, 120, 100, 90, 80, 60, 40):
        text = printed(view, width=width)
        assert all(cell_len(line.rstrip()) <= width for line in text.splitlines())
        assert f"{view.whole.loss:.4f}" in text
        (row,) = (line for line in text.splitlines() if "bbu" in line)
        assert f"{view.rows[0].loss:.4f}" in text
        assert "…" not in row
        heads[width] = [
            name
            for name in ("at step", "token acc", "loss over", "share", "change")
            if name in text
        ]
        # A name has up to 40 columns, and less only where no other column is left to go.
        assert f"{LONG[:39]}…" in text or not heads[width]
    assert heads[160] == ["at step", "token acc", "loss over", "share", "change"]
    left = [set(heads[160]) - set(heads[width]) for width in (120, 100, 90, 80, 60)]
    order = ["at step", "token acc", "loss over", "share", "change"]
    for gone in left:
        assert gone == set(order[: len(gone)])
    assert [len(gone) for gone in left] == sorted(len(gone) for gone in left)
    assert len(left[-1]) > len(left[0])
    assert heads[40] == []


def test_columns_without_values_are_hidden() -> None:
    view = view_of(traces_of([(1, "loss", 2.0), (1, "bbu_loss", 1.5), (2, "bbu_loss", 1.0)]))
    text = printed(view, width=80)
    assert "share" not in text
    assert "token acc" not in text


def test_watch_in_a_terminal_of_80_by_24(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", make_history(30, channels=("bbu", LONG)))
    with in_a_terminal(str(path), "--once", rows=24, columns=80) as (job, output, _):
        until = time.monotonic() + 60
        while job.poll() is None and time.monotonic() < until:
            output()
            time.sleep(0.05)
        text = output()
    assert job.poll() == 0
    last = [entry for entry in make_history(30, channels=("bbu", LONG)) if "loss" in entry][-1]
    assert f"{last['bbu_loss']:.4f}" in text
    assert f"{last['loss']:.4f}" in text
