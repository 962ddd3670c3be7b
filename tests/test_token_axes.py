"""The axes `position` and `length`: loss by place in the sequence, in every layout of a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import Batch, bucket, reference_token_axis
from session_tools import batch, new

from channel_metrics import ChannelMetrics, ConfigError, MetricsConfig
from channel_metrics.core.micro_batch import MicroBatch
from channel_metrics.core.places import bucket_name, buckets, places
from channel_metrics.core.schema import Column, Metric, Schema

AXES = {"position": {"by": "position"}, "size": {"by": "length"}}
METRICS = ("loss", "tokens", "share", "token_acc", "weighted_loss", "samples", "loss_se")


@dataclass
class Layout:
    """One micro-batch: as many rows, sequences of these lengths in each, and pads around them.

    before, after: pads of each row. supervised: per token of the flattened rows.
    """

    rows: list[list[int]]
    before: list[int]
    after: list[int]

    @property
    def width(self) -> int:
        used = zip(self.before, self.rows, self.after, strict=True)
        return max(b + sum(row) + a for b, row, a in used)

    @property
    def bounds(self) -> list[int]:
        """Rows with one sequence are one sequence, with their pads. Others have pads after them."""
        found = [0]
        for number, row in enumerate(self.rows):
            if len(row) == 1:
                found.append((number + 1) * self.width)
            else:
                for length in row:
                    found.append(found[-1] + length)
        return found

    @property
    def pads(self) -> frozenset[int]:
        kept: set[int] = set()
        for number, (before, row) in enumerate(zip(self.before, self.rows, strict=True)):
            start = number * self.width + before
            kept |= set(range(start, start + sum(row)))
        return frozenset(set(range(len(self.rows) * self.width)) - kept)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Rows of one sequence each, with pads on both sides, or one row of several sequences."""
    if draw(st.booleans()):
        return Layout([draw(st.lists(st.integers(0, 9), min_size=2, max_size=5))], [0], [2])
    rows = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    pads = [draw(st.integers(0, 3)) for _ in range(2 * len(rows))]
    return Layout([[length] for length in rows], pads[: len(rows)], pads[len(rows) :])


@given(st.lists(layouts(), min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_values_are_those_of_the_naive_loop(all_layouts: list[Layout], random: Any) -> None:
    metrics, wanted = new(metrics=METRICS, axes=AXES), []
    for layout in all_layouts:
        size, bounds, pads = len(layout.rows) * layout.width, layout.bounds, layout.pads
        one = Batch(
            losses=[random.choice([0.5, 1.0, 2.25, math.nan]) for _ in range(size)],
            channels=["a"] * (len(bounds) - 1),
            bounds=bounds,
            loss_mask=[float(at not in pads and random.random() < 0.7) for at in range(size)],
            correct=[random.random() < 0.5 for _ in range(size)],
            weights=[random.choice([0.5, 1.0]) for _ in range(size)],
            pads=pads,
        )
        wanted.append(one)
        metrics.count(micro_batch(layout, one))
    window = metrics.close(1)
    for axis, by in (("position", "position"), ("size", "length")):
        found, of_axis = window.axes.get(axis, {}), reference_token_axis(wanted, by)
        assert found.keys() == of_axis.keys()
        for label, values in found.items():
            naive = {m: v for m, v in of_axis[label].items() if m in (*METRICS[:5], "nonfinite")}
            assert values == pytest.approx(naive, rel=1e-9)
        assert sum(v["share"] for v in found.values()) == pytest.approx(1 if found else 0)


def micro_batch(layout: Layout, one: Batch) -> MicroBatch:
    shape = torch.Size([len(layout.rows), layout.width])
    keep = torch.tensor([at not in one.pads for at in range(shape.numel())]).view(shape)
    packed = len(layout.rows[0]) > 1
    bounds = torch.tensor(one.bounds, dtype=torch.int32) if packed else None
    losses = torch.tensor(one.losses).view(shape)
    return MicroBatch(
        token_losses=losses,
        channels=list(one.channels),
        cu_seqlens=bounds,
        loss_mask=torch.tensor(one.loss_mask).view(shape),
        correct=torch.tensor(one.correct).view(shape),
        weights=torch.tensor(one.weights).view(shape),
        # Without pads, the session finds the places itself.
        places=None if keep.all() else places(shape, bounds, keep, losses),
    )


@given(st.integers(0, 2**22))
def test_buckets(number: int) -> None:
    assert bucket_name(int(buckets(torch.tensor(number)))) == bucket(number)


def test_the_bounds_of_buckets() -> None:
    powers = [2**e + d for e in range(1, 21) for d in (-1, 0, 1)]
    names = [bucket_name(int(n)) for n in buckets(torch.tensor([0, *powers]))]
    assert names == [bucket(number) for number in (0, *powers)]
    assert sorted(set(names)) == list(dict.fromkeys(sorted(names)))
    assert int(buckets(torch.tensor(-1))) == -1


def test_channels_are_as_without_the_axes() -> None:
    """No other value changes: channels, labels of records, crosses, and their totals."""
    more: dict[str, Any] = {"metrics": (*METRICS, "tokens_total", "samples_total"), "tree": 1}
    lang = {"lang": {"b/c": "en"}}
    plain, both = new(axes=lang, **more), new(axes={**lang, **AXES}, **more)
    for metrics in (plain, both):
        metrics.count(batch(("b/c", 3, 1.0), ("a", 5, 2.0), (None, 2, 4.0)))
        metrics.end_step()
    without, window = plain.close(1), both.close(1)
    assert window.values == without.values
    of_tokens = {axis: window.axes[axis] for axis in AXES}
    assert {**without.axes, **of_tokens} == window.axes
    assert window.logs.keys() >= without.logs.keys()
    assert of_tokens["size"] == {
        "0000002-0000003": {"loss": 11 / 5, "tokens": 5, "share": 0.5, "tokens_total": 5},
        "0000004-0000007": {"loss": 2.0, "tokens": 5, "share": 0.5, "tokens_total": 5},
    }
    assert window.logs["position/0000004-0000007_tokens"] == 1


def test_steps_evaluations_and_states() -> None:
    metrics = new(axes=AXES)
    metrics.begin_step()
    metrics.count(batch(("a", 4, 1.0)))
    metrics.begin_step()  # again
    metrics.count(batch(("a", 2, 1.0)))
    metrics.end_step()
    with metrics.evaluation("eval", 1) as found:
        metrics.count(batch(("a", 1, 3.0)))
    assert found.logs["eval_position/0000000_loss"] == 3.0
    later = new(axes=AXES)
    later.load_state_dict(metrics.state_dict())
    assert later.close(1).axes["size"] == {"0000002-0000003": {"loss": 1.0, "tokens": 2}}


def test_an_id_per_token_shows_no_places(caplog: pytest.LogCaptureFixture) -> None:
    metrics = new("a", axes=AXES)
    for _ in range(2):
        metrics.count(MicroBatch(token_losses=torch.ones(2, 3), channels=torch.zeros(2, 3).long()))
    window = metrics.close(1)
    assert window.values["a"]["tokens"] == 12 and not window.axes
    assert len(caplog.records) == 1 and "position, size are left out" in caplog.text


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"where": {"by": "place"}}, "axes.where must be {by: position}, {by: length}, {by: c"),
        ({"where": {"by": "position", "a": "b"}}, "axes.where must be {by: position}"),
        ({"role": {"by": "column"}}, "{by: column, field: ...,"),
        ({"role": {"by": "column", "field": "r", "labels": []}}, "labels must list up to 254"),
        ({"role": {"by": "column", "field": "r", "labels": {0: 1}}}, "or map the entries of 'r'"),
        ({f"a{i}": {"by": "column", "field": "r"} for i in range(8)}, "axes may hold 7 axes by"),
        ({"kind": {"by": "modality", "labels": {}}}, "axes.kind.labels must map names to token"),
        ({"kind": {"by": "modality", "labels": {"a": [1, -1]}}}, "must hold token ids from 0 on"),
        ({"kind": {"by": "modality", "labels": {"a": 1, "b": 1}}}, "each once, but is"),
    ],
)
def test_wrong_settings(axes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MetricsConfig(axes=axes)


def test_an_axis_of_tokens_cannot_be_crossed() -> None:
    with pytest.raises(ConfigError, match="cross names the axis 'position'"):
        MetricsConfig(axes=AXES, cross=(("channel", "position"),))


def test_a_trainer_of_pairs_has_no_tokens() -> None:
    pairs = Schema("pairs", "pairs", [Column("pairs", "pairs", "all")], [Metric("loss", (), id)])
    with pytest.raises(ConfigError, match="single tokens, but this trainer counts pairs"):
        ChannelMetrics(MetricsConfig(metrics=("loss",), axes=AXES), schema=pairs)
