"""Labels on further axes from columns of the data, in the trainer.

The oracle is the same run with the column of an axis as the channel.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset
from hf_tools import make_records, train

from channel_metrics import MetricsConfig, Window
from channel_metrics.trainers.hf import attach

METRICS = ("loss", "token_acc", "tokens", "samples", "share", "tokens_total")
LANGUAGES = ["de", "en", None]
RECORDS: list[dict[str, Any]] = [
    {**record, "meta": {"lang": LANGUAGES[i % 3]}, "kind": i % 2, "topics": ["m", "s"][: i % 3]}
    for i, record in enumerate(make_records(32))
]
DATA = Dataset.from_list(RECORDS).cast_column("kind", ClassLabel(names=["odd", "even"]))
AXES = {"lang": "meta.lang", "kind": "kind", "topic": "topics"}


def windows(folder: Path, config: MetricsConfig, records: Any = DATA, **given: Any) -> list[Window]:
    found: list[Window] = []

    def prepare(trainer: Any) -> None:
        attach(trainer, config)
        trainer.channel_metrics.on_window.append(found.append)

    options: dict[str, Any] = {
        "trainer_arguments": {"eval_dataset": records},
        "eval_strategy": "steps",
    }
    train(folder, prepare=prepare, records=records, **options, eval_steps=2, **given)
    assert [window.split for window in found] == ["train", "eval"] * 2
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Window]:
    config = MetricsConfig(axes=AXES, cross=(("channel", "lang"),), metrics=METRICS)
    return windows(tmp_path_factory.mktemp("axes"), config)


@pytest.mark.parametrize(("axis", "field"), [("lang", "meta.lang"), ("kind", "kind")])
def test_an_axis_is_what_its_column_is_as_channel(
    tmp_path: Path, found: list[Window], axis: str, field: str
) -> None:
    alone = windows(tmp_path, MetricsConfig(fields=(field,), metrics=METRICS))
    for window, other in zip(found, alone, strict=True):
        assert window.axes[axis] == other.values


def test_channels_are_as_without_axes(tmp_path: Path, found: list[Window]) -> None:
    alone = windows(tmp_path, MetricsConfig(metrics=METRICS))
    assert [w.values for w in found] == [w.values for w in alone]
    for window in found:
        crossed = window.axes["channel.lang"]
        assert sum(values["share"] for values in crossed.values()) == pytest.approx(1)
        of_bbu = [v["tokens"] for name, v in crossed.items() if name.startswith("bbu.")]
        assert sum(of_bbu) == window.values["bbu"]["tokens"]


def test_several_labels_of_a_record(found: list[Window]) -> None:
    """The evaluation sees all records once."""
    counts = {"m": 0, "s": 0, "unlabeled": 0}
    for record in RECORDS:
        for topic in record["topics"] or ["unlabeled"]:
            counts[topic] += sum(label != -100 for label in record["labels"][1:])
    for window in found[1::2]:
        assert {name: v["tokens"] for name, v in window.axes["topic"].items()} == counts


def test_a_stream(tmp_path: Path, found: list[Window]) -> None:
    config = MetricsConfig(axes=AXES, cross=(("channel", "lang"),), metrics=METRICS)
    streamed = windows(tmp_path, config, DATA.to_iterable_dataset())
    # It comes in another order, but each evaluation sees all records.
    for window, other in zip(streamed[1::2], found[1::2], strict=True):
        assert counts_of(window) == counts_of(other)


def counts_of(window: Window) -> dict[str, dict[str, float]]:
    return {
        axis: {name: values["tokens"] for name, values in of_axis.items()}
        for axis, of_axis in window.axes.items()
    }


def test_the_best_model_by_a_label(tmp_path: Path) -> None:
    config = MetricsConfig(axes=AXES)
    options: dict[str, Any] = {
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
    }
    found = windows(tmp_path, config, metric_for_best_model="eval_lang/de_loss", **options)
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_metric"] == min(w.axes["lang"]["de"]["loss"] for w in found[1::2])
