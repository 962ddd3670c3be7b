"""The setting `sampler`: weights that follow from windows, and a stream that follows them."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from session_tools import new
from torch.utils.data import DataLoader

from channel_metrics import (
    ChannelMetrics,
    ChannelMetricsError,
    ConfigError,
    MetricsConfig,
    MicroBatch,
    MixedStream,
)
from channel_metrics.analysis.readers.keys import decode_keys
from channel_metrics.core.schema import Column, Schema
from channel_metrics.data.weights import followed, speed

LOSSES = {"a": 1.0, "b": 3.0}
START = {"a": 1, "b": 1}
SIZE = 4


def stream(**options: Any) -> MixedStream:
    sources = {name: [{"id": f"{name}{i}"} for i in range(50)] for name in LOSSES}
    return MixedStream(sources, **{"batch_size": SIZE, **options})


def session(**sampler: Any) -> ChannelMetrics:
    return new(metrics=("loss", "samples"), sampler={"start": START, **sampler})


def trained(
    metrics: ChannelMetrics,
    made: MixedStream,
    steps: range,
    *,
    workers: int = 0,
    losses: Any = LOSSES.__getitem__,
) -> tuple[list[list[str]], list[dict[str, float]]]:
    """A loop of one's own, with a window per step: the ids of each batch, and the logs."""
    made.follow(metrics)
    loader = iter(
        DataLoader(made, batch_size=SIZE, num_workers=workers, collate_fn=lambda records: records)
    )
    ids, logs = [], []
    for step in steps:
        records = next(loader)
        ids.append([record["id"] for record in records])
        channels = [record["channel"] for record in records]
        token_losses = torch.tensor([[losses(name)] for name in channels])
        metrics.count(MicroBatch(token_losses=token_losses, channels=channels))
        logs.append(metrics.close(step).logs)
    return ids, logs


def weights(logs: list[dict[str, float]]) -> list[float]:
    return [log["b_weight"] for log in logs]


def test_weights_are_proportional_to_losses() -> None:
    ids, logs = trained(session(), stream(), range(20))
    # The weights of a window are those that its records were drawn with.
    assert weights(logs) == pytest.approx([0.5] + [0.75] * 19)
    assert all(log["a_weight"] + log["b_weight"] == pytest.approx(1) for log in logs)
    shares = sum(name[0] == "b" for batch in ids[1:] for name in batch) / (19 * SIZE)
    assert abs(shares - 0.75) < 4 * (0.75 * 0.25 / (19 * SIZE)) ** 0.5


def test_smoothing_bounds_warmup_and_start() -> None:
    smooth = weights(trained(session(smoothing=0.5, warmup=2), stream(), range(6))[1])
    # Until then a window had both channels.
    assert smooth[:3] == [0.5] * 3 and smooth[3] == pytest.approx(0.625)
    assert weights(trained(session(max=0.6), stream(), range(4))[1])[-1] == pytest.approx(0.6)
    low = session(start={"a": 1, "b": 99}, min=0.1)
    assert weights(trained(low, stream(), range(4))[1]) == pytest.approx([0.9] * 4)
    prior = session(start={"a": 3, "b": 1})
    assert weights(trained(prior, stream(seed=2), range(8))[1])[-1] == pytest.approx(0.5)
    fixed = weights(trained(session(rule="fixed"), stream(), range(5))[1])
    assert fixed == [0.5] * 5


def test_a_channel_that_is_absent_keeps_its_weight() -> None:
    seen = session()
    made = stream()
    made.follow(seen)
    loader = iter(made)
    next(loader)
    seen.count(MicroBatch(token_losses=torch.ones(1, 1), channels=["b"]))
    seen.close(1)
    assert made.plan.at(10**9) == [0.5, 0.5]


def test_excess_loss_with_a_reference() -> None:
    given = {"rule": "excess", "reference": {"a": 0.5, "b": 2.9}, "rate": 0.5}
    found = weights(trained(session(**given), stream(), range(3))[1])
    # exp(0.5 * 0.5) against exp(0.5 * 0.1), step by step, as far as both were in the window.
    one = 1 / (1 + 2.718281828**0.2)
    assert found[1] == pytest.approx(one)
    with pytest.raises(ConfigError, match="needs the losses of a reference model"):
        session(rule="excess")


def test_excess_loss_that_is_measured() -> None:
    """The metric of the window, with the losses of a reference model in the records."""
    references = {"a": {"ref_nll": 1.0, "ref_tokens": 2}, "b": {"ref_nll": 5.8, "ref_tokens": 2}}
    sources = {name: [{"ids": [1, 2, 3], **of}] * 9 for name, of in references.items()}
    metrics = new(metrics=("excess_loss",), sampler={"start": START, "rule": "excess"})
    made = MixedStream(sources, batch_size=8)
    made.follow(metrics)

    def base(records: Any) -> Any:
        ids = torch.tensor([record["ids"] for record in records])
        return {"input_ids": ids, "labels": ids}

    loader: Any = DataLoader(made, batch_size=8, collate_fn=metrics.collator(base))
    batch = next(iter(loader))
    losses = [[LOSSES[name]] * 2 for name in batch["channels"]]
    with metrics.observe(torch.nn.Module(), batch) as seen:
        seen.token_losses(torch.tensor(losses))
    window = metrics.close(1)
    excess = {name: values["excess_loss"] for name, values in window.values.items()}
    assert excess == pytest.approx({"a": 0.5, "b": 0.1})
    assert made.plan.at(8)[1] == pytest.approx(1 / (1 + math.exp(0.5 - 0.1)))


def test_learning_speed_prefers_what_still_falls() -> None:
    """`a` falls as a power law; `b` stays where it is."""
    metrics = session(rule="speed", min=0.1, smoothing=0.5)
    count = 0

    def losses(name: str) -> float:
        nonlocal count
        count += 1
        return 2.0 if name == "b" else 1 + 8 * count**-0.4

    _, logs = trained(metrics, stream(), range(30), losses=losses)
    assert weights(logs)[:3] == [0.5] * 3, "no curve yet"
    assert weights(logs)[-1] < 0.2
    points = metrics.totals.notes["sampler"]["points"]["a"]
    assert speed(points, 120.0) == pytest.approx(0.4 * 8 * 120**-1.4, rel=0.3)


def my_rule(window: Any, held: dict[str, float]) -> dict[str, float]:
    assert window.split == "train" and sum(held.values()) == pytest.approx(1)
    return {"a": 1.0, "b": 4.0} if window.step else {}


def test_a_function_of_a_user() -> None:
    for rule in (my_rule, "test_sampler:my_rule"):
        found = weights(trained(session(rule=rule), stream(), range(4))[1])
        assert found == pytest.approx([0.5, 0.5, 0.8, 0.8])
    for wrong in ({"c": 1.0}, {"a": -1.0}, {"a": float("nan")}, None):
        with pytest.raises(ConfigError, match="the rule of sampler must return"):
            trained(session(rule=lambda *_, w=wrong: w), stream(), range(1))
    with pytest.raises(ConfigError, match="rule of sampler names 'nowhere:rule', but that cannot"):
        session(rule="nowhere:rule")


@pytest.mark.parametrize("how", ["save", "state_dict"])
def test_resume_goes_on_with_the_draw(tmp_path: Path, how: str) -> None:
    options = {"rule": "speed", "smoothing": 0.3, "min": 0.05}
    whole_ids, whole_logs = trained(session(**options), stream(lag=16), range(20), workers=2)
    alone = trained(session(**options), stream(lag=16), range(20))
    assert alone == (whole_ids, whole_logs), "workers change nothing"
    first, second = session(**options), session(**options)
    ids, logs = trained(first, stream(lag=16), range(9), workers=2)
    if how == "save":
        first.save(tmp_path, is_writer=True)
        second.start(tmp_path)
    else:
        state = {"totals": first.state_dict()["totals"]}
        second.load_state_dict(json.loads(json.dumps(state)))
    more_ids, more_logs = trained(second, stream(lag=16), range(9, 20))
    assert ids + more_ids == whole_ids
    assert logs + more_logs == whole_logs


def test_a_change_arrives_after_the_lag_and_not_later() -> None:
    """With 2 workers that are 2 batches ahead: 4 batches after the window."""
    assert weights(trained(session(), stream(lag=16), range(7), workers=2)[1]) == pytest.approx(
        [0.5] * 5 + [0.75] * 2
    )


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 2), (2, 2), (2, 3)])
def test_how_far_workers_are_ahead(workers: int, prefetch: int) -> None:
    """Exactly prefetch_factor * num_workers batches, which a smaller lag would miss."""
    ahead = prefetch * workers * SIZE
    for lag in (ahead, ahead - 1):
        metrics, made = session(), stream(lag=lag)
        made.follow(metrics)
        options: Any = {"num_workers": workers, "prefetch_factor": prefetch}
        loader = iter(DataLoader(made, batch_size=SIZE, collate_fn=list, **options))
        for step in range(1, 4):
            channels = [record["channel"] for record in next(loader)]
            end = time.monotonic() + 60
            while int(made.plan.drawn.max()) < step * SIZE + ahead and time.monotonic() < end:
                time.sleep(0.01)
            time.sleep(0.05)  # for records that must not come
            assert int(made.plan.drawn.max()) == step * SIZE + ahead
            metrics.count(MicroBatch(token_losses=torch.ones(SIZE, 1), channels=channels))
            if lag < ahead:
                with pytest.raises(
                    ChannelMetricsError, match=f"is {lag}; make it at least {ahead}"
                ):
                    metrics.close(step)
                break
            metrics.close(step)


def test_other_channels_in_the_checkpoint(tmp_path: Path, caplog: Any) -> None:
    first = session()
    trained(first, stream(), range(3))
    first.save(tmp_path, is_writer=True)
    second = new(metrics=("loss",), sampler={"start": {"a": 1, "c": 1}})
    made = MixedStream({"a": [{"id": 1}], "c": [{"id": 2}]})
    made.follow(second)
    second.start(tmp_path)
    assert "weights of other channels; the weights begin anew" in caplog.text
    assert made.plan.entries == [(12, [0.5, 0.5])] and made.plan.counts[1] == 0
    second.start()
    assert made.plan.position == 0


def test_a_state_in_mid_window_is_said(caplog: Any) -> None:
    first = session()
    first.count(MicroBatch(token_losses=torch.ones(1, 1), channels=["b"]))
    session().load_state_dict(first.state_dict())
    assert "in the middle of a window" in caplog.text


def test_what_does_not_fit() -> None:
    pairs = Schema("pairs", "pairs", [Column("pairs", "pairs", "pairs", total=True)])
    with pytest.raises(ConfigError, match=r"but this trainer counts pairs \(pairs\); remove"):
        new(metrics=(), sampler={"start": START}, schema=pairs)
    metrics = session()
    metrics.count(MicroBatch(token_losses=torch.ones(1, 1), channels=["b"]))
    with pytest.raises(ConfigError, match="but no dataset follows it"):
        metrics.close(1)
    with pytest.raises(ConfigError, match="but no dataset follows it"):
        session().observe(torch.nn.Module(), {})
    with pytest.raises(ConfigError, match="does not have; add sampler"):
        stream().follow(new())
    with pytest.raises(ConfigError, match="must name the sources of the stream, a, b, but names"):
        stream().follow(session(start={"a": 1, "c": 1}))

    def counted(name: str, records: int, taken: int) -> None:
        metrics, made = session(), stream()
        made.follow(metrics)
        loader = iter(made)
        for _ in range(taken):
            next(loader)
        metrics.count(MicroBatch(token_losses=torch.ones(records, 1), channels=[name] * records))
        metrics.close(1)

    with pytest.raises(ConfigError, match="no record of a, b, the channels of sampler"):
        counted("x", 1, 1)
    with pytest.raises(ChannelMetricsError, match="9 records were trained on, but a MixedStream"):
        counted("a", 9, 5)
    counted("a", 8, 5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "sampler lacks a setting"),
        ({"start": {"a": 0}}, "'a' in start of sampler must be a number above 0"),
        ({"start": START, "rule": "los"}, "rule of sampler must be fixed, loss, excess, speed, or"),
        ({"start": START, "smoothing": 1}, "smoothing from 0 to below 1"),
        ({"start": START, "rate": 0}, "rate above 0"),
        ({"start": START, "min": 0.6}, "min must be at most 0.5, and max at least that"),
        ({"start": START, "max": 0.4}, "must allow 2 weights with the sum 1"),
        ({"start": START, "warmup": -1}, "warmup of sampler must be a whole number"),
        ({"start": START, "reference": {"a": 1}}, "must have the channels of start, a, b, but has"),
        ({"start": START, "rul": "loss"}, "unknown key 'rul' in sampler; did you mean 'rule'"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], said: str) -> None:
    if not settings:
        settings = {"rule": "loss"}
    with pytest.raises(ConfigError, match=said):
        ChannelMetrics(MetricsConfig.from_mapping({"sampler": settings}))


def test_readers_know_the_weights() -> None:
    assert decode_keys(["a_loss", "a_tokens", "a_weight"])["a_weight"].metric == "weight"
    assert followed({"a": 1.0}, {"a": 2.0}, smoothing=0.0, least=0.0, most=1.0) == {"a": 1.0}
