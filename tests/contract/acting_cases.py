"""More cases: what is done with closed windows: a stream, budgets, alerts, an end of the run.

`CASES` holds these and all others.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from channel_metrics import ConfigError
from contract.cases import case, config
from contract.more_cases import CASES, NEEDS
from contract.script import (
    Evaluation,
    Harness,
    Ran,
    Script,
    Step,
    expected,
    flat,
    measure,
    ran,
    size,
    steps,
    unit,
)

__all__ = ["CASES", "NEEDS"]

Steps = tuple[tuple[Step, ...], ...]

RUN = steps("ab", "aa", "ab", "bb", "ab", "aa", "ab", "ab")


@case()
def each_window_is_in_the_stream(harness: Harness, folder: Path) -> None:
    path = folder / "new" / "windows.jsonl"
    script = Script(
        config=config(stream=str(path)),
        steps=RUN[:4],
        evaluations=(Evaluation(1, steps("bbaa", first=40)[0]),),
    )
    found = ran(harness, script, folder)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["split"], line["step"]) for line in lines] == [
        (window.split, window.step) for window in found.windows
    ]
    check_stream(path, found)


def check_stream(path: Path, found: Ran) -> None:
    """Whether the file holds each window of a rank, once."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line, window in zip(lines, found.windows, strict=True):
        assert {key: line[key] for key in window.logs} == window.logs
        assert line["sums"]["a"] == list(window.sums("a").values())


def goal(harness: Harness) -> tuple[str, int]:
    """A total of `a` that step 3 reaches, in the second window."""
    ours = [s for step in RUN[:3] for s in flat(step) if s.channel == "a"]
    return f"a_{unit(harness)}", sum(size(harness, sequence) for sequence in ours)


def check_end(harness: Harness, found: Ran, said: str, step: int) -> None:
    """Whether the run ended at this step, or said why it should have."""
    assert found.error is None, found.error
    (line,) = [text for text in found.warnings if said in text]
    stops = "stops" in harness.can
    assert found.steps == (step if stops else len(RUN)), line
    assert ("the run ends here" if stops else "this trainer goes on; end it yourself") in line


@case()
def a_total_that_is_reached_ends_the_run(harness: Harness, folder: Path) -> None:
    key, end = goal(harness)
    budget = {"ratios": {"a": 3, "b": 1}, "records": {"a": 10}}
    script = Script(config=config(stop_at={key: str(end)}, budget=budget), steps=RUN)
    found = ran(harness, script, folder)
    check_end(harness, found, f"{key} of stop_at has reached", 4)
    values = expected(harness, [s for step in RUN[:4] for s in flat(step)])
    shares = {name: values[name]["samples"] / 8 for name in "ab"}
    log = found.logs[1]
    assert {k: log[k] for k in ("a_target_share", "b_target_share", "a_source_epochs")} == {
        "a_target_share": 0.75, "b_target_share": 0.25, "a_source_epochs": 8 * shares["a"] / 10
    }  # fmt: skip
    assert {name: log[f"{name}_achieved_share"] for name in "ab"} == shares
    assert log["a_eta_hours"] == 0.0 and "a_eta_hours" not in found.logs[0]
    assert "b_source_epochs" not in log


@case("ranks")
def all_ranks_end_at_one_step(harness: Harness, folder: Path) -> None:
    key, end = goal(harness)
    path = folder / "windows.jsonl"
    chosen = config(stop_at={key: end}, budget={"records": {"a": 10}}, stream=str(path))
    doubled = tuple((*step, *step) for step in RUN)
    per_rank = harness.run(Script(config=chosen, steps=doubled), folder, ranks=2)
    for found in per_rank:
        assert found.error is None, found.error
        assert found.windows == per_rank[0].windows and found.steps == per_rank[0].steps
    assert found.windows[-1].time > 1e9, "the clock of the first rank"
    assert per_rank[0].steps == (2 if "stops" in harness.can else len(RUN))
    lines = [text for found in per_rank for text in found.warnings if "stop_at" in text]
    assert len(lines) == 1, "one rank says it"
    check_stream(path, per_rank[0])


@case()
def early_stopping_on_a_channel(harness: Harness, folder: Path) -> None:
    """The model does not learn, so the first value stays the best."""
    what = measure(harness)
    metric = f"{harness.eval_prefix}{what}"
    wanted = {"channel": "a", "metric": metric, "patience": 2, "mode": "min"}
    evaluations = [Evaluation(n, steps("aabb", first=40)[0]) for n in (1, 3, 5, 7)]
    chosen = config(stop_when={**wanted, "min_delta": 1e-4})
    script = Script(config=chosen, steps=RUN, evaluations=tuple(evaluations))
    found = ran(harness, script, folder)
    check_end(harness, found, f"{metric} of a is ", 5)
    assert len(found.evaluations) == (3 if "stops" in harness.can else 4)


@case("ranks", "stops")
def all_ranks_stop_early(harness: Harness, folder: Path) -> None:
    what = measure(harness)
    wanted = {"metric": f"{harness.eval_prefix}macro_loss", "patience": 1, "min_delta": 1e-4}
    if what != "loss":  # there is no macro_loss of rewards
        wanted |= {"channel": "a", "metric": f"{harness.eval_prefix}{what}", "mode": "min"}
    doubled = tuple((*step, *step) for step in RUN)
    evaluations = [Evaluation(n, steps("aabb", first=40)[0]) for n in (1, 3, 5)]
    script = Script(
        config=config(metrics=("loss", "macro_loss"), stop_when=wanted),
        steps=doubled,
        evaluations=tuple(evaluations),
    )
    first, second = harness.run(script, folder, ranks=2)
    for found in (first, second):
        assert found.error is None, found.error
        assert found.steps == 3 and len(found.evaluations) == 2


ALERTS = {"kinds": ["unlabeled", "starved"], "unlabeled": 0.1}
SEEN_BY = {"alert": "unlabeled", "channel": "unlabeled", "split": "train", "step": 4}


def alerts_in(folder: Path) -> list[dict[str, object]]:
    lines = (folder / "alerts.jsonl").read_text().splitlines()
    return [{key: json.loads(line)[key] for key in SEEN_BY} for line in lines]


@case()
def an_alert_is_told_and_written(harness: Harness, folder: Path) -> None:
    alerts = {**ALERTS, "file": str(folder / "alerts.jsonl")}
    script = Script(config=config(alerts=alerts), steps=steps("ab", "aa", "a-", "ab", "a-", "ab"))
    found = ran(harness, script, folder)
    (line,) = [text for text in found.warnings if "alert at step" in text]
    assert line.startswith("alert at step 4: unlabeled: unlabeled: "), line
    assert alerts_in(folder) == [SEEN_BY]


@case("ranks")
def one_rank_tells_of_an_alert(harness: Harness, folder: Path) -> None:
    alerts = {**ALERTS, "file": str(folder / "alerts.jsonl")}
    doubled = tuple((*step, *step) for step in steps("ab", "aa", "a-", "ab"))
    chosen = config(alerts=alerts, stream=str(folder / "windows.jsonl"))
    per_rank = harness.run(Script(config=chosen, steps=doubled), folder, ranks=2)
    for found in per_rank:
        assert found.error is None, found.error
        assert found.collectives[1] == 1, "the second window has no new names"
    lines = [text for found in per_rank for text in found.warnings if "alert at step" in text]
    assert len(lines) == 1 and alerts_in(folder) == [SEEN_BY]


@case()
def a_sampler_that_no_dataset_follows_is_an_error(harness: Harness, folder: Path) -> None:
    script = Script(config=config(sampler={"start": {"a": 1, "b": 1}}), steps=RUN[:4])
    (found,) = harness.run(script, folder)
    said = "sampler needs losses" if "pairs" in harness.can else "no dataset follows it"
    assert isinstance(found.error, ConfigError) and said in str(found.error), found.error
    assert found.steps <= 2, "the first window"


def outliers_in(folder: Path) -> list[dict[str, object]]:
    files = sorted((folder / "outliers").glob("rank*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def check_outliers(harness: Harness, lines: list[dict[str, object]], windows: Steps) -> None:
    """The highest and the lowest loss of each channel of each window."""
    for number, window in enumerate(windows, start=1):
        for name in "ab":
            own = [s for step in window for s in flat(step) if s.channel == name]
            means = {harness.nll(s) / s.tokens: s.number for s in own}
            for kind, choose in (("highest", max), ("lowest", min)):
                found = [
                    line
                    for line in lines
                    if (line["step"], line["channel"], line["outlier"]) == (2 * number, name, kind)
                ]
                best = choose(found, key=lambda line: float(str(line["loss"])))
                assert best["loss"] == pytest.approx(choose(means), rel=1e-4)
                if "ids" in harness.can:
                    assert best["id"] == str(means[choose(means)])


NO_OUTLIERS = "outliers are sequences of tokens, which this trainer does not count here"


@case()
def outliers_are_the_most_extreme_sequences(harness: Harness, folder: Path) -> None:
    outliers = {"folder": str(folder / "outliers"), "count": 1}
    found = ran(harness, Script(config=config(outliers=outliers), steps=RUN[:4]), folder)
    said = [text for text in found.warnings if "outliers" in text]
    if "pairs" in harness.can:
        assert len(said) == 1 and NO_OUTLIERS in said[0]
        return
    assert not said
    lines = outliers_in(folder)
    check_outliers(harness, lines, (RUN[:2], RUN[2:4]))
    assert len(lines) == 2 * 2 * 2, "of two channels in two windows"


@case("ranks")
def each_rank_writes_its_outliers(harness: Harness, folder: Path) -> None:
    outliers = {"folder": str(folder / "outliers"), "count": 1}
    doubled = tuple((*step, *step[::-1]) for step in RUN[:4])
    chosen = config(outliers=outliers)
    for found in harness.run(Script(config=chosen, steps=doubled), folder, ranks=2):
        assert found.error is None, found.error
    if "pairs" in harness.can:
        return
    assert len(list((folder / "outliers").iterdir())) == 2
    check_outliers(harness, outliers_in(folder), (RUN[:2], RUN[2:4]))
