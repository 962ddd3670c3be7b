"""`ChannelMetrics`: windows, steps and observers of one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from no_sync import NoSync
from session_tools import Seen, batch, new, tokens

from channel_metrics import ChannelMetricsError, MetricsConfig
from channel_metrics.core.micro_batch import MicroBatch
from channel_metrics.core.schema import Column, Metric, Schema, ratio
from channel_metrics.session import ChannelMetrics
from channel_metrics.windows import Window


class Display:
    is_display = True

    def __init__(self) -> None:
        self.called = 0

    def __call__(self, window: Window) -> None:
        self.called += 1
        raise ZeroDivisionError("no screen")


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


def test_a_step_without_a_beginning_cannot_be_dropped() -> None:
    metrics = new()
    metrics.count(batch(("a", 1, 1.0)))
    with pytest.raises(ChannelMetricsError, match=r"needs begin_step\(\) before the step"):
        metrics.end_step(discard=True)


def test_the_end_of_a_step_waits_for_no_device() -> None:
    metrics = new("a")
    for _ in range(2):
        metrics.begin_step()
        ids = torch.zeros(1, dtype=torch.int64, device="meta")
        with NoSync():
            metrics.count(MicroBatch(token_losses=torch.ones(1, 2, device="meta"), channels=ids))
            metrics.end_step()


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


def test_observers_are_told_once_of_each_window() -> None:
    seen, other = Seen(), Seen()
    metrics = new(on_window=[seen])
    metrics.on_window.append(other)
    metrics.count(batch(("a", 1, 1.0)))
    windows: list[Window | None] = [metrics.close(1)]
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
