"""The names in settings that act on windows: labels under any `axis_format`, and unknown names."""

from __future__ import annotations

from typing import Any

import pytest
from session_tools import batch, new

from channel_metrics import ConfigError, MetricsConfig
from channel_metrics.session import ChannelMetrics
from channel_metrics.trainers.wanted import check_stop_when


@pytest.mark.parametrize("name", ["kind/x", "x@kind"])
def test_labels_under_another_axis_format(name: str) -> None:
    """`axis/label` as the page says, or the row itself."""
    axes: dict[str, Any] = {
        "axes": {"kind": {"a": "x", "b": "y"}},
        "axis_format": "{label}@{axis}",
        "top": 1,
    }
    metrics = new(**axes, stop_when={"channel": name, "metric": "eval_loss"})
    rows = metrics.rows(["a", "b"])
    check_stop_when(metrics, {"": rows, "eval_": rows})
    with pytest.raises(ConfigError, match="names the channel 'x@kind', which no record of this"):
        check_stop_when(metrics, {"": rows, "eval_": metrics.rows(["b"])})
    for step in (1, 2):
        assert not metrics.stop_reason
        with metrics.evaluation("eval", step):
            metrics.count(batch(("b", 2, 9.0 / step), ("a", 1, 1.0)))
    assert metrics.stop_reason.startswith(f"eval_loss of {name} is 1 at step 2")
    budget: dict[str, Any] = {
        "ratios": {name: 1, "a": 1},
        "records": {name: 2},
        "until": {f"{name}_tokens": 9},
    }
    budget["unit"] = "tokens"
    alerts = {"kinds": ["exhausted"], "to": []}
    metrics = new(**axes, stop_at={f"{name}_tokens": 5}, budget=budget, alerts=alerts)
    for _ in range(2):
        assert not metrics.stop_reason
        metrics.count(batch(("a", 3, 1.0), ("b", 1, 1.0)))
        logs = metrics.close(1).logs
    assert logs["x_kind_achieved_share"] == 0.75 and logs["x_kind_source_epochs"] == 1.0
    assert metrics.stop_reason == f"{name}_tokens of stop_at has reached 6 of 5 at step 1"
    assert "x_kind_eta_hours" in logs
    assert [*metrics.totals.notes["alerts"]["told"]["train"]] == ["exhausted x@kind"]


def test_a_row_by_the_name_that_settings_have() -> None:
    cross, form = (("channel", "kind"),), "{label}@{axis}"
    config = MetricsConfig(axes={"kind": "kind"}, cross=cross, tree=1, axis_format=form)
    for name, row in (
        ("channel.kind/a.x", "a.x@channel.kind"), ("tree/code/python", "code/python@tree"),
        ("tree_mean/code", "code@tree_mean"), ("code/python", "code/python"), ("a", "a"),
        ("x@kind", "x@kind"), ("kind/", "kind/"),
    ):  # fmt: skip
        assert config.row_of(name) == row
    assert MetricsConfig(axes={"kind": "kind"}).row_of("tree/code") == "tree/code"


def test_unknown_names_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    def said(metrics: ChannelMetrics) -> list[str]:
        caplog.clear()
        for step in (1, 2, 3):
            metrics.count(batch(("bbu", 2, 1.0)))
            metrics.close(step)
            with metrics.evaluation("eval", step):
                metrics.count(batch(("bbu", 2, 2.0 / step), (f"late{step}", 1, 1.0)))
        return [record.getMessage() for record in caplog.records]

    far = "which no record has had so far; did you mean 'bbu'?"
    budget = {"ratios": {"bbu": 1, "bbv": 1}, "until": {"bbw_tokens": 9, "tokens": 9}}
    assert said(new(budget=budget)) == [
        f"ratios of budget name 'bbv', {far}",
        f"bbw_tokens in until of budget names 'bbw', {far}",
    ]
    stop_when = {"channel": "bbu", "metric": "eval_loss"}
    assert said(new(stop_when=stop_when)) == []
    assert said(new(stop_when={**stop_when, "channel": "bbv"})) == [f"stop_when names 'bbv', {far}"]
    waits = "which no window has had so far; compare it with the keys of the log."
    for wrong, what in (
        ({**stop_when, "metric": "evl_loss"}, "'evl_loss' of bbu"),
        ({**stop_when, "metric": "eval_ppl"}, "'eval_ppl' of bbu"),
        ({"metric": "eval_macro_loss"}, "'eval_macro_loss'"),
    ):
        assert said(new(stop_when=wrong)) == [f"stop_when waits for {what}, {waits}"]
