"""ms-swift's own trainer, run for real: its numbers, faster; ours beside them; the same training.

The oracle is ms-swift itself: each case trains with it alone and with channel metrics. Training
must be the same bit for bit, and so must be all that ms-swift logs, but for its channel losses,
which it sums up in float32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rank_cases import Case, RanksOf, case
from swift_checks import channels_in, check_raw, check_sums, check_training, windows
from swift_files import CHANNELS, given
from swift_tools import ON, SWIFT, both, counted_reads, needs_swift, run

from channel_metrics import MetricsConfig

pytestmark = needs_swift
alone = case(SWIFT, ranks=1)

PACKED: dict[str, Any] = {"packing": True, "per_device_train_batch_size": 1}


@alone
def padded(folder: Path) -> Any:
    return both(given(folder))


@alone
def packing(folder: Path) -> Any:
    return both(given(folder, **PACKED))


@alone
def all_logits(folder: Path) -> Any:
    return both(given(folder, use_logits_to_keep=False, packing=True))


@alone
def lora(folder: Path) -> Any:
    options: dict[str, Any] = {
        "tuner_type": "lora",
        "lora_rank": 2,
        "target_modules": ["all-linear"],
    }
    return both(given(folder, **options))


@alone
def pretraining(folder: Path) -> Any:
    """What `swift pt` does: no chat template, all tokens supervised, long texts are split."""
    options = {"use_chat_template": False, "loss_scale": "all", "max_length": 16}
    return both(given(folder, "texts", truncation_strategy="split", **options))


@pytest.mark.parametrize("case", [padded, packing, all_logits, lora, pretraining])
def test_the_flags_own_curves_and_ours(ranks_of: RanksOf, case: Case) -> None:
    """`--enable_channel_loss`: `loss_{channel}` stays, ours stand beside it."""
    (found,) = ranks_of(case)
    check_training(found["off"], found["on"])
    check_sums(windows(found["on"]["log"]))
    check_raw(found["on"]["log"], found["off"]["log"])
    for entry in windows(found["on"]["log"]):
        assert all(f"loss_{name}" in entry for name in channels_in(entry))


@alone
def without_the_flag(folder: Path) -> Any:
    return both(given(folder, enable_channel_loss=False))


@alone
def one_row(folder: Path) -> Any:
    """The model keeps the logits of supervised tokens only, a mask; and with ms-swift's own."""
    one: dict[str, Any] = {"per_device_train_batch_size": 1}
    own = run(given(folder, **one), None)["log"]
    return both(given(folder, enable_channel_loss=False, **one)) | {"own": own}


@alone
def padding_free(folder: Path) -> Any:
    own = run(given(folder, padding_free=True), None)["log"]
    options = given(folder, padding_free=True, enable_channel_loss=False)
    return both(options) | {"own": own}


@pytest.mark.parametrize("case", [without_the_flag, one_row, padding_free])
def test_without_the_flag(ranks_of: RanksOf, case: Case) -> None:
    """Only ours; the model's own loss is observed."""
    (found,) = ranks_of(case)
    check_training(found["off"], found["on"])
    check_sums(windows(found["on"]["log"]))
    assert not any(key.startswith("loss_") for e in found["on"]["log"] for key in e)
    own = found.get("own") or ranks_of(padded)[0]["off"]["log"]
    # With the flag, ms-swift takes another way to the loss: weights differ by rounding.
    check_raw(found["on"]["log"], own, windows_compared=1)


@alone
def weighted(folder: Path) -> Any:
    """`react` weights some tokens with 2; and what ms-swift logs for the same data unweighted."""
    unweighted = run(given(folder, "react", **PACKED), None)["log"]
    return both(given(folder, "react", loss_scale="react", **PACKED)) | {"unweighted": unweighted}


@alone
def dft(folder: Path) -> Any:
    unweighted = run(given(folder), None)["log"]
    return both(given(folder, enable_dft_loss=True)) | {"unweighted": unweighted}


@pytest.mark.parametrize("case", [weighted, dft])
def test_weighted_tokens(ranks_of: RanksOf, case: Case) -> None:
    """ms-swift logs the loss that it optimises; ours is the nll, which it would log unweighted."""
    (found,) = ranks_of(case)
    check_training(found["off"], found["on"])
    check_sums(windows(found["on"]["log"]))
    check_raw(found["on"]["log"], found["unweighted"], windows_compared=1)
    first = windows(found["on"]["log"])[0]
    assert all(abs(first[f"loss_{n}"] / first[f"{n}_loss"] - 1) > 0.01 for n in channels_in(first))


def test_tokens_are_those_that_ms_swift_trains_on(ranks_of: RanksOf) -> None:
    """Channel losses, weighted by their tokens, are the loss of the step."""
    for of in (padded, packing, one_row, padding_free, pretraining):
        (found,) = ranks_of(of)
        for entry in windows(found["on"]["log"]):
            names = channels_in(entry)
            total = sum(entry[f"{n}_loss"] * entry[f"{n}_tokens"] for n in names)
            tokens = sum(entry[f"{n}_tokens"] for n in names)
            assert total / tokens == pytest.approx(entry["loss"], rel=1e-5)


@alone
def fused(folder: Path) -> Any:
    """No column `channel`: it is filled from `metadata._fusion_source`."""
    # The packs of three steps hold most of the stream.
    stream = PACKED | {"streaming": True, "gradient_accumulation_steps": 9}
    return {
        "dataset": run(given(folder, "fused"))["log"],
        "stream": run(given(folder, "fused", **stream))["log"],
    }


def test_the_channel_of_a_nested_field(ranks_of: RanksOf) -> None:
    """`metadata._fusion_source`, which ms-swift would drop; records and streams."""
    (found,) = ranks_of(fused)
    plain = windows(ranks_of(padded)[0]["on"]["log"])
    for entry, labeled in zip(windows(found["dataset"]), plain, strict=True):
        tokens = {name: entry[f"{name}_tokens"] for name in channels_in(entry)}
        assert all(tokens[n] <= labeled[f"{n}_tokens"] for n in tokens if n != "unlabeled")
        assert sum(tokens.values()) == sum(labeled[f"{n}_tokens"] for n in channels_in(labeled))
    for log in found.values():
        seen = {name for entry in windows(log) for name in channels_in(entry)}
        assert seen == {*CHANNELS, "unlabeled"}
        # ms-swift calls samples without a channel None.
        assert all(e.get("loss_None") == e.get("unlabeled_loss") for e in windows(log))


@alone
def named_column(folder: Path) -> Any:
    """`--columns` says which column the channel is; `metadata` says another."""
    options = given(folder, columns={"source": "channel"})
    renamed = []
    for record in map(json.loads, Path(options["dataset"][0]).read_text().splitlines()):
        other = {"metadata": {"_fusion_source": "another"}, "source": record.pop("channel")}
        renamed.append(json.dumps(record | other) + "\n")
    folder.mkdir()
    (folder / "data.jsonl").write_text("".join(renamed))
    return both(options | {"dataset": [str(folder / "data.jsonl")]})


def test_a_column_that_the_user_names(ranks_of: RanksOf) -> None:
    """`--columns` wins over the fields of the config."""
    (found,) = ranks_of(named_column)
    check_training(found["off"], found["on"])
    check_raw(found["on"]["log"], found["off"]["log"])


@alone
def resumed(folder: Path) -> Any:
    """Four steps at once; and two, then two more from the checkpoint."""
    config = MetricsConfig(metrics=("tokens", "tokens_total", "samples_total"))
    steps: dict[str, Any] = {
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 4,
        "logging_steps": 1,
    }
    logs: list[Any] = []
    for more in ({}, {"resume_from_checkpoint": str(folder / "0" / "checkpoint-2")}):
        options = given(folder / str(len(logs)), **PACKED, **steps, **more)
        logs.append(run(options, config)["log"])
    return logs


def test_totals_survive_resume(ranks_of: RanksOf) -> None:
    (logs,) = ranks_of(resumed)
    at_once, later = ({e["step"]: e for e in windows(log)} for log in logs)
    for step in (3, 4):
        totals = {k: v for k, v in at_once[step].items() if k.endswith("_total")}
        assert totals and totals == {k: later[step][k] for k in totals}
    assert at_once[4]["bbu_tokens_total"] > at_once[4]["bbu_tokens"]


@alone
def host_syncs(folder: Path) -> Any:
    """Reads of device values per micro-batch: ms-swift alone, with its flag, and we with it."""
    found: dict[str, Any] = {}
    for name, kind in (("padded", {}), ("packing", PACKED)):
        runs = (("without", False, None), ("theirs", True, None), ("ours", True, ON))
        for who, flag, metrics in runs:
            with counted_reads() as reads:
                run(given(folder, enable_channel_loss=flag, **kind), metrics)
            found[f"{name}, {who}"] = reads
    return found


def test_no_host_sync_for_a_sample(ranks_of: RanksOf) -> None:
    """With the flag, our micro-batches read as little as those of ms-swift without it."""
    (found,) = ranks_of(host_syncs)
    for kind, more in (("padded", 24), ("packing", 13)):  # as in docs/ms_swift.md
        without, theirs, ours = (found[f"{kind}, {who}"] for who in ("without", "theirs", "ours"))
        assert len(ours) == 6 and ours == without
        assert [t - w for t, w in zip(theirs, without, strict=True)] == [more] * 6


AXES = MetricsConfig(axes={"domain": "metadata._fusion_domain", "kind": {"bbu": "x"}})


@alone
def axes(folder: Path) -> Any:
    """The same runs with the domain as an axis, and as the channel."""
    options = {**PACKED, "enable_channel_loss": False}
    by_domain = MetricsConfig(fields=("metadata._fusion_domain",))
    logs = [run(given(folder, "fused", **options), config)["log"] for config in (AXES, by_domain)]
    return [windows(log) for log in logs]


def test_labels_from_columns_that_ms_swift_drops(ranks_of: RanksOf) -> None:
    (found,) = ranks_of(axes)
    for entry, alone in zip(*found, strict=True):
        labels = ("target", "source", "unlabeled")
        assert {key for key in entry if key.startswith("domain/")} == {
            f"domain/{key}" for key in alone if key.startswith(labels)
        }
        for key in (key for key in alone if key.startswith(labels)):
            assert entry[f"domain/{key}"] == alone[key]
        assert entry.get("kind/x_loss") == entry.get("bbu_loss")
    assert len(found[0]) > 1
