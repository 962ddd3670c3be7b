"""A `MixedStream` in TRL's SFTTrainer, in the way of docs/sampler.md."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from datasets import Dataset
from hf_case_tools import ddp
from paths import ROOT
from rank_cases import RanksOf
from sampler_tools import CONFIG, check_draws, values, weights
from trl import SFTConfig
from trl_tools import arguments, text_records, tiny_model

from channel_metrics.demo.tiny import byte_tokenizer

ROWS = 4
# On two ranks, two workers are two batches ahead each, and transformers one.
BATCHES_AHEAD = (2 * 2 + 1) * 2


def mixed(folder: Path, lag: int, checkpoint: Path | None = None, **options: Any) -> Any:
    """Run the block of the page, with a window per step. lag: in batches of one rank."""
    (block,) = [
        block.split("```")[0]
        for block in (ROOT / "docs/sampler.md").read_text().split("```python\n")[1:]
        if "import SFTTrainer" in block
    ]
    steps = {"logging_steps": 1, "gradient_accumulation_steps": 1, "max_length": 24}
    args = SFTConfig(**arguments(folder, **steps, **options))
    assert args.per_device_train_batch_size == ROWS and "lag=rows" in block
    records = [r for r in text_records(96) if r["channel"] in CONFIG.channels]
    names: dict[str, Any] = {
        "model": tiny_model(),
        "args": args,
        "tokenizer": byte_tokenizer(),
        "records": Dataset.from_list(records),
        "config": CONFIG,
    }
    block = block.replace("lag=rows", f"lag={lag} * rows")
    if checkpoint is not None:
        block = block.replace("train()", f"train(resume_from_checkpoint={str(checkpoint)!r})")
    exec(block, names)
    return names["trainer"]


def of(trainer: Any) -> list[dict[str, float]]:
    return values(entry for entry in trainer.state.log_history if "loss" in entry)


def test_the_page(tmp_path: Path) -> None:
    trainer = mixed(tmp_path, 1, max_steps=6)
    found = of(trainer)
    # The change after step 1 holds from step 3 on, as one batch is read ahead.
    assert weights(found)[:2] == [0.5, 0.5] and 0.8 < weights(found)[2] < weights(found)[5]
    check_draws(found, ROWS, ROWS)
    assert trainer.channel_metrics.sampler._counts().total() == 6 * ROWS


def test_resume_goes_on_with_the_draw(tmp_path: Path) -> None:
    given: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4}
    whole = of(mixed(tmp_path / "whole", 1, **given))
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    resumed = mixed(tmp_path / "resumed", 1, checkpoint, **given, ignore_data_skip=True)
    assert of(resumed) == whole and len(whole) == 6
    check_draws(of(resumed), ROWS, ROWS)


@ddp
def with_workers(folder: Path) -> list[dict[str, float]]:
    warnings.simplefilter("ignore")  # transformers and trl warn of what the test above ignores
    return of(
        mixed(
            folder,
            BATCHES_AHEAD,
            max_steps=9,
            dataloader_num_workers=2,
            pad_to_multiple_of=32,  # the first rank reads for all, so batches have one width
            ddp_backend="gloo",
        )
    )


def test_two_ranks_with_two_workers(ranks_of: RanksOf) -> None:
    first, second = ranks_of(with_workers)
    assert first == second and len(first) == 9
    assert weights(first)[5] == 0.5 < weights(first)[6]
    check_draws(first, 2 * ROWS, BATCHES_AHEAD * ROWS)
