"""The setting `sampler` in ms-swift, whose pipeline prepares the data."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from rank_cases import Case, RanksOf, case
from swift_files import CHANNELS, given, ranks_given, shared_data
from swift_tools import SWIFT, needs_swift, run

from channel_metrics import ConfigError, MetricsConfig, MixedStream

pytestmark = needs_swift

ROWS, STEPS = 4, 8
SAMPLER: dict[str, Any] = {
    "start": dict.fromkeys(CHANNELS, 1),
    "rule": "test_swift_sampler:by_step",
}
CONFIG = MetricsConfig(channels=CHANNELS, metrics=("loss", "samples"), sampler=SAMPLER)
ENDS = ("_weight", "_samples")


def by_step(window: Any, weights: dict[str, float]) -> dict[str, float]:
    return {"bbu": 1.0, "rru": 2.0 + window.step, "lvis": 1.0, "lang_chat": weights["bbu"]}


def trained(arguments: dict[str, Any], config: MetricsConfig = CONFIG) -> Any:
    """The weights and samples of each window, {source: its records}, and the lag."""
    trainer = run(arguments, config)["trainer"]
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    stream = trainer.train_dataset
    sizes = {name: len(part) for name, part in stream.sources.items()}
    return [{k: v for k, v in e.items() if k.endswith(ENDS)} for e in logs], sizes, stream.lag


OPTIONS: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": ROWS,
    "gradient_accumulation_steps": 1,
    "enable_channel_loss": False,
}


@case(SWIFT, ranks=1)
def alone(folder: Path) -> Any:
    return trained(given(folder, **OPTIONS))


@case(SWIFT, ranks=1)
def with_a_worker(folder: Path) -> Any:
    return trained(given(folder, **OPTIONS, dataloader_num_workers=2))


@case(SWIFT, ranks=1)
def with_all_that_travels(folder: Path) -> Any:
    """Axes, and ids and losses of a reference: names of channels hold more than the channel. Some
    records are too long, and ms-swift takes others for them."""
    lines = shared_data(folder)["plain"].read_text().splitlines()
    data = folder.parent / "carried.jsonl"
    with data.open("w") as file:
        for number, record in enumerate(map(json.loads, lines)):
            record |= {"domain": "xyz"[number % 3], "id": f"r{number}"}
            record |= {"ref_nll": 1.0 * number, "ref_tokens": 3}
            if number % 5 == 0:
                record["messages"][0]["content"] += 300 * "long"
            file.write(json.dumps(record) + "\n")
    config = replace(
        CONFIG,
        metrics=("loss", "samples", "excess_loss"),
        axes={"domain": "domain"},
        outliers={"folder": str(folder / "outliers"), "count": 1, "id_field": "id"},
    )
    options = OPTIONS | {"dataset": [str(data)], "max_length": 300, "lazy_tokenize": True}
    found = trained(given(folder, **options), config)
    written = (folder / "outliers" / "rank0.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in data.read_text().splitlines()]
    channels = {record["id"]: record["channel"] for record in records}
    domains = sum(log.get(f"domain/{domain}_samples", 0) for log in found[0] for domain in "xyz")
    return *found, channels, [json.loads(line) for line in written], domains


@case(SWIFT, ranks=1)
def resumed(folder: Path) -> Any:
    whole = trained(given(folder, **OPTIONS, save_strategy="steps", save_steps=5))
    checkpoint = folder / "checkpoint-5"
    again = folder.parent / f"{folder.name}_again"
    return whole, trained(given(again, **OPTIONS, resume_from_checkpoint=str(checkpoint)))


@case(SWIFT, ranks=1)
def refused(folder: Path) -> Any:
    with pytest.raises(ConfigError) as packed:
        trained(given(folder, **OPTIONS, packing=True))
    with pytest.raises(ConfigError) as streamed:
        trained(given(folder, **OPTIONS, streaming=True))
    return str(packed.value), str(streamed.value)


@case(SWIFT, ranks=2)
def on_ranks(folder: Path) -> Any:
    return trained(ranks_given(folder, **OPTIONS))


@case(SWIFT, ranks=2)
def on_ranks_with_a_worker(folder: Path) -> Any:
    return trained(ranks_given(folder, **OPTIONS, dataloader_num_workers=1))


def check_draws(logs: Any, sizes: dict[str, int], lag: int, ranks: int) -> None:
    per_step = ROWS * ranks
    # In the order in which ms-swift has met the channels.
    made = MixedStream(
        {name: [{}] * size for name, size in sizes.items()}, seed=42, batch_size=per_step
    )
    weights = dict.fromkeys(sizes, 0.25)
    entries = [(0, [*weights.values()])]
    for step, log in enumerate(logs, start=1):
        scores = {"bbu": 1.0, "rru": 2.0 + step, "lvis": 1.0, "lang_chat": weights["bbu"]}
        weights = {name: scores[name] / sum(scores.values()) for name in sizes}
        assert sum(log.get(f"{name}_samples", 0) for name in CHANNELS) == per_step
        entries.append((step * per_step + lag, [*weights.values()]))
    made.plan.begin(entries, 0, [0] * len(CHANNELS))
    drawn = iter(made)
    for log in logs:
        counts = Counter(record["channel"] for record in islice(drawn, per_step))
        assert {n: counts[n] for n in CHANNELS} == {n: log.get(f"{n}_samples", 0) for n in CHANNELS}
    assert logs[-1]["rru_weight"] > 0.5


@pytest.mark.parametrize(
    ("of", "ranks", "lag"),
    [
        (alone, 1, 0),
        # For a stream, ms-swift takes one worker, which is two batches ahead.
        (with_a_worker, 1, 2 * ROWS),
        (on_ranks, 2, 0),
        (on_ranks_with_a_worker, 2, 2 * 2 * ROWS),
    ],
)
def test_the_weights_are_followed(ranks_of: RanksOf, of: Case, ranks: int, lag: int) -> None:
    (logs, sizes, its_lag), *others = ranks_of(of)
    assert all(other[0] == logs for other in others) and len(logs) == STEPS
    assert its_lag == lag
    check_draws(logs, sizes, lag, ranks)


def test_what_travels_with_the_channels_stays(ranks_of: RanksOf) -> None:
    ((logs, sizes, lag, channels, outliers, domains),) = ranks_of(with_all_that_travels)
    # Records that are too long are replaced by others of their channel.
    check_draws([{k: v for k, v in log.items() if "/" not in k} for log in logs], sizes, lag, 1)
    assert domains == STEPS * ROWS
    assert outliers and all(channels[one["id"]] == one["channel"] for one in outliers)


def test_resume_goes_on_with_the_draw(ranks_of: RanksOf) -> None:
    ((whole, again),) = ranks_of(resumed)
    logs, sizes, lag = whole
    assert again[0][-3:] == logs[-3:] and len(logs) == STEPS
    check_draws(logs, sizes, lag, 1)


def test_records_without_an_index_are_refused(ranks_of: RanksOf) -> None:
    ((packed, streamed),) = ranks_of(refused)
    assert "but ms-swift has made a PackingDataset; leave out streaming, packing" in packed
    assert "but ms-swift has made a IterableDataset" in streamed
