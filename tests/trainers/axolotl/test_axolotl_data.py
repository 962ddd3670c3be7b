"""The channels of entries and rows, and the configs that are refused."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from axolotl_tools import ONLY_HERE, PLUGIN
from paths import ROOT

from channel_metrics.demo.tiny import byte_tokenizer
from channel_metrics.errors import ChannelError, ConfigError, UnsupportedVersionError
from channel_metrics.trainers.hf.columns import LENGTHS_COLUMN, NAMES_COLUMN, KeepsNames

pytestmark = [ONLY_HERE, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize(
    ("entries", "names"),
    [
        ([{"path": "/d/code.jsonl"}, {"path": "org/chat"}], ["code", "chat"]),
        ([{"path": "a/train.json"}, {"path": "b/train.json"}], ["a/train", "b/train"]),
        ([{"path": "train.json"}, {"path": "b/train.json"}], ["train", "b/train"]),
        (
            [{"path": "org/web-v1.5", "name": "main"}, {"path": "org/web-v1.5"}],
            ["main", "web-v1.5"],
        ),
        ([{"path": "json", "data_files": n} for n in ("x.json", ["y.json"])], ["x", "y"]),
        ([{"path": "a.json", "split": "x"}, {"path": "a.json", "split": "y"}], ["a", "a"]),
    ],
)
def test_the_name_of_an_entry(entries: list[dict[str, Any]], names: list[str]) -> None:
    from channel_metrics.trainers.axolotl.data import label_of

    assert [label_of(entry, entries) for entry in entries] == names


def test_duplicates_are_found_without_regard_to_the_channel() -> None:
    from axolotl.utils.data.utils import _deduplicate_dataset
    from datasets import Dataset

    from channel_metrics.trainers.axolotl.data import unique_rows

    rows = {"input_ids": [[1], [2], [1]], NAMES_COLUMN: ["a", "b", "b"]}
    dataset = Dataset.from_dict(rows)
    found, _ = unique_rows(_deduplicate_dataset, dataset)
    assert found[:] == {"input_ids": [[1], [2]], NAMES_COLUMN: ["a", "b"]}
    assert len(_deduplicate_dataset(dataset)[0]) == 3, "this is why the function is needed"


def test_texts_without_a_token_give_no_row() -> None:
    from axolotl.prompt_strategies.completion import load
    from axolotl.utils.dict import DictDefault

    strategy = load(byte_tokenizer(), DictDefault(train_on_inputs=True, sequence_len=4))
    keep = KeepsNames(strategy.tokenize_prompt, batched=True)
    assert keep({"text": [""], NAMES_COLUMN: ["a"]}) == {}
    made = keep({"text": ["", "12345", "1"], NAMES_COLUMN: ["a", "b", "c"]})
    assert made[NAMES_COLUMN] == ["b", "b", "c"]
    assert [len(ids) for ids in made["labels"]] == [4, 2, 2]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["BatchSampler", "V2BatchSampler"])
def test_rows_of_several_records(kind: str, side: str) -> None:
    from axolotl.utils.collators import batching

    from channel_metrics.trainers.hf.rows import RowsCollator

    tokenizer = byte_tokenizer()
    tokenizer.padding_side = side
    base = getattr(batching, f"{kind}DataCollatorForSeq2Seq")(tokenizer, pad_to_multiple_of=8)
    collate = RowsCollator(base, fields=(NAMES_COLUMN,), bounds_key="bounds", row_bounds=False)

    def record(channel: str, *ids: int) -> dict[str, Any]:
        places = list(range(len(ids)))
        return {"input_ids": list(ids), "labels": list(ids), "position_ids": places} | {
            "attention_mask": [1] * len(ids),
            NAMES_COLUMN: channel,
        }

    rows = [[record("a", 5, 6), record("b", 7, 8, 9)], [record("c", 1)]]
    batch = collate(rows)
    assert batch["channels"] == ["a", "b", "c"] and batch["input_ids"].shape == (2, 8)
    assert batch["bounds"].tolist() == [0, 2 if side == "right" else 5, 8, 16]
    # One row, without a list around it.
    assert collate(rows[0])["channels"] == ["a", "b"]
    zeros = torch.zeros(1, 8, dtype=torch.int64)
    base.tokenizer = SimpleNamespace(
        padding_side=side, pad=lambda *_, **__: dict.fromkeys(("input_ids", "labels"), zeros)
    )
    with pytest.raises(ChannelError, match="must hold the 5 tokens of its records"):
        collate(rows[0])


def test_without_metrics_a_collator_gets_rows_without_channels() -> None:
    from channel_metrics.trainers.hf.rows import WithoutNames

    record = {"input_ids": [1], "labels": [1]}
    ours = {**record, NAMES_COLUMN: ["a"], LENGTHS_COLUMN: [1]}
    collate = WithoutNames(tuple)
    assert collate([ours, [ours, ours]]) == (record, [record, record])
    assert collate.around(list)([ours]) == [record]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rl": "dpo"}, "supervised fine-tuning, but this config has `rl: dpo`"),
        ({"reward_model": True}, "this config has `reward_model: True`"),
        ({"pretraining_dataset": "web"}, "list the texts in `datasets:` with `type: completion`"),
        ({"streaming": True, "sample_packing": True}, "reads only the first of `datasets:`"),
        ({"context_parallel_size": 2}, "need whole rows, but with `context_parallel_size: 2`"),
        ({"channel_metrics": {"feilds": ["x"]}}, "fields"),
        ({"channel_metrics": "loss"}, "channel_metrics: expected keys and values"),
    ],
)
def test_a_config_that_is_refused(settings: dict[str, Any], said: str) -> None:
    from axolotl.utils.dict import DictDefault

    from channel_metrics.trainers.axolotl import ChannelMetricsPlugin

    with pytest.raises(ConfigError, match=said):
        ChannelMetricsPlugin().register(DictDefault(settings))


def test_another_trainer_is_refused() -> None:
    from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer

    from channel_metrics.trainers.axolotl.mixins import mixin_for

    with pytest.raises(UnsupportedVersionError, match="this run has a AxolotlDPOTrainer"):
        mixin_for(AxolotlDPOTrainer)


def test_a_release_without_a_function_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from axolotl.utils.data import utils
    from axolotl.utils.dict import DictDefault

    from channel_metrics.trainers.axolotl import ChannelMetricsPlugin

    monkeypatch.delattr(utils, "_deduplicate_dataset")
    with pytest.raises(UnsupportedVersionError, match=r"lacks: .*_deduplicate_dataset; use 0\.21"):
        ChannelMetricsPlugin().register(DictDefault({}))


def test_the_lines_of_the_page(capfd: pytest.CaptureFixture[str]) -> None:
    from axolotl.integrations.base import load_plugin
    from axolotl.utils.data import sft
    from axolotl.utils.dict import DictDefault

    page = (ROOT / "docs" / "axolotl.md").read_text()
    first, second = map(yaml.safe_load, re.findall(r"```yaml\n(.*?)```", page, re.DOTALL))
    assert first == {"plugins": [PLUGIN]}
    plugin, before = load_plugin(PLUGIN), sft.get_dataset_wrapper
    plugin.register(DictDefault({**second, "datasets": [{"path": "org/chat"}]}))
    try:
        assert plugin.config.fields == ("source",)
        assert sft.get_dataset_wrapper is not before
    finally:
        plugin.on_config_validation_error(DictDefault({}))
    assert sft.get_dataset_wrapper is before
    assert "the channels of `datasets:` are chat" in capfd.readouterr().err
