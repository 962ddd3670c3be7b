"""Labels of tokens where batches come from a collator: pads, packs, runs of one channel."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from collator_tools import left, padded
from no_sync import NoSync
from reference import Batch, reference_token_axis
from session_tools import new
from transformers import DataCollatorWithFlattening

from channel_metrics import ChannelError, ChannelMetricsError, MicroBatch
from channel_metrics.observing import observe

KINDS = {"image": [5, 6, 10], "audio": 14}
AXES: dict[str, Any] = {
    "position": {"by": "position"},
    "length": {"by": "length"},
    "role": {"by": "column", "field": "meta.roles"},
    "hard": {"by": "column", "field": "hard", "labels": {0: "easy", 1: "hard"}},
    "modality": {"by": "modality", "labels": KINDS},
}
METRICS = ("loss", "tokens", "share")
Record = dict[str, Any]


def record(channel: Any, *ids: int, prompt: int = 1) -> Record:
    """The loss of a token is its id. Records that begin with 4 have no roles."""
    labels = [-100] * prompt + list(ids[prompt:])
    found = {"input_ids": list(ids), "labels": labels, "channel": channel}
    found["hard"] = [token % 2 for token in ids]
    return found if ids[0] == 4 else {**found, "meta": {"roles": [role(token) for token in ids]}}


def role(token: int) -> str | None:
    return ("user", "assistant", None)[token % 3]


RECORDS = [
    record("a", 1, 2, 3),
    record("b", 4, 5, 6, 7, 8, 9, prompt=3),
    record("a", 10, 11),
    record("b", 12, 13, 14, 15, 16),
]
IN_RUNS = [
    record(["a", "a", "b", "b", "b", "a"], 1, 2, 3, 4, 5, 6),
    record(["b", "a", "a", "b", "b"], 7, 8, 9, 10, 11),
]


def check(window: Any, records: list[Record]) -> None:
    counted = [
        Batch(
            [float(token) for token in one["input_ids"]],
            ["all"],
            [0, len(one["input_ids"])],
            loss_mask=[float(label != -100) for label in one["labels"]],
            labels=one["labels"],
            kinds={5: "image", 6: "image", 10: "image", 14: "audio"},
        )
        for one in records
    ]
    for axis, source in AXES.items():
        for batch, one in zip(counted, records, strict=True):
            has = one.get("meta") or {"roles": [None] * len(one["input_ids"])}
            hard = ["hard" if token % 2 else "easy" for token in one["input_ids"]]
            batch.marks = has["roles"] if axis == "role" else hard
        wanted = reference_token_axis(counted, source["by"])
        assert window.axes[axis].keys() == wanted.keys()
        for label, values in window.axes[axis].items():
            assert values == pytest.approx({name: wanted[label][name] for name in METRICS})


def count(metrics: Any, batch: Any, **more: Any) -> None:
    with observe(metrics, torch.nn.Module(), batch, **more) as seen:
        seen.token_losses(batch["input_ids"].roll(-1, dims=-1).float())


@pytest.mark.parametrize(
    ("base", "records"),
    [
        (padded, RECORDS),
        (left, RECORDS),
        (DataCollatorWithFlattening(return_tensors="pt"), RECORDS),
        (padded, IN_RUNS),
        (left, IN_RUNS),
    ],
    ids=["padded", "left", "flat", "runs", "runs-left"],
)
def test_every_layout_gives_the_same_places(base: Any, records: list[Record]) -> None:
    metrics = new(metrics=METRICS, axes=AXES)
    collate = metrics.collator(base)
    for start in range(0, len(records), 2):
        batch = collate(records[start : start + 2])
        count(metrics, batch)
        assert not any(key.startswith("channel") for key in batch)
    check(metrics.close(1), records)


@pytest.mark.parametrize("base", [padded, left, DataCollatorWithFlattening(return_tensors="pt")])
def test_records_that_are_repeated_are_left_out(base: Any) -> None:
    metrics = new(metrics=METRICS, axes=AXES)
    with metrics.evaluation("eval", 1) as found:
        count(metrics, metrics.collator(base)(RECORDS), real=(3, 4))
    check(found.window, RECORDS[:3])


def test_records_in_another_order() -> None:
    def shortest_first(features: list[Record]) -> Any:
        return left(sorted(features, key=lambda one: len(one["input_ids"])))

    metrics = new(metrics=METRICS, axes=AXES)
    with metrics.evaluation("eval", 1) as found:
        count(metrics, metrics.collator(shortest_first)(RECORDS), real=(3, 4))
    check(found.window, RECORDS[:3])


def test_labels_that_do_not_fit_are_refused() -> None:
    collate = new(axes=AXES).collator(padded)
    one = RECORDS[0]
    for wrong, message in (
        ({"hard": [1, 0]}, "field 'hard' of a record must list a label for each of its 3 tokens, "),
        ({"hard": 1}, "but has 1; cut or pad the record"),
        ({"hard": [0, 1, 2]}, "field 'hard' of a record has the label 2; "),
        ({"meta": {"roles": ["usr", "user", None]}}, "has the label 'usr'; .*'user'"),
    ):
        fault = collate([one | wrong])["channels"]
        with pytest.raises(ChannelError, match=message):
            raise fault.error


def test_a_collator_with_channels_of_its_own_cannot_place_labels() -> None:
    def own(records: list[Record]) -> Any:
        return {**padded(records), "channels": ["a"] * len(records)}

    collate = new(axes=AXES).collator(own)
    with pytest.raises(ChannelError, match="or the collator returns `channels` itself"):
        raise collate(RECORDS)["channels"].error


def test_without_the_column_there_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    metrics = new(axes={"role": {"by": "column", "field": "role"}})
    collate = metrics.collator(padded)
    for _ in range(2):
        count(metrics, collate(RECORDS[:1]))
    assert metrics.close(1).axes["role"] == {"unlabeled": {"loss": 2.5, "tokens": 4}}
    assert caplog.text.count("1 columns with labels of tokens (role) are in none of its") == 1


def test_a_batch_without_labels_of_tokens_is_refused() -> None:
    cases: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("role", {}, "axis 'role' needs a label per token ('meta.roles'), but the batch does not"),
        ("modality", {}, "axis 'modality' needs the ids of the tokens"),
        ("any", {"labels": torch.tensor([3, 4])}, "labels: {image: 151655}}}"),
    )
    for axis, more, message in cases:
        metrics = new(axes={axis: AXES.get(axis, {"by": "modality"})})
        with pytest.raises(ChannelMetricsError, match=re.escape(message)):
            metrics.count(MicroBatch(token_losses=torch.ones(2), channels=["a"], **more))


def test_a_processor_tells_the_ids() -> None:
    """The first that knows an id is asked, and a config of a model comes last."""
    processor = SimpleNamespace(image_token_id=3, tokenizer=SimpleNamespace(video_token_id=4))
    metrics = new(axes={"kind": {"by": "modality"}})
    model = SimpleNamespace(config=SimpleNamespace(image_token_index=9, audio_token_id=5))
    metrics.read_tokenizer(processor, model)
    ids = torch.tensor([1, 3, 4, 5, 9, 3, -100])
    metrics.count(MicroBatch(token_losses=ids.float(), channels=["a"], labels=ids))
    assert {name: of["tokens"] for name, of in metrics.close(1).axes["kind"].items()} == {
        "text": 2,
        "image": 2,
        "video": 1,
        "audio": 1,
    }


def test_nothing_is_added_where_no_axis_asks() -> None:
    metrics = new(axes={"position": {"by": "position"}})
    assert not metrics.with_targets
    assert "channel_marks" not in metrics.collator(padded)(RECORDS)


def test_nothing_waits_for_the_device() -> None:
    metrics = new("a", metrics=("loss",), axes=AXES)
    ids = torch.arange(6, device="meta").view(2, 3)
    batch = MicroBatch(
        token_losses=torch.empty(2, 3, device="meta"),
        channels=torch.zeros(2, dtype=torch.int64, device="meta"),
        cu_seqlens=torch.empty(3, dtype=torch.int32, device="meta"),
        labels=ids,
        marks=ids,
    )
    with NoSync():
        metrics.count(batch)
        metrics.count(batch)
