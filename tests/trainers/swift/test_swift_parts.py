"""ms-swift's own trainer: faults of ours, packs of groups, the cut of labels, the plugin."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch as replaced

import faults
import torch
from rank_cases import RanksOf, case
from swift_checks import channels_in, check_training, windows
from swift_files import given
from swift_tools import SWIFT, needs_swift, run

from channel_metrics import MetricsConfig

pytestmark = needs_swift
alone = case(SWIFT, ranks=1)

# {place: how often it is called, when its second call fails}. The collator goes on: it may run in
# another process, and its errors travel in the batch.
PLACES = {"collate for ms-swift": 6, "record a micro-batch": 2}


@alone
def faults_of_ours(folder: Path) -> Any:
    """Errors of ours with on_error: warn: in the collator, in a micro-batch, and at the start."""
    plain = given(folder, enable_channel_loss=False)
    warn = MetricsConfig(on_error="warn")
    found: dict[str, Any] = {"plain": run(plain, None)}
    for place in PLACES:
        with faults.inject(place, lambda call, *_: call > 1) as calls:
            found[place] = run(plain, warn) | {"calls": len(calls)}
    found["flag"] = run(given(folder), None)
    # These keys are those of --enable_channel_loss.
    clash = MetricsConfig(on_error="warn", key_format="{metric}_{channel}")
    found["clash"] = run(given(folder), clash)
    for of_run in found.values():
        del of_run["trainer"]
    return found


def test_a_fault_of_ours_leaves_the_run(ranks_of: RanksOf) -> None:
    """After one in the collator or in a micro-batch, nothing is measured any more."""
    (found,) = ranks_of(faults_of_ours)
    for place, calls in PLACES.items():
        check_training(found["plain"], found[place])
        assert found[place]["calls"] == calls
        assert not any(channels_in(entry) for entry in found[place]["log"])


def test_a_fault_at_the_start_leaves_ms_swifts_own_curves(ranks_of: RanksOf) -> None:
    (found,) = ranks_of(faults_of_ours)
    check_training(found["flag"], found["clash"])
    assert all("loss_bbu" in e or "loss_rru" in e for e in windows(found["clash"]["log"]))
    assert not any("tokens" in key for entry in found["clash"]["log"] for key in entry)


@alone
def name_clash(folder: Path) -> Any:
    """A key_format whose keys are those of --enable_channel_loss."""
    try:
        run(given(folder), MetricsConfig(key_format="{metric}_{channel}"))
    except ValueError as error:
        return str(error)
    return None


def test_keys_of_two_meanings_are_refused(ranks_of: RanksOf) -> None:
    (message,) = ranks_of(name_clash)
    assert "gives 'loss' and 'channel_loss' of a channel the same key 'loss_channel'" in message
    assert "Or leave out --enable_channel_loss" in message


@alone
def grouped_packs(folder: Path) -> Any:
    """Batches that name a group per pack, as GroupedPackingDataset makes them."""
    from swift.trainers import Seq2SeqTrainer, TrainerFactory
    from swift_grouped import with_grouped_packs

    from channel_metrics.trainers.swift.mixin import SwiftChannelMetricsMixin

    leftover: list[str] = []

    class Leftover:
        """Stands for a GroupedMetricsMixin that nobody removed: it takes its keys if they come."""

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            above: Any = super()
            leftover.extend(k for k in ("packed_group", "packed_segments") if k in inputs)
            return above.compute_loss(model, inputs, *args, **kwargs)

    class OwnTrainer(
        SwiftChannelMetricsMixin,
        Leftover,
        Seq2SeqTrainer,  # type: ignore[misc]  # ms-swift has no types
    ):
        """A trainer of a user's, without the patch."""

    given_packs: dict[str, Any] = {
        "packing": True,
        "per_device_train_batch_size": 2,
        "enable_channel_loss": False,
    }
    own = replaced.object(TrainerFactory, "get_trainer_cls", lambda args: OwnTrainer)
    with with_grouped_packs() as seen, own:
        found = run(given(folder, **given_packs), None)
    return {"log": found["log"], "packs": seen, "leftover": leftover}


def test_packs_of_groups(ranks_of: RanksOf) -> None:
    """Batches with `packed_group` and `packed_segments`, two packs each; by the mixin."""
    (found,) = ranks_of(grouped_packs)
    assert found["leftover"] == []
    log = windows(found["log"])
    for index, entry in enumerate(log):
        expected: dict[str, int] = {}
        for batch in found["packs"][2 * index : 2 * index + 2]:
            for group, targets in batch:
                expected[group] = expected.get(group, 0) + targets
        assert {name: entry[f"{name}_tokens"] for name in channels_in(entry)} == expected
        assert len(expected) > 1


@alone
def bounds_after_the_cut(folder: Path) -> Any:
    """ms-swift's own cut of labels [1, S], on random packs; ours by each label's number."""
    from swift.trainers.mixin import SwiftMixin

    from channel_metrics.trainers.swift.cut import kept_bounds

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


def test_bounds_follow_ms_swifts_cut(ranks_of: RanksOf) -> None:
    (compared,) = ranks_of(bounds_after_the_cut)
    assert compared > 300


@alone
def applied_twice(folder: Path) -> Any:
    """The plugin by its path, as ms-swift imports it, beside the module; applied once."""
    import sys

    import channel_metrics.patches.ms_swift as patch
    from swift.trainers import Seq2SeqTrainer
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


def test_the_plugin_applies_once(ranks_of: RanksOf) -> None:
    (seen,) = ranks_of(applied_twice)
    assert all(seen.values()), seen
