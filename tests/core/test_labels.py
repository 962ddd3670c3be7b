"""Names: out of records, into ids, into log keys."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch

from channel_metrics import ChannelError, ChannelTable, ConfigError
from channel_metrics.core import names
from channel_metrics.core.keys import metric_key, sanitize
from channel_metrics.core.labels import (
    DEFAULT_FIELDS,
    channel_of,
    channels_of,
    field_roots,
    winning_field,
)


@pytest.mark.parametrize(
    ("record", "channels"),
    [
        ({"channel": "bbu"}, ["bbu"]),
        ({"dataset_id": 7}, ["7"]),
        ({"dataset_id": np.int64(7)}, ["7"]),
        ({"dataset_id": torch.tensor(7)}, ["7"]),
        ({"channel": np.array("bbu")}, ["bbu"]),
        ({"metadata": {"_fusion_source": "rru"}}, ["rru"]),
        ({"metadata._fusion_source": "flat"}, ["flat"]),
        ({"channel": None, "dataset_source": "second"}, ["second"]),
        ({"channel": "first", "dataset_source": "second"}, ["first"]),
        ({"channel": ["a", None, 3]}, ["a", None, "3"]),
        ({"channel": ("a", "b")}, ["a", "b"]),
        ({"channel": float("nan"), "dataset_id": 3.0}, ["3"]),
        ({"channel": np.float64("nan")}, [None]),
        ({"channel": pd.NA, "dataset_source": pd.NaT}, [None]),
        ({"channel": "", "dataset_source": "  "}, [None]),
        ({"channel": ["a", "", float("nan"), 3.0, pd.NA, "a "]}, ["a", None, None, "3", None, "a"]),
        ({"channel": np.array(["a", "b", "a"])}, ["a", "b", "a"]),
        ({"channel": torch.tensor([3, 1, 3])}, ["3", "1", "3"]),
        ({"channel": [torch.tensor(3), np.int64(1)]}, ["3", "1"]),
        ({"metadata": "not a mapping"}, [None]),
        ({"metadata": {}}, [None]),
        ({}, [None]),
    ],
)
def test_channels_of_a_record(record: dict[str, Any], channels: list[str | None]) -> None:
    assert channels_of(record) == channels


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"channel": None, "dataset_source": "second"}, "dataset_source"),
        ({"channel": [None, "a"], "dataset_source": "second"}, "channel"),
        ({"channel": [None], "dataset_source": "second"}, None),
        ({"channel": [None, ""], "dataset_source": "second"}, None),
        ({}, None),
    ],
)
def test_the_winning_field_is_the_one_that_gives_the_channels(
    record: dict[str, Any], field: str | None
) -> None:
    assert winning_field(record) == field
    if field is not None:
        assert channels_of(record, [field]) == channels_of(record)


def test_integers_that_number_classes() -> None:
    classes = {"source": ("web", "books")}
    assert channels_of({"source": 1}, ["source"], classes) == ["books"]
    assert channels_of({"source": [0, -1, None, 1]}, ["source"], classes) == [
        *["web", None, None, "books"]
    ]
    assert channels_of({"source": "web", "other": 1}, ["source"], classes) == ["web"]
    assert channels_of({"other": 1}, ["source", "other"], classes) == ["1"]
    with pytest.raises(ChannelError, match="-1 or 0 to 1, but is 2"):
        channels_of({"source": 2}, ["source"], classes)


def test_spaces_around_a_name_are_left_out_and_told_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "_told", set())
    assert channels_of({"channel": "web "}) == channels_of({"channel": ["web"]}) == ["web"]
    assert channels_of({"channel": "\tbooks"}) == ["books"]
    assert [record.getMessage() for record in caplog.records] == [
        "channel 'web ' has spaces around it: it is counted as 'web'."
    ]
    # Declared names, too.
    table = ChannelTable(["web ", " books"], unknown="error")
    assert table.names == ("web", "books")
    assert table.ids(["web", "books ", " unlabeled"]) == [0, 1, -1]


def test_names_join_together_or_not_at_all() -> None:
    table = ChannelTable(["bbu"])
    for call in (table.ids, table.add_all):
        with pytest.raises(ChannelError, match="'a!' and 'a\\?' would both"):
            call(["new", "a!", "bbu", "a?"])
        assert table.names == ("bbu",)
    assert table.ids(["a?", "new"]) == [1, 2]


def test_own_fields() -> None:
    record = {"meta": {"origin": {"name": "web"}}, "channel": "ignored"}
    assert channels_of(record, ["meta.origin.name"]) == ["web"]
    assert channels_of(record, ["meta.origin.other", "channel"]) == ["ignored"]
    assert channel_of(record, ["meta.origin.name"]) == "web"
    assert field_roots(["meta.a", "channel", "meta.b"]) == ("meta", "channel")
    assert field_roots(DEFAULT_FIELDS) == ("channel", "dataset_source", "metadata", "dataset_id")


def test_ids_count_in_the_order_of_the_names() -> None:
    table = ChannelTable(["bbu", "rru", "bbu"])
    assert list(table.names) == ["bbu", "rru"]
    assert len(table) == 2
    assert "rru" in table
    assert "lvis" not in table
    assert table.ids(["rru", None, "unlabeled", "lvis", "bbu"]) == [1, -1, -1, 2, 0]
    assert list(table.names) == ["bbu", "rru", "lvis"]
    assert table.add("rru") == 1
    assert repr(table) == "ChannelTable(['bbu', 'rru', 'lvis'], unknown='add')"


def test_unknown_names() -> None:
    unlabeled = ChannelTable(["bbu"], unknown="unlabeled")
    assert unlabeled.ids(["lvis", "bbu"]) == [-1, 0]
    assert unlabeled.names == ("bbu",)
    assert unlabeled.knows_all(["lvis"])
    strict = ChannelTable(["bbu"], unknown="error")
    assert strict.ids(["bbu", None, "unlabeled"]) == [0, -1, -1]
    with pytest.raises(
        ChannelError, match=re.escape("'lvis' is not in the declared table ['bbu']")
    ):
        strict.ids(["lvis"])
    growing = ChannelTable(["bbu"])
    assert growing.knows_all(["bbu", None, "unlabeled"])
    assert not growing.knows_all(["bbu", "lvis"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ChannelTable(["a b", "a_b"]), "'a b' and 'a_b' would both be logged as 'a_b'"),
        (lambda: ChannelTable([""]), "must be a non-empty string, but is ''"),
        (lambda: ChannelTable(["  "]), "must be a non-empty string, but is '  '"),
        (lambda: ChannelTable().ids(cast(Any, [3])), "must be a non-empty string, but is 3"),
        (
            lambda: channels_of({"channel": 1.5}),
            "'channel' of a record must be a name or an integer",
        ),
        (lambda: channels_of({"channel": True}), "but is bool; point `fields`"),
        (lambda: channels_of({"metadata": {"_fusion_source": {}}}), "but is dict"),
        (lambda: channels_of({"channel": [["a"]]}), "but is list"),
        (lambda: channel_of({"channel": ["a", "b"]}), "one channel for a record, but it lists 2"),
    ],
)
def test_refuses_names(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ChannelError, match=re.escape(message)):
        call()


@pytest.mark.parametrize(
    "key_format",
    ["{channel}", "{metric}", "loss", "{channel}_{metric}_{step}", "{channel", "{}_{}",
     "{channel.x}_{metric}", "{channel[x]}_{metric}", None, 5],
)  # fmt: skip
def test_refuses_key_formats(key_format: Any) -> None:
    with pytest.raises(ConfigError, match=re.escape(repr(key_format))):
        ChannelTable(key_format=key_format)


def test_refuses_other_treatments_of_unknown_names() -> None:
    with pytest.raises(ConfigError, match='"add", "unlabeled" or "error", but is \'drop\''):
        ChannelTable(unknown=cast(Any, "drop"))


def test_refuses_the_keys_of_the_trainer() -> None:
    with pytest.raises(ConfigError, match="'train' would be logged as 'train_loss'"):
        ChannelTable(["train"], reserved=["train_loss"])
    assert ChannelTable(["train"], key_format="{metric}_{channel}", reserved=["train_loss"])
    table = ChannelTable(reserved=["eval_loss"])
    with pytest.raises(ConfigError, match="'eval_loss'"):
        table.ids(["eval"])
    assert table.names == ()


def test_keys() -> None:
    assert metric_key("{channel}_{metric}", "bbu", "loss") == "bbu_loss"
    assert metric_key("{metric}_{channel}", "bbu", "loss") == "loss_bbu"
    assert metric_key("{metric}/{channel}", "a b", "loss") == "loss/a_b"
    assert sanitize("web/en v1.5-x (new): é") == "web/en_v1.5-x_new_é"


@pytest.mark.parametrize(
    ("key_format", "names"),
    [
        ("{channel}_{metric}", ("bbu", "bbu_weighted")),
        ("{channel}_{metric}", ("bbu_weighted", "bbu")),
        # `tokens_total` + `x` and `tokens` + `total_x`.
        ("{metric}_{channel}", ("x", "total_x")),
    ],
)
def test_keys_of_different_metrics(key_format: str, names: tuple[str, str]) -> None:
    """`bbu_weighted` + `loss` reads like `bbu` + `weighted_loss`."""
    with pytest.raises(ChannelError, match="of different metrics or splits; rename one of them"):
        ChannelTable(names, key_format=key_format)
    assert len(ChannelTable(names, key_format="{channel}/{metric}")) == 2
