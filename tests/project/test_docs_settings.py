"""Each block of YAML or JSON in README and docs is read by what it is meant for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_docs_blocks import ALL, ROOT, Block, first_line

from channel_metrics import ChannelMetrics, MetricsConfig, MicroBatch
from channel_metrics.core.labels import channel_of
from channel_metrics.probes.probe import ProbeConfig

# {(page, first line of a block): the test that reads it}, if it is no file of `MetricsConfig`
OTHER = {
    ("docs/axolotl.md", "plugins:"): "tests/trainers/axolotl/test_axolotl_data.py",
    ("docs/axolotl.md", "channel_metrics:"): "tests/trainers/axolotl/test_axolotl_data.py",
    ("docs/config.md", "sources:"): "tests/project/test_generated_docs.py",
    ("docs/probe.md", "probe:"): "tests/project/test_docs_settings.py",
}
YAML = [block for block in ALL if block.language == "yaml"]
SETTINGS = [block for block in YAML if (block.page, first_line(block)) not in OTHER]


@pytest.mark.parametrize("block", SETTINGS, ids=lambda block: f"{block.page}:{block.line}")
def test_settings(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = yaml.safe_load(block.text)
    config = MetricsConfig.from_mapping(given)
    assert given and all(getattr(config, name) for name in given)
    given.pop("on_window", None)  # names a module of the reader
    given.pop("reference", None)  # names a file of the reader
    given["metrics"] = [
        *given.get("metrics", ()),
        *{"loss", "macro_loss"} - {*given.get("metrics", ())},
    ]
    ChannelMetrics(MetricsConfig.from_mapping(given))


def test_other_files_are_read_elsewhere() -> None:
    assert set(OTHER) <= {(block.page, first_line(block)) for block in YAML}
    for (page, _), test in OTHER.items():
        assert page.rpartition("/")[2] in (ROOT / test).read_text(encoding="utf-8")


def block_of(page: str, language: str) -> Block:
    """The only block of a page in a language."""
    (block,) = [b for b in ALL if b.page == page and b.language == language]
    return block


def test_the_settings_of_a_probe() -> None:
    section = yaml.safe_load(block_of("docs/probe.md", "yaml").text)["probe"]
    assert section.pop("sources") == {"canary": "canary.jsonl"}
    assert ProbeConfig(**section).every == 20


def test_the_record_of_the_playbook() -> None:
    record = json.loads(block_of("docs/TRAINING_PLAYBOOK.md", "json").text)
    assert channel_of(record, MetricsConfig().fields) == "bbu"


class Letters:
    """A tokenizer, as far as outliers need one."""

    def decode(self, tokens: list[int]) -> str:
        return "b" * len(tokens)


def test_the_line_of_outliers(tmp_path: Path) -> None:
    shown = json.loads(block_of("docs/acting.md", "json").text)
    outliers = {"folder": str(tmp_path), "count": 1, "id_field": "id"}
    metrics = ChannelMetrics(MetricsConfig(outliers=outliers, live_table=False))
    metrics.read_tokenizer(Letters())
    losses, labels = torch.ones(1, 3), torch.ones(1, 3, dtype=torch.int64)
    metrics.count(MicroBatch(token_losses=losses, labels=labels, channels=["bbu"]))
    metrics.close(shown["step"])
    line = json.loads((tmp_path / "rank0.jsonl").read_text().splitlines()[0])
    assert list(line) == list(shown)
    same = ("channel_metrics", "channel", "split", "step")
    assert [line[key] for key in same] == [shown[key] for key in same]


def test_every_block_of_json_is_read() -> None:
    pages = [block.page for block in ALL if block.language == "json"]
    assert sorted(pages) == ["docs/TRAINING_PLAYBOOK.md", "docs/acting.md"]
