"""`llamafactory-cli train`, stages dpo and kto, and a stage without metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from llamafactory_tools import EPOCH, ONLY_HERE, Command, make_files
from mixture_runs import NAMES

pytestmark = [ONLY_HERE, pytest.mark.timeout(900)]

CONFIG = "metrics: [loss, samples, share]"
SHARED = {**EPOCH, "config": CONFIG, "eval_strategy": "epoch"}
PAIRS = {"dataset": "code_pairs,chat_pairs", "eval_dataset": "code_pairs,chat_pairs"}
ANSWERS = {"dataset": "code_kto,chat_kto", "eval_dataset": "code_kto,chat_kto"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, files: Path) -> dict[str, Command]:
    folder = tmp_path_factory.mktemp("runs")
    against: dict[str, Any] = {**SHARED, "ref_model": str(files / "other")}
    runs: dict[str, dict[str, Any]] = {
        "dpo": {**against, **PAIRS, "stage": "dpo", "pref_ftx": 0.5},
        "kto": {**against, **ANSWERS, "stage": "kto"},
        "rm": {**PAIRS, "stage": "rm"},
    }
    runs |= {f"{stage}_ranks": {**runs[stage], "ranks": 2} for stage in ("dpo", "kto")}
    return {name: Command(files, folder / name, **given).end() for name, given in runs.items()}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def evaluation(command: Command) -> dict[str, Any]:
    (entry,) = (entry for entry in command.log if "eval_runtime" in entry)
    return entry


@pytest.mark.parametrize("run", ["dpo", "dpo_ranks"])
def test_losses_and_rewards_of_pairs(ran: dict[str, Command], files: Path, run: str) -> None:
    from llamafactory_oracle import dpo_loss, records, rewards

    trained, evaluated = ran[run].values, evaluation(ran[run])
    for name in (f"{name}_pairs" for name in NAMES):
        pairs = [tuple(rewards(files, record)) for record in records(files, name[:-6])]
        chosen, rejected = (mean(list(side)) for side in zip(*pairs, strict=True))
        loss = mean([dpo_loss(files, record, ftx=0.5) for record in records(files, name[:-6])])
        for prefix, found in (("", trained), ("eval_", evaluated)):
            key = f"{prefix}{name}_"
            assert found[f"{key}samples"] == 24
            assert found[f"{key}loss"] == pytest.approx(loss, rel=1e-5)
            assert found[f"{key}rewards/chosen"] == pytest.approx(chosen, abs=1e-5)
            assert found[f"{key}rewards/rejected"] == pytest.approx(rejected, abs=1e-5)
            assert found[f"{key}rewards/margins"] == pytest.approx(chosen - rejected, abs=1e-5)
            right = mean([float(a > b) for a, b in pairs])
            assert found[f"{key}rewards/accuracies"] == pytest.approx(right)


@pytest.mark.parametrize("run", ["dpo", "dpo_ranks", "kto", "kto_ranks"])
def test_losses_add_up_to_that_of_the_stage(ran: dict[str, Command], run: str) -> None:
    found = evaluation(ran[run])
    kind = "pairs" if run.startswith("dpo") else "kto"
    assert sum(found[f"eval_{name}_{kind}_share"] for name in NAMES) == pytest.approx(1)
    # Both sets have 24 records, and all batches have one size.
    loss = mean([found[f"eval_{name}_{kind}_loss"] for name in NAMES])
    assert loss == pytest.approx(found["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("run", ["kto", "kto_ranks"])
def test_rewards_of_answers(ran: dict[str, Command], files: Path, run: str) -> None:
    from llamafactory_oracle import records, rewards

    trained, evaluated = ran[run].values, evaluation(ran[run])
    for name in NAMES:
        of: dict[bool, list[float]] = {True: [], False: []}
        for record in records(files, name):
            of[record["good"]].append(next(rewards(files, record)))
        chosen, rejected = mean(of[True]), mean(of[False])
        wanted = {"chosen": chosen, "rejected": rejected, "margins": chosen - rejected}
        for prefix, found in (("", trained), ("eval_", evaluated)):
            assert found[f"{prefix}{name}_kto_samples"] == 24
            for key, value in wanted.items():
                logged = found[f"{prefix}{name}_kto_rewards/{key}"]
                assert logged == pytest.approx(value, abs=1e-5)


def test_another_stage_is_left_alone_with_one_line(ran: dict[str, Command]) -> None:
    assert "stages sft, pt, dpo and kto, but this run has a PairwiseTrainer" in ran["rm"].output
    assert not any("code_pairs" in key for key in ran["rm"].values)
