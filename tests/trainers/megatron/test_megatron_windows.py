"""Windows of loops of one's own that lie, die, and leave channels out; two real processes."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron_tools import on_two
from rank_cases import RanksOf
from said import warnings_of_ours

COUNTS = ("_tokens", "_samples")


@contextmanager
def told() -> Iterator[list[str]]:
    """What the library says, by its logger and, at the end, by warnings."""
    with warnings_of_ours() as found, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    found += [str(warning.message) for warning in caught]


@on_two
def lie(folder: Path) -> dict[str, Any]:
    """First an honest window; then two in which rank 1 reports too much."""
    from megatron_loop import RoughLoop, start

    start()
    loop = RoughLoop()
    with told() as honest:
        loop.window()
    if dist.get_rank() == 1:
        loop.lie = 1.01
    with told() as lying:
        windows = [loop.window(), loop.window()]
    return {"honest": honest, "lying": lying, "windows": windows}


@on_two
def evaluation(folder: Path) -> dict[str, Any]:
    """In the middle of a training window: one that dies, and one that ends with a pass whose
    losses are not asked for."""
    from megatron_loop import EvaluationDied, RoughLoop, new_metrics, start

    start()
    loop = RoughLoop()
    loop.run(loop.forward_step)
    train, of_train = loop.metrics, loop.seen
    loop.metrics, loop.seen, loop.dies_at = new_metrics(), [], 1
    loop.metrics.begin_step()
    with torch.no_grad():
        try:
            loop.pass_over(7, forward_only=True)
        except EvaluationDied:
            died = len(loop.seen)
        loop.seen, loop.dies_at = [], -1
        loop.metrics.begin_step()
        loop.pass_over(8, forward_only=True)
        outputs = loop.pass_over(9, forward_only=True, collect_non_loss_data=True)
    evaluated = loop.metrics.compute(), loop.naive()
    loop.metrics, loop.seen = train, of_train
    return {
        "died": died,
        "outputs": len(outputs),
        "eval": evaluated,
        "train": loop.window(),
    }


@on_two
def totals(folder: Path) -> list[Any]:
    """Three windows; the second has no lvis."""
    from megatron_loop import NAMES, RoughLoop, start

    start()
    loop = RoughLoop()
    found = []
    for without_lvis in (False, True, False):
        loop.channels = (
            (lambda ids: ids.masked_fill(ids == NAMES.index("lvis"), 0)) if without_lvis else None
        )
        found.append(loop.window())
    return found


@on_two
def unlabeled(folder: Path) -> list[str]:
    from megatron_loop import RoughLoop, start

    start()
    loop = RoughLoop()
    loop.channels = lambda ids: torch.full_like(ids, -1)
    with told() as found:
        loop.window()
    return found


@on_two
def without_reference(folder: Path) -> dict[str, Any]:
    from megatron_loop import NAMES, RoughLoop, start

    from channel_metrics import MetricsConfig
    from channel_metrics.trainers.megatron.counting import MegatronChannelMetrics

    start()
    loop = RoughLoop()
    loop.metrics = MegatronChannelMetrics(NAMES, config=MetricsConfig(metrics=("excess_loss",)))
    with told() as found:
        windows = [loop.window(), loop.window()]
    return {"told": found, "windows": windows}


@on_two
def peek(folder: Path) -> dict[str, Any]:
    """Values in the middle of a window, which goes on."""
    from megatron_loop import RoughLoop, start

    start()
    loop = RoughLoop()
    loop.run(loop.forward_step)
    seen = list(loop.seen)
    middle = loop.metrics.compute(reset=False), loop.naive()
    loop.seen = seen
    return {"middle": middle, "end": loop.window()}


def check(values: dict[str, float], wanted: dict[str, float]) -> None:
    """All but the totals."""
    assert len(wanted) == 5 * 4
    found = {key: value for key, value in values.items() if not key.endswith("_total")}
    assert found == pytest.approx(wanted, rel=1e-6)


def test_a_loss_function_that_lies_is_told_once(ranks_of: RanksOf) -> None:
    """On one of two ranks, by one per cent; the values are those of the tokens all the same."""
    honest, lying = (
        ["".join(rank[kind]).count("do not add up") for rank in ranks_of(lie)]
        for kind in ("honest", "lying")
    )
    assert max(honest) == 0 and max(lying) == 1
    for rank in ranks_of(lie):
        for values, wanted in rank["windows"]:
            check(values, wanted)


def test_an_evaluation_that_dies_leaves_nothing(ranks_of: RanksOf) -> None:
    """Nor does a pass for data other than losses."""
    for rank in ranks_of(evaluation):
        assert rank["died"] == 1 and rank["outputs"] == 2
        check(*rank["eval"])
        check(*rank["train"])


def test_totals_go_on_after_a_window_without_the_channel(ranks_of: RanksOf) -> None:
    for rank in ranks_of(totals):
        so_far: Counter[str] = Counter()
        for values, wanted in rank:
            present = {key: int(n) for key, n in wanted.items() if key.endswith(COUNTS)}
            so_far.update(present)
            assert {key: values[f"{key}_total"] for key in present} == {
                key: so_far[key] for key in present
            }
        assert ["lvis_tokens" in wanted for _, wanted in rank] == [True, False, True]


def test_a_channel_that_is_absent_has_no_total(ranks_of: RanksOf) -> None:
    values, wanted = ranks_of(totals)[0][1]
    found = {key for key in values if key.endswith("_total")}
    assert found == {f"{key}_total" for key in wanted if key.endswith(COUNTS)}


def test_a_window_without_any_channel_is_told(ranks_of: RanksOf) -> None:
    said = [message for rank in ranks_of(unlabeled) for message in rank]
    assert any("all tokens" in message and "unlabeled" in message for message in said)


def test_values_in_the_middle_of_a_window_count_nothing_twice(ranks_of: RanksOf) -> None:
    for rank in ranks_of(peek):
        values, wanted = rank["middle"]
        ratios = {key: n for key, n in wanted.items() if not key.endswith(COUNTS)}
        assert {key: values[key] for key in ratios} == pytest.approx(ratios, rel=1e-6)
        check(*rank["end"])
        values, wanted = rank["end"]
        counts = {key: n for key, n in wanted.items() if key.endswith(COUNTS)}
        assert {key: values[f"{key}_total"] for key in counts} == counts


def test_excess_loss_is_absent_and_said_so_once(ranks_of: RanksOf) -> None:
    """The batches of Megatron have no numbers of a reference model."""
    for of_rank in ranks_of(without_reference):
        assert not any("excess" in key for values, _ in of_rank["windows"] for key in values)
        (said,) = (text for text in of_rank["told"] if "excess" in text)
        assert said.startswith("excess_loss needs `ref_nll`")
