"""`ChannelMetrics` with more than one label per record: axes and groups of names."""

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
    one.count(batch(("code/py/web", 1, 1.0), ("code/py/ml", 3, 2.0), ("code/rs", 1, 4.0)))
    # `code/py` is no row here, but a child of `code`, as `code/rs` is.
    assert one.close(1).axes == {
        "tree": {"code": {"loss": 11 / 5, "tokens": 5}},
        "tree_mean": {"code": {"loss": (7 / 4 + 4) / 2}},
    }


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
