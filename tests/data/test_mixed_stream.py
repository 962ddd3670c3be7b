"""The draws of a `MixedStream`: by the weights, and the same with any workers and ranks."""

from __future__ import annotations

import multiprocessing
import pickle
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
from torch.utils.data import DataLoader

from channel_metrics import ConfigError
from channel_metrics.data.mixed_stream import MixedStream

SOURCES = {name: [{"id": f"{name}{i}"} for i in range(10)] for name in "abc"}
START = [(0, [0.5, 0.3, 0.2])]


def stream(entries: Any = None, position: int = 0, counts: Any = (0, 0, 0), **options: Any) -> Any:
    made = MixedStream(SOURCES, **{"batch_size": 4, "lag": 32, **options})
    made.plan.begin(list(entries or START), position, counts)
    return made


def taken(made: Any, count: int) -> list[str]:
    return [record["id"] for record in islice(made, count)]


def first(records: list[dict[str, Any]]) -> list[str]:
    return [record["id"] for record in records]


def batches(made: MixedStream, workers: int, **options: Any) -> Iterator[list[str]]:
    # No function of this file: a worker would import the file.
    return map(first, DataLoader(made, 4, num_workers=workers, collate_fn=list, **options))


def test_draws_follow_the_weights_and_the_seed() -> None:
    found = list(islice(stream(), 10_000))
    counts = Counter(record["channel"] for record in found)
    # 4 standard deviations of the multinomial.
    for name, weight in zip("abc", START[0][1], strict=True):
        assert abs(counts[name] - 10_000 * weight) < 4 * (10_000 * weight * (1 - weight)) ** 0.5
    assert taken(stream(), 50) == taken(stream(), 50) == first(found[:50])
    assert taken(stream(seed=1), 50) != first(found[:50])


def test_each_record_once_before_one_comes_again() -> None:
    of_a = [name for name in taken(stream(), 200) if name[0] == "a"]
    turns = [of_a[i : i + 10] for i in range(0, len(of_a) - 9, 10)]
    assert len(turns) > 5 and all(len({*turn}) == 10 for turn in turns)
    assert turns[0] != turns[1], "in another order"
    of_b = [name for name in taken(stream(), 200) if name[0] == "b"][:10]
    assert [name[1] for name in of_b] != [name[1] for name in turns[0]], "of each source"


@pytest.mark.parametrize("start", ["fork", "forkserver"])
def test_workers_change_nothing(start: str) -> None:
    """Workers that share the memory of this process, and workers that get a pickled stream."""
    context = multiprocessing.get_context(start)
    context.set_forkserver_preload(["torch"])  # imported once for all workers
    alone = batches(stream(), 0)
    several = batches(stream(), 2, multiprocessing_context=context)
    for _ in range(9):
        assert next(alone) == next(several)


def test_ranks_together_are_one_sequence() -> None:
    """Two ranks with one worker each, and with none: 8 draws per step, 4 for each rank."""
    whole = taken(stream(), 48)
    for workers in (0, 2):
        ranks = [batches(stream(rank=rank, ranks=2), workers) for rank in range(2)]
        found = [name for _ in range(6) for rank in ranks for name in next(rank)]
        assert found == whole


def test_a_change_holds_from_its_draw_on() -> None:
    changed = [*START, (37, [0.0, 0.0, 1.0])]
    found = taken(stream(changed), 100)
    assert found[:37] == taken(stream(), 37)
    assert {name[0] for name in found[37:]} == {"c"}


def test_a_running_iteration_sees_changes() -> None:
    for workers in (0, 2):
        made = stream()
        loader = batches(made, workers)
        seen = next(loader)
        made.plan.change(40, [0.0, 0.0, 1.0])
        seen += [name for _ in range(19) for name in next(loader)]
        assert seen == taken(stream([*START, (40, [0.0, 0.0, 1.0])]), 80), workers
        assert int(made.plan.drawn.max()) >= 80


@pytest.mark.parametrize("position", [1, 36, 40, 257])
def test_an_iteration_goes_on_in_the_middle(position: int) -> None:
    entries = [*START, (39, [0.1, 0.1, 0.8])]
    whole = taken(stream(entries), 400)
    counts = [sum(name[0] == channel for name in whole[:position]) for channel in "abc"]
    rest = stream(entries, position, counts)
    rest.plan.move(position, counts)
    assert taken(rest, 100) == whole[position : position + 100]
    # The numbers of the next draws are known in each worker.
    loader = batches(rest, 2)
    assert [n for _ in range(6) for n in next(loader)] == whole[position : position + 24]


def test_sources_and_records() -> None:
    from datasets import Dataset

    made = MixedStream({"a": Dataset.from_list(SOURCES["a"])}, field="")
    made.plan.begin([(0, [1.0])], 0, [0])
    assert next(iter(made)).keys() == {"id"}
    made = MixedStream({"a": [{"id": 1, "source": "x"}]}, field="source")
    made.plan.begin([(0, [1.0])], 0, [0])
    assert next(iter(made)) == {"id": 1, "source": "a"}
    assert "channel" not in SOURCES["a"][0]
    assert taken(pickle.loads(pickle.dumps(stream())), 9) == taken(stream(), 9)


def said_by_a_worker(made: MixedStream) -> str:
    """The error of a worker."""
    try:
        next(batches(made, 2))
    except ConfigError as error:
        # It would keep the loader for the garbage collector, which waits 10 s for the workers.
        error.__traceback__ = None
        return str(error)
    return ""


def test_wrong_arguments() -> None:
    with pytest.raises(ConfigError, match="source 'a' must have a length and be indexed"):
        MixedStream({"a": iter(())})
    with pytest.raises(ConfigError, match="source 'a' has no records"):
        MixedStream({"a": []})
    arguments: list[dict[str, Any]] = [{"batch_size": 0}, {"lag": -1}, {"rank": 1}]
    for wrong in arguments:
        with pytest.raises(ConfigError, match="batch_size must be 1 or more, lag 0 or more"):
            MixedStream(SOURCES, **wrong)
    assert "at least prefetch_factor * 2 batches of 4 records" in said_by_a_worker(stream(lag=7))
    assert next(batches(stream(lag=8), 2, prefetch_factor=1))
    alone = iter(MixedStream(SOURCES))
    assert next(alone)["channel"] == "a", "some trainers look at the first record"
    with pytest.raises(ConfigError, match=r"call stream\.follow\(metrics\) before"):
        next(alone)
