"""Sources are annotated, checked, and mixed by their ratios, the same for the same seed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from channel_metrics.config import MetricsConfig
from channel_metrics.demo.config import ModelConfig, Source, TrainConfig
from channel_metrics.demo.mixture import annotate, build_mixture, quotas, source_records
from channel_metrics.demo.tiny import TinyModel, byte_tokenizer
from channel_metrics.errors import ChannelMetricsError, ConfigError

TOKENIZER = byte_tokenizer()


@pytest.fixture(autouse=True)
def _no_progress_bars() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def config_of(*sources: Source, **changes: Any) -> TrainConfig:
    config = TrainConfig(sources=sources, model=ModelConfig(tiny=TinyModel()))
    return replace(config, metrics=MetricsConfig(), **changes)


def source_of(folder: Path, name: str, size: int = 10, **changes: Any) -> Source:
    path = write(folder / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(size)])
    return Source(name=name, path=path, **changes)


def texts_of(dataset: Any) -> list[str]:
    return [str(TOKENIZER.decode(ids, skip_special_tokens=True)) for ids in dataset["input_ids"]]


def test_annotation_keeps_the_records_own_metadata(tmp_path: Path) -> None:
    source = source_of(tmp_path, "bbu", template="aux", domain="target")
    fusion = {"_fusion_source": "bbu", "_fusion_template": "aux", "_fusion_domain": "target"}
    assert annotate(source, {"text": "a", "metadata": {"site": 1}}) == {
        "text": "a",
        "metadata": {"site": 1, **fusion},
    }
    assert annotate(source, {"text": "a", "metadata": None})["metadata"] == fusion


def test_metadata_of_all_sources_stands_side_by_side(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", [{"text": "aa", "metadata": {"day": "2024-01-01"}}])
    b = write(tmp_path / "b.jsonl", [{"text": "bb"}, {"text": "cc", "metadata": {"boxes": [1]}}])
    config = config_of(Source(name="a", path=a), Source(name="b", path=b), num_samples=4)
    mixture = build_mixture(config, TOKENIZER)
    held = {record["metadata"]["_fusion_source"]: record["metadata"] for record in mixture.train}
    assert held["a"]["day"] == "2024-01-01"
    assert held["b"]["day"] is None
    assert set(mixture.train.column_names) == {"input_ids", "labels", "metadata"}


def test_ratios_are_met_to_the_record_and_every_record_comes_before_one_repeats(
    tmp_path: Path,
) -> None:
    config = config_of(
        source_of(tmp_path, "a", 10, ratio=3), source_of(tmp_path, "b", 100), num_samples=100
    )
    texts = texts_of(build_mixture(config, TOKENIZER).train)
    counts = Counter(texts)
    assert Counter(text[0] for text in texts) == {"a": 75, "b": 25}
    assert {counts[f"a {i}"] for i in range(10)} == {7, 8}
    assert max(count for text, count in counts.items() if text[0] == "b") == 1


def test_the_same_seed_gives_the_same_order(tmp_path: Path) -> None:
    sources = source_of(tmp_path, "a"), source_of(tmp_path, "b")
    one, same, other = (
        texts_of(build_mixture(config_of(*sources, seed=seed), TOKENIZER).train)
        for seed in (1, 1, 2)
    )
    assert one == same != other


def test_held_out_records_are_not_trained_on(tmp_path: Path) -> None:
    config = config_of(source_of(tmp_path, "a", val_samples=3), num_samples=50)
    mixture = build_mixture(config, TOKENIZER)
    train, val = set(texts_of(mixture.train)), set(texts_of(mixture.val))
    assert len(train) == 7
    assert len(val) == 3
    assert not train & val


def test_val_path_and_none(tmp_path: Path) -> None:
    val_path = write(tmp_path / "val.jsonl", [{"text": "held"}])
    sources = source_of(tmp_path, "a", val_path=val_path), source_of(tmp_path, "b")
    assert texts_of(build_mixture(config_of(*sources), TOKENIZER).val) == ["held"]
    assert build_mixture(config_of(sources[1]), TOKENIZER).val is None


def test_messages_and_text_side_by_side_and_what_cannot_be_learned_is_counted(
    tmp_path: Path,
) -> None:
    answer = {"role": "assistant", "content": "yes"}
    records = [
        {"text": "plain"},
        {"messages": [{"role": "user", "content": "ok?"}, answer]},
        {"messages": [{"role": "user", "content": "long " * 30}, answer]},
        {"messages": [{"role": "user", "content": "no answer"}]},
    ]
    source = Source(name="a", path=write(tmp_path / "a.jsonl", records))
    mixture = build_mixture(config_of(source, max_length=60), TOKENIZER)
    assert mixture.num_skipped == 2
    assert len(mixture.train) == 2


def test_python_corpus_as_a_source() -> None:
    source = Source(name="docs", kind="python_corpus", part="topics", max_bytes=20_000)
    assert next(source_records(source))["metadata"]["_fusion_source"] == "docs"


@pytest.mark.parametrize(
    ("records", "changes", "message"),
    [
        ([{"text": "a"}, {"txt": "b"}], {}, r"a\.jsonl:2: .*txt"),
        ([{"text": "a", "metadata": {"x": i}} for i in (1, "s")], {}, "one type"),
        ([{"text": "a"}], {"val_samples": 1}, "none to train on"),
        ([{"messages": [{"role": "user", "content": "a"}]}], {}, "raise max_length"),
    ],
)
def test_data_that_cannot_be_used(
    tmp_path: Path, records: list[Any], changes: dict[str, Any], message: str
) -> None:
    source = Source(name="a", path=write(tmp_path / "a.jsonl", records), **changes)
    with pytest.raises(ChannelMetricsError, match=message):
        build_mixture(config_of(source), TOKENIZER)


def test_types_that_differ_between_sources(tmp_path: Path) -> None:
    sources = [
        Source(name=name, path=write(tmp_path / name, [{"text": "ab", "metadata": {"x": value}}]))
        for name, value in (("a", 1), ("b", {"y": "s"}))
    ]
    with pytest.raises(ChannelMetricsError, match="in all sources"):
        build_mixture(config_of(*sources), TOKENIZER)


def test_a_source_that_gets_nothing(tmp_path: Path) -> None:
    sources = source_of(tmp_path, "a", ratio=100), source_of(tmp_path, "b", ratio=0.001)
    with pytest.raises(ConfigError, match="source 'b' gets none"):
        build_mixture(config_of(*sources), TOKENIZER)


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=8), st.integers(0, 5000))
def test_quotas_add_up_and_are_within_one(ratios: list[float], total: int) -> None:
    parts = quotas(ratios, total)
    assert sum(parts) == total
    for part, ratio in zip(parts, ratios, strict=True):
        assert abs(part - ratio / sum(ratios) * total) < 1 + 1e-6
