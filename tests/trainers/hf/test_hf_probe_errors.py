"""What a probe refuses, and what an error in one does to the run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_probe_tools import (
    CANARY,
    add,
    expected_values,
    other_logs,
    probe_logs,
    probe_of,
    run,
)
from hf_tools import PaddingCollator, Record, make_records, tiny_model, train
from transformers import Trainer

from channel_metrics import ChannelMetricsError, ConfigError, MetricsConfig
from channel_metrics.probes.probe import ProbeConfig
from channel_metrics.probes.without_trace import undisturbed
from channel_metrics.trainers.hf import attach
from channel_metrics.trainers.hf.probe import DatasetMetricsCallback


class Stream(torch.utils.data.IterableDataset[Any]):
    """Records without a length."""

    def __iter__(self) -> Any:
        return iter(CANARY)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({}, "sources of a probe must be a mapping"),
        ([CANARY], "sources of a probe must be a mapping"),
        ({"x": []}, "'x' of the probe is empty"),
        ({"x": Stream()}, "'x' of the probe must be a path .* is a Stream"),
        (
            {"x": {"train": CANARY}},
            "must be one dataset, but is a mapping of train;",
        ),
        ({"x": "nowhere.jsonl"}, "'x' of the probe: .*nowhere.jsonl does not exist"),
        ({"a b": CANARY, "a_b": CANARY}, "'a b' and 'a_b'"),
    ],
)
def test_sources_that_cannot_be_measured(sources: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DatasetMetricsCallback(sources)


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "canary.jsonl"
    path.write_text('{"input_ids": [1]}\nnonsense\n')
    with pytest.raises(ConfigError, match=r"canary.jsonl:2: expected one JSON object"):
        DatasetMetricsCallback({"canary": path})


def test_options_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="every must be a whole number of at least 1, but is 0"):
        DatasetMetricsCallback({"x": CANARY}, every=0)
    with pytest.raises(ConfigError, match="unknown key 'evry' in the probe; did you mean 'every'"):
        DatasetMetricsCallback({"x": CANARY}, evry=2)
    assert DatasetMetricsCallback({"x": CANARY}, ProbeConfig(every=3), batches=2).config == (
        ProbeConfig(every=3, batches=2)
    )


def without_labels(features: list[Any]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([feature["input_ids"][:2] for feature in features])}


UNSUPERVISED = [{**record, "labels": [-100] * len(record["labels"])} for record in CANARY]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": {"x": UNSUPERVISED}}, "no token of the 7 samples of dataset 'x'"),
        ({"collator": without_labels}, "'canary' of the probe must have `labels`, .* input_ids"),
    ],
)
def test_batches_that_say_nothing(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, probe_of(**options))


def test_a_collator_that_cannot_be_copied(tmp_path: Path) -> None:
    class Locked(PaddingCollator):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("a lock cannot be copied")

    more: dict[str, Any] = {"trainer_arguments": {"data_collator": Locked()}}
    with pytest.raises(ConfigError, match=r"Locked.* cannot be copied .a lock.* `collator`"):
        run(tmp_path, probe_of(), **more)
    trainer = run(tmp_path, probe_of(collator=PaddingCollator()), max_steps=1, **more)
    assert list(probe_logs(trainer.state.log_history)) == [0, 1]


def test_a_callback_that_nobody_has_told_its_trainer(tmp_path: Path) -> None:
    probe = probe_of()
    message = r"`attach_probe\(trainer, ...\)` from .* or set `callback.trainer = trainer`"

    def plain(trainer: Any) -> None:
        trainer.add_callback(probe)

    with pytest.raises(ConfigError, match=message):
        train(tmp_path, prepare=plain)
    # Channel metrics tell it, each time anew.
    measured = run(tmp_path, probe, metrics_on=True, max_steps=2)
    assert list(probe_logs(measured.state.log_history)) == [0, 2]
    assert probe.trainer is None
    with pytest.raises(ConfigError, match=message):
        train(tmp_path, prepare=plain)


def test_a_trainer_that_was_set_by_hand_is_preferred(tmp_path: Path) -> None:
    other = train(tmp_path, model=tiny_model(seed=1), max_steps=1)
    probe = probe_of(sources={"canary": CANARY})
    probe.trainer = other
    before = {name: value.clone() for name, value in other.model.state_dict().items()}
    trainer = run(tmp_path, probe, metrics_on=True, max_steps=1)
    assert not probe_logs(trainer.state.log_history)
    expected = expected_values(other.model, "canary", CANARY)
    logs = probe_logs(other.state.log_history)
    assert logs and all(values == pytest.approx(expected, rel=1e-5) for values in logs.values())
    torch.testing.assert_close(dict(other.model.state_dict()), before, rtol=0, atol=0)


def run_with_channel(folder: Path, channel: str, config: MetricsConfig | None = None) -> None:
    def prepare(trainer: Trainer) -> None:
        attach(trainer, config)
        trainer.add_callback(probe_of())

    records = [{**record, "channel": channel} for record in make_records(16)]
    train(folder, prepare=prepare, records=records)


def test_keys_that_a_channel_has(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"channel 'dataset_canary' .* 'dataset_canary_loss'"):
        run_with_channel(tmp_path, "dataset_canary")
    config = MetricsConfig(key_format="dataset_{channel}_{metric}")
    with pytest.raises(ConfigError, match=r"channel 'canary' .* 'dataset_canary_loss'"):
        run_with_channel(tmp_path, "canary", config)


def test_keys_that_a_later_channel_has(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class MapStyle(torch.utils.data.Dataset[Any]):
        """Its channels are met on the way."""

        def __len__(self) -> int:
            return 16

        def __getitem__(self, index: int) -> Record:
            return {**make_records(16)[index], "channel": "dataset_canary"}

    def prepare(trainer: Trainer) -> None:
        attach(trainer)
        trainer.add_callback(probe_of())

    trainer = train(tmp_path, prepare=prepare, records=MapStyle())
    assert "which is the trainer's own key" in caplog.text
    probed = list(probe_logs(trainer.state.log_history))
    for entry in trainer.state.log_history:
        # The key belongs to the probe; the channel's other values are there.
        if "dataset_canary_loss" in entry:
            assert entry["step"] in probed and "loss" not in entry
    assert any("dataset_canary_share" in entry for entry in trainer.state.log_history)


def test_keys_that_somebody_else_logs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'dataset_canary_loss' of a probe is also logged by"):
        run(tmp_path, probe_of(), probe_of(sources={"canary": CANARY}))


# ---- errors on the way ----------------------------------------------------------------------


def test_an_error_can_end_the_probe_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run_one(*probes: DatasetMetricsCallback) -> dict[str, Any]:
        def fail(model: Any, *_: Any) -> None:
            if not model.training:
                forwards.append(1)
                if len(forwards) > 8:
                    raise ZeroDivisionError("no forward today")

        def prepare(trainer: Any) -> None:
            trainer.model.register_forward_pre_hook(fail)
            for probe in probes:
                add(trainer, probe)

        forwards: list[int] = []
        trainer = train(tmp_path, prepare=prepare, max_steps=6, logging_steps=1)
        return {
            "weights": trainer.model.state_dict(),
            "logs": other_logs(trainer.state.log_history),
            "probed": list(probe_logs(trainer.state.log_history)),
            "modes": [module.training for module in trainer.model.modules()],
        }

    without = run_one()
    with caplog.at_level(logging.WARNING, logger="channel_metrics"):
        warned = run_one(probe_of(on_error="warn"))
    assert warned.pop("probed") == [0, 2] and without.pop("probed") == []
    torch.testing.assert_close(warned, without, rtol=0, atol=0)
    assert sum("no forward today" in record.message for record in caplog.records) == 1
    # By default, once a probe has been logged.
    default = run_one(probe_of())
    assert default.pop("probed") == [0, 2]
    torch.testing.assert_close(default, without, rtol=0, atol=0)
    with pytest.raises(ZeroDivisionError):
        run_one(probe_of(on_error="raise"))


class BigBuffer(torch.nn.Module):
    """A buffer too large to be copied, which forwards may change."""

    def __init__(self, changes: bool) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(5 * 2**20))
        self.changes = changes

    def forward(self) -> None:
        if self.changes:
            self.get_buffer("table")[0] += 1


def test_a_large_buffer_that_cannot_be_put_back() -> None:
    model = BigBuffer(changes=False)
    with undisturbed(model):
        model()
    model.changes = True
    message = r"the buffer 'table' of a BigBuffer .20 MiB."
    with pytest.raises(ChannelMetricsError, match=message), undisturbed(model):
        model()
