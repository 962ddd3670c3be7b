"""Labels on further axes: how records give them, and how sums are added up per label."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given
from hypothesis import strategies as st

from channel_metrics import ChannelError, ConfigError, MetricsConfig
from channel_metrics.core.axes import AxisBook
from channel_metrics.core.labels import LabelTable, channels_of, field_columns, field_roots
from channel_metrics.core.names import joint_name, split_name
from channel_metrics.data.scan import class_names, scan_channels

CONFIG = MetricsConfig(axes={"domain": "meta.domain", "topic": ["topics", "topic"]})


def labels(record: dict[str, Any]) -> list[tuple[str | None, list[tuple[str, str]]]]:
    names = channels_of(record, CONFIG.label_fields)
    return [(None, []) if name is None else split_name(name) for name in names]


@pytest.mark.parametrize(
    ("record", "found"),
    [
        ({"channel": "a"}, [("a", [])]),
        ({"channel": "a", "meta": {"domain": "x"}}, [("a", [("domain", "x")])]),
        ({"channel": "a", "meta.domain": " x "}, [("a", [("domain", "x")])]),
        ({"meta": {"domain": "x"}}, [(None, [("domain", "x")])]),
        ({"meta": {"domain": float("nan")}}, [(None, [])]),
        ({"channel": "a", "topic": 3}, [("a", [("topic", "3")])]),
        # The first field that has a label; several labels.
        (
            {"channel": "a", "topics": ["m", "s", "m", None], "topic": "n"},
            [("a", [("topic", "m"), ("topic", "s")])],
        ),
        ({"channel": "a", "topics": [], "topic": "n"}, [("a", [("topic", "n")])]),
        # A pack: one entry per sequence, or one for all.
        (
            {"channel": ["a", None], "topic": ["m", "n"], "meta": {"domain": "x"}},
            [("a", [("domain", "x"), ("topic", "m")]), (None, [("domain", "x"), ("topic", "n")])],
        ),
        (
            {"channel": ["a", "b"], "topics": [["m", "s"], None]},
            [("a", [("topic", "m"), ("topic", "s")]), ("b", [])],
        ),
        ({"channel": ["a"], "topics": [["m", "s"]]}, [("a", [("topic", "m"), ("topic", "s")])]),
    ],
)
def test_labels_of_a_record(record: dict[str, Any], found: list[Any]) -> None:
    assert labels(record) == found


def test_a_list_of_another_length_is_refused() -> None:
    with pytest.raises(ChannelError, match="lists labels for 3 sequences, but the record has 2"):
        labels({"channel": ["a", "b"], "topic": ["m", "n", "o"]})


def test_columns_and_class_names() -> None:
    fields = CONFIG.label_fields
    assert field_roots(fields)[-3:] == ("meta", "topics", "topic")
    assert {"meta.domain", "topic"} <= field_columns(fields)
    features = Features({"channel": Value("string"), "topic": ClassLabel(names=["m", "n"])})
    dataset = Dataset.from_dict({"channel": ["a", "b"], "topic": [1, -1]}, features=features)
    assert class_names(dataset, fields) == {"topic": ("m", "n")}
    assert scan_channels(dataset, fields, "train") == [joint_name("a", [("topic", "n")]), "b"]


def test_a_training_set_with_labels_but_no_channels_is_refused() -> None:
    dataset = Dataset.from_dict({"topic": ["m", "n"]})
    with pytest.raises(
        ChannelError, match=r"looked for channel, dataset_source.*dataset_id, found"
    ):
        scan_channels(dataset, CONFIG.label_fields, "train")


def test_declared_channels_and_joint_names() -> None:
    a, c = (joint_name(name, [("topic", "m")]) for name in "ac")
    table = LabelTable(["a", "b"], unknown="unlabeled")
    assert not table.knows_all([a])
    assert table.ids([a, c, "c"]) == [2, 3, -1]
    assert table.names[3] == joint_name(None, [("topic", "m")])
    assert table.knows_all([a, "c", None])
    with pytest.raises(ChannelError, match="channel 'c' is not in the declared table"):
        LabelTable(["a"], unknown="error").ids([c])


def test_rows() -> None:
    book = AxisBook(
        {"kind": {"a": "x"}, "topic": ()},
        [("channel", "topic"), ("kind", "topic")],
        form="{axis}:{label}",
    )
    assert book.rows(joint_name("a", [("topic", "m"), ("topic", "s"), ("other", "o")])) == [
        "a", "kind:x", "topic:m", "topic:s", "channel.topic:a.m", "channel.topic:a.s",
        "kind.topic:x.m", "kind.topic:x.s",
    ]  # fmt: skip
    assert book.rows(None) == [
        "unlabeled", "kind:unlabeled", "topic:unlabeled", "channel.topic:unlabeled.unlabeled",
        "kind.topic:unlabeled.unlabeled",
    ]  # fmt: skip
    twice = AxisBook({"topic": ()}, [("channel", "topic")] * 2).rows("a")
    assert twice == ["a", "topic/unlabeled", "channel.topic/a.unlabeled"], "counted once"
    with pytest.raises(ChannelError, match="channel 'kind:x' has the name of the label 'x'"):
        book.names(["a", "kind:x"])
    with pytest.raises(ChannelError, match="'tree_mean/x' has the name of the label 'x' on the ax"):
        AxisBook({}, tree=1).names(["x/y", "tree_mean/x"])
    book = AxisBook({"b": {"one": "xa"}, "ab": {"one": "x"}}, form="{label}{axis}")
    with pytest.raises(ChannelError, match=r"'xa' on the axis 'b' and 'x' .* both be called 'xab'"):
        book.rows("one")


NAMES = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", None]), st.lists(st.sampled_from(["m", "n", "o"]), unique=True)
    ),
    max_size=8,
    unique_by=lambda pair: (pair[0], tuple(pair[1])),
)


@given(NAMES, st.integers(0, 1000))
def test_sums_per_label_are_those_of_a_loop(given_: list[Any], seed: int) -> None:
    pairs = [(c, topics) for c, topics in given_ if c is not None or topics]
    names = tuple(str(joint_name(c, [("topic", t) for t in topics])) for c, topics in pairs)
    sums = torch.rand(len(pairs) + 1, 2, generator=torch.Generator().manual_seed(seed)).double()
    book = AxisBook({"kind": {"a": "x"}, "topic": ()})
    book.project(names[:1], sums[:2])  # names that come up later are rows, too
    found = book.project(names, sums)
    assert len({*found.names}) == len(found.names)
    wanted: dict[str, list[float]] = {}
    for (channel, topics), row in zip([(None, []), *pairs], sums.tolist(), strict=True):
        kind = "x" if channel == "a" else "unlabeled"
        of_topics = [f"topic/{topic}" for topic in topics or ["unlabeled"]]
        for name in (channel or "unlabeled", f"kind/{kind}", *of_topics):
            before = wanted.get(name, [0.0, 0.0])
            wanted[name] = [one + more for one, more in zip(before, row, strict=True)]
    rows = dict(zip(("unlabeled", *found.names), found.sums.tolist(), strict=True))
    assert rows.keys() - wanted.keys() <= {"unlabeled"}
    for name, of_row in wanted.items():
        assert rows[name] == pytest.approx(of_row)
    assert set(found.names[: found.num_channels]) == {c for c, _ in pairs if c is not None}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"axes": ["domain"]}, "axes must map the name of an axis to its field"),
        ({"axes": {"a b": "x"}}, "the name of an axis must be letters"),
        ({"axes": {"channel": "x"}}, "and none of channel, tree, tree_mean"),
        ({"axes": {"domain": 3}}, "axes.domain must be a field, a list of fields, or a mapping"),
        ({"axes": {"domain": {"bbu": 3}}}, "but maps 'bbu' to 3"),
        ({"cross": [["channel", "domain"]]}, "cross names the axis 'domain'"),
        ({"axes": {"d": "x"}, "cross": [["d"]]}, "must list two or more different axes"),
        ({"axes": {"d": "x"}, "cross": [["d", "d"]]}, "must list two or more different axes"),
        ({"axes": {"d": "x"}, "cross": "d"}, "cross must be a list of lists of axes"),
        ({"axis_format": "{axis}"}, "axis_format must be built from"),
        ({"axis_format": "{axis}/{name}"}, "axis_format must be built from"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        MetricsConfig.from_mapping(settings)
