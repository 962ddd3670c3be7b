"""A `MixedStream` in TRL's SFTTrainer, in the way of docs/sampler.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from paths import ROOT
from sampler_tools import CONFIG, values, weights
from trl import SFTConfig
from trl_tools import arguments, text_records, tiny_model

from channel_metrics.demo.tiny import byte_tokenizer


def test_the_page(tmp_path: Path) -> None:
    (block,) = [
        block.split("```")[0]
        for block in (ROOT / "docs/sampler.md").read_text().split("```python\n")[1:]
        if "import SFTTrainer" in block
    ]
    options = {"max_steps": 6, "logging_steps": 1, "gradient_accumulation_steps": 1}
    args = SFTConfig(**arguments(tmp_path, max_length=24, **options))
    records = [r for r in text_records(96) if r["channel"] in CONFIG.channels]
    names: dict[str, Any] = {
        "model": tiny_model(),
        "args": args,
        "tokenizer": byte_tokenizer(),
        "records": Dataset.from_list(records),
        "config": CONFIG,
    }
    exec(block, names)
    trainer = names["trainer"]
    found = values(entry for entry in trainer.state.log_history if "loss" in entry)
    # The change after step 1 holds from step 3 on, as one batch is read ahead.
    assert weights(found)[:2] == [0.5, 0.5] and 0.8 < weights(found)[2] < weights(found)[5]
    samples = [sum(v for k, v in log.items() if k.endswith("_samples")) for log in found]
    assert samples == [4] * 6
    assert trainer.channel_metrics.sampler._counts().total() == 24
