"""TRL on two real processes: every pair, token and completion is counted once."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hf_case_tools import ddp
from rank_cases import RanksOf
from test_trl_grpo import COUNTED, Scores, grpo
from test_trl_grpo import expected as expected_rewards
from test_trl_kto import Batch, Batches, kto, kto_records
from test_trl_kto import expected as expected_answers
from test_trl_sft import LAYOUTS
from trl_dpo_tools import EVERYTHING, dpo, expected, pair_table
from trl_sft_tools import MySFT, sft
from trl_tools import logs, pair_records, text_records

from channel_metrics import MetricsConfig
from channel_metrics.trainers.hf import attach

PACKED = ("bfd", "wrapped_free")
RANKS: dict[str, Any] = {"learning_rate": 0.0, "ddp_backend": "gloo"}
EVALUATED: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 4}
METRICS = MetricsConfig(metrics=("loss", "tokens", "samples"))


@ddp
def all_trainers(folder: Path) -> dict[str, Any]:
    # transformers and trl warn of what the single-process tests ignore one by one.
    warnings.simplefilter("ignore")
    found = packs(folder, **RANKS)
    found["dpo"] = dpo(
        folder,
        pair_records(32),
        prepare=lambda trainer: attach(trainer, EVERYTHING),
        eval_dataset=Dataset.from_list(pair_records(11, seed=3)),
        gradient_accumulation_steps=1,
        logging_steps=4,
        **EVALUATED,
        **RANKS,
    )
    batches, scores = Batches(), Scores()
    found["kto"] = kto(
        folder,
        kto_records(32),
        prepare=lambda trainer: attach(trainer, EVERYTHING),
        before=batches,
        gradient_accumulation_steps=1,
        logging_steps=4,
        eval_dataset=Dataset.from_list(kto_records(11, seed=3)),
        **EVALUATED,
        **RANKS,
    )
    found["grpo"] = grpo(
        folder,
        scores=scores,
        prepare=lambda trainer: attach(trainer, COUNTED),
        # A group of four completions lies on both ranks.
        num_generations=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        logging_steps=4,
        **RANKS,
    )
    values = {name: (logs(t), logs(t, "eval_")) for name, t in found.items()}
    return {
        **values,
        "answers": batches.seen,
        "given": scores.given,
        "skipping": scores.skipping,
    }


def packs(folder: Path, **options: Any) -> dict[str, Any]:
    """A trainer for each layout; 15 packs or so do not fill the last batch of two ranks."""
    return {
        layout: sft(
            folder,
            MySFT,
            channel_metrics=METRICS,
            eval_dataset=Dataset.from_list(text_records(40, seed=5)),
            per_device_eval_batch_size=3,
            **EVALUATED,
            **options,
            **LAYOUTS[layout],
        )
        for layout in PACKED
    }


@pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated")
def test_two_ranks_count_everything_once(tmp_path: Path, ranks_of: RanksOf) -> None:
    first, second = ranks_of(all_trainers)
    # All 32 pairs in 4 steps of 2 x 4; 11 pairs leave the last batch of a rank short.
    records, held_out = pair_records(32), pair_records(11, seed=3)
    table = pair_table([*records, *held_out])
    (trained,), (evaluated,) = first["dpo"]
    want = expected(table, list(pair_table(records)))
    assert {k: v for k, v in trained.items() if not k.endswith("_total")} == pytest.approx(
        want, rel=1e-4, abs=1e-6
    )
    assert evaluated == pytest.approx(
        expected(table, list(pair_table(held_out)), "eval_"), rel=1e-4, abs=1e-6
    )
    for layout, trainer in packs(tmp_path, learning_rate=0.0).items():
        assert len(trainer.eval_dataset) % 6 not in (0, 5)
        (evaluated,), (alone,) = first[layout][1], logs(trainer, "eval_")
        assert evaluated == pytest.approx(alone, rel=1e-5)
        assert first[layout][1] and first[layout] == second[layout]
    (trained,), (evaluated,) = first["kto"]
    want = together(first["answers"][True], second["answers"][True])
    assert {k: v for k, v in trained.items() if not k.endswith("_total")} == pytest.approx(
        want, rel=1e-4, abs=3e-6
    )
    assert sum(v for k, v in evaluated.items() if k.endswith("_samples")) == 11
    want = together(first["answers"][False], second["answers"][False], 11)
    for key in (key for key in want if "rewards/" in key or "samples" in key):
        assert evaluated[f"eval_{key}"] == pytest.approx(want[key], rel=1e-4, abs=3e-6)
    given = first["given"] + second["given"]
    skipping = first["skipping"] + second["skipping"]
    (rewards,), _ = first["grpo"]
    assert rewards == pytest.approx(expected_rewards(given, skipping), rel=1e-5, abs=1e-6)
    assert len(given) == 16


def together(first: list[Batch], second: list[Batch], count: int | None = None) -> dict[str, float]:
    """What KTO's batches of both ranks give. count: of their answers, if the last are repeated."""
    both = [
        Batch([*a.answers, *b.answers], [*a.mismatched, *b.mismatched])
        for a, b in zip(first, second, strict=True)
    ]
    if count is not None:
        before = sum(len(batch.answers) for batch in both[:-1])
        del both[-1].answers[count - before :]
    return expected_answers(both)
