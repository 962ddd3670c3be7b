"""ms-swift's own trainer, run for real: its numbers, faster; ours beside them; the same training.

The oracle is ms-swift itself: each case of `swift_cases_*.py` trains with it alone and with
channel metrics. Training must be the same bit for bit, and so must be all that ms-swift logs, but
for its channel losses, which it sums up in float32.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from typing import Any

import pytest
from hf_launch import Launch, launch
from swift_files import CHANNELS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("swift") is None,
    reason="ms-swift is only in the main environment (Python 3.11): `make test` runs this",
)

Log = list[dict[str, float]]
OWN = ("loss_", "eval_loss_")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return launch("swift", tmp_path_factory)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return launch("swift_ranks", tmp_path_factory)


def check_training(off: dict[str, Any], on: dict[str, Any]) -> None:
    """Weights, random numbers and all that ms-swift logs are those of ms-swift alone."""
    assert (on["weights"], on["random"]) == (off["weights"], off["random"])
    assert len(on["log"]) == len(off["log"])
    for theirs, ours in zip(off["log"], on["log"], strict=True):
        for key, value in theirs.items():
            if key.startswith(OWN):
                assert ours[key] == pytest.approx(value, rel=1e-6), key
            else:
                assert ours[key] == value, key


def windows(log: Log) -> Log:
    found = [entry for entry in log if "loss" in entry]
    assert len(found) >= 2
    return found


def channels_in(entry: dict[str, float]) -> list[str]:
    names = (*CHANNELS, "unlabeled")
    return [name for name in names if f"{name}_loss" in entry]


def check_sums(log: Log, prefix: str = "") -> None:
    """Shares add up to one; the accuracies to the one that ms-swift logs."""
    for entry in log:
        names = [n for n in (*CHANNELS, "unlabeled") if f"{prefix}{n}_loss" in entry]
        shares = {name: entry[f"{prefix}{name}_share"] for name in names}
        assert sum(shares.values()) == pytest.approx(1)
        accuracy = sum(entry[f"{prefix}{name}_token_acc"] * shares[name] for name in names)
        # What it counts in float32 divides in float64.
        assert accuracy == pytest.approx(entry[f"{prefix}token_acc"], abs=1e-6)


def check_raw(log: Log, theirs: Log, windows_compared: int | None = None) -> None:
    """`{channel}_loss` is what ms-swift logs as `loss_{channel}` where it weights no tokens."""
    pairs = list(zip(windows(log), windows(theirs), strict=True))[:windows_compared]
    for ours, own in pairs:
        names = [key.removeprefix("loss_") for key in own if key.startswith("loss_")]
        assert sorted(names) == sorted(channels_in(ours)) and len(names) > 1
        for name in names:
            assert ours[f"{name}_loss"] == pytest.approx(own[f"loss_{name}"], rel=2e-6)


@pytest.mark.parametrize("case", ["padded", "packing", "all_logits", "lora", "pretraining"])
def test_the_flags_own_curves_and_ours(one: Launch, case: str) -> None:
    """`--enable_channel_loss`: `loss_{channel}` stays, ours stand beside it."""
    (found,) = one.ranks(case)
    check_training(found["off"], found["on"])
    check_sums(windows(found["on"]["log"]))
    check_raw(found["on"]["log"], found["off"]["log"])
    for entry in windows(found["on"]["log"]):
        assert all(f"loss_{name}" in entry for name in channels_in(entry))


@pytest.mark.parametrize("case", ["without_the_flag", "one_row", "padding_free"])
def test_without_the_flag(one: Launch, case: str) -> None:
    """Only ours; the model's own loss is observed."""
    (found,) = one.ranks(case)
    check_training(found["off"], found["on"])
    check_sums(windows(found["on"]["log"]))
    assert not any(key.startswith("loss_") for e in found["on"]["log"] for key in e)
    own = found.get("own") or one.ranks("padded")[0]["off"]["log"]
    # With the flag, ms-swift takes another way to the loss: weights differ by rounding.
    check_raw(found["on"]["log"], own, windows_compared=1)


@pytest.mark.parametrize("case", ["weighted", "dft"])
def test_weighted_tokens(one: Launch, case: str) -> None:
    """ms-swift logs the loss that it optimises; ours is the nll, which it would log unweighted."""
    (found,) = one.ranks(case)
    check_training(found["off"], found["on"])
    check_sums(windows(found["on"]["log"]))
    check_raw(found["on"]["log"], found["unweighted"], windows_compared=1)
    first = windows(found["on"]["log"])[0]
    assert all(abs(first[f"loss_{n}"] / first[f"{n}_loss"] - 1) > 0.01 for n in channels_in(first))


def test_tokens_are_those_that_ms_swift_trains_on(one: Launch) -> None:
    """Channel losses, weighted by their tokens, are the loss of the step."""
    for case in ("padded", "packing", "one_row", "padding_free", "pretraining"):
        (found,) = one.ranks(case)
        for entry in windows(found["on"]["log"]):
            names = channels_in(entry)
            total = sum(entry[f"{n}_loss"] * entry[f"{n}_tokens"] for n in names)
            tokens = sum(entry[f"{n}_tokens"] for n in names)
            assert total / tokens == pytest.approx(entry["loss"], rel=1e-5)


def test_evaluation(one: Launch) -> None:
    (found,) = one.ranks("evaluation")
    pairs = [
        (theirs, ours)
        for theirs, ours in zip(found["off"], found["on"], strict=True)
        if "eval_loss" in ours
    ]
    assert len(pairs) >= 2
    for theirs, ours in pairs:
        assert ours["eval_loss"] == theirs["eval_loss"]
        names = [key.removeprefix("eval_loss_") for key in theirs if key.startswith("eval_loss_")]
        assert len(names) == 4
        for name in names:
            theirs_too = pytest.approx(theirs[f"eval_loss_{name}"], rel=1e-6)
            assert ours[f"eval_loss_{name}"] == theirs_too
            assert ours[f"eval_{name}_loss"] == theirs_too
        # 13 records: repetitions do not count.
        check_sums([ours], "eval_")
    best = min(ours["eval_lvis_loss"] for _, ours in pairs)
    # ms-swift rounds what it logs.
    assert found["best"] == pytest.approx(best, abs=1e-8)


def test_the_channel_of_a_nested_field(one: Launch) -> None:
    """`metadata._fusion_source`, which ms-swift would drop; records and streams."""
    (found,) = one.ranks("fused")
    plain = windows(one.ranks("padded")[0]["on"]["log"])
    for entry, labeled in zip(windows(found["dataset"]), plain, strict=True):
        tokens = {name: entry[f"{name}_tokens"] for name in channels_in(entry)}
        assert all(tokens[n] <= labeled[f"{n}_tokens"] for n in tokens if n != "unlabeled")
        assert sum(tokens.values()) == sum(labeled[f"{n}_tokens"] for n in channels_in(labeled))
    for log in found.values():
        seen = {name for entry in windows(log) for name in channels_in(entry)}
        assert seen == {*CHANNELS, "unlabeled"}
        # ms-swift calls samples without a channel None.
        assert all(e.get("loss_None") == e.get("unlabeled_loss") for e in windows(log))


def test_a_column_that_the_user_names(one: Launch) -> None:
    """`--columns` wins over the fields of the config."""
    (found,) = one.ranks("named_column")
    check_training(found["off"], found["on"])
    check_raw(found["on"]["log"], found["off"]["log"])


def test_totals_survive_resume(one: Launch) -> None:
    (logs,) = one.ranks("resumed")
    at_once, resumed = ({e["step"]: e for e in windows(log)} for log in logs)
    for step in (3, 4):
        totals = {k: v for k, v in at_once[step].items() if k.endswith("_total")}
        assert totals and totals == {k: resumed[step][k] for k in totals}
    assert at_once[4]["bbu_tokens_total"] > at_once[4]["bbu_tokens"]


def test_a_fault_of_ours_leaves_the_run(one: Launch) -> None:
    """After one in the collator or in a micro-batch, nothing is measured any more."""
    (found,) = one.ranks("faults")
    for place in ("_with_channels", "record"):
        check_training(found["plain"], found[place])
        assert found[place]["calls"] == 2
        assert not any(channels_in(entry) for entry in found[place]["log"])


def test_a_fault_at_the_start_leaves_ms_swifts_own_curves(one: Launch) -> None:
    (found,) = one.ranks("faults")
    check_training(found["flag"], found["clash"])
    assert all("loss_bbu" in e or "loss_rru" in e for e in windows(found["clash"]["log"]))
    assert not any("tokens" in key for entry in found["clash"]["log"] for key in entry)


def test_keys_of_two_meanings_are_refused(one: Launch) -> None:
    (message,) = one.ranks("name_clash")
    assert "--enable_channel_loss logs with another meaning" in message


def test_packs_of_groups(one: Launch) -> None:
    """Batches with `packed_group` and `packed_segments`, two packs each; by the mixin."""
    (found,) = one.ranks("grouped_packs")
    assert found["leftover"] == []
    log = windows(found["log"])
    for index, entry in enumerate(log):
        expected: dict[str, int] = {}
        for batch in found["packs"][2 * index : 2 * index + 2]:
            for group, targets in batch:
                expected[group] = expected.get(group, 0) + targets
        assert {name: entry[f"{name}_tokens"] for name in channels_in(entry)} == expected
        assert len(expected) > 1


def test_bounds_follow_ms_swifts_cut(one: Launch) -> None:
    (compared,) = one.ranks("bounds_after_the_cut")
    assert compared > 300


def test_the_plugin_applies_once(one: Launch) -> None:
    (seen,) = one.ranks("applied_twice")
    assert all(seen.values()), seen


def test_no_host_sync_for_a_sample(one: Launch) -> None:
    """With the flag, our micro-batches read as little as those of ms-swift without it."""
    (found,) = one.ranks("host_syncs")
    for kind, samples in (("padded", 4), ("packing", 1)):
        without, theirs, ours = (found[f"{kind}, {who}"] for who in ("without", "theirs", "ours"))
        assert len(ours) == 6 and ours == without
        assert all(t >= w + samples for t, w in zip(theirs, without, strict=True))


def test_one_all_reduce_per_log(ranks: Launch) -> None:
    """Beyond what ms-swift sends without its flag: one for each window, and once the names."""
    for found in ranks.ranks("ddp"):
        plain, theirs, ours = (
            Counter(counts)
            for counts in (found["plain"], found["off"]["collectives"], found["on"]["collectives"])
        )
        # The last window is that of the run's end.
        windows_closed = len(windows(found["on"]["log"])) + 1
        assert ours - plain == {"all_reduce": windows_closed + 1}
        assert not plain - ours
        assert theirs["all_reduce"] - plain["all_reduce"] >= 4 * windows_closed


def test_an_evaluation_counts_records_once(one: Launch, ranks: Launch) -> None:
    """13 records on two ranks, with the weights that one process began with."""
    (alone,) = one.ranks("evaluation")
    first = next(entry for entry in alone["on"] if "eval_loss" in entry)
    for found in ranks.ranks("uneven_evaluation"):
        check_training(*({**found[who], "log": []} for who in ("off", "on")))
        entry = next(entry for entry in found["on"]["log"] if "eval_loss" in entry)
        names = [name for name in CHANNELS if f"eval_{name}_loss" in first]
        assert len(names) == 4
        for name in names:
            assert entry[f"eval_{name}_tokens"] == first[f"eval_{name}_tokens"]
            for key in (f"eval_{name}_loss", f"eval_loss_{name}"):
                assert entry[key] == pytest.approx(first[key], rel=1e-6)


@pytest.mark.parametrize("case", ["ddp", "zero2", "zero2_lora", "ulysses_padding_free", "ring"])
def test_two_ranks(ranks: Launch, case: str) -> None:
    for found in ranks.ranks(case):
        check_training(found["off"], found["on"])
        check_raw(found["on"]["log"], found["off"]["log"])
        check_sums(windows(found["on"]["log"]))


def test_the_layouts_are_what_they_are_called(ranks: Launch) -> None:
    """(Ulysses ranks, ring ranks)"""
    for case, layout in (("ulysses", [2, 1]), ("ulysses_padding_free", [2, 1]), ("ring", [1, 2])):
        assert all(found["ranks"] == layout for found in ranks.ranks(case))


def test_ulysses_with_weights_and_evaluation(ranks: Launch) -> None:
    for found in ranks.ranks("ulysses"):
        check_training(found["off"], found["on"])
        log = found["on"]["log"]
        check_sums(windows(log))
        evaluations = [entry for entry in log if "eval_loss" in entry]
        check_sums(evaluations, "eval_")
        assert any("eval_bbu_loss" in entry for entry in evaluations)


def test_a_stream_of_two_ranks(ranks: Launch) -> None:
    """The first rank sends names; the channels of ms-swift alone are all None."""
    for found in ranks.ranks("stream"):
        theirs = [{k: v for k, v in e.items() if "loss_" not in k} for e in found["off"]["log"]]
        check_training(found["off"] | {"log": theirs}, found["on"])
        check_sums(windows(found["on"]["log"]))
        seen = {name for entry in windows(found["on"]["log"]) for name in channels_in(entry)}
        assert seen == {*CHANNELS, "unlabeled"}
