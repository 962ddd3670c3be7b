"""`swift rlhf`: a fault of ours, and runs without metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faults
import pytest
from rank_cases import RanksOf, case
from swift_rlhf_files import CHANNELS, NUM_RECORDS, given, shared
from swift_tools import SWIFT, needs_swift, run

from channel_metrics import ConfigError, MetricsConfig

pytestmark = needs_swift
alone = case(SWIFT, ranks=1)


@alone
def fault(folder: Path) -> Any:
    """In the second step, after a first evaluation and window; then an evaluation by TRL's code."""
    options = given(folder, "orpo", eval_steps=2)
    # Three batches of five records, and all pairs of the first step.
    before = 3 + NUM_RECORDS // 2
    found = {"off": run(options, None)}
    with faults.inject("count the records of rlhf", lambda call, *_: call > before):
        found["on"] = run(options)
    for of_run in found.values():
        del of_run["trainer"]
    return found


def test_a_fault_ends_the_metrics_only(ranks_of: RanksOf) -> None:
    (found,) = ranks_of(fault)
    off, on = found["off"], found["on"]
    assert (on["weights"], on["random"]) == (off["weights"], off["random"])
    (told,) = on["told"]
    assert "a fault of ours" in told
    with_ours = [any(key.startswith(CHANNELS) for key in entry) for entry in on["log"]]
    kinds = [next(k for k in ("eval_loss", "loss", "train_loss") if k in e) for e in on["log"]]
    assert kinds == ["eval_loss", "loss", "loss", "eval_loss", "train_loss"]
    # The keys of evaluations begin with `eval_`.
    assert with_ours == [False, True, False, False, False]
    assert [f"eval_{CHANNELS[0]}_samples" in entry for entry in on["log"]] == [True, *[False] * 4]


@alone
def without(folder: Path) -> Any:
    """Runs that have no metrics, and what they say."""
    sequences = given(folder / "dpo", "dpo", eval_strategy="no", max_steps=1)
    teacher = {
        "teacher_model": str(shared(folder) / "reference"),
        "teacher_model_type": "qwen2",
    }
    options = given(folder / "gkd", "gkd", eval_strategy="no", max_steps=1, **teacher)
    from swift import RLHFArguments

    from channel_metrics.trainers.swift.tasks import why_without_metrics

    found = {"gkd": [run(options, None), run(options)]}
    for of_run in found["gkd"]:
        del of_run["trainer"]
    follows = MetricsConfig(sampler={"start": {"bbu": 1, "rru": 1}, "rule": "loss"})
    with pytest.raises(ConfigError) as error:
        run(options, follows)
    reasons: dict[str, str | None] = {"sampler": str(error.value)}
    args = RLHFArguments(**sequences)
    reasons["dpo"] = why_without_metrics(args)
    args.sequence_parallel_size = 2
    reasons["parallel"] = why_without_metrics(args)
    args.sequence_parallel_size, args.rlhf_type, args.multi_turn_scheduler = 1, "grpo", "math_tip"
    reasons["turns"] = why_without_metrics(args)
    args.rlhf_type, args.task_type = None, "seq_cls"
    reasons["classes"] = why_without_metrics(args)
    return found | {"reasons": reasons}


def test_runs_without_metrics_say_so(ranks_of: RanksOf) -> None:
    (found,) = ranks_of(without)
    off, on = found["gkd"]
    assert (on["log"], on["weights"]) == (off["log"], off["weights"])
    (told,) = on["told"]
    assert told.startswith("no channel metrics in this run")
    assert "dpo, orpo, cpo, rm, kto, grpo, and this is rlhf_type gkd." in told
    assert found["reasons"] == {
        "sampler": "the setting `sampler` follows channel metrics, which this run does not have: "
        "this is rlhf_type gkd; leave it out.",
        "dpo": None,
        "parallel": "rlhf_type dpo has them only with sequence_parallel_size 1",
        "classes": "this is task_type seq_cls",
        "turns": "rlhf_type grpo has them only without multi_turn_scheduler",
    }


@alone
def units(folder: Path) -> Any:
    from channel_metrics.trainers.trl.kto import KTO_SCHEMA
    from channel_metrics.trainers.trl.samples import pair_schema

    schemas = (KTO_SCHEMA, pair_schema(), pair_schema(1.0))
    return {
        kind: {one.name: one.unit for schema in schemas for one in getattr(schema, kind)}
        for kind in ("metrics", "columns")
    }


def test_only_shares_of_a_whole_have_no_unit(ranks_of: RanksOf) -> None:
    (both,) = ranks_of(units)
    found = both["metrics"]
    assert {name for name, unit in found.items() if not unit} == {"share", "rewards/accuracies"}
    assert found["nll_loss"] == found["loss"] == "nats"
    assert found["rewards/margins"] == both["columns"]["margins"] == "rewards"
    assert both["columns"]["accuracies"] == "pairs"
