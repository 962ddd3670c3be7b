"""`KeyBook`: the log keys of a run, and which of them would be one key."""

from __future__ import annotations

import pickle
import time
from collections import Counter
from collections.abc import Callable
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from channel_metrics import ChannelError, ChannelTable, ConfigError
from channel_metrics.core.keys import KeyBook, metric_key
from channel_metrics.core.labels import Unknown
from channel_metrics.core.schema import TOKENS, Metric


def messages(book: KeyBook, *names: str, prefix: str | None = None) -> list[str]:
    return [str(error) for error in book.learn(names, prefix)]


def slashes_gone(key: str) -> str:
    return key.replace("/", "_")


def test_keys_of_a_channel() -> None:
    book = KeyBook()
    assert book.key("bbu", "loss") == "bbu_loss"
    assert book.key("a b", "loss", "eval_") == "eval_a_b_loss"
    assert KeyBook("{metric}/{channel}").key("unlabeled", "ppl", "eval_") == "eval_ppl/unlabeled"
    assert book.learn(["bbu", "rru", "bbu", "unlabeled"]) == [] and not book.clashes


@pytest.mark.parametrize(
    ("names", "prefixes", "keys"),
    [
        # One name after the characters that trackers refuse are gone.
        (["a b", "a_b"], [], {"a_b_loss", "a_b_tokens_total"}),
        # Two metrics.
        (["bbu", "bbu_weighted"], [], {"bbu_weighted_loss"}),
        # Two splits.
        (["bbu", "eval_bbu"], ["eval_"], {"eval_bbu_loss", "eval_bbu_ppl"}),
        # Two splits, of which one prefix continues the other.
        (["bbu", "val_bbu"], ["eval_", "eval_val_"], {"eval_val_bbu_loss"}),
        # Both at once: `eval_` + `bbu` + `_weighted_loss`.
        (["bbu", "eval_bbu_weighted"], ["eval_"], {"eval_bbu_weighted_loss"}),
        # What has no channel has keys too.
        (["eval_unlabeled"], ["eval_"], {"eval_unlabeled_loss"}),
    ],
)
def test_clashes(names: list[str], prefixes: list[str], keys: set[str]) -> None:
    """In whatever order names and splits come, they are found, said once, and left out."""
    for order in (names, names[::-1]):
        for prefixes_first in (True, False):
            book = KeyBook()
            said = [] if prefixes_first else messages(book, *order)
            for prefix in prefixes:
                said += messages(book, prefix=prefix)
            said += messages(book, *order)
            (message,) = said
            assert "would both be logged as" in message and "rename one of them" in message
            assert keys <= book.clashes
            # Said already.
            assert book.learn(order) == []
            assert [book.learn(prefix=prefix) for prefix in prefixes] == [[]] * len(prefixes)


def test_what_does_not_clash_is_let_be() -> None:
    book = KeyBook()
    assert messages(book, "bbu", "eval_bbu") == []  # no evaluation has such a prefix yet
    assert messages(book, prefix="test_") == []
    assert messages(book, prefix="eval_") != []
    assert "eval_bbu_loss" in book.clashes
    assert not {"bbu_loss", "test_bbu_loss", "eval_eval_bbu_loss"} & book.clashes
    # A format that keeps metric and channel apart.
    apart = KeyBook("{channel}/{metric}")
    assert messages(apart, "bbu", "bbu_weighted", prefix="eval_") == []


@st.composite
def books(draw: st.DrawFn) -> tuple[str, list[str], list[str]]:
    parts = st.sampled_from(["eval", "val", "weighted", "loss", "total", "x", "tokens"])
    name = st.lists(parts, min_size=1, max_size=3).map("_".join)
    key_format = draw(st.sampled_from(["{channel}_{metric}", "{metric}_{channel}"]))
    prefixes = draw(st.lists(name.map("{}_".format), max_size=2, unique=True))
    return key_format, prefixes, draw(st.lists(name, max_size=4, unique=True))


@given(books())
def test_equals_a_search_through_all_keys(drawn: tuple[str, list[str], list[str]]) -> None:
    """Each key that two (split, channel, metric) have is a clash, and nothing else is."""
    key_format, prefixes, names = drawn
    book = KeyBook(key_format)
    found, learned = book.learn(names), [""]
    for prefix in prefixes:
        learned.append(prefix)
        found += book.learn(prefix=prefix)
    keys = Counter(
        prefix + metric_key(key_format, name, metric)
        for prefix, name, metric in product(learned, {*names, "unlabeled"}, TOKENS.metric_names)
    )
    assert book.clashes == {key for key, count in keys.items() if count > 1}
    assert bool(found) == bool(book.clashes)


def test_a_prefix_under_which_all_channels_clash() -> None:
    """`weighted_` + `loss_x` is `weighted_loss_x`, whatever x is."""
    book = KeyBook("{metric}_{channel}")
    book.learn(["a"])
    said = messages(book, prefix="weighted_")
    assert len(said) == 2 and all("would twice be logged as" in message for message in said)
    assert book.clashes == {"weighted_loss_a", "weighted_loss_unlabeled"}
    assert book.learn(["a"], prefix="eval_") == []


def test_a_channel_that_clashes_with_itself() -> None:
    book = KeyBook()
    book.learn(["weighted"])
    (message,) = messages(book, prefix="weighted_")
    assert message == (
        "channel 'weighted' would twice be logged as 'weighted_weighted_loss', of different "
        "metrics or splits; rename it or choose another key_format."
    )
    assert book.clashes == {"weighted_weighted_loss"}


def test_reserved_keys() -> None:
    book = KeyBook(reserved=["train_loss", "eval_loss", "eval_runtime"])
    (message,) = messages(book, "train", "bbu", "run")
    assert message == (
        "channel 'train' would be logged as 'train_loss', which is the trainer's own key; rename "
        "the channel or choose another key_format."
    )
    assert book.clashes == {"train_loss"}
    (message,) = messages(book, "eval")
    assert "'eval_loss'" in message
    # `eval_` + `x_loss` is the key of a channel `x` in evaluation.
    late = KeyBook(reserved=["eval_x_loss"])
    assert messages(late, "x") == []
    assert "'eval_x_loss'" in messages(late, prefix="eval_")[0]


def test_keys_that_are_reserved_later() -> None:
    book = KeyBook()
    book.learn(["probe", "bbu"])
    assert book.reserve(["other_loss"]) == []
    (error,) = book.reserve(["probe_loss"])
    assert "'probe' would be logged as 'probe_loss'" in str(error)
    assert isinstance(error, ConfigError) and book.clashes == {"probe_loss"}
    assert book.reserve(["probe_loss"]) == []
    assert messages(book, "other") != []


def test_writers_that_rewrite_keys() -> None:
    """ms-swift's writers turn "/" into "_"."""
    plain = KeyBook("{metric}/{channel}", reserved=["loss_a"])
    assert messages(plain, "x", "total/x", "a", "a/b", "a_b") == []
    book = KeyBook("{metric}/{channel}", reserved=["loss_a"], rewrite=slashes_gone)
    said = messages(book, "x", "total/x", "a", "a/b", "a_b")
    assert len(said) == 3
    assert "'x' and 'total/x' would both be logged as 'tokens/total/x'" in said[0]
    assert "'a' would be logged as 'loss/a', which is the trainer's own key" in said[1]
    assert "'a/b' and 'a_b' would both be logged as 'a_b'" in said[2]
    assert {"tokens/total/x", "tokens_total/x", "loss/a", "loss/a/b", "loss/a_b"} <= book.clashes


def test_metrics_with_a_key_of_their_own() -> None:
    schema = TOKENS.extended(
        Metric("swift", (), lambda s: 0.0, key="loss_{channel}", unlabeled="None", always=True)
    )
    book = KeyBook(schema=schema)
    assert book.key("bbu", "swift", "eval_") == "eval_loss_bbu"
    assert book.key("unlabeled", "swift") == "loss_None"
    assert book.key("unlabeled", "loss") == "unlabeled_loss"
    # `loss_x` + `_loss` is `loss_` + `x_loss`.
    (message,) = messages(book, "loss_x", "x_loss")
    assert "'loss_x_loss'" in message
    # That is the key of the tokens without a channel.
    (message,) = messages(book, "None")
    assert "'None' would be logged as 'loss_None'" in message and "loss_None" in book.clashes


@pytest.mark.parametrize(
    "key_format",
    ["{channel:>10}_{metric}", "{channel!r}_{metric}", "{channel}_{metric:.3}",
     "{channel}_{metric!s}", "{channel}_{channel}_{metric}", "{channel}{metric}{}",
     "{0}_{metric}", "", "{channel"],
)  # fmt: skip
def test_formats_that_would_change_a_name_are_refused(key_format: str) -> None:
    with pytest.raises(ConfigError, match="key_format must"):
        KeyBook(key_format)


def test_a_format_that_gives_two_metrics_one_key() -> None:
    schema = TOKENS.extended(Metric("own", (), lambda s: 0.0, key="{channel}_loss"))
    with pytest.raises(ConfigError, match="gives 'loss' and 'own' of a channel the same key"):
        KeyBook(schema=schema)


def test_a_name_that_comes_late_leaves_the_others_alone() -> None:
    book = KeyBook()
    assert messages(book, "bbu", "rru") == []
    assert len(messages(book, "bbu_weighted", "lvis")) == 1
    assert book.clashes == {"bbu_weighted_loss"}
    assert book.key("bbu_weighted", "ppl") not in book.clashes


@pytest.mark.slow
@pytest.mark.parametrize("key_format", ["{channel}_{metric}", "{metric}/{channel}"])
def test_100000_channels_in_three_evaluations(key_format: str) -> None:
    book = KeyBook(key_format, reserved=["loss", "eval_loss", "learning_rate"])
    start = time.process_time()
    assert book.learn(f"channel{i:06}" for i in range(100_000)) == []
    for prefix in ("eval_", "eval_code_", "test_"):
        assert book.learn(prefix=prefix) == []
    assert (
        len(book.learn(["eval_channel000007"] if key_format[1] == "c" else ["channel000007?"])) < 2
    )
    assert time.process_time() - start < 30


@pytest.mark.parametrize("unknown", ["add", "error"])
def test_a_table_travels_to_workers_without_its_metrics(
    monkeypatch: pytest.MonkeyPatch, unknown: Unknown
) -> None:
    """A metric that somebody registered may be a lambda, which cannot be pickled."""
    monkeypatch.setattr(TOKENS, "metrics", [*TOKENS.metrics, Metric("own", (), lambda s: 0.0)])
    table = ChannelTable(
        ["a", "b"], unknown=unknown, key_format="{channel}/{metric}", reserved=["x/loss"]
    )
    again = pickle.loads(pickle.dumps(table))
    assert (again.names, again.unknown, again.key_format) == (("a", "b"), unknown, table.key_format)
    with pytest.raises(ConfigError, match="'x/loss'"):
        again.add("x")


@pytest.mark.parametrize("make", [ChannelTable, lambda n: ChannelTable(n[::-1])])
def test_a_table_refuses_what_the_book_finds(make: Callable[[list[str]], ChannelTable]) -> None:
    with pytest.raises(ChannelError, match="would both be logged as 'bbu_weighted_loss'"):
        make(["bbu", "bbu_weighted"])


def test_a_reserved_key_hides_no_other_clash() -> None:
    for order in (["train_weighted", "train"], ["train", "train_weighted"]):
        book = KeyBook(reserved=["train_loss"])
        for name in order:
            book.learn([name])
        assert book.clashes == {"train_loss", "train_weighted_loss"}
