"""`ChannelMetrics` with many names: `top`, `max_keys`, and the keys that something follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from reference_axes import (
    Record,
    Values,
    reference_axis,
    reference_top,
    reference_tree,
    reference_tree_means,
)
from session_tools import batch, new

from channel_metrics import ChannelError, ChannelMetrics, Window
from channel_metrics.core.names import joint_name
from channel_metrics.trainers.wanted import check_wanted

TOTALS = ("loss", "tokens", "share", "tokens_total")
NAMES = ["a", "b/c", "b/d/e", "b/d/f", "g/h", None]
AXES = {"channel": ("channel",), "topic": ("topic",), "channel.topic": ("channel", "topic")}
RECORDS = st.builds(
    Record,
    channel=st.sampled_from(NAMES),
    losses=st.lists(st.integers(0, 8).map(float), min_size=1, max_size=4),
    labels=st.fixed_dictionaries(
        {"topic": st.lists(st.sampled_from(["m", "n", "o"]), max_size=3, unique=True)}
    ),
)


def count(metrics: ChannelMetrics, records: Sequence[Record]) -> None:
    for record in records:
        name = joint_name(record.channel, [("topic", topic) for topic in record.labels["topic"]])
        for loss in record.losses:
            metrics.count(batch((name, 1, loss)))


def check(
    window: Window, records: Sequence[Record], trained: Sequence[Record], top: int, levels: int
) -> None:
    """Every row is that of a loop over the records, and those with the most tokens are shown."""
    found = {"channel": window.values, **window.axes}
    for axis, axes in AXES.items():
        rest = {"others", "unlabeled"}
        shown = {*found.get(axis, {})} - rest
        if axis == "channel.topic":
            shown |= {name for name in found.get(axis, {}) if "unlabeled" in name}
        close_to(found.get(axis, {}), reference_top(records, shown, *axes))
        check_rank(shown, reference_axis(records, *axes), reference_axis(trained, *axes), top)
    groups, everything = found.get("tree", {}), reference_tree(records, levels)
    close_to(groups, {name: everything[name] for name in groups})
    check_rank({*groups}, everything, reference_tree(trained, levels), top)
    means = {group: of["loss"] for group, of in found.get("tree_mean", {}).items()}
    wanted = reference_tree_means(records, levels)
    assert means == pytest.approx({group: wanted[group] for group in groups})


def check_rank(shown: set[str], here: Values, trained: Values, top: int) -> None:
    left = here.keys() - shown - {"unlabeled"}

    def size(name: str) -> float:
        return trained.get(name, {}).get("tokens", 0)

    assert len(shown - {"unlabeled"}) <= top
    assert all(size(one) >= size(other) for one in shown for other in left)


def close_to(found: Any, wanted: Values) -> None:
    assert {*found} == {*wanted}
    for label, values in wanted.items():
        for metric in ("loss", "tokens", "share"):
            assert found[label][metric] == pytest.approx(values[metric]), (label, metric)


@given(
    st.lists(RECORDS, min_size=1, max_size=9),
    st.lists(RECORDS, min_size=1, max_size=9),
    st.integers(1, 3),
    st.integers(1, 2),
)
@example(
    [
        Record("b/c", [1.0, 3.0], {"topic": ["m", "n", "o"]}),
        Record("b/d/e", [5.0], {"topic": ["n", "o"]}),
        Record("a", [2.0, 2.0, 2.0], {"topic": ["m"]}),
    ],
    [Record("b/d/e", [5.0] * 4, {"topic": ["n", "o"]}), Record("b/c", [1.0], {"topic": []})],
    1,
    2,
)
def test_rows_are_those_of_the_naive_loop(
    train: list[Record], held: list[Record], top: int, levels: int
) -> None:
    """Groups in groups, records with several labels, and evaluations that have other names."""
    metrics = new(
        top=top, tree=levels, axes={"topic": ()}, cross=[["channel", "topic"]],
        metrics=("loss", "tokens", "share"),
    )  # fmt: skip
    count(metrics, train)
    check(metrics.close(1), train, train, top, levels)
    with metrics.evaluation("eval", 1) as found:
        count(metrics, held)
    assert found.window is not None
    check(found.window, held, train, top, levels)


def test_an_evaluation_shows_what_was_trained_on_most() -> None:
    metrics = new(top=2)
    metrics.count(batch(("a", 9, 1.0), ("b", 5, 1.0), ("c", 1, 1.0)))
    metrics.close(1)
    with metrics.evaluation("eval", 1) as found:
        metrics.count(batch(("b", 1, 1.0), ("c", 8, 1.0), ("d", 9, 1.0), ("e", 2, 1.0)))
    # Of `b`, `c`, `d` and `e`. The last two were never trained on.
    assert found.window is not None and list(found.window.values) == ["b", "c", "others"]


def test_means_of_children_are_of_all_channels(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever `top` and `eval_channels` show."""
    metrics = new(tree=1, top=1, eval_channels=("x/a",))
    counts = [("x/a", 5, 1.0), ("x/b", 2, 3.0), ("x/c", 1, 8.0), ("y/a", 1, 9.0), ("y/b", 1, 9.0)]
    metrics.count(batch(*counts))
    window = metrics.close(1)
    assert list(window.values) == ["x/a", "others"]
    assert window.axes == {
        "tree": {"x": {"loss": 19 / 8, "tokens": 8}},
        "tree_mean": {"x": {"loss": 4.0}},
    }
    assert window.sums("tree/y")["tokens"] == 2
    said = [record.getMessage() for record in caplog.records]
    assert "`top` (1) leaves these groups of names out of the log: tree/y ..." in said
    with metrics.evaluation("eval", 1) as found:
        metrics.count(batch(*counts))
    assert found.window is not None
    assert list(found.window.values) == ["x/a"]
    assert found.window.axes["tree_mean"] == {"x": {"loss": 4.0}}


def test_what_a_setting_follows_is_shown() -> None:
    stops = {"channel": "lang/fr", "metric": "loss"}
    weights = {"start": {"d": 1, "e": 1}, "rule": "fixed"}
    metrics = new(
        top=1, axes={"lang": {"a": "en", "b": "de", "c": "fr"}}, stop_when=stops, sampler=weights,
        eval_channels=("c",),
    )  # fmt: skip
    metrics.count(batch(*((name, 9 - n, 1.0) for n, name in enumerate("abcd"))))
    window = metrics.peek(1)
    assert list(window.values) == ["a", "others", "c", "d"]
    assert list(window.axes["lang"]) == ["en", "others", "fr", "unlabeled"]


@pytest.mark.parametrize("limits", [{"top": 1}, {"max_keys": 2}])
def test_keys_that_a_trainer_follows_stay(limits: dict[str, Any]) -> None:
    metrics = new(tree=1, **limits)
    for key in ("eval_x/c_loss", "eval_tree_mean/y_loss"):
        check_wanted(metrics, key, {"eval_": None}, "monitor")
    counts = [("x/a", 9, 1.0), ("x/b", 5, 2.0), ("x/c", 2, 4.0), ("y/a", 1, 8.0)]
    metrics.count(batch(*counts))
    metrics.close(1)
    with metrics.evaluation("eval", 1) as found:
        metrics.count(batch(*counts))
    assert found.logs["eval_x/c_loss"] == 4.0
    assert found.logs["eval_tree_mean/y_loss"] == 8.0
    assert "eval_x/b_loss" not in found.logs


def test_the_key_of_stop_when_stays() -> None:
    metrics = new(max_keys=2, stop_when={"metric": "b_loss"})
    metrics.count(batch(("a", 1, 1.0), ("b", 1, 3.0), ("c", 1, 5.0)))
    assert metrics.close(1).logs == {"a_loss": 1.0, "a_tokens": 1, "b_loss": 3.0}
    metrics.count(batch(("b", 1, 4.0)))
    assert metrics.close(2).logs == {"b_loss": 4.0}
    assert metrics.stop_reason


def test_values_of_observers_count_as_keys(caplog: pytest.LogCaptureFixture) -> None:
    metrics = new(max_keys=3, budget={"ratios": {"a": 1, "b": 1}})
    metrics.count(batch(("a", 1, 1.0), ("b", 1, 3.0)))
    logs = metrics.close(1).logs
    assert logs == {"a_loss": 1.0, "a_tokens": 1, "a_target_share": 0.5}
    metrics.count(batch(("a", 1, 1.0), ("b", 1, 3.0)))
    assert metrics.close(2).logs.keys() == logs.keys()
    (said,) = [r.getMessage() for r in caplog.records if "values of settings" in r.getMessage()]
    assert "3 values of settings such as `budget` are left out" in said and "b_target" in said


def test_top_adds_the_others_up(caplog: pytest.LogCaptureFixture) -> None:
    metrics = new(top=2, metrics=TOTALS, axes={"lang": {"a": "en", "b": "de", "c": "fr"}})
    counts = [("a", 5, 1.0), ("b", 3, 2.0), ("c", 2, 4.0), (None, 1, 0.0)]
    metrics.count(batch(*counts))
    window = metrics.close(1)
    assert list(window.values) == ["a", "b", "others", "unlabeled"]
    assert window.values["others"] == {"loss": 4.0, "tokens": 2, "share": 2 / 11}
    assert list(window.axes["lang"]) == ["en", "de", "others", "unlabeled"]
    assert window.sums("c")["tokens"] == 2.0, "the table of the window holds all"
    assert sum(values["share"] for values in window.values.values()) == pytest.approx(1)
    # What had the most tokens so far stays, also if another channel leads in one window.
    metrics.count(batch(("c", 1, 4.0), ("a", 1, 1.0)))
    assert list(metrics.close(2).values) == ["a", "others"]
    assert sum("`top` (2) counts these" in record.getMessage() for record in caplog.records) == 1


def test_an_open_window_shows_what_leads_in_it() -> None:
    metrics = new(top=1)
    metrics.count(batch(("a", 1, 1.0), ("b", 5, 2.0)))
    assert list(metrics.peek(1).values) == ["others", "b"]


def test_a_channel_that_is_called_others() -> None:
    metrics = new(top=1)
    metrics.count(batch(("others", 1, 1.0), ("a", 1, 1.0)))
    with pytest.raises(ChannelError, match="what `top` leaves out; rename this channel"):
        metrics.close(1)


def test_a_limit_of_keys(caplog: pytest.LogCaptureFixture) -> None:
    """Two metrics per row: `a` and its label fit, `b` and what comes later do not."""
    metrics = new(max_keys=4, axes={"lang": {"a": "en"}})
    logged = {"a_loss", "a_tokens", "lang/en_loss", "lang/en_tokens"}
    metrics.count(batch(("a", 5, 1.0)))
    assert metrics.close(1).logs.keys() == logged
    metrics.count(batch(("a", 1, 2.0), ("b", 3, 4.0), ("c", 1, 0.0)))
    window = metrics.close(2)
    assert window.logs.keys() == logged
    assert (window.logs["a_loss"], window.values["b"]) == (2.0, {"loss": 4.0, "tokens": 3})
    assert window.sums("c")["tokens"] == 1.0
    assert window.totals["b"] == {"tokens_total": 3, "samples_total": 1}
    metrics.count(batch(("b", 2, 4.0), (None, 1, 1.0)))
    third = metrics.close(3)
    assert third.logs == {"unlabeled_loss": 1.0, "unlabeled_tokens": 1.0}
    assert third.totals["b"]["tokens_total"] == 5
    with metrics.evaluation("eval", 3, "eval_") as evaluation:
        metrics.count(batch(("a", 1, 1.0)))
    assert evaluation.logs == {} and evaluation.window is not None
    assert evaluation.window.values["a"]["loss"] == 1.0
    (said,) = [r.getMessage() for r in caplog.records if "max_keys" in r.getMessage()]
    assert "more than 4 log keys" in said and "3 channels or labels" in said and "b, c" in said


def test_without_a_limit_of_keys() -> None:
    metrics = new(max_keys=0)
    metrics.count(batch(*((f"c{n}", 1, 1.0) for n in range(6000))))
    assert len(metrics.close(1).logs) == 12_000
