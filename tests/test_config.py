"""`MetricsConfig`: what it takes, what it refuses."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from channel_metrics import ChannelMetricsError, ConfigError, MetricsConfig
from channel_metrics.config import refuse_unknown_keys
from channel_metrics.core.labels import DEFAULT_FIELDS
from channel_metrics.core.schema import DEFAULT_METRICS
from channel_metrics.data.yaml import load_metrics_config


def test_defaults() -> None:
    config = MetricsConfig()
    assert config.fields == DEFAULT_FIELDS
    assert config.metrics == DEFAULT_METRICS
    assert config.new_table().names == ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.unknown = "error"  # type: ignore[misc]  # frozen, which is the point


def test_from_plain_values() -> None:
    config = MetricsConfig.from_mapping(
        {"channels": ["bbu", "rru"], "unknown": "error", "key_format": "{metric}_{channel}"}
    )
    assert config.channels == ("bbu", "rru")
    table = config.new_table(reserved=["x"])
    assert (table.names, table.unknown, table.key_format, table.keys.reserved) == (
        ("bbu", "rru"),
        "error",
        "{metric}_{channel}",
        frozenset({"x"}),
    )
    assert config.new_table() is not config.new_table()
    assert hash(config) == hash(dataclasses.replace(config))


def test_metrics_of_the_window_and_of_the_run() -> None:
    config = MetricsConfig(metrics=("tokens_total", "loss", "samples_total", "share"))
    assert config.window_metrics == ("loss", "share")
    assert config.run_metrics == ("tokens_total", "samples_total")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"channel": ["bbu"]}, "unknown key 'channel' in metrics config; did you mean 'channels'?"),
        ({"zzzz": 1}, f"known are {', '.join(f.name for f in dataclasses.fields(MetricsConfig))}."),
        ({3: 1}, "unknown key 3 in metrics config"),
        ({"channels": "bbu"}, "channels must be a list of strings, but is 'bbu'."),
        ({"channels": None}, "channels must be a list of strings, but is None."),
        ({"channels": {"bbu": 1}}, "channels must be a list of strings, but is {'bbu': 1}."),
        ({"eval_channels": "bbu"}, "eval_channels must be a list of strings, but is 'bbu'."),
        ({"on_error": "ignore"}, 'on_error must be "raise", "warn" or None, but is \'ignore\'.'),
        ({"metrics": 3}, "metrics must be a list of strings, but is 3."),
        ({"fields": [1]}, "fields must be a list of strings, but is [1]."),
        ({"fields": []}, "fields must name at least one record field, but is empty."),
        ({"metrics": ["token_ac"]}, "unknown metric 'token_ac'; did you mean 'token_acc'?"),
        ({"unknown": True}, 'must be "add", "unlabeled" or "error", but is True.'),
        (
            {"key_format": "{channel}"},
            "hold both {channel} and {metric}, once and as they are, but is '{channel}'",
        ),
        ({"channels": ["a b", "a_b"]}, "'a b' and 'a_b' would both be logged as 'a_b'"),
        ({"channels": [""]}, "must be a non-empty string"),
    ],
)
def test_refuses(values: dict[Any, Any], message: str) -> None:
    with pytest.raises(ChannelMetricsError, match=re.escape(message)):
        MetricsConfig.from_mapping(values)


def test_unknown_keys_are_refused_in_any_mapping() -> None:
    refuse_unknown_keys({"a": 1}, ["a", "b"], "data")
    with pytest.raises(
        ConfigError, match=r"unknown key 'sourcs' in data; did you mean 'sources'\?"
    ):
        refuse_unknown_keys({"a": 1, "sourcs": 2}, iter(["a", "sources"]), "data")


def test_a_file_of_a_run_gives_its_section_metrics(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("sources: {a: {path: a.jsonl}}\nmetrics: {metrics: [ppl], fields: [lang]}\n")
    assert load_metrics_config(path) == MetricsConfig(metrics=("ppl",), fields=("lang",))
    path.write_text("sources: {a: {path: a.jsonl}}\n")
    assert load_metrics_config(path) == MetricsConfig()
    path.write_text("sources: {}\neval_domain: target\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: eval_domain .* metrics\.eval_channels"):
        load_metrics_config(path)
