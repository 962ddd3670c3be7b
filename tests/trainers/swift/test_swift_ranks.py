"""ms-swift's own trainer on two ranks: DDP, dispatched streams, DeepSpeed, sequence parallelism."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rank_cases import Case, RanksOf, case
from swift_checks import channels_in, check_raw, check_sums, check_training, windows
from swift_files import CHANNELS, given, ranks_given, shared_data
from swift_tools import ON, SWIFT, both, needs_swift, run
from transformers import AttentionInterface

pytestmark = needs_swift
alone = case(SWIFT, ranks=1)
on_two = case(SWIFT, ranks=2, setup="hf_deepspeed:without_shared_memory")
in_parts = case(SWIFT, ranks=2)


# ms-swift chooses fp16 for float32, which DeepSpeed has not for a CPU.
EXACT: dict[str, Any] = {"fp16": False, "bf16": False}
ZERO_2 = {
    "zero_optimization": {"stage": 2},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
}


@on_two
def ddp(folder: Path) -> Any:
    """And what ms-swift sends without its flag."""
    plain = run(ranks_given(folder, enable_channel_loss=False), None)
    return both(ranks_given(folder)) | {"plain": plain["collectives"]}


def test_one_all_reduce_per_log(ranks_of: RanksOf) -> None:
    """Beyond what ms-swift sends without its flag: one for each window, and once the names."""
    for found in ranks_of(ddp):
        plain, theirs, ours = (
            Counter(counts)
            for counts in (found["plain"], found["off"]["collectives"], found["on"]["collectives"])
        )
        # The last window is that of the run's end.
        windows_closed = len(windows(found["on"]["log"])) + 1
        assert ours - plain == {"all_reduce": windows_closed + 1}
        assert not plain - ours
        assert theirs["all_reduce"] - plain["all_reduce"] >= 4 * windows_closed


@alone
def evaluation(folder: Path) -> Any:
    options: dict[str, Any] = {
        "val_dataset": [str(shared_data(folder)["plain"]) + "#13"],
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_on_start": True,
        "per_device_eval_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "metric_for_best_model": "macro_loss",
        "load_best_model_at_end": False,
    }
    plain = run(given(folder / "off", **options | {"metric_for_best_model": "loss"}), None)
    objective = replace(ON, metrics=(*ON.metrics, "macro_loss"))
    metered = run(given(folder / "on", **options), objective)
    best = metered["trainer"].state.best_metric
    return {"off": plain["log"], "on": metered["log"], "best": best}


def test_evaluation(ranks_of: RanksOf) -> None:
    (found,) = ranks_of(evaluation)
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
    losses = [[ours[f"eval_{name}_loss"] for name in CHANNELS] for _, ours in pairs]
    best = min(sum(of_channels) / len(of_channels) for of_channels in losses)
    # ms-swift rounds what it logs.
    assert found["best"] == pytest.approx(best, abs=1e-8)


@on_two
def uneven_evaluation(folder: Path) -> Any:
    """13 records on two ranks: one is evaluated twice."""
    given: dict[str, Any] = {"eval_strategy": "steps", "eval_on_start": True, "max_steps": 1}
    validation = f"{ranks_given(folder)['dataset'][0]}#13"
    batch: dict[str, Any] = {"per_device_eval_batch_size": 4, "val_dataset": [validation]}
    return both(ranks_given(folder, **given, **batch))


def test_an_evaluation_counts_records_once(ranks_of: RanksOf) -> None:
    """13 records on two ranks, with the weights that one process began with."""
    (alone,) = ranks_of(evaluation)
    first = next(entry for entry in alone["on"] if "eval_loss" in entry)
    for found in ranks_of(uneven_evaluation):
        check_training(*({**found[who], "log": []} for who in ("off", "on")))
        entry = next(entry for entry in found["on"]["log"] if "eval_loss" in entry)
        names = [name for name in CHANNELS if f"eval_{name}_loss" in first]
        assert len(names) == 4
        for name in names:
            assert entry[f"eval_{name}_tokens"] == first[f"eval_{name}_tokens"]
            for key in (f"eval_{name}_loss", f"eval_loss_{name}"):
                assert entry[key] == pytest.approx(first[key], rel=1e-6)


@on_two
def zero2(folder: Path) -> Any:
    return both(ranks_given(folder, deepspeed=ZERO_2, **EXACT))


@on_two
def zero2_lora(folder: Path) -> Any:
    given: dict[str, Any] = {"tuner_type": "lora", "lora_rank": 2, "target_modules": ["all-linear"]}
    return both(ranks_given(folder, deepspeed=ZERO_2, **EXACT, **given))


def _itself(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    groups = query.shape[1] // value.shape[1]
    return value.repeat_interleave(groups, dim=1).transpose(1, 2).contiguous(), None


def _sequence_parallel(folder: Path, *args: Any, runs: Any = both, **overrides: Any) -> Any:
    from swift.sequence_parallel import sequence_parallel

    # Packs under sequence parallelism need flash attention. With this one a token sees only itself,
    # so that everything else runs: how rows are cut, losses gathered, and channels counted.
    AttentionInterface.register("itself", _itself)
    options = ranks_given(folder, *args, sequence_parallel_size=2, **overrides)
    try:
        found = runs(options)
        ranks = (sequence_parallel.sp_world_size, sequence_parallel.rp_world_size)
        return found | {"ranks": ranks}
    finally:
        sequence_parallel.world_size = 1


@in_parts
def ulysses(folder: Path) -> Any:
    """Padded rows, weighted tokens, and an evaluation; ms-swift's own attention."""
    given: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "per_device_eval_batch_size": 4,
    }
    found = {"split_dataset_ratio": 0.1, "loss_scale": "react", **given}
    return _sequence_parallel(folder, "react", **found)


@in_parts
def ulysses_padding_free(folder: Path) -> Any:
    return _sequence_parallel(folder, attn_impl="itself", padding_free=True)


@in_parts
def ring(folder: Path) -> Any:
    """One key-value head cannot be divided: ms-swift takes rings, of zigzag parts."""
    from swift.sequence_parallel.sequence_parallel import SequenceParallel

    # Its groups are made once per process.
    SequenceParallel._global_inited = False
    return _sequence_parallel(folder, "react", 1, attn_impl="itself", padding_free=True)


def by_domain(options: dict[str, Any]) -> dict[str, Any]:
    """Runs with the domain as an axis, and as the channel."""
    field = "metadata._fusion_domain"
    configs = {"axis": replace(ON, axes={"domain": field}), "alone": replace(ON, fields=(field,))}
    return {name: windows(run(options, config)["log"]) for name, config in configs.items()}


@in_parts
def labels(folder: Path) -> Any:
    options = {"attn_impl": "itself", "padding_free": True, "enable_channel_loss": False}
    return _sequence_parallel(folder, "fused", runs=by_domain, **options)


def test_labels_from_a_column_with_ulysses(ranks_of: RanksOf) -> None:
    domains = ("target_", "source_", "unlabeled_")
    for found in ranks_of(labels):
        for entry, alone in zip(found["axis"], found["alone"], strict=True):
            of_axis = {key: v for key, v in entry.items() if key.startswith("domain/")}
            wanted = {f"domain/{key}": v for key, v in alone.items() if key.startswith(domains)}
            assert of_axis == wanted
        keys = {key for entry in found["axis"] for key in entry}
        assert {"domain/target_loss", "domain/source_tokens", "bbu_loss"} <= keys


@pytest.mark.parametrize("case", [ddp, zero2, zero2_lora, ulysses_padding_free, ring])
def test_two_ranks(ranks_of: RanksOf, case: Case) -> None:
    for found in ranks_of(case):
        check_training(found["off"], found["on"])
        check_raw(found["on"]["log"], found["off"]["log"])
        check_sums(windows(found["on"]["log"]))


def test_the_layouts_are_what_they_are_called(ranks_of: RanksOf) -> None:
    """(Ulysses ranks, ring ranks)"""
    for of, layout in ((ulysses, (2, 1)), (ulysses_padding_free, (2, 1)), (ring, (1, 2))):
        assert all(found["ranks"] == layout for found in ranks_of(of))


def test_ulysses_with_weights_and_evaluation(ranks_of: RanksOf) -> None:
    for found in ranks_of(ulysses):
        check_training(found["off"], found["on"])
        log = found["on"]["log"]
        check_sums(windows(log))
        evaluations = [entry for entry in log if "eval_loss" in entry]
        check_sums(evaluations, "eval_")
        assert any("eval_bbu_loss" in entry for entry in evaluations)


@on_two
def stream(folder: Path) -> Any:
    """The first rank makes the batches of both."""
    return both(ranks_given(folder, "fused", streaming=True))


def test_a_stream_of_two_ranks(ranks_of: RanksOf) -> None:
    """The first rank sends names; the channels of ms-swift alone are all None."""
    for found in ranks_of(stream):
        theirs = [{k: v for k, v in e.items() if "loss_" not in k} for e in found["off"]["log"]]
        check_training(found["off"] | {"log": theirs}, found["on"])
        check_sums(windows(found["on"]["log"]))
        seen = {name for entry in windows(found["on"]["log"]) for name in channels_in(entry)}
        assert seen == {*CHANNELS, "unlabeled"}
