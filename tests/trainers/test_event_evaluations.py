"""Evaluations whose begin and end are events."""

from __future__ import annotations

import pickle
from functools import partial

from session_tools import Seen, batch, new, tokens

from channel_metrics.trainers.event_evaluations import EventEvaluations


def test_one_window_for_each_set() -> None:
    seen = Seen()
    metrics = new("a", on_window=[seen])
    evaluations = EventEvaluations(metrics)
    metrics.count(batch(("a", 1, 1.0)))
    evaluations.begin(["val_0", "val_1", "val_2", "val_3"], 5)
    metrics.count(batch(("a", 2, 1.0)))
    # The second set and the last one have no batch.
    evaluations.reach(2)
    metrics.count(batch(("a", 4, 1.0)))
    evaluations.reach(2)
    windows = evaluations.end()
    assert [window.split for window in windows] == ["val_0", "val_1", "val_2", "val_3"]
    assert [tokens(window) for window in windows] == [{"a": 2.0}, {}, {"a": 4.0}, {}]
    assert [(w.step, w.prefix) for w in windows] == [(5, f"val_{n}_") for n in range(4)]
    assert [window.split for window in seen] == ["val_0", "val_2"]
    assert not metrics.evaluating and evaluations.end() == []
    assert tokens(metrics.close(5)) == {"a": 1.0}


def test_one_that_is_left_open_is_dropped() -> None:
    seen = Seen()
    metrics = new("a", on_window=[seen])
    evaluations = EventEvaluations(metrics)
    for close in (partial(evaluations.begin, ["eval"], 2), evaluations.drop):
        evaluations.begin(["eval", "test"], 1)
        metrics.count(batch(("a", 2, 1.0)))
        evaluations.reach(1)
        metrics.count(batch(("a", 3, 1.0)))
        close()
        metrics.count(batch(("a", 4, 1.0)))
    # The counts after `drop` are those of training.
    assert evaluations.end() == [] and not metrics.evaluating
    assert tokens(metrics.close(2)) == {"a": 4.0}
    assert [(window.split, window.step) for window in seen[:-1]] == [("eval", 1)] * 2


def test_it_can_be_pickled_while_nothing_is_open() -> None:
    evaluations = EventEvaluations(new("a"))
    evaluations.begin(["eval"], 1)
    evaluations.end()
    pickle.loads(pickle.dumps(evaluations)).begin(["eval"], 1)
