"""What `check` finds in data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from channel_metrics.cli.check import check_data, find_problems
from channel_metrics.config import MetricsConfig
from channel_metrics.errors import ChannelError, ChannelMetricsError, ConfigError

DEBUG = Path(__file__).parents[2] / "configs" / "fused_data" / "debug.yaml"


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_fields_records_and_tokens(tmp_path: Path) -> None:
    first = write(
        tmp_path / "a.jsonl",
        [
            {"text": "x" * 40, "channel": "bbu"},
            {"text": "x" * 20, "metadata": {"_fusion_source": "rru"}},
            {"text": "x" * 20, "channel": None, "dataset_source": "rru"},
        ],
    )
    second = write(tmp_path / "b.jsonl", [{"text": "x" * 8}, {"text": "xx", "channel": ["a", "b"]}])
    result = check_data([first, second])
    assert result.num_records == {"bbu": 1, "rru": 2, None: 1, "a": 1, "b": 1}
    assert result.num_tokens == {"bbu": 10, "rru": 10, None: 2, "a": 0.25, "b": 0.25}
    assert result.found_in == {
        "channel": 2,
        "dataset_source": 1,
        "metadata._fusion_source": 1,
        None: 1,
    }
    assert result.has_channel
    assert not result.problems


def test_another_field(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "a", "meta": {"lang": "de"}}])
    assert not check_data([path]).has_channel
    assert check_data([path], fields=["meta.lang"]).num_records == {"de": 1}


def test_a_run_is_checked_as_it_would_be_trained() -> None:
    alone, as_option = check_data([DEBUG]), check_data([], config_path=DEBUG)
    assert alone == as_option
    assert alone.num_records == {"bbu": 200, "rru": 200, "lvis": 200, "lang_chat": 200}
    assert alone.tokens_by == "tokenizer byte"


def test_the_tokenizer_of_a_run_counts_other_files(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "abc", "channel": "a"}])
    assert check_data([path], config_path=DEBUG).num_tokens == {"a": 3}


def test_the_file_of_a_metrics_config_gives_its_fields(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "abc", "lang": "de", "channel": "a"}])
    config = tmp_path / "metrics.yaml"
    config.write_text("fields: [lang]\nmetrics: [loss, ppl]\n")
    assert check_data([path], config_path=config).num_records == {"de": 1}
    with pytest.raises(ConfigError, match=r"metrics\.yaml names no sources; give JSONL files"):
        check_data([], config_path=config)


def test_problems_with_names() -> None:
    problems = find_problems(["b u", "b_u", "eval", "unlabeled", "", None, "fine"], MetricsConfig())
    for part in ("'b_u'", "'eval_loss'", "'unlabeled'", "non-empty"):
        assert sum(part in problem for problem in problems) == 1
    assert len(problems) == 4


def test_a_field_without_a_name_in_it_is_named_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"channel": "a"}, {"channel": {"id": 1}}])
    with pytest.raises(ChannelError, match=r"a\.jsonl:2: field 'channel'"):
        check_data([path])


def test_arguments_that_do_not_fit(tmp_path: Path) -> None:
    for data, config in (([], None), ([DEBUG, tmp_path / "a.jsonl"], None), ([DEBUG], DEBUG)):
        with pytest.raises(ConfigError, match="JSONL files, or the YAML of one run"):
            check_data(data, config_path=config)
    with pytest.raises(ChannelMetricsError, match="does not exist"):
        check_data([tmp_path / "a.jsonl"])
