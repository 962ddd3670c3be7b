"""`ChannelMetrics` with more than one label per record: axes, groups of names, and `top`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from session_tools import Seen, batch, new

from channel_metrics import ChannelError, ConfigError
from channel_metrics.core.names import joint_name
from channel_metrics.trainers.wanted import check_wanted

EN, DE = [("lang", "en")], [("lang", "de")]
A_EN, A_DE, B_EN = (str(joint_name(*pair)) for pair in (("a", EN), ("a", DE), ("b", EN)))
LANG: dict[str, Any] = {"axes": {"lang": ()}}
TOTALS = ("loss", "tokens", "share", "tokens_total")


def test_a_window_holds_channels_and_labels() -> None:
    seen = Seen()
    metrics = new(metrics=TOTALS, on_window=[seen], **LANG)
    metrics.count(batch((A_EN, 1, 1.0), (A_DE, 3, 2.0), (B_EN, 4, 4.0), (None, 2, 8.0)))
    window = metrics.close(1)
    assert list(window.values) == ["a", "b", "unlabeled"]
    assert window.values["a"] == {"loss": 1.75, "tokens": 4, "share": 0.4, "tokens_total": 4}
    assert window.axes == {
        "lang": {
            "en": {"loss": 3.4, "tokens": 5, "share": 0.5, "tokens_total": 5},
            "de": {"loss": 2.0, "tokens": 3, "share": 0.3, "tokens_total": 3},
            "unlabeled": {"loss": 8.0, "tokens": 2, "share": 0.2, "tokens_total": 2},
        }
    }
    assert (window.logs["lang/en_loss"], window.logs["a_loss"]) == (3.4, 1.75)
    assert window.sums("lang/de")["nll"] == 6.0 and window.sums("a")["nll"] == 7.0
    assert seen == [window]
    # Counts of an open window are left out, of labels too.
    metrics.count(batch((A_EN, 1, 1.0)))
    assert "lang/en_loss" in (logs := metrics.peek(2).logs) and "lang/en_tokens" not in logs


def test_totals_of_labels_go_on_after_a_resume(tmp_path: Path) -> None:
    metrics = new(metrics=TOTALS, **LANG)
    metrics.count(batch((A_EN, 1, 1.0), (B_EN, 4, 4.0)))
    metrics.close(1)
    metrics.save(tmp_path, is_writer=True)
    # Also with an axis that the run before did not have.
    later = new(metrics=TOTALS, axes={"lang": (), "kind": {"b": "x"}})
    later.resume(tmp_path)
    later.count(batch((A_EN, 2, 1.0), (B_EN, 1, 1.0)))
    logs = later.close(2).logs
    totals = {key: value for key, value in logs.items() if key.endswith("tokens_total")}
    assert totals == {
        "a_tokens_total": 3, "b_tokens_total": 5, "lang/en_tokens_total": 8,
        "kind/x_tokens_total": 5, "kind/unlabeled_tokens_total": 3,
    }  # fmt: skip


def test_eval_channels_choose_channels_and_no_labels() -> None:
    metrics = new(eval_channels=("a",), **LANG)
    metrics.declare_names([A_EN, A_DE, B_EN])
    metrics.check_eval_channels()
    with metrics.evaluation("eval", 1) as found:
        metrics.count(batch((A_EN, 1, 1.0), (B_EN, 1, 3.0)))
    assert found.logs == {
        "eval_a_loss": 1.0, "eval_a_tokens": 1, "eval_lang/en_loss": 2.0, "eval_lang/en_tokens": 2,
    }  # fmt: skip
    sets = {"eval_": metrics.rows([A_EN, B_EN])}
    assert "eval_lang/en_loss" in check_wanted(metrics, "eval_lang/en_loss", sets, "monitor")
    with pytest.raises(ConfigError, match="eval_channels leaves out 'b'"):
        check_wanted(metrics, "eval_b_loss", sets, "monitor")
    with pytest.raises(
        ConfigError, match="no record of this evaluation set has the channel 'lang/de'"
    ):
        check_wanted(metrics, "eval_lang/de_loss", sets, "monitor")
    with pytest.raises(ConfigError, match="eval_channels names 'lang/en'"):
        new(eval_channels=("lang/en",), unknown="error", **LANG)


def test_a_channel_with_the_name_of_a_label_is_refused() -> None:
    with pytest.raises(ChannelError, match="has the name of the label 'en' on the axis 'lang'"):
        new(**LANG).declare_names([A_EN, "lang/en"])
    metrics = new(**LANG, on_error="raise")
    metrics.count(batch((A_EN, 1, 1.0), ("lang/en", 1, 1.0)))
    with pytest.raises(ChannelError, match="choose another axis_format"):
        metrics.close(1)


@pytest.mark.parametrize(
    ("unknown", "channels"), [("unlabeled", ["a", "unlabeled"]), ("add", ["a", "b"])]
)
def test_declared_channels(unknown: Any, channels: list[str]) -> None:
    metrics = new("a", unknown=unknown, **LANG)
    metrics.count(batch((A_EN, 1, 1.0), (B_EN, 1, 3.0)))
    window = metrics.close(1)
    assert list(window.values) == channels
    assert window.axes["lang"]["en"] == {"loss": 2.0, "tokens": 2}


def test_groups_of_names() -> None:
    metrics = new(tree=2, metrics=("loss", "tokens"))
    metrics.count(
        batch(
            ("code/py/web", 1, 1.0), ("code/py/ml", 3, 2.0), ("code/rs", 4, 4.0), ("chat", 1, 9.0)
        )
    )
    window = metrics.close(1)
    assert window.axes == {
        "tree": {
            "code": {"loss": 23 / 8, "tokens": 8},
            "code/py": {"loss": 7 / 4, "tokens": 4},
        },
        # The children of `code` are a group and a channel.
        "tree_mean": {"code": {"loss": (7 / 4 + 4) / 2}, "code/py": {"loss": 1.5}},
    }
    assert window.logs["tree_mean/code_loss"] == 2.875
    one = new(tree=1)
    one.count(batch(("code/py/web", 1, 1.0), ("code/rs", 1, 4.0), ("a", 1, 0.0)))
    # `code/py` is no row here, so the only child of `code` is `code/rs`.
    assert one.close(1).axes == {
        "tree": {"code": {"loss": 2.5, "tokens": 2}},
        "tree_mean": {"code": {"loss": 4.0}},
    }


def test_top_adds_the_others_up(caplog: pytest.LogCaptureFixture) -> None:
    metrics = new(top=2, metrics=TOTALS, axes={"lang": {"a": "en", "b": "de", "c": "fr"}})
    counts = [("a", 5, 1.0), ("b", 3, 2.0), ("c", 2, 4.0), (None, 1, 0.0)]
    metrics.count(batch(*counts))
    window = metrics.close(1)
    assert list(window.values) == ["a", "b", "others", "unlabeled"]
    assert window.values["others"] == {"loss": 4.0, "tokens": 2, "share": 2 / 11}
    assert list(window.axes["lang"]) == ["en", "de", "others", "unlabeled"]
    assert window.sums("c")["tokens"] == 2.0, "the table of the window holds all"
    assert sum(values["share"] for values in window.values.values()) == pytest.approx(1)
    # What had the most tokens so far stays, also if another channel leads in one window.
    metrics.count(batch(("c", 1, 4.0), ("a", 1, 1.0)))
    assert list(metrics.close(2).values) == ["a", "others"]
    assert sum("are more than `top`" in record.getMessage() for record in caplog.records) == 1


def test_an_open_window_shows_what_leads_in_it() -> None:
    metrics = new(top=1)
    metrics.count(batch(("a", 1, 1.0), ("b", 5, 2.0)))
    assert list(metrics.peek(1).values) == ["others", "b"]


def test_a_channel_that_is_called_others() -> None:
    metrics = new(top=1)
    metrics.count(batch(("others", 1, 1.0), ("a", 1, 1.0)))
    with pytest.raises(ChannelError, match="what `top` leaves out; rename this channel"):
        metrics.close(1)


def test_a_limit_of_keys(caplog: pytest.LogCaptureFixture) -> None:
    """Two metrics per row: `a` and its label fit, `b` and what comes later do not."""
    metrics = new(max_keys=4, axes={"lang": {"a": "en"}})
    logged = {"a_loss", "a_tokens", "lang/en_loss", "lang/en_tokens"}
    metrics.count(batch(("a", 5, 1.0)))
    assert metrics.close(1).logs.keys() == logged
    metrics.count(batch(("a", 1, 2.0), ("b", 3, 4.0), ("c", 1, 0.0)))
    window = metrics.close(2)
    assert window.logs.keys() == logged
    assert (window.logs["a_loss"], window.values["b"]) == (2.0, {"loss": 4.0, "tokens": 3})
    assert window.sums("c")["tokens"] == 1.0
    assert window.totals["b"] == {"tokens_total": 3, "samples_total": 1}
    metrics.count(batch(("b", 2, 4.0), (None, 1, 1.0)))
    third = metrics.close(3)
    assert third.logs == {"unlabeled_loss": 1.0, "unlabeled_tokens": 1.0}
    assert third.totals["b"]["tokens_total"] == 5
    with metrics.evaluation("eval", 3, "eval_") as evaluation:
        metrics.count(batch(("a", 1, 1.0)))
    assert evaluation.logs == {} and evaluation.window is not None
    assert evaluation.window.values["a"]["loss"] == 1.0
    (said,) = [r.getMessage() for r in caplog.records if "max_keys" in r.getMessage()]
    assert "more than 4 log keys" in said and "3 channels or labels" in said and "b, c" in said


def test_labels_that_overlap_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    both = str(joint_name("a", [*EN, *DE]))
    metrics = new(metrics=TOTALS, **LANG)
    metrics.count(batch((A_EN, 1, 1.0)))
    metrics.close(1)
    assert not caplog.records
    for step in (2, 3):
        metrics.count(batch((both, 2, 1.0), (A_EN, 2, 1.0)))
        shares = {label: of["share"] for label, of in metrics.close(step).axes["lang"].items()}
        assert shares == {"en": 1.0, "de": 0.5}
    (said,) = [record.getMessage() for record in caplog.records]
    assert "'lang' and count in each of them, so its shares add up to more than 1" in said


def test_without_a_limit_of_keys() -> None:
    metrics = new(max_keys=0)
    metrics.count(batch(*((f"c{n}", 1, 1.0) for n in range(6000))))
    assert len(metrics.close(1).logs) == 12_000
