"""Cases of ms-swift on one process: each run of ms-swift alone, and with channel metrics."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch as replaced

import channel_metrics.patches.ms_swift as patch
import swift_tools
import torch
from hf_case_tools import cases_of
from swift.trainers import Seq2SeqTrainer, TrainerFactory
from swift.trainers.mixin import SwiftMixin
from swift_files import arguments, make_data, make_model
from swift_grouped import with_grouped_packs
from swift_tools import run

from channel_metrics import MetricsConfig
from channel_metrics.trainers.hf.state import ChannelState
from channel_metrics.trainers.swift.collator import SwiftCollator
from channel_metrics.trainers.swift.cut import kept_bounds
from channel_metrics.trainers.swift.mixin import SwiftChannelMetricsMixin

WORLD_SIZE = 1
ENVIRON: dict[str, str] = {}

PACKED: dict[str, Any] = {"packing": True, "per_device_train_batch_size": 1}
_shared: dict[str, Any] = {}


def _given(folder: Path, data: str = "plain", **overrides: Any) -> dict[str, Any]:
    if not _shared:
        base = folder.parent / "swift_one"
        base.mkdir()
        _shared.update(model=make_model(base / "model"), data=make_data(base))
    return arguments(_shared["model"], _shared["data"][data], folder, **overrides)


def padded(folder: Path) -> Any:
    return swift_tools.both(_given(folder))


def without_the_flag(folder: Path) -> Any:
    return swift_tools.both(_given(folder, enable_channel_loss=False))


def one_row(folder: Path) -> Any:
    """The model keeps the logits of supervised tokens only, a mask; and with ms-swift's own."""
    one = {"per_device_train_batch_size": 1}
    own = swift_tools.run(_given(folder, **one), None)["log"]
    return swift_tools.both(_given(folder, enable_channel_loss=False, **one)) | {"own": own}


def all_logits(folder: Path) -> Any:
    return swift_tools.both(_given(folder, use_logits_to_keep=False, packing=True))


def packing(folder: Path) -> Any:
    return swift_tools.both(_given(folder, **PACKED))


def padding_free(folder: Path) -> Any:
    own = swift_tools.run(_given(folder, padding_free=True), None)["log"]
    given = _given(folder, padding_free=True, enable_channel_loss=False)
    return swift_tools.both(given) | {"own": own}


def weighted(folder: Path) -> Any:
    """`react` weights some tokens with 2; and what ms-swift logs for the same data unweighted."""
    unweighted = swift_tools.run(_given(folder, "react", **PACKED), None)["log"]
    return swift_tools.both(_given(folder, "react", loss_scale="react", **PACKED)) | {
        "unweighted": unweighted
    }


def dft(folder: Path) -> Any:
    unweighted = swift_tools.run(_given(folder), None)["log"]
    return swift_tools.both(_given(folder, enable_dft_loss=True)) | {"unweighted": unweighted}


def lora(folder: Path) -> Any:
    given = {"tuner_type": "lora", "lora_rank": 2, "target_modules": ["all-linear"]}
    return swift_tools.both(_given(folder, **given))


def host_syncs(folder: Path) -> Any:
    """Reads of device values per micro-batch: ms-swift alone, with its flag, and we with it."""
    found: dict[str, Any] = {}
    for name, kind in (("padded", {}), ("packing", PACKED)):
        runs = (("without", False, None), ("theirs", True, None), ("ours", True, swift_tools.ON))
        for who, flag, metrics in runs:
            with swift_tools.counted_reads() as reads:
                swift_tools.run(_given(folder, enable_channel_loss=flag, **kind), metrics)
            found[f"{name}, {who}"] = reads
    return found


def evaluation(folder: Path) -> Any:
    given = {
        "val_dataset": [str(_shared["data"]["plain"]) + "#13"],
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_on_start": True,
        "per_device_eval_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "metric_for_best_model": "lvis_loss",
        "load_best_model_at_end": False,
    }
    plain = swift_tools.run(
        _given(folder / "off", **given | {"metric_for_best_model": "loss"}), None
    )
    metered = swift_tools.run(_given(folder / "on", **given))
    best = metered["trainer"].state.best_metric
    return {"off": plain["log"], "on": metered["log"], "best": best}


def pretraining(folder: Path) -> Any:
    """What `swift pt` does: no chat template, all tokens supervised, long texts are split."""
    given = {"use_chat_template": False, "loss_scale": "all", "max_length": 16}
    return swift_tools.both(_given(folder, "texts", truncation_strategy="split", **given))


def fused(folder: Path) -> Any:
    """No column `channel`: it is filled from `metadata._fusion_source`."""
    # The packs of three steps hold most of the stream.
    stream = PACKED | {"streaming": True, "gradient_accumulation_steps": 9}
    return {
        "dataset": swift_tools.run(_given(folder, "fused"))["log"],
        "stream": swift_tools.run(_given(folder, "fused", **stream))["log"],
    }


def named_column(folder: Path) -> Any:
    """`--columns` says which column the channel is; `metadata` says another."""
    given = _given(folder, columns={"source": "channel"})
    renamed = []
    for record in map(json.loads, Path(given["dataset"][0]).read_text().splitlines()):
        other = {"metadata": {"_fusion_source": "another"}, "source": record.pop("channel")}
        renamed.append(json.dumps(record | other) + "\n")
    folder.mkdir()
    (folder / "data.jsonl").write_text("".join(renamed))
    return swift_tools.both(given | {"dataset": [str(folder / "data.jsonl")]})


def resumed(folder: Path) -> Any:
    """Four steps at once; and two, then two more from the checkpoint."""
    config = MetricsConfig(metrics=("tokens", "tokens_total", "samples_total"))
    steps = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "logging_steps": 1}
    logs = []
    for more in ({}, {"resume_from_checkpoint": str(folder / "0" / "checkpoint-2")}):
        given = _given(folder / str(len(logs)), **PACKED, **steps, **more)
        logs.append(run(given, config)["log"])
    return logs


@contextmanager
def _failing(owner: Any, name: str) -> Iterator[list[int]]:
    """An error of ours in the second call; and how many calls there were."""
    original = getattr(owner, name)
    calls: list[int] = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(calls))
        if len(calls) > 1:
            raise ZeroDivisionError("a fault of ours")
        return original(*args, **kwargs)

    with replaced.object(owner, name, failing):
        yield calls


def faults(folder: Path) -> Any:
    """Errors of ours with on_error: warn: in the collator, in a micro-batch, and at the start."""
    plain = _given(folder, enable_channel_loss=False)
    warn = MetricsConfig(on_error="warn")
    found: dict[str, Any] = {"plain": swift_tools.run(plain, None)}
    for owner, name in ((SwiftCollator, "_with_channels"), (ChannelState, "record")):
        with _failing(owner, name) as calls:
            found[name] = swift_tools.run(plain, warn) | {"calls": len(calls)}
    found["flag"] = swift_tools.run(_given(folder), None)
    # These keys are those of --enable_channel_loss.
    clash = MetricsConfig(on_error="warn", key_format="{metric}_{channel}")
    found["clash"] = swift_tools.run(_given(folder), clash)
    for of_run in found.values():
        del of_run["trainer"]
    return found


def name_clash(folder: Path) -> Any:
    """A key_format whose keys are those of --enable_channel_loss."""
    try:
        swift_tools.run(_given(folder), MetricsConfig(key_format="{metric}_{channel}"))
    except ValueError as error:
        return str(error)
    return None


class _Leftover:
    """Stands for a GroupedMetricsMixin that nobody has removed: it takes its keys if they come."""

    found: ClassVar[list[str]] = []

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        keys = [key for key in ("packed_group", "packed_segments") if key in inputs]
        self.found.extend(keys)
        return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]


class _OwnTrainer(SwiftChannelMetricsMixin, _Leftover, Seq2SeqTrainer):
    """A trainer of a user's, without the patch."""


def grouped_packs(folder: Path) -> Any:
    """Batches that name a group per pack, as GroupedPackingDataset makes them."""
    given = _given(folder, packing=True, per_device_train_batch_size=2, enable_channel_loss=False)
    own = replaced.object(TrainerFactory, "get_trainer_cls", lambda args: _OwnTrainer)
    with with_grouped_packs() as seen, own:
        found = swift_tools.run(given, None)
    return {"log": found["log"], "packs": seen, "leftover": _Leftover.found}


def bounds_after_the_cut(folder: Path) -> Any:
    """ms-swift's own cut of labels [1, S], on random packs; ours by each label's number."""
    generator = torch.Generator().manual_seed(0)
    compared = 0
    for _ in range(100):
        lengths = torch.randint(1, 7, (4,), generator=generator)
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        size = int(bounds[-1])
        labels = torch.arange(size).masked_fill(torch.rand(size, generator=generator) < 0.5, -100)
        labels[bounds[:-1].long()] = -100
        inputs = {"labels": labels[None]}
        trainer = type("Trainer", (), {"template": _Template, "args": _Arguments})()
        SwiftMixin.prepare_logits_to_keep(trainer, inputs)
        kept = kept_bounds(bounds, inputs["logits_to_keep"], inputs["labels"].shape[-1])
        for index, label in enumerate(inputs["labels"][0].tolist()):
            if label != -100:
                owner = int(torch.searchsorted(kept, index, right=True)) - 1
                assert bounds[owner] <= label < bounds[owner + 1], (bounds, kept, labels)
                compared += 1
        last = inputs["labels"].shape[-1]
        assert kept_bounds(bounds, last, last).tolist()[-1] == last
    return compared


class _Template:
    sequence_parallel_size = 1


class _Arguments:
    tuner_backend = "peft"


def applied_twice(folder: Path) -> Any:
    """The plugin by its path, as ms-swift imports it, beside the module; applied once."""
    import sys

    from swift.utils.utils import import_external_file

    path = os.path.abspath(patch.__file__)
    patch.revert()
    plain = Seq2SeqTrainer.__init__
    import_external_file(path)
    once = Seq2SeqTrainer.__init__
    patch.apply()
    import trl

    seen = {
        "patched": once is not plain and Seq2SeqTrainer.__init__ is once,
        "off the path": os.path.dirname(path) not in sys.path,
        "trl is the package": hasattr(trl, "SFTConfig"),
    }
    patch.revert()
    return seen | {"reverted": Seq2SeqTrainer.__init__ is plain}


CASES = cases_of(globals())
