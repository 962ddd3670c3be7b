"""Excess loss over a reference model, from records to the window."""

from __future__ import annotations

import json
import logging
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from session_tools import batch, new

from channel_metrics import ChannelError, ChannelLossAccumulator, ConfigError, MetricsConfig
from channel_metrics.core.extremes import text_of_id
from channel_metrics.core.names import joint_name
from channel_metrics.core.sums import TokenValues
from channel_metrics.data.batch_channels import BatchChannels, take_channels
from channel_metrics.data.carried import (
    RECORD_IDS_KEY,
    Carried,
    split_carried,
    without_carried,
)
from channel_metrics.data.collator import ChannelCollator
from channel_metrics.data.collator_fault import CollatorFault
from channel_metrics.data.reference import REFERENCE_KEY, Reference, reference_of
from channel_metrics.data.repeats import first_records

METRICS = ("excess_loss",)
NAN = math.nan


def padded(records: list[Any]) -> dict[str, Any]:
    size = max(len(record["input_ids"]) for record in records)
    rows = [r["input_ids"] + [0] * (size - len(r["input_ids"])) for r in records]
    ones = [[1] * len(r["input_ids"]) + [0] * (size - len(r["input_ids"])) for r in records]
    ids, mask = torch.tensor(rows), torch.tensor(ones)
    assert not any("ref_nll" in record for record in records)  # the model must not see it
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask > 0, -100)}


def sorted_by_length(records: list[Any]) -> dict[str, Any]:
    return padded(sorted(records, key=lambda record: len(record["input_ids"])))


def flattened(records: list[Any]) -> dict[str, Any]:
    ids = [token for record in records for token in record["input_ids"]]
    starts = [i for record in records for i in range(len(record["input_ids"]))]
    labels = [-100 if at == 0 else token for token, at in zip(ids, starts, strict=True)]
    return {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([labels]),
        "position_ids": torch.tensor([starts]),
    }


RECORDS = [
    {"input_ids": [5, 6, 7], "channel": "a", "ref_nll": 0.1, "ref_tokens": 2},
    {"input_ids": [8, 9], "channel": "b", "ref_nll": 2.0, "ref_tokens": 1},
    {"input_ids": [1, 2, 3, 4], "channel": "a", "ref_nll": None, "ref_tokens": None},
    {"input_ids": [2, 3, 3, 4], "channel": "a", "ref_nll": 9.0, "ref_tokens": 3},
    {"input_ids": [4, 3, 4], "channel": None, "ref_nll": 1.0, "ref_tokens": 2},
]


@pytest.mark.parametrize("base", [padded, sorted_by_length, flattened])
@pytest.mark.parametrize("channels", [(), ("a", "b")])
def test_numbers_follow_their_sequences(base: Any, channels: tuple[str, ...]) -> None:
    """Padded, sorted by the collator, padding-free; with names and with ids. Each token has the
    loss 1, so excess is 2 - 0.1, 1 - 2.0, 3 - 9.0 and 2 - 1.0."""
    metrics = new(*channels, metrics=(*METRICS, "tokens"))
    found = metrics.collator(base)(RECORDS)
    assert found[REFERENCE_KEY].dtype == torch.int64
    with metrics.observe(torch.nn.Module(), found) as seen:
        labels = found["labels"]
        assert REFERENCE_KEY not in found
        seen.token_losses(torch.ones(labels.shape[0], labels.shape[1] - 1))
    window = metrics.close(1)
    assert window.logs == {
        "a_excess_loss": pytest.approx((2 - 0.1 + 3 - 9.0) / 5, abs=1e-15),
        "a_tokens": 8.0,
        "b_excess_loss": -1.0,  # not clipped
        "b_tokens": 1.0,
        "unlabeled_excess_loss": 0.5,
        "unlabeled_tokens": 2.0,
    }
    assert window.sums("a")["excess_unmatched"] == 1


def test_the_numbers_are_exact() -> None:
    """A model that is its own reference has no excess, to the last bit."""
    nll = math.pi * 1e3
    record = {"input_ids": [1, 2], "channel": "a", "ref_nll": nll, "ref_tokens": 1}
    metrics = new(metrics=METRICS)
    found = metrics.collator(padded)([record])
    taken = take_channels(found)
    assert isinstance(taken, BatchChannels) and taken.reference is not None
    assert taken.reference.tolist() == [[nll, 1.0]]


def test_other_tokens_are_left_out_and_told(caplog: pytest.LogCaptureFixture) -> None:
    """A record that is cut in training, one without numbers, one with a loss that is NaN."""
    metrics = new(metrics=METRICS)
    reference = torch.tensor([[1.0, 4], [NAN, NAN], [1.0, 2], [5.0, 2]], dtype=torch.float64)
    counts = batch(("a", 3, 1.0), ("a", 2, 1.0), ("b", 2, NAN), ("b", 2, 1.0))
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            metrics.count(replace(counts, reference=reference))
            logs = metrics.close(step).logs
            assert {k: v for k, v in logs.items() if "excess" in k} == {"b_excess_loss": -1.5}
    (said,) = [r.getMessage() for r in caplog.records if "excess" in r.getMessage()]
    assert said.endswith("2 of a, 1 of b of a window.")


def test_trainers_without_numbers_say_so_once(caplog: pytest.LogCaptureFixture) -> None:
    metrics = new(metrics=(*METRICS, "loss"))
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            metrics.count(batch(("a", 3, 1.0)))
            assert metrics.close(step).logs == {"a_loss": 1.0}
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("excess_loss needs `ref_nll`")


def test_parts_of_sequences_have_none() -> None:
    accumulator = ChannelLossAccumulator(["a"], metrics=METRICS)
    accumulator.update(torch.ones(1, 4), channels=torch.zeros(1, 4, dtype=torch.int64))
    assert accumulator.in_parts and accumulator.compute() == {}


def test_off_is_free() -> None:
    metrics = new(metrics=("loss",))
    assert reference_of(metrics.config) is None
    names = [name for name in metrics.close(1).columns if name.startswith("excess")]
    assert not names


def packs(records: list[Any]) -> dict[str, Any]:
    return flattened([{"input_ids": ids} for record in records for ids in record["parts"]])


def test_packs_list_one_of_each_per_sequence() -> None:
    record = {"parts": [[1, 2], [3, 4, 5]], "channel": ["a", "b"]}
    metrics = new(metrics=METRICS)
    collate = metrics.collator(packs)
    found = take_channels(collate([{**record, "ref_nll": [1.5, 2.5], "ref_tokens": [1, 2]}]))
    assert isinstance(found, BatchChannels) and found.reference is not None
    assert found.reference.tolist() == [[1.5, 1.0], [2.5, 2.0]]
    whole = take_channels(collate([{**record, "ref_nll": 4.0, "ref_tokens": 3}]))
    assert isinstance(whole, BatchChannels) and whole.reference is None
    wrong = take_channels(collate([{**record, "ref_nll": [1.0] * 3, "ref_tokens": [1] * 3}]))
    assert isinstance(wrong, CollatorFault)
    assert "a record of 2 sequences lists 3 `ref_nll`" in str(wrong.error)


def written(path: Path, *lines: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_a_table_by_id(tmp_path: Path) -> None:
    """The id may be nested, and a number in one of them and a string in the other."""
    path = written(
        tmp_path / "ref.jsonl",
        {"meta": {"id": "7"}, "ref_nll": 0.5, "ref_tokens": 2},
        {"meta": {"id": 8}, "ref_nll": 1.5, "ref_tokens": 2},
    )
    config = MetricsConfig(metrics=METRICS, reference=path, reference_id="meta.id")
    reference = reference_of(config)
    assert reference is not None and reference.roots == ("meta",) and not reference.own_fields
    collate = pickle.loads(pickle.dumps(ChannelCollator(padded, carried=Carried(reference))))
    records = [
        {"input_ids": [1, 2, 3], "channel": "a", "meta": {"id": number}} for number in (7, 9, "8")
    ]
    found = take_channels(collate(records))
    assert isinstance(found, BatchChannels) and found.reference is not None
    assert found.reference[0].tolist() == [0.5, 2] and found.reference[2].tolist() == [1.5, 2]
    assert found.reference[1].isnan().all()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"id": 1, "ref_nll": 1.0}], "cannot be read so"),
        ([{"ref_nll": 1.0, "ref_tokens": 1}], "expected one line per 'id', but this one has none"),
        ([{"id": 1, "ref_nll": n, "ref_tokens": 1} for n in (1.0, 2.0)], "1 again, with other"),
    ],
)
def test_a_table_is_checked(tmp_path: Path, lines: list[Any], message: str) -> None:
    path = written(tmp_path / f"{len(message)}.jsonl", *lines)
    with pytest.raises(ConfigError, match=message):
        reference_of(MetricsConfig(metrics=METRICS, reference=path))


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="reference needs 'excess_loss' among metrics"):
        MetricsConfig(reference="x.jsonl")
    with pytest.raises(ConfigError, match="cannot be read so"):
        reference_of(MetricsConfig(metrics=METRICS, reference="absent.jsonl"))
    accumulator = ChannelLossAccumulator(["a"], metrics=METRICS)
    with pytest.raises(ChannelError, match=r"reference must be float64 \[1, 2\]"):
        accumulator.update(torch.ones(3), channels=["a"], reference=torch.ones(2, 2).double())


def test_repeated_records_of_an_evaluation_are_left_out_with_their_numbers() -> None:
    held = torch.tensor([[1.0, 2], [3.0, 2]], dtype=torch.float64)
    values = TokenValues(torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool))
    of_rows = BatchChannels(["a", "b"], None, torch.tensor([1, 0]), reference=held)
    kept = first_records(of_rows, values, 1, 2)
    assert kept is not None and kept[0].reference is not None
    assert kept[0].channels == ["b"] and kept[0].reference.tolist() == [[3.0, 2.0]]
    bounds = torch.tensor([0, 2, 4], dtype=torch.int32)
    flat = first_records(replace(of_rows, cu_seqlens=bounds), values, 1, 2)
    assert flat is not None and flat[0].reference is not None
    assert flat[0].reference.tolist() == [[3.0, 2.0], [1.0, 2.0]]


def test_what_travels_survives_odd_names_and_ids() -> None:
    name = joint_name("a b", [("domain", "x y")])
    record = {"ref_nll": 1e-17, "ref_tokens": 3, "id": "1\n\x03 2"}
    for id_field, own in (("", None), ("id", record["id"])):
        (names,) = Carried(Reference(), id_field).joined([record], [[name]])
        assert without_carried(names[0]) == name
        found, keys = split_carried([*names, None, "c"])
        assert found == [name, None, "c"] and (RECORD_IDS_KEY in keys) == (own is not None)
        numbers = keys[REFERENCE_KEY].view(torch.float64)
        assert numbers[0].tolist() == [1e-17, 3] and numbers[1:].isnan().all()
        ids = keys.get(RECORD_IDS_KEY, torch.zeros(3, 8, dtype=torch.int64)).tolist()
        assert [text_of_id(words) for words in ids] == [own, None, None]
    # Records without both travel without a mark.
    assert Carried(Reference(), "id").joined([{}], [["c", None]]) == [["c", None]]
