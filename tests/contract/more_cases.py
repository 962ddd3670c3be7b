"""More cases: labels on further axes, and a trainer whose loss is not that of its tokens.

`CASES` holds these and those of cases.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from reference import bucket

from channel_metrics import ChannelError, ConfigError
from channel_metrics.core.names import joint_name
from contract.cases import CASES, NEEDS, case, config
from contract.labels import KINDS, by
from contract.script import (
    Evaluation,
    Harness,
    OneSequence,
    Script,
    check_values,
    expected,
    flat,
    measure,
    ran,
    renamed,
    role_of,
    steps,
    window_sequences,
)

__all__ = ["CASES", "NEEDS"]

# {letter of the script: channel, language}
LABELS: dict[str, tuple[str | None, str | None]] = {
    "a": ("a", "en"),
    "b": ("b", "en"),
    "c": ("c", None),
    "d": ("a", "de"),
    "e": (None, "de"),
    "": (None, None),
}
NAMES = {
    letter: joint_name(channel, [] if language is None else [("tongue", language)]) or ""
    for letter, (channel, language) in LABELS.items()
}
LETTERS = {name: letter for letter, name in NAMES.items()}


@case()
def labels_on_two_axes(harness: Harness, folder: Path) -> None:
    """One axis follows from the channel, the other one stands in the joint names."""
    script = Script(
        config=config(axes={"kind": KINDS, "tongue": ()}, cross=(("channel", "tongue"),)),
        steps=renamed(steps("abcd", "dea-", "aabb", "ceba"), NAMES),
        evaluations=(Evaluation(1, renamed(steps("adce", first=40), NAMES)[0]),),
    )
    found, how = ran(harness, script, folder), measure(harness)
    windows = [window for window in found.windows if window.split == "train"]
    for window, sequences in zip(windows, window_sequences(script), strict=True):
        check_values(window.values, by(harness, sequences, channel))
        check_values(window.axes["kind"], by(harness, sequences, kind))
        check_values(window.axes["tongue"], by(harness, sequences, language))
        check_values(window.axes["channel.tongue"], by(harness, sequences, both))
        assert window.logs[f"kind/x_{how}"] == window.axes["kind"]["x"][how]
        crossed = window.axes["channel.tongue"]["a.en"]
        assert window.logs["channel.tongue/a.en_share"] == crossed["share"]
    everything = by(harness, [s for w in window_sequences(script) for s in w], language)
    assert windows[-1].axes["tongue"]["en"]["samples_total"] == everything["en"]["samples"]
    (evaluation,) = [window for window in found.windows if window.split != "train"]
    of_evaluation = list(script.evaluations[0].batches[0] + script.evaluations[0].batches[1])
    check_values(evaluation.axes["tongue"], by(harness, of_evaluation, language))
    de = evaluation.axes["tongue"]["de"][how]
    assert found.evaluations[0][f"eval_tongue/de_{how}"] == pytest.approx(de)


@case()
def loss_by_position(harness: Harness, folder: Path) -> None:
    """Positions of whole sequences, in training, in evaluations and in totals."""
    axes = {"position": {"by": "position"}, "length": {"by": "length"}}
    script = Script(
        config=config(axes=axes),
        steps=steps("aabb", "abab", "bb-a", "aaaa"),
        evaluations=(Evaluation(1, steps("bbaa", first=40)[0]),),
    )
    if measure(harness) != "loss" or "pairs" in harness.can:
        (refused,) = harness.run(script, folder)
        assert isinstance(refused.error, ConfigError) and "single tokens" in str(refused.error)
        return
    found, total = ran(harness, script, folder), 0.0
    windows = [window for window in found.windows if window.split == "train"]
    for window, sequences in zip(windows, window_sequences(script), strict=True):
        wanted = by_position(harness, sequences)
        total += wanted["0000002-0000003"]["tokens"]
        check_values(window.axes["position"], wanted)
        assert not any("samples" in metric for metric in window.axes["position"]["0000001"])
        check_values(window.values, expected(harness, sequences))
        of_length = window.axes["length"].values()
        assert sum(values["share"] for values in of_length) == pytest.approx(1)
    assert windows[-1].axes["position"]["0000002-0000003"]["tokens_total"] == total
    key = "position/0000002-0000003_loss"
    assert windows[0].logs[key] == windows[0].axes["position"]["0000002-0000003"]["loss"]
    held = by_position(harness, flat(script.evaluations[0].batches))
    assert found.evaluations[0][f"eval_{key}"] == pytest.approx(held["0000002-0000003"]["loss"])


def by_position(harness: Harness, sequences: list[OneSequence]) -> dict[str, dict[str, float]]:
    """What a window holds per position."""

    def labels(sequence: OneSequence) -> list[str]:
        last = harness.first + sequence.tokens
        return [bucket(position) for position in range(harness.first, last)]

    return by_label(harness, sequences, labels)


def by_label(
    harness: Harness,
    sequences: list[OneSequence],
    labels: Callable[[OneSequence], list[str]],
) -> dict[str, dict[str, float]]:
    """What a window holds per label of single tokens, by counting one token after the other."""
    found: dict[str, list[float]] = {}
    for sequence in sequences:
        for label, loss in zip(labels(sequence), harness.losses(sequence), strict=True):
            found.setdefault(label, []).append(loss)
    tokens = sum(map(len, found.values()))
    return {
        name: {"loss": sum(of) / len(of), "tokens": len(of), "share": len(of) / tokens}
        for name, of in found.items()
    }


@case()
def loss_by_what_a_token_is(harness: Harness, folder: Path) -> None:
    """Labels from the ids of the tokens in every trainer, from a column where it is kept."""
    images = [2, 5, *range(20, 40)]
    of_ids = {"kind": {"by": "modality", "labels": {"image": images}}}
    roles = {"role": {"by": "column", "field": "roles"}}
    held = (Evaluation(1, steps("bbaa", first=40)[0]),)
    has_columns = "columns" in harness.can
    axes = of_ids | roles if has_columns else of_ids
    script = Script(config=config(axes=axes), steps=steps("aabb", "abab"), evaluations=held)
    if measure(harness) != "loss" or "pairs" in harness.can:
        (refused,) = harness.run(script, folder)
        assert isinstance(refused.error, ConfigError) and "single tokens" in str(refused.error)
        return

    def kinds(sequence: OneSequence) -> list[str]:
        return ["image" if token in images else "text" for token in harness.tokens(sequence)]

    def roles_of(sequence: OneSequence) -> list[str]:
        return [role_of(token) or "unlabeled" for token in harness.tokens(sequence)]

    found = ran(harness, script, folder)
    (window,) = [window for window in found.windows if window.split == "train"]
    (sequences,) = window_sequences(script)
    check_values(window.values, expected(harness, sequences))
    check_values(window.axes["kind"], by_label(harness, sequences, kinds))
    of_held = by_label(harness, flat(held[0].batches), kinds)
    loss = found.evaluations[0]["eval_kind/text_loss"]
    assert loss == pytest.approx(of_held["text"]["loss"])
    if has_columns:
        check_values(window.axes["role"], by_label(harness, sequences, roles_of))
        return
    (refused,) = harness.run(replace(script, config=config(axes=roles)), folder / "refused")
    assert isinstance(refused.error, ChannelError)
    assert "needs a label per token ('roles')" in str(refused.error)


@case()
def all_unlabeled_warns_once(harness: Harness, folder: Path) -> None:
    chosen = config(channels=("a",))
    found = ran(harness, Script(config=chosen, steps=steps("--", "--"), every=1), folder)
    said = [message for message in found.warnings if "count as 'unlabeled'" in message]
    assert len(said) == 1 and "no record" in said[0]


@case("lies")
def a_loss_that_lies_is_told_once(harness: Harness, folder: Path) -> None:
    script = Script(config=config(), steps=steps("ab", "aa", "bb", "ab"), every=1, lies=True)
    found = ran(harness, script, folder)
    said = [message for message in found.warnings if "do not add up" in message]
    assert len(said) == 1


def channel(sequence: OneSequence) -> str | None:
    return LABELS[LETTERS[sequence.channel or ""]][0]


def language(sequence: OneSequence) -> str | None:
    return LABELS[LETTERS[sequence.channel or ""]][1]


def kind(sequence: OneSequence) -> str | None:
    return KINDS.get(channel(sequence) or "")


def both(sequence: OneSequence) -> str | None:
    return f"{channel(sequence) or 'unlabeled'}.{language(sequence) or 'unlabeled'}"
