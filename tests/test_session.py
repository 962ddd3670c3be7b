"""`ChannelMetrics`: windows, evaluations, totals, names, observers and faults of one run."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from datasets import ClassLabel, Dataset, Features

from channel_metrics import ChannelError, ChannelMetricsError, ConfigError, MetricsConfig
from channel_metrics.core.micro_batch import MicroBatch
from channel_metrics.core.schema import Column, Metric, Schema, ratio
from channel_metrics.session import ChannelMetrics
from channel_metrics.windows import Evaluation, Window

LOSS_AND_TOKENS = ("loss", "tokens")


def new(
    *channels: str, metrics: tuple[str, ...] = LOSS_AND_TOKENS, **options: Any
) -> ChannelMetrics:
    given = {key: options.pop(key) for key in list(options) if key in MetricsConfig.__annotations__}
    return ChannelMetrics(MetricsConfig(channels=channels, metrics=metrics, **given), **options)


def batch(*counts: tuple[str | None, int, float], **more: Any) -> MicroBatch:
    """(channel, tokens, loss of each) per sequence."""
    losses = [loss for _, tokens, loss in counts for _ in range(tokens)]
    ends = torch.tensor([0, *(tokens for _, tokens, _ in counts)]).cumsum(0)
    return MicroBatch(
        token_losses=torch.tensor(losses),
        channels=[name for name, _, _ in counts],
        cu_seqlens=ends.int(),
        **more,
    )


def tokens(window: Window) -> dict[str, float]:
    return {name: values["tokens"] for name, values in window.values.items()}


class Seen(list[Window]):
    """An observer."""

    def __call__(self, window: Window) -> None:
        self.append(window)


class Display:
    is_display = True

    def __init__(self) -> None:
        self.called = 0

    def __call__(self, window: Window) -> None:
        self.called += 1
        raise ZeroDivisionError("no screen")


# ---- windows ------------------------------------------------------------------------------------


def test_windows_follow_each_other() -> None:
    metrics = new("a")
    metrics.count(batch(("a", 2, 1.0), ("b", 1, 4.0)))
    metrics.count(batch(("a", 2, 3.0), (None, 3, 5.0)))
    window = metrics.close(10)
    assert window.values == {
        "a": {"loss": 2.0, "tokens": 4.0},
        "b": {"loss": 4.0, "tokens": 1.0},
        "unlabeled": {"loss": 5.0, "tokens": 3.0},
    }
    assert window.logs == {
        "a_loss": 2.0, "a_tokens": 4.0, "b_loss": 4.0, "b_tokens": 1.0,
        "unlabeled_loss": 5.0, "unlabeled_tokens": 3.0,
    }  # fmt: skip
    assert (window.split, window.step, window.prefix, window.final) == ("train", 10, "", True)
    metrics.count(batch(("b", 1, 1.0)))
    assert tokens(metrics.close(20)) == {"b": 1}
    assert metrics.close(30).values == {}


def test_the_sums_of_a_window() -> None:
    metrics = new("a")
    metrics.count(batch(("a", 2, 1.5), (None, 1, 4.0), ("a", 1, 1.0)))
    window = metrics.close(1)
    assert window.names == ("a",)
    expected = dict.fromkeys(window.columns, 0.0)
    assert window.sums("a") == {**expected, "tokens": 3, "samples": 2, "nll": 4.0}
    assert window.sums("unlabeled") == {**expected, "tokens": 1, "samples": 1, "nll": 4.0}
    assert window.sums("never seen") == expected


def test_a_step_that_runs_again_is_counted_once() -> None:
    metrics = new()
    metrics.count(batch(("a", 1, 1.0)))
    metrics.begin_step()
    metrics.count(batch(("a", 50, 9.0), ("of the first try", 1, 1.0)))
    metrics.begin_step()
    metrics.count(batch(("a", 2, 1.0)))
    metrics.end_step()
    assert tokens(metrics.close(1)) == {"a": 3}


def test_a_step_that_the_optimizer_skips_is_not_counted() -> None:
    metrics = new()
    for step, discard in ((1, False), (2, True), (3, False)):
        metrics.begin_step()
        metrics.count(batch(("a", 10**step, 1.0)))
        metrics.end_step(discard=discard)
    assert tokens(metrics.close(3)) == {"a": 1010}
    metrics.end_step()  # none is open


def test_an_open_step_joins_the_window_that_is_closed() -> None:
    metrics = new()
    metrics.begin_step()
    metrics.count(batch(("a", 2, 1.0)))
    assert tokens(metrics.close(1)) == {"a": 2}
    metrics.count(batch(("a", 3, 1.0)))
    assert tokens(metrics.close(2)) == {"a": 3}


def test_peek_shows_ratios_and_changes_nothing() -> None:
    """Whoever adds up the tokens of a log gets the tokens of the run."""
    seen = Seen()
    metrics = new(
        "a", metrics=("loss", "tokens", "samples", "share", "tokens_total"), on_window=[seen]
    )
    metrics.count(batch(("a", 2, 1.0), ("b", 2, float("nan"))))
    window = metrics.peek(1)
    assert (window.final, window.values) == (
        False,
        {"a": {"loss": 1.0, "share": 0.5}, "b": {"share": 0.5}},
    )
    assert metrics.totals.of("a")["tokens_total"] == 0 and seen == [] and not metrics.guard.proven
    metrics.count(batch(("a", 2, 4.0)))
    closed = metrics.close(2)
    assert closed.values["a"] == {
        "loss": 2.5, "tokens": 4.0, "samples": 2.0, "share": 2 / 3, "tokens_total": 4,
    }  # fmt: skip
    assert seen == [closed]


# ---- evaluations --------------------------------------------------------------------------------


def test_evaluations_are_windows_of_their_own() -> None:
    seen = Seen()
    metrics = new("a", metrics=("loss", "tokens", "tokens_total"), on_window=[seen])
    metrics.count(batch(("a", 1, 1.0)))
    metrics.begin_step()
    metrics.count(batch(("a", 2, 1.0)))
    with metrics.evaluation("code", 5, prefix="eval_code_") as evaluation:
        assert metrics.evaluating and evaluation.logs == {} and evaluation.window is None
        metrics.count(batch(("a", 7, 3.0)))
    window = evaluation.window
    assert window is not None and not metrics.evaluating
    assert (window.split, window.step, window.prefix) == ("code", 5, "eval_code_")
    # No totals: they are of what was trained on.
    assert evaluation.logs == {"eval_code_a_loss": 3.0, "eval_code_a_tokens": 7.0}
    metrics.count(batch(("a", 3, 1.0)))
    assert metrics.close(6).values == {"a": {"loss": 1.0, "tokens": 6.0, "tokens_total": 6}}
    assert [window.split for window in seen] == ["code", "train"]


def test_nested_evaluations() -> None:
    metrics = new()
    with metrics.evaluation("outer", 1) as outer:
        metrics.count(batch(("a", 1, 1.0)))
        with metrics.evaluation("inner", 1, prefix="inner_") as inner:
            metrics.count(batch(("a", 2, 1.0)))
        metrics.count(batch(("a", 4, 1.0)))
    assert (outer.logs["eval_a_tokens"], inner.logs["inner_a_tokens"]) == (5, 2)
    assert metrics.close(1).values == {}


def test_an_evaluation_that_raises_is_dropped() -> None:
    metrics = new()
    metrics.count(batch(("a", 1, 1.0)))

    def evaluate() -> None:
        with metrics.evaluation("outer", 1) as outer:
            opened.append(outer)
            metrics.count(batch(("a", 2, 1.0)))
            with metrics.evaluation("inner", 1) as inner:
                opened.append(inner)
                metrics.count(batch(("a", 4, 1.0)))
                raise KeyError

    opened: list[Evaluation] = []
    with pytest.raises(KeyError):
        evaluate()
    outer, inner = opened
    assert outer.window is None and inner.window is None and not metrics.evaluating
    with metrics.evaluation("next", 1) as after:
        metrics.count(batch(("a", 8, 1.0)))
    assert after.logs["eval_a_tokens"] == 8
    assert tokens(metrics.close(1)) == {"a": 1}


def test_a_generator_that_leaves_an_evaluation_open() -> None:
    metrics = new()

    def batches() -> Iterator[int]:
        with metrics.evaluation("inner", 1):
            yield 1

    with metrics.evaluation("outer", 1) as outer:
        metrics.count(batch(("a", 1, 1.0)))
        left = batches()
        next(left)
    assert outer.logs["eval_a_tokens"] == 1 and not metrics.evaluating
    with metrics.evaluation("next", 2) as after:
        left.close()
        metrics.count(batch(("a", 2, 1.0)))
    assert after.logs["eval_a_tokens"] == 2


def test_a_discarded_evaluation() -> None:
    seen = Seen()
    metrics = new(on_window=[seen])
    with metrics.evaluation("warm-up", 0) as evaluation:
        metrics.count(batch(("a", 2, 1.0)))
        evaluation.discard()
    assert evaluation.window is None and evaluation.logs == {} and seen == []


def test_eval_channels() -> None:
    metrics = new("a", "b", eval_channels=("b", "unlabeled"))
    with metrics.evaluation("test", 1) as evaluation:
        metrics.count(batch(("a", 2, 1.0), ("b", 3, 1.0), (None, 4, 1.0)))
    assert evaluation.window is not None
    assert tokens(evaluation.window) == {"b": 3, "unlabeled": 4}
    # The sums are there all the same.
    assert evaluation.window.sums("a")["tokens"] == 2
    metrics.count(batch(("a", 2, 1.0)))
    assert tokens(metrics.close(1)) == {"a": 2}


@pytest.mark.parametrize("unknown", ["error", "unlabeled"])
def test_eval_channels_that_can_be_known_to_be_wrong(unknown: str) -> None:
    with pytest.raises(
        ConfigError, match="eval_channels names 'bb', which is no channel; did you mean 'bbu'"
    ):
        new("bbu", "rru", eval_channels=("bb",), unknown=unknown)
    assert new("bbu", eval_channels=("bbu", "unlabeled"), unknown=unknown)


def test_eval_channels_that_turn_out_wrong(caplog: pytest.LogCaptureFixture) -> None:
    metrics = new(eval_channels=("bb", "zzz"))
    for step in (1, 2):
        with metrics.evaluation("test", step) as evaluation:
            metrics.count(batch(("bbu", 2, 1.0)))
        assert evaluation.logs == {}
    assert [record.getMessage() for record in caplog.records] == [
        "eval_channels names 'bb', which is no channel; did you mean 'bbu'?",
        "eval_channels names 'zzz', which is no channel; known are bbu.",
    ]
    with pytest.raises(ConfigError, match="eval_channels names 'bb'"):
        metrics.check_eval_channels()


def test_a_metric_of_every_channel_ignores_eval_channels() -> None:
    schema = Schema("pairs", count="pairs")
    schema.register(
        Column("pairs", "pairs", ""),
        Column("margin", "reward", ""),
        Metric(
            "mean",
            ("margin", "pairs"),
            lambda s: ratio(s["margin"], s["pairs"]),
            asked_by=("loss",),
        ),
        Metric(
            "own",
            ("pairs",),
            lambda s: s["pairs"],
            always=True,
            every_channel=True,
            key="own_{channel}",
        ),
    )
    metrics = new("a", "b", eval_channels=("a",), schema=schema)
    with metrics.evaluation("test", 1) as evaluation:
        metrics.add(["a", "b"], {"pairs": torch.ones(2), "margin": torch.tensor([2.0, 3.0])})
    assert evaluation.logs == {"eval_a_mean": 2.0, "eval_own_a": 1.0, "eval_own_b": 1.0}


# ---- totals -------------------------------------------------------------------------------------


def trained(metrics: ChannelMetrics) -> ChannelMetrics:
    """Two channels: one in a window that was closed, one in the open window."""
    metrics.count(batch(("a", 3, 1.0)))
    metrics.close(1)
    metrics.count(batch(("a", 2, 1.0), ("b", 4, 1.0)))
    return metrics


def of(number: int, samples: int) -> dict[str, int]:
    return {"tokens_total": number, "samples_total": samples}


def test_totals_are_saved_and_resumed(tmp_path: Path) -> None:
    metrics = trained(new())
    metrics.save(tmp_path, is_writer=True)
    # The open window is in the file, and stays open.
    assert metrics.totals.of("a") == of(3, 1)
    assert tokens(metrics.close(2)) == {"a": 2, "b": 4}
    again = new(metrics=("tokens", "tokens_total"))
    again.start(tmp_path)
    assert (again.totals.of("a"), again.totals.of("b")) == (of(5, 2), of(4, 1))
    again.count(batch(("a", 1, 1.0)))
    assert again.close(3).logs == {"a_tokens": 1.0, "a_tokens_total": 6}
    # What is absent from a window keeps its totals.
    again.save(tmp_path / "later", is_writer=True)
    assert new().totals.of("b") == of(0, 0)
    last = new()
    last.resume(tmp_path / "later")
    assert (last.totals.of("a"), last.totals.of("b")) == (of(6, 3), of(4, 1))
    last.start()
    assert last.totals.of("a") == of(0, 0)


def test_only_the_writer_writes(tmp_path: Path) -> None:
    trained(new()).save(tmp_path, is_writer=False)
    assert list(tmp_path.iterdir()) == []


def test_a_file_under_its_old_name_is_resumed(tmp_path: Path) -> None:
    trained(new()).save(tmp_path, is_writer=True)
    (tmp_path / "channel_metrics.json").rename(tmp_path / "channel_metrics_totals.json")
    metrics = new()
    metrics.resume(tmp_path)
    assert metrics.totals.of("b") == of(4, 1)


def test_a_checkpoint_without_totals(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    metrics = trained(new())
    metrics.start(tmp_path)
    assert metrics.totals.of("a") == of(0, 0) and metrics.close(1).values == {}
    (record,) = caplog.records
    assert str(tmp_path) in record.getMessage() and "count from here" in record.getMessage()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": 1, "channels": {"a": {"tokens_total": null}}}']
)
@pytest.mark.parametrize("on_error", [None, "raise", "warn"])
def test_a_damaged_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, on_error: Any
) -> None:
    path = tmp_path / "channel_metrics.json"
    path.write_text(text)
    metrics = new(on_error=on_error, metrics=("tokens", "tokens_total"))
    if on_error != "warn":
        with pytest.raises(ChannelMetricsError, match="delete it to resume with totals") as raised:
            metrics.start(tmp_path)
        assert str(path) in str(raised.value)
        return
    for _ in range(2):
        metrics.start(tmp_path)
    (record,) = caplog.records
    assert str(path) in record.getMessage() and "delete it" in record.getMessage()
    metrics.count(batch(("a", 2, 1.0)))
    assert metrics.close(1).logs == {"a_tokens": 2.0, "a_tokens_total": 2}


def test_a_state_of_ones_own() -> None:
    metrics = trained(new())
    metrics.begin_step()
    metrics.count(batch(("b", 1, 1.0)))
    state = json.loads(json.dumps(metrics.state_dict(), default=lambda tensor: tensor.tolist()))
    state["train"]["sums"] = torch.tensor(state["train"]["sums"], dtype=torch.float64)
    again = new("c", metrics=("tokens", "tokens_total"))
    again.count(batch(("c", 9, 1.0)))
    again.load_state_dict(state)
    assert again.close(2).values == {
        "a": {"tokens": 2.0, "tokens_total": 5},
        "b": {"tokens": 5.0, "tokens_total": 5},
    }
    with pytest.raises(ChannelMetricsError, match="another version"):
        again.load_state_dict({**state, "totals": {"version": 9}})


# ---- observers ----------------------------------------------------------------------------------


def test_observers_are_told_once_of_each_window() -> None:
    seen, other = Seen(), Seen()
    metrics = new(on_window=[seen])
    metrics.on_window.append(other)
    metrics.count(batch(("a", 1, 1.0)))
    windows = [metrics.close(1)]
    with metrics.evaluation("test", 1) as evaluation:
        metrics.count(batch(("a", 1, 1.0)))
    metrics.count(batch(("a", 1, 1.0)))
    windows += [evaluation.window, metrics.close(2)]
    # Some trainers log twice at one step: nobody is told of nothing.
    metrics.close(2)
    assert seen == other == windows


def test_a_display_that_fails_is_removed(caplog: pytest.LogCaptureFixture) -> None:
    display, seen = Display(), Seen()
    metrics = new(on_window=[display, seen])
    for step in (1, 2):
        metrics.count(batch(("a", 1, 1.0)))
        metrics.close(step)
    assert display.called == 1 and len(seen) == 2 and metrics.measuring
    (record,) = caplog.records
    assert "failed, and shows nothing from now on: ZeroDivisionError" in record.getMessage()


@pytest.mark.parametrize("on_error", [None, "raise", "warn"])
def test_an_observer_that_may_steer_the_training_raises(on_error: Any) -> None:
    def sampler(window: Window) -> None:
        if window.step == 2:
            raise ZeroDivisionError("no weights")

    metrics = new(on_window=[sampler], on_error=on_error)
    metrics.count(batch(("a", 1, 1.0)))
    metrics.close(1)
    metrics.count(batch(("a", 1, 1.0)))
    with pytest.raises(ZeroDivisionError):
        metrics.close(2)


# ---- names --------------------------------------------------------------------------------------


def test_declared_channels_that_share_a_key() -> None:
    with pytest.raises(ChannelError, match="'bbu' and 'bbu_weighted' would both be logged"):
        new("bbu", "bbu_weighted")
    with pytest.raises(ConfigError, match="'train_loss', which is the trainer's own key"):
        new("train", reserved=["train_loss"])
    metrics = new("bbu", reserved=["train_loss"])
    with pytest.raises(ConfigError, match="'train_loss'"):
        metrics.declare_names(["rru", "train"])
    with pytest.raises(ChannelError, match="'lvis' is not in the declared table"):
        new("bbu", unknown="error").declare_names(["bbu", "unlabeled", "lvis"])
    unlabeled = new("bbu", unknown="unlabeled")
    unlabeled.declare_names(["lvis"])
    assert unlabeled.labels.names == ("bbu",)


def test_keys_that_clash_later_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    metrics = new("bbu", metrics=("loss", "weighted_loss"), reserved=["grad_norm", "lvis_loss"])
    metrics.count(batch(("bbu", 1, 1.0), weights=torch.ones(1)))
    assert metrics.close(1).logs == {"bbu_loss": 1.0, "bbu_weighted_loss": 1.0}
    for step in (2, 3):
        given = batch(
            ("bbu", 1, 1.0), ("bbu_weighted", 1, 2.0), ("lvis", 1, 3.0), weights=torch.ones(3)
        )
        metrics.count(given)
        window = metrics.close(step)
        assert window.logs == {
            "bbu_loss": 1.0, "bbu_weighted_weighted_loss": 2.0, "lvis_weighted_loss": 3.0,
        }  # fmt: skip
        # The values are there for observers.
        assert window.values["lvis"]["loss"] == 3.0
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert all(message.endswith("These keys are left out of the log.") for message in messages)


def test_keys_that_an_evaluation_brings(caplog: pytest.LogCaptureFixture) -> None:
    metrics = new("bbu", "eval_bbu")
    with metrics.evaluation("test", 1) as evaluation:
        metrics.count(batch(("bbu", 1, 1.0), ("eval_bbu", 2, 1.0)))
    assert evaluation.logs == {"eval_eval_bbu_loss": 1.0, "eval_eval_bbu_tokens": 2.0}
    metrics.count(batch(("bbu", 1, 1.0), ("eval_bbu", 2, 1.0)))
    assert metrics.close(1).logs == {"bbu_loss": 1.0, "bbu_tokens": 1.0}
    assert len(caplog.records) == 1


def test_values_join_the_log_of_a_trainer(caplog: pytest.LogCaptureFixture) -> None:
    metrics = new()
    logs: dict[str, Any] = {"a_loss": "the trainer's", "lr": 1e-3}
    for step in (1, 2):
        metrics.count(batch(("a", 2, 1.0)))
        metrics.write(metrics.close(step), logs)
    assert logs == {"a_loss": "the trainer's", "lr": 1e-3, "a_tokens": 2.0}
    (record,) = caplog.records
    assert "'a_loss' is already logged by the trainer" in record.getMessage()


# ---- what is said, and what an error does -------------------------------------------------------


def test_a_window_without_any_channel_warns(caplog: pytest.LogCaptureFixture) -> None:
    metrics = new("a", fields=("meta.source", "channel"))
    for step in (1, 2):
        metrics.count(batch((None, 2, 1.0)))
        assert tokens(metrics.close(step)) == {"unlabeled": 2}
    (record,) = caplog.records
    assert record.getMessage() == (
        "no record of this train window had a channel (looked for meta.source, channel); all "
        "tokens count as 'unlabeled'."
    )


def test_what_does_not_add_up_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    metrics = new()
    for step, reported in ((1, 2.00001), (2, 4.0), (3, 8.0), (4, 2.0)):
        metrics.count(batch(("a", 2, 1.0), reported_sum=torch.tensor(reported)))
        metrics.peek(step)
        assert len(caplog.records) == (step > 2)
        metrics.close(step)
    (record,) = caplog.records
    assert "do not add up to the trainer's own loss" in record.getMessage()
    assert "difference is 5.0e-01." in record.getMessage()


def test_an_error_raises_until_a_train_window_was_seen(caplog: pytest.LogCaptureFixture) -> None:
    bad = batch(("a", 2, 1.0), labels=torch.ones(3).long())
    metrics = new()
    with pytest.raises(ChannelMetricsError, match="labels must have the shape"):
        metrics.count(bad)
    # An evaluation before training, or an empty window, proves nothing.
    with metrics.evaluation("sanity", 0):
        metrics.count(batch(("a", 2, 1.0)))
    metrics.close(0)
    with pytest.raises(ChannelMetricsError, match="labels must have the shape"):
        metrics.count(bad)
    metrics.count(batch(("a", 2, 1.0)))
    metrics.close(1)
    metrics.count(bad)
    assert not metrics.measuring
    (record,) = caplog.records
    assert "off for the rest of this run, training goes on" in record.getMessage()
    metrics.count(batch(("a", 2, 1.0)))
    with metrics.evaluation("test", 2) as evaluation:
        metrics.count(batch(("a", 2, 1.0)))
    assert evaluation.logs == {} and metrics.close(2).values == {} and metrics.peek(2).logs == {}


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_on_error(on_error: Any, tmp_path: Path) -> None:
    metrics = new(on_error=on_error)
    if on_error == "warn":
        metrics.count(batch(("a", 2, 1.0), labels=torch.ones(3).long()))
        assert not metrics.measuring and metrics.close(1).values == {}
        metrics.save(tmp_path, is_writer=True)
        assert list(tmp_path.iterdir()) == []
        return
    metrics.count(batch(("a", 2, 1.0)))
    metrics.close(1)
    with pytest.raises(ChannelMetricsError):
        metrics.count(batch(("a", 2, 1.0), labels=torch.ones(3).long()))


# ---- other units --------------------------------------------------------------------------------


def test_units_other_than_tokens(caplog: pytest.LogCaptureFixture) -> None:
    schema = Schema("pairs", count="pairs")
    schema.register(
        Column("margin", "reward", ""),
        Column("pairs", "pairs", "", total=True),
        Metric("loss", ("margin", "pairs"), lambda s: ratio(s["margin"], s["pairs"])),
        Metric("tokens", ("pairs",), lambda s: s["pairs"], adds_up=True),
    )
    metrics = new("a", schema=schema)
    values = {"pairs": torch.ones(3), "margin": torch.tensor([1.0, 2.0, 3.0])}
    metrics.begin_step()
    metrics.add(["a", "b", "a"], values, ours=torch.tensor(6.0), theirs=torch.tensor(3.0))
    window = metrics.close(1)
    assert window.values == {"a": {"loss": 2.0, "tokens": 2.0}, "b": {"loss": 2.0, "tokens": 1.0}}
    assert window.columns == ("margin", "pairs")
    assert metrics.totals.of("a") == {"pairs_total": 2}
    assert "5.0e-01" in caplog.text
    metrics.add([None], {"pairs": torch.ones(1)})
    metrics.close(2)
    assert "all pairs count as 'unlabeled'" in caplog.text


@pytest.mark.parametrize("wrong", [{"theirs": 3.0}, {"theirs": torch.ones(2)}, {"ours": 3.0}])
def test_an_add_that_is_refused_adds_nothing(wrong: dict[str, Any]) -> None:
    schema = Schema("pairs", count="pairs")
    schema.register(
        Column("pairs", "pairs", ""), Metric("tokens", ("pairs",), lambda s: s["pairs"])
    )
    metrics = new("a", schema=schema)
    metrics.add(["a"], {"pairs": torch.ones(1)})
    sums = {"ours": torch.tensor(1.0), "theirs": torch.tensor(1.0)} | wrong
    with pytest.raises(ChannelMetricsError, match="must be a tensor of one number"):
        metrics.add(["a", "b"], {"pairs": torch.ones(2)}, **sums)
    assert metrics.close(1).values == {"a": {"tokens": 1.0}} and "b" not in metrics.labels


def test_ids_per_token_and_the_sequences_apart() -> None:
    metrics = new("a", "b", metrics=("tokens", "samples"))
    metrics.count(
        MicroBatch(
            token_losses=torch.ones(4),
            channels=torch.tensor([0, 0, 1, -1]),
            sequences=torch.tensor([0, 1]),
        )
    )
    assert metrics.close(1).values == {
        "a": {"tokens": 2.0, "samples": 1.0},
        "b": {"tokens": 1.0, "samples": 1.0},
        "unlabeled": {"tokens": 1.0, "samples": 0.0},
    }


@pytest.fixture(autouse=True)
def _warnings_are_seen(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="channel_metrics")


def test_another_default_device(tmp_path: Path) -> None:
    """What belongs on the host stays there, in a collective of one rank too."""
    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    losses, labels = torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.int64)
    torch.set_default_device("meta")
    try:
        metrics = ChannelMetrics(MetricsConfig(metrics=("loss", "tokens")))
        collate = metrics.collator(lambda _: {"labels": labels})
        assert collate([{"channel": "a"}, {"channel": "b"}])["channels"] == ["a", "b"]
        metrics.declare([{"channel": "a"}, {"channel": "b"}], "train")
        batch = metrics.collator(lambda _: {"labels": labels})([{"channel": "b"}, {"channel": "a"}])
        metrics.count(MicroBatch(token_losses=losses, channels=batch["channels"]))
        metrics.count(MicroBatch(token_losses=losses, channels=["new", None]))
        logs = metrics.close(1).logs
        assert metrics.close(2).values == {}
    finally:
        torch.set_default_device(None)
        dist.destroy_process_group()
    names = ("a", "b", "new", "unlabeled")
    assert logs == {f"{n}_{m}": v for n in names for m, v in (("loss", 1.0), ("tokens", 3.0))}


def test_class_labels_of_a_declared_dataset() -> None:
    """A collator without a dataset of its own has the names from `declare`."""
    features = Features(channel=ClassLabel(names=["web", "books"]))
    metrics = ChannelMetrics()
    metrics.declare(Dataset.from_dict({"channel": [1, 0, 1]}, features=features), "train")
    assert metrics.labels.names == ("books", "web")
    batch = {"labels": torch.zeros(2, 3, dtype=torch.int64)}
    found = metrics.collator(lambda _: batch)([{"channel": 0}, {"channel": 1}])
    assert found["channels"].tolist() == [1, 0]


def test_an_evaluation_on_the_training_data_is_no_training() -> None:
    """Trainers name the split by its prefix, and `train` is a usual one."""
    told: list[Window] = []
    metrics = ChannelMetrics(
        MetricsConfig(metrics=("tokens", "tokens_total")), on_window=[told.append]
    )
    batch = MicroBatch(token_losses=torch.ones(4), channels=["a"])
    metrics.count(batch)
    assert metrics.close(1).logs == {"a_tokens": 4, "a_tokens_total": 4}
    with metrics.evaluation("train", 1, "train_") as found:
        metrics.count(batch)
    assert found.logs == {"train_a_tokens": 4}
    assert [window.split for window in told] == ["train", "eval_train"]
    assert metrics.totals.of("a")["tokens_total"] == 4


def test_a_step_of_an_evaluation_that_is_run_again() -> None:
    """It counts once, and the training step around the evaluation stays as it is."""
    metrics = new("a", metrics=("tokens",))
    metrics.begin_step()
    metrics.count(batch(("a", 1, 1.0)))
    with metrics.evaluation("eval", 1) as found:
        for tokens in (2, 3):
            for _ in range(2):
                metrics.begin_step()
                metrics.count(batch(("a", tokens, 1.0)))
            metrics.end_step()
        metrics.begin_step()
        metrics.count(batch(("a", 5, 1.0)))
        metrics.end_step(discard=True)
        metrics.begin_step()
        metrics.count(batch(("a", 7, 1.0)))
    assert found.logs == {"eval_a_tokens": 2 + 3 + 7}
    assert metrics.close(1).logs == {"a_tokens": 1}


def test_a_checkpoint_has_no_step_that_is_still_open(tmp_path: Path) -> None:
    """A trainer may save before the optimizer has stepped, and take the step again."""
    metrics = ChannelMetrics(MetricsConfig(metrics=("tokens",)))
    batch = MicroBatch(token_losses=torch.ones(4), channels=["a"])
    metrics.begin_step()
    metrics.count(batch)
    metrics.end_step()
    metrics.begin_step()
    metrics.count(batch)
    metrics.save(tmp_path, is_writer=True)
    stored = json.loads((tmp_path / "channel_metrics.json").read_text())
    assert stored["channels"]["a"]["tokens_total"] == 4
    metrics.end_step()
    assert metrics.close(2).logs == {"a_tokens": 8}
