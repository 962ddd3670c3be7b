"""The cases: each takes a harness and a folder. NEEDS says what the trainer must be able to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from channel_metrics import ChannelMetricsError, ConfigError, MetricsConfig
from channel_metrics.core.names import split_name
from contract.labels import AXES, check_slopes, check_tree, check_window, check_windows
from contract.script import (
    ERROR_BARS,
    PERCENTILES,
    Evaluation,
    Harness,
    Script,
    check_spread,
    expected,
    flat,
    measure,
    ran,
    renamed,
    size,
    steps,
    train_windows,
    unit,
    window_sequences,
)

CASES: dict[str, Callable[[Harness, Path], None]] = {}
NEEDS: dict[str, frozenset[str]] = {}
ALL = ("loss", "tokens", "samples", "share", "tokens_total", "samples_total")


def case(*needs: str) -> Callable[..., Callable[[Harness, Path], None]]:
    def register(function: Callable[[Harness, Path], None]) -> Callable[[Harness, Path], None]:
        CASES[function.__name__] = function
        NEEDS[function.__name__] = frozenset(needs)
        return function

    return register


def config(**given: Any) -> MetricsConfig:
    settings: dict[str, Any] = {"metrics": ALL, "axes": AXES, "live_table": False, **given}
    return MetricsConfig(**settings)


@case()
def windows_add_up(harness: Harness, folder: Path) -> None:
    chosen = config(metrics=(*ALL, *ERROR_BARS, *PERCENTILES))
    script = Script(config=chosen, steps=steps("aabb", "abab", "bb-a", "aaaa"))
    found = ran(harness, script, folder)
    check_windows(harness, found, script)
    for values in train_windows(found):
        check_spread(harness, values)
    for logs, values in zip(found.logs, train_windows(found), strict=True):
        for channel, of_channel in values.items():
            for metric, value in of_channel.items():
                assert logs[f"{channel}_{metric}"] == pytest.approx(value)
    assert not found.warnings


@case()
def absent_channel_is_absent_and_its_totals_go_on(harness: Harness, folder: Path) -> None:
    script = Script(config=config(), steps=steps("ab", "aa", "aa", "ab"), every=1)
    windows = train_windows(ran(harness, script, folder))
    assert [set(values) for values in windows] == [{"a", "b"}, {"a"}, {"a"}, {"a", "b"}]
    sizes = [size(harness, s) for step in script.steps for s in flat(step) if s.channel == "b"]
    assert windows[-1]["b"][f"{unit(harness)}_total"] == sum(sizes)
    assert windows[-1]["b"]["samples_total"] == 2


@case()
def unlabeled_is_in_plain_sight(harness: Harness, folder: Path) -> None:
    script = Script(config=config(), steps=steps("a-", "--"), every=2)
    found = ran(harness, script, folder)
    check_windows(harness, found, script)
    (values,) = train_windows(found)
    assert list(values) == ["a", "unlabeled"] and f"unlabeled_{measure(harness)}" in found.logs[0]


@case()
def eval_channels_are_respected(harness: Harness, folder: Path) -> None:
    script = Script(
        config=config(channels=("a", "b"), eval_channels=("a",)),
        steps=steps("ab", "ab"),
        evaluations=(Evaluation(2, steps("abab")[0]),),
    )
    found = ran(harness, script, folder)
    (evaluated,) = found.evaluations
    assert f"eval_a_{measure(harness)}" in evaluated and not any(
        key.startswith("eval_b") for key in evaluated
    )
    assert set(train_windows(found)[0]) == {"a", "b"}


@case()
def evaluation_has_its_own_window_and_no_totals(harness: Harness, folder: Path) -> None:
    names = ("macro_loss", "worst_loss", "weighted_loss_of_channels")
    script = Script(
        config=config(metrics=(*ALL, *names, *ERROR_BARS), channel_weights={"a": 3, "b": 1}),
        steps=steps("ab", "aa", "bb", "ab"),
        evaluations=(Evaluation(1, steps("bbaa", first=40)[0]),),
    )
    found = ran(harness, script, folder)
    (evaluated,) = found.evaluations
    (window,) = [one for one in found.windows if one.split != "train"]
    if measure(harness) == "loss":
        of_a, of_b = (evaluated[f"eval_{channel}_loss"] for channel in "ab")
        objectives = [(of_a + of_b) / 2, max(of_a, of_b), (3 * of_a + of_b) / 4]
        assert [evaluated[f"eval_{name}"] for name in names] == pytest.approx(objectives)
        assert "macro_loss" in found.logs[0]
        assert window.worst_channel == ("a" if of_a > of_b else "b")
    else:
        assert not {f"eval_{name}" for name in names} & set(evaluated)
    check_window(harness, window, flat(script.evaluations[0].batches))
    for row, values in {**window.values, "lang/de": window.axes["lang"]["de"]}.items():
        logged = {metric: evaluated[f"eval_{row}_{metric}"] for metric in values}
        assert logged == pytest.approx(values)
    assert not any(key.endswith("_total") for key in evaluated)
    check_windows(harness, found, script)


@case("fails")
def evaluation_that_raises_is_dropped(harness: Harness, folder: Path) -> None:
    script = Script(
        config=config(),
        steps=steps("ab", "aa", "bb", "ab"),
        evaluations=(
            Evaluation(1, steps("bbaa", first=40)[0], fails=True),
            Evaluation(3, steps("abab", first=50)[0]),
        ),
    )
    found = ran(harness, script, folder)
    (evaluated,) = found.evaluations
    wanted = expected(harness, flat(script.evaluations[1].batches))
    counted = unit(harness)
    assert evaluated[f"eval_a_{counted}"] == wanted["a"][counted]
    check_windows(harness, found, script)


@case()
def typo_in_eval_channels_is_an_error_when_all_names_are_known(
    harness: Harness, folder: Path
) -> None:
    chosen = config(channels=("bbu", "rru"), unknown="unlabeled", eval_channels=("ruu",))
    (found,) = harness.run(Script(config=chosen, steps=steps("--", "--")), folder)
    assert isinstance(found.error, ConfigError) and "did you mean 'rru'" in str(found.error)


@case()
def late_typo_in_eval_channels_is_said_once(harness: Harness, folder: Path) -> None:
    names = {"a": "bbu", "b": "rru"}
    (held,) = renamed(steps("abab", first=40), names)
    script = Script(
        config=config(eval_channels=("bbu", "ruu")),
        steps=renamed(steps("ab", "ab", "ba", "ab"), names),
        evaluations=(Evaluation(1, held), Evaluation(3, held)),
    )
    found = ran(harness, script, folder)
    said = [message for message in found.warnings if "'ruu', which is no channel" in message]
    assert len(said) == 1 and "did you mean 'rru'" in said[0]
    keys = {f"eval_{name}_{measure(harness)}" for name in ("bbu", "rru")}
    first, second = (keys & set(e) for e in found.evaluations)
    assert first == second == {f"eval_bbu_{measure(harness)}"}


@case()
def reserved_keys_are_refused(harness: Harness, folder: Path) -> None:
    chosen = config(channels=(harness.reserved,))
    (found,) = harness.run(Script(config=chosen, steps=steps("--", "--")), folder)
    assert isinstance(found.error, ConfigError) and "the trainer's own key" in str(found.error)


@case("save")
def totals_are_saved_and_resumed(harness: Harness, folder: Path) -> None:
    """The checkpoint comes in the middle of a window, whose tokens are in it."""
    every = steps("ab", "aa", "bb", "ab", "aa", "bb")
    first = ran(harness, Script(config=config(), steps=every[:4], every=2, save_at=3), folder)
    assert first.checkpoint is not None
    stored = json.loads((first.checkpoint / "channel_metrics.json").read_text())["channels"]
    seen = [s for step in every[:3] for s in flat(step)]
    totals = {f"{unit(harness)}_total", "samples_total"}
    for name in "ab":
        sizes = [size(harness, s) for s in seen if s.channel == name]
        # The totals stand under the joint names of channels and languages.
        own = [of_name for joint, of_name in stored.items() if split_name(joint)[0] == name]
        assert sum(one[f"{unit(harness)}_total"] for one in own) == sum(sizes)
    second = ran(
        harness,
        Script(config=config(), steps=every, every=6, resume=first.checkpoint),
        folder / "second",
    )
    whole = ran(harness, Script(config=config(), steps=every, every=6), folder / "whole")
    for name in "ab":
        for metric in totals:
            assert train_windows(second)[-1][name][metric] == train_windows(whole)[-1][name][metric]


@case("save")
def a_damaged_file_is_named(harness: Harness, folder: Path) -> None:
    every = steps("ab", "aa", "bb", "ab")
    first = ran(harness, Script(config=config(), steps=every[:2], every=2, save_at=2), folder)
    assert first.checkpoint is not None
    file = first.checkpoint / "channel_metrics.json"
    file.write_text("{")
    script = Script(config=config(), steps=every, every=2, resume=first.checkpoint)
    (found,) = harness.run(script, folder / "second")
    assert isinstance(found.error, ChannelMetricsError) and str(file) in str(found.error)
    script = Script(config=config(on_error="warn"), steps=every, every=2, resume=first.checkpoint)
    warned = ran(harness, script, folder / "third")
    assert any(str(file) in message for message in warned.warnings)
    counted = sum(size(harness, s) for step in every[2:] for s in flat(step) if s.channel == "a")
    assert train_windows(warned)[-1]["a"][f"{unit(harness)}_total"] == counted


@case("rerun")
def a_step_that_is_run_again_counts_once(harness: Harness, folder: Path) -> None:
    script = Script(config=config(), steps=steps("ab", "aa", "bb", "ab"), reruns=frozenset({2, 3}))
    check_windows(harness, ran(harness, script, folder), script)


@case("skip")
def a_step_that_is_skipped_does_not_count(harness: Harness, folder: Path) -> None:
    script = Script(config=config(), steps=steps("ab", "aa", "bb", "ab"), skips=frozenset({2}))
    check_windows(harness, ran(harness, script, folder), script)


@case("peek")
def a_log_in_mid_window_has_ratios_only(harness: Harness, folder: Path) -> None:
    script = Script(config=config(), steps=steps("ab", "aa"), peeks=frozenset({1}))
    found = ran(harness, script, folder)
    (peeked,) = found.peeked
    rows = ("a", "b", "kind/x", "lang/en", "lang/unlabeled")
    assert {f"{row}_{metric}" for row in rows for metric in ("loss", "share")} == set(peeked)
    check_windows(harness, found, script)


@case()
def a_fault_before_the_first_window_ends_the_run(harness: Harness, folder: Path) -> None:
    script = Script(config=config(), steps=steps("ab", "aa", "bb", "ab"), fault_at=1)
    (found,) = harness.run(script, folder)
    assert isinstance(found.error, ZeroDivisionError) and not found.windows


@case()
def a_fault_after_the_first_window_ends_the_metrics_only(harness: Harness, folder: Path) -> None:
    script = Script(config=config(), steps=steps("ab", "aa", "bb", "ab", "aa", "bb"), fault_at=3)
    found = ran(harness, script, folder)
    assert found.steps == 6 and len(train_windows(found)) == 1
    said = [message for message in found.warnings if "training goes on" in message]
    assert len(said) == 1 and "an error of ours" in said[0]
    assert not any(key.startswith(("a_", "b_")) for logs in found.logs[1:] for key in logs)


@case()
def on_error_can_be_forced(harness: Harness, folder: Path) -> None:
    every = steps("ab", "aa", "bb", "ab")
    warned = ran(
        harness, Script(config=config(on_error="warn"), steps=every, fault_at=0), folder / "warn"
    )
    assert warned.steps == 4 and not train_windows(warned)
    script = Script(config=config(on_error="raise"), steps=every, fault_at=3)
    (raised,) = harness.run(script, folder / "raise")
    assert isinstance(raised.error, ZeroDivisionError)


@case("ranks")
def ranks_agree_with_one_all_reduce(harness: Harness, folder: Path) -> None:
    """A channel that one rank alone has seen, and one that is new in the last window."""
    letters = ("aabb", "aaab", "abab", "aacc", "abab", "abab")
    names = {"a": "g/a", "b": "g/b", "c": "c"}
    chosen = config(metrics=(*ALL, *ERROR_BARS, *PERCENTILES, "loss_slope"), tree=1)
    script = Script(config=chosen, steps=renamed(steps(*letters), names), every=2)
    per_rank = harness.run(script, folder, ranks=2)
    assert len(per_rank) == 2
    for found in per_rank:
        assert found.error is None, found.error
        assert train_windows(found) == train_windows(per_rank[0])
    check_windows(harness, per_rank[0], script)
    for window, sequences in zip(per_rank[0].windows, window_sequences(script), strict=True):
        check_spread(harness, window.values)
        check_tree(harness, window, sequences)
    check_slopes(harness, per_rank[0], script)
    # The first window meets the names, the second a new one; the third is the steady state.
    for found in per_rank:
        assert found.collectives[0] <= 4 and found.collectives[1] <= 4
        assert found.collectives[2] == 1
