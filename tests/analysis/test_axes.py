"""Labels of axes in the log of a session, told apart from channels with a "/" in their names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from session_tools import batch, new
from typer.testing import CliRunner

from analysis.analysis_tools import run_of, write_jsonl
from analysis.labelled import ALL, AXES, PLAIN, SLASHED, history
from channel_metrics.analysis import load
from channel_metrics.analysis.axes import with_axis
from channel_metrics.analysis.judging.told import findings_of
from channel_metrics.analysis.readers.keys import GLOBAL
from channel_metrics.analysis.report.views import views_of
from channel_metrics.analysis.rows import final_rows, whole_row
from channel_metrics.analysis.run import Run, load_run
from channel_metrics.cli.main import app
from channel_metrics.core.names import joint_name
from channel_metrics.errors import ChannelMetricsError


def run_with(tmp_path: Path, channels: Sequence[str], **more: Any) -> Run:
    return load_run(write_jsonl(tmp_path / "logging.jsonl", history(channels, **more)))


def notes_about_axes(run: Run) -> list[str]:
    return [note for note in run.problems.notes if "--axis" in note]


def check(run: Run) -> tuple[int, float]:
    """The windows of the self-check, and its largest difference."""
    (view,) = views_of([run])
    assert view.check is not None
    return view.check.windows, view.check.largest


@pytest.mark.parametrize("metrics", [ALL, ("loss", "tokens")])
def test_labels_are_no_channels(tmp_path: Path, metrics: Sequence[str]) -> None:
    run = run_with(tmp_path, PLAIN, metrics=metrics, axes=AXES, cross=[["channel", "domain"]])
    assert run.channels() == list(PLAIN)
    assert run.axes == ["domain", "lang", "channel.domain"]
    assert sum(row.share or 0 for row in final_rows(run)) == pytest.approx(1)
    windows, largest = check(run)
    assert windows == 12 and largest == pytest.approx(0, abs=1e-6)
    assert notes_about_axes(run) == [
        "labels of the axes domain, lang, channel.domain are left aside; --axis domain shows them"
    ]
    # The values are kept, also for the tables that are written.
    assert "lang/en" in {key.channel for key, _, _ in run.all_series()}


@pytest.mark.parametrize("metrics", [ALL, ("loss", "tokens")])
@pytest.mark.parametrize("channels", [SLASHED, (*SLASHED, "bbu"), ("bbu", "web/de", "web/en")])
def test_channels_with_a_slash_stay_channels(
    tmp_path: Path, channels: Sequence[str], metrics: Sequence[str]
) -> None:
    run = run_with(tmp_path, channels, metrics=metrics)
    assert set(run.channels()) == set(channels)
    assert run.axes == notes_about_axes(run) == []


@pytest.mark.parametrize("metrics", [ALL, ("loss", "tokens")])
@pytest.mark.parametrize("channels", [SLASHED, (*SLASHED, "bbu"), ("code/rust", "code/python")])
def test_channels_with_a_slash_beside_labels(
    tmp_path: Path, channels: Sequence[str], metrics: Sequence[str]
) -> None:
    run = run_with(tmp_path, channels, metrics=metrics, axes=AXES)
    assert set(run.channels()) == set(channels)
    assert run.axes == ["domain", "lang"]
    assert check(run)[1] == pytest.approx(0, abs=1e-6)


def test_groups_of_trees_are_labels(tmp_path: Path) -> None:
    run = run_with(tmp_path, (*SLASHED, "bbu"), tree=1)
    assert set(run.channels()) == {*SLASHED, "bbu"}
    assert run.axes == ["tree", "tree_mean"]
    tree, mean = with_axis(run, "tree"), with_axis(run, "tree_mean")
    assert tree.channels() == mean.channels() == ["code", "web"]
    python, rust = (run.series(f"code/{name}", "loss")[1] for name in ("python", "rust"))
    assert mean.series("code", "loss")[1] == pytest.approx((python + rust) / 2)
    # The groups do not hold `bbu`, so their shares are those of the log.
    code, web = final_rows(tree)
    assert code.share == pytest.approx(tree.series("code", "share")[1].mean())
    assert (code.share or 0) + (web.share or 0) < 0.9
    # Without such channels, it is a name as any other.
    alone = run_of([{"step": s, "tree/oak_loss": 1.0, "tree/oak_tokens": 4} for s in (1, 2, 3)])
    assert alone.channels() == ["tree/oak"]


def test_one_group_of_channels_with_as_many_tokens_as_another_one() -> None:
    """Both have half of the tokens, and the log has no shares: the losses tell."""
    log = [
        {"step": s, "loss": 2.0, "code_loss": 1.0, "code_tokens": 8}
        | {"web/en_loss": 2.0, "web/en_tokens": 4, "web/de_loss": 4.0, "web/de_tokens": 4}
        for s in range(1, 9)
    ]
    assert run_of(log).channels() == ["code", "web/en", "web/de"]


@pytest.mark.parametrize(
    "other",
    [
        {"code/a_tokens": 50},
        {"bbu_tokens": 50},
        {"bbu_loss": 2.0},
    ],
    ids=["tokens of the prefix", "tokens of the channels", "losses"],
)
@pytest.mark.parametrize("num_other", [2, 3])
def test_labels_hold_all_tokens_at_19_of_20_steps(other: dict[str, float], num_other: int) -> None:
    """A resume may have other axes. Of 40 steps, two may be such, but not three."""
    usual = {"bbu_loss": 1.0, "bbu_tokens": 100, "code/a_loss": 1.0, "code/a_tokens": 100}
    log = [{"step": s, **usual, **(other if s <= num_other else {})} for s in range(1, 41)]
    run = run_of(log)
    assert run.axes == (["code"] if num_other == 2 else [])
    assert run.channels() == (["bbu"] if num_other == 2 else ["bbu", "code/a"])


def test_labels_of_losses_below_zero() -> None:
    """A log without shares, so that losses tell whether they are labels."""
    usual = {"bbu_loss": -1.0, "bbu_tokens": 100, "code/a_tokens": 100}
    for loss, axes in ((-1.0, ["code"]), (-1.1, [])):
        run = run_of([{"step": s, **usual, "code/a_loss": loss} for s in range(1, 9)])
        assert run.axes == axes


def test_an_axis_that_begins_later() -> None:
    """A resume may add an axis: steps without any of its labels say nothing about it."""
    log = [{"step": s, "bbu_loss": 1.0, "bbu_tokens": 9} for s in range(1, 21)]
    for entry in log[10:]:
        entry |= {"lang/en_loss": 1.0, "lang/en_tokens": 9}
    run = run_of(log)
    assert (run.axes, run.channels()) == (["lang"], ["bbu"])


def test_names_that_are_declared_are_channels(tmp_path: Path) -> None:
    """Both prefixes hold all tokens here, and keys in alphabetical order do not tell which."""
    names = ("read/wiki", "read/news")
    entries = [dict(sorted(e.items())) for e in history(names, axes={"domain": {names[0]: "a"}})]
    log = write_jsonl(tmp_path / "logging.jsonl", entries)
    run = load_run(log, channels=names)
    assert (run.axes, set(run.channels())) == (["domain"], set(names))
    assert load_run(log).axes == ["read"]


def test_an_axis_in_place_of_the_channels(tmp_path: Path) -> None:
    entries = history(PLAIN, axes=AXES)
    run = run_of(entries)
    shown = with_axis(run, "domain")
    assert any("self-check are left out" in note for note in shown.problems.notes)
    assert shown.channels() == ["target", "unlabeled"]
    assert shown.series("target", "loss")[1].tolist() == [e["domain/target_loss"] for e in entries]
    rows = {row.channel: row for row in final_rows(shown)}
    assert rows["target"].tokens == sum(entry["bbu_tokens"] for entry in entries)
    # The mean of the shares of the whole run, which need not be one of the labels alone.
    assert rows["target"].share == pytest.approx(shown.series("target", "share")[1].mean())
    (view,) = views_of([shown])
    found = findings_of(view)
    assert not any(finding.kind == "check" for finding in found)
    said = "no label is missing for longer than its own rhythm explains"
    assert [finding.text for finding in found if finding.kind == "gap"] == [said]
    with pytest.raises(ChannelMetricsError, match=r"got 'role'; its log has domain, lang"):
        with_axis(run, "role")
    with pytest.raises(ChannelMetricsError, match="its log has labels of no axis"):
        with_axis(run_of(history(PLAIN)), "domain")


@pytest.mark.parametrize("metrics", [("loss", "share"), ("loss", "tokens", "share")])
def test_labels_that_overlap(metrics: tuple[str, ...]) -> None:
    """Half of the records of `bbu` are both in code and in math."""
    session = new(metrics=metrics, axes={"topic": (), "lang": ()})
    entries = []
    for step in range(1, 4):
        names = [
            joint_name("bbu", [("topic", "code"), ("topic", "math"), ("lang", "en")]),
            joint_name("bbu", [("topic", "code"), ("lang", "de")]),
        ]
        session.count(batch(*((name, 4, 1.0 + place) for place, name in enumerate(names))))
        entries.append({"loss": 1.5, **session.close(step).logs, "step": step})
    run = run_of(entries)
    assert run.axes == ["topic", "lang"]
    said = "labels of the axis topic overlap, so their shares add up to more than 1"
    assert said in with_axis(run, "topic").problems.notes
    assert not any("overlap" in note for note in with_axis(run, "lang").problems.notes)
    # Labels may overlap or leave tokens out, so their sum is not the run's number of tokens.
    assert whole_row(with_axis(run, "topic")).tokens is None
    assert whole_row(run).tokens == (24 if "tokens" in metrics else None)


def test_labels_are_compared_with_those_of_the_first_run() -> None:
    """A run without the axis has no view."""
    one, plain = run_of(history(PLAIN, axes=AXES)), run_of(history(PLAIN))
    higher = [
        {key: 2 * value if key.endswith("loss") else value for key, value in entry.items()}
        for entry in history(PLAIN, axes=AXES)
    ]
    first, other = views_of([one, plain, run_of(higher)], "lang")
    assert (first.index, other.index) == (0, 2) and not first.versus
    changes = {found.channel: found.change for found in other.versus}
    assert changes == pytest.approx({GLOBAL: 1.0, "en": 1.0, "de": 1.0})
    # Without labels in the first run, nothing is compared.
    assert [view.versus for view in views_of([plain, one], "lang")] == [[]]


@pytest.mark.parametrize("command", [("analyze",), ("report", "--no-pictures")])
def test_the_option_of_the_commands(tmp_path: Path, command: tuple[str, ...]) -> None:
    log = write_jsonl(tmp_path / "logging.jsonl", history(PLAIN, axes=AXES))

    def channels(*more: str) -> list[str]:
        done = CliRunner().invoke(app, [*command, str(log), "--json", *more])
        assert done.exit_code == 0, done.output
        return [row["channel"] for row in json.loads(done.stdout)["runs"][0]["channels"]]

    assert set(channels()) == set(PLAIN)
    assert channels("--axis", "lang") == ["en", "de"]
    wrong = CliRunner().invoke(app, [*command, str(log), "--axis", "role"])
    assert wrong.exit_code == 2 and "got 'role'" in wrong.output


def test_a_notebook_gets_the_channels_or_the_labels_of_an_axis(tmp_path: Path) -> None:
    log = write_jsonl(tmp_path / "logging.jsonl", history(PLAIN, axes=AXES))
    assert set(load(log)["channel"]) == {"", *PLAIN}
    assert set(load(log, axis="lang")["channel"]) == {"", "en", "de"}
