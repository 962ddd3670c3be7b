"""Settings that act on windows: totals that end a run, early stopping, budgets."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from paths import ROOT
from session_tools import batch, new, tokens

from channel_metrics import ConfigError, MetricsConfig
from channel_metrics.acting import StopWhen
from channel_metrics.analysis.readers.keys import decode_keys
from channel_metrics.ranks.ranks import Ranks
from channel_metrics.session import ChannelMetrics

WATCH = {"channel": "a", "metric": "eval_loss"}


def evaluated(metrics: ChannelMetrics, *losses: float, first: int = 1) -> str:
    """One evaluation per loss; returns why the run should end."""
    for step, loss in enumerate(losses, start=first):
        with metrics.evaluation("eval", step):
            metrics.count(batch(("a", 2, loss), ("b", 2, 1.0)))
    return metrics.stop_reason


def test_patience_counts_windows_in_a_row() -> None:
    assert not evaluated(new(stop_when=WATCH | {"patience": 2}), 3.0, 2.0, 2.5, 1.0, 1.5, 0.5)
    said = evaluated(new(stop_when=WATCH | {"patience": 2}), 3.0, 2.0, 2.5, 2.0, 0.1)
    assert said == (
        "eval_loss of a is 2 at step 4, and not better for 2 windows of stop_when; "
        "the best was 2 at step 2"
    )


def test_what_counts_as_better() -> None:
    assert evaluated(new(stop_when=WATCH | {"min_delta": 0.5}), 3.0, 2.6)
    assert not evaluated(new(stop_when=WATCH | {"min_delta": 0.5}), 3.0, 2.4)
    assert not evaluated(new(stop_when=WATCH | {"mode": "max"}), 1.0, 2.0, 3.0)
    ppl = WATCH | {"metric": "eval_ppl"}
    assert "no value was finite" in evaluated(new(metrics=("ppl",), stop_when=ppl), 1000.0)
    assert evaluated(new(stop_when=WATCH), 1.0, math.nan) == "", "NaN is in no loss"


@pytest.mark.parametrize(
    ("metric", "mode"),
    [
        ("eval_loss", "min"), ("val_macro_loss", "min"), ("loss_of_channels", "min"),
        ("eval_ppl", "min"), ("eval_bits_per_byte", "min"), ("eval_bits_per_char", "min"),
        ("eval_token_acc", "max"), ("eval_accuracy", "max"),
        ("eval_rewards/accuracies", "max"), ("reward", "max"), ("eval_rewards/margins", "max"),
    ],
)  # fmt: skip
def test_which_values_are_better(metric: str, mode: str) -> None:
    assert StopWhen(metric=metric).mode == mode


def test_other_windows_change_nothing() -> None:
    metrics = new(stop_when=WATCH)
    evaluated(metrics, 1.0)
    metrics.count(batch(("a", 1, 9.0)))
    metrics.close(1)
    with metrics.evaluation("code", 1, "eval_code_"):
        metrics.count(batch(("a", 1, 9.0)))
    with metrics.evaluation("eval", 1):
        metrics.count(batch(("b", 1, 9.0)))
    assert not metrics.stop_reason and evaluated(metrics, 1.0, first=2)


def test_a_metric_of_training_is_not_that_of_evaluations() -> None:
    metrics = new(stop_when={"channel": "a", "metric": "loss"})
    metrics.count(batch(("a", 1, 2.0)))
    metrics.close(1)
    assert not evaluated(metrics, 9.0)
    metrics.count(batch(("a", 1, 2.0)))
    metrics.close(2)
    assert metrics.stop_reason.startswith("loss of a is 2 at step 2")


def test_labels_of_axes_are_no_part_of_the_whole() -> None:
    budget = {"ratios": {"a": 1, "kind/x": 3}}
    metrics = new(axes={"kind": {"a": "x", "b": "x"}}, budget=budget)
    metrics.count(batch(("a", 1, 1.0), ("b", 1, 1.0), (None, 2, 1.0), ("b", 3, 1.0)))
    logs = metrics.close(1).logs
    assert {key: logs[key] for key in logs if key.endswith("achieved_share")} == {
        "a_achieved_share": 1 / 4, "kind/x_achieved_share": 3 / 4
    }  # fmt: skip


def test_an_objective_and_a_label_of_an_axis() -> None:
    on = new(metrics=("loss", "macro_loss"), stop_when={"metric": "eval_macro_loss"})
    assert "eval_macro_loss is 2.5 at step 2" in evaluated(on, 3.0, 4.0)
    kind = {"channel": "kind/x", "metric": "eval_loss"}
    assert evaluated(new(axes={"kind": {"a": "x"}}, stop_when=kind), 3.0, 4.0)


def test_a_resumed_run_remembers(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"stop_when": WATCH | {"patience": 3}}
    first = new(**settings)
    evaluated(first, 1.0, 2.0)
    first.save(tmp_path, is_writer=True)
    second, third = new(**settings), new(**settings)
    second.start(tmp_path)
    third.load_state_dict(first.state_dict())
    for resumed in (second, third):
        assert not evaluated(resumed, 2.0, first=3) and evaluated(resumed, 2.0, first=4)
    second.start()
    assert not second.stop_reason and not evaluated(second, 2.0, 3.0, 3.0)


def test_any_goal_ends_the_run(caplog: pytest.LogCaptureFixture) -> None:
    metrics = new(stop_at={"tokens": 100, "b_samples": "2", "c_tokens": 9})
    for step in (1, 2):
        assert not metrics.stop_reason
        metrics.count(batch(("a", 3, 1.0), ("b", 1, 1.0)))
        assert tokens(metrics.close(step)) == {"a": 3, "b": 1}
    assert metrics.stop_reason == "b_samples of stop_at has reached 2 of 2 at step 2"
    assert "this trainer goes on; end it yourself." in caplog.text
    assert caplog.text.count("names 'c', which no record has had so far") == 1
    whole = new(stop_at={"tokens": 4}, axes={"kind": {"a": "x"}})
    whole.count(batch(("a", 3, 1.0)))
    assert not whole.close(1).logs.get("eta_hours") and not whole.stop_reason
    whole.count(batch((None, 1, 1.0)))
    whole.close(2)
    assert whole.stop_reason, "tokens without a channel count; labels of an axis do not"


def test_time_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 1000.0, 1900.0])
    monkeypatch.setattr("channel_metrics.session.time", lambda: next(clock))
    metrics = new(stop_at={"a_tokens": 100, "tokens": 110})
    found = []
    for step in (1, 2, 3):
        metrics.count(batch(("a", 10, 1.0), ("b", 1, 1.0)))
        found.append(metrics.close(step).logs)
    assert "a_eta_hours" not in found[0]
    # 10 tokens in 900 s, and 80 or 70 to go.
    assert [log["a_eta_hours"] for log in found[1:]] == [2.0, 1.75]
    assert [log["eta_hours"] for log in found[1:]] == [2.0, 1.75]


def test_the_soonest_of_several_goals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of `stop_at`, and of `until` for a channel without a goal there."""
    for reversed_ in (False, True):
        clock = iter([0.0, 3600.0])
        monkeypatch.setattr("channel_metrics.session.time", lambda clock=clock: next(clock))
        stop_at = {"a_tokens": 100, "a_samples": 1000}
        until = {"a_tokens": 21, "b_samples": 6, "b_tokens": 4, "tokens": 44}
        if reversed_:
            stop_at, until = (dict(reversed(of.items())) for of in (stop_at, until))
        metrics = new(metrics=("loss",), stop_at=stop_at, budget={"until": until})
        for step in (1, 2):
            metrics.count(batch(("a", 10, 1.0), ("b", 1, 1.0)))
            logs = metrics.close(step).logs
        hours = {key: value for key, value in logs.items() if key.endswith("eta_hours")}
        assert hours == {"a_eta_hours": 8.0, "b_eta_hours": 2.0, "eta_hours": 2.0}


def test_epochs_over_tokens_and_a_total_that_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a channel, a label of an axis, and tokens without a channel; and a wrong name."""
    clock = iter([0.0, 3600.0])
    monkeypatch.setattr("channel_metrics.session.time", lambda: next(clock))
    sources = {"a": 6, "kind/x": "5", "unlabeled": 1, "B": 8}
    budget = {"tokens": sources, "records": {"b": 4}, "until": {"kind/x_tokens": 7}}
    metrics = new(metrics=("loss",), axes={"kind": {"a": "x", "b": "x"}}, budget=budget)
    for step in (1, 2):
        metrics.count(batch(("a", 3, 1.0), ("b", 1, 1.0), (None, 1, 1.0)))
        logs = metrics.close(step).logs
    assert {key: value for key, value in logs.items() if not key.endswith("loss")} == {
        "a_source_epochs": 1.0,
        "b_source_epochs": 0.5,
        "B_source_epochs": 0.0,
        "kind/x_source_epochs": 8 / 5,
        "unlabeled_source_epochs": 2.0,
        "kind/x_eta_hours": 0.0,
    }
    assert not metrics.stop_reason
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("tokens of budget name 'B', which no record has had so far; ")


def test_a_taken_key_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    metrics = new(metrics=("share",), budget={"ratios": {"a": 1, "b": 1}, "unit": "tokens"})
    metrics.count(batch(("a", 3, 1.0), ("a_target", 1, 1.0)))
    logs = metrics.close(1).logs
    assert logs["a_target_share"] == 0.25 and logs["a_achieved_share"] == 0.75
    assert "'a_target_share' is the key of another value" in caplog.text
    metrics.count(batch(("a target", 3, 1.0)))
    assert "a_target_share" not in metrics.close(2).logs, "two channels share it"


class SecondRank(Ranks):
    @property
    def rank(self) -> int:
        return 1


def test_the_first_reason_stays_and_the_first_rank_says_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for ranks in (Ranks(), SecondRank()):
        metrics = new(ranks=ranks)
        metrics.stop("enough")
        metrics.stop("too much")
        assert metrics.stop_reason == "enough"
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == "enough: this trainer goes on; end it yourself."


def test_readers_know_the_values() -> None:
    keys = ["a_loss", "a_tokens", "a_target_share", "a_source_epochs", "a_eta_hours"]
    assert {key.channel for key in decode_keys(keys).values()} == {"a"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"stop_at": 3}, "stop_at must be a mapping of names to numbers, but is 3"),
        ({"stop_at": {"a_tokens": "many"}}, "'a_tokens' in stop_at must be a number above 0"),
        ({"stop_at": {"a_loss": 3}}, "'a_loss' in stop_at names no total; give CHANNEL_tokens"),
        ({"stop_when": {"metric": "eval_x"}}, "mode of stop_when must be min or max"),
        ({"stop_when": {"channel": "a"}}, "stop_when lacks a setting"),
        ({"stop_when": WATCH | {"patience": 0}}, "patience of stop_when must be a whole number"),
        ({"stop_when": WATCH | {"min_delta": -1}}, "min_delta of stop_when must be a number"),
        ({"stop_when": WATCH | {"chanel": "a"}}, "unknown key 'chanel' in stop_when; did you mean"),
        ({"budget": ["a"]}, "budget must be a mapping of settings"),
        ({"budget": {"ratios": {"a": True}}}, "'a' in ratios of budget must be a number above 0"),
        ({"budget": {"until": {"a_loss": 3}}}, "'a_loss' in until of budget names no total"),
        ({"budget": {"tokens": {"a": 1}, "records": {"a": 1}}}, "both records and tokens of 'a'"),
        ({"budget": {"unit": "bytes"}}, "unit of budget must be samples or tokens"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ChannelMetrics(MetricsConfig.from_mapping(settings))


def test_the_page() -> None:
    text = (ROOT / "docs/acting.md").read_text()
    for block in text.split("```python\n")[1:]:
        exec(block.split("```")[0], {})
    for block in text.split("```yaml\n")[1:]:
        settings = yaml.safe_load(block.split("```")[0])
        metrics = set(settings.get("metrics", ())) | {"loss"}
        ChannelMetrics(MetricsConfig.from_mapping({**settings, "metrics": sorted(metrics)}))
