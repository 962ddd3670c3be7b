"""What happens in a run, without a trainer: micro-batches, evaluations, checkpoints, mishaps.

A `Script` says it, a `Harness` makes one trainer do it, and `Ran` is what came of it on one rank.
The cases (cases.py) never name a trainer. To add one, write a `Harness` and put it into HARNESSES
of test_contract.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import pytest
from reference import error_bars, percentiles

from channel_metrics import MetricsConfig, Window
from channel_metrics.core.table import SumTable
from channel_metrics.counting import Counting

ERROR_BARS = ("loss_se", "loss_low", "loss_high")
PERCENTILES = ("loss_p10", "loss_p50", "loss_p90")

ROWS = 2
"""Sequences in each micro-batch: trainers want batches of one size."""


@dataclass(frozen=True)
class OneSequence:
    """One sequence: its channel, its supervised tokens, and a number that gives its content.

    Two that differ in the channel only are equal, so that their losses are computed once.
    """

    channel: str | None = field(compare=False)
    tokens: int
    number: int


Batch = tuple[OneSequence, ...]
Step = tuple[Batch, ...]


def steps(*channels: str, tokens: int = 3, first: int = 0) -> tuple[Step, ...]:
    """One step per argument; each micro-batch has `ROWS` sequences, one letter each.

    `steps("aab-", "bb")`: a first step of two micro-batches, [a, a] and [b, unlabeled], then one
    of one. Sequences differ in length.
    """
    number = first
    made = []
    for letters in channels:
        sequences = []
        for letter in letters:
            channel = None if letter == "-" else letter
            sequences.append(OneSequence(channel, tokens + number % 4, number))
            number += 1
        batches = [sequences[i : i + ROWS] for i in range(0, len(sequences), ROWS)]
        made.append(tuple(map(tuple, batches)))
    return tuple(made)


def renamed(all_steps: Iterable[Step], names: Mapping[str, str]) -> tuple[Step, ...]:
    """The same steps with other names of channels."""
    return tuple(
        tuple(
            tuple(replace(one, channel=names[one.channel or ""] or None) for one in batch)
            for batch in step
        )
        for step in all_steps
    )


@dataclass(frozen=True)
class Evaluation:
    """An evaluation after a step of training. fails: it raises after its first batch."""

    after: int
    batches: Step
    fails: bool = False


@dataclass(frozen=True, kw_only=True)
class Script:
    """A run. Every step has the same number of micro-batches."""

    config: MetricsConfig
    steps: tuple[Step, ...]
    every: int = 2
    """Steps between two logs."""
    evaluations: tuple[Evaluation, ...] = ()
    reruns: frozenset[int] = frozenset()
    """Steps (from 1) that the trainer runs twice, counted once."""
    skips: frozenset[int] = frozenset()
    """Steps that the optimizer skips, not counted."""
    peeks: frozenset[int] = frozenset()
    """Steps after which the trainer logs in mid-window."""
    save_at: int | None = None
    """The step after which a checkpoint is written."""
    resume: Path | None = None
    """The folder of the checkpoint to go on from; `steps` are those of the whole run."""
    fault_at: int | None = None
    """The micro-batch (from 0, of training) in whose counting an error of ours happens."""
    lies: bool = False
    """Whether the trainer's own loss is not that of its tokens."""


@dataclass
class Ran:
    """What came of a run on one rank."""

    windows: list[Window] = field(default_factory=list)
    """What observers were told."""
    logs: list[dict[str, float]] = field(default_factory=list)
    """What the trainer itself logged in training, from the first window on."""
    peeked: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    """What each evaluation that ended gave."""
    warnings: list[str] = field(default_factory=list)
    error: BaseException | None = None
    checkpoint: Path | None = None
    """The folder that was saved."""
    steps: int = 0
    """How many steps were trained."""
    collectives: list[int] = field(default_factory=list)
    """Our all-reduces up to each window, train and evaluation."""


class Harness(Protocol):
    """One trainer.

    can: of "rerun", "skip", "peek", "ranks", "lies", "save", "fails", "stops"; "columns", if its
    batches keep a column with a label per token; "ids", if they keep that of the record's id; and
    "pairs", where it counts pairs and no tokens: a sequence of the script is one pair, and its
    `nll` the loss of that pair. With "rewards" too, it logs a reward and no loss, and `nll` is the
    reward.
    """

    name: str
    can: frozenset[str]
    reserved: str
    """The name of a channel whose key (`{channel}_{metric}`) is one of the trainer's own."""
    first: int
    """The position of the first supervised token of a sequence."""
    eval_prefix: str = "eval_"
    """How the trainer's keys of an evaluation begin."""

    def run(self, script: Script, folder: Path, ranks: int = 1) -> list[Ran]:
        """Run it; one `Ran` per rank. Errors come back in `Ran.error`."""

    def nll(self, sequence: OneSequence) -> float:
        """The summed nll of the supervised tokens of a sequence, by an independent way."""

    def losses(self, sequence: OneSequence) -> list[float]:
        """The losses of the supervised tokens, where tokens are counted."""

    def tokens(self, sequence: OneSequence) -> list[int]:
        """The ids of the supervised tokens, where tokens are counted."""

    def loss(self, sequences: Sequence[OneSequence]) -> float:
        """The loss of these sequences, by an independent way."""
        return sum(map(self.nll, sequences)) / sum(size(self, one) for one in sequences)


def ran(harness: Harness, script: Script, folder: Path) -> Ran:
    """One process, without an error."""
    (found,) = harness.run(script, folder)
    assert found.error is None, found.error
    return found


def train_windows(found: Ran) -> list[dict[str, dict[str, float]]]:
    return [window.values for window in found.windows if window.split == "train"]


def unit(harness: Harness) -> str:
    """The metric that says how much of a channel was counted."""
    return "samples" if "pairs" in harness.can else "tokens"


def measure(harness: Harness) -> str:
    """The metric that says how well a channel does."""
    return "reward" if "rewards" in harness.can else "loss"


def size(harness: Harness, sequence: OneSequence) -> int:
    """How much a sequence counts."""
    return 1 if "pairs" in harness.can else sequence.tokens


def expected(harness: Harness, sequences: Iterable[OneSequence]) -> dict[str, dict[str, float]]:
    """{channel: loss (or reward), share, samples, and where tokens are counted, these and the
    spread of the loss} of a window, by counting one after the other."""
    by_channel: dict[str, list[OneSequence]] = {}
    for sequence in sequences:
        by_channel.setdefault(sequence.channel or "unlabeled", []).append(sequence)
    counted = {name: sum(size(harness, s) for s in of) for name, of in by_channel.items()}
    return {
        name: {
            measure(harness): harness.loss(of_channel),
            "share": counted[name] / sum(counted.values()),
            "samples": len(of_channel),
            unit(harness): counted[name],
            **_spread(harness, of_channel),
        }
        for name, of_channel in by_channel.items()
    }


def _spread(harness: Harness, sequences: Iterable[OneSequence]) -> dict[str, float]:
    if unit(harness) != "tokens":
        return {}
    sums = [(size(harness, one), harness.nll(one)) for one in sequences]
    return error_bars("loss", sums) | percentiles(sums)


def check_spread(harness: Harness, values: dict[str, dict[str, float]]) -> None:
    """A trainer of tokens logs percentiles, and error bars where a channel has two sequences.

    Others log neither.
    """
    for of_channel in values.values():
        wanted = set(PERCENTILES) if unit(harness) == "tokens" else set()
        if wanted and of_channel["samples"] > 1:
            wanted |= set(ERROR_BARS)
        assert {*ERROR_BARS, *PERCENTILES} & set(of_channel) == wanted


def window_sequences(script: Script) -> list[list[OneSequence]]:
    """The sequences of each train window of a script, in a run that nothing disturbs."""
    windows: list[list[OneSequence]] = [[]]
    for number, step in enumerate(script.steps, start=1):
        if number not in script.skips:
            windows[-1] += [sequence for batch in step for sequence in batch]
        if number % script.every == 0:
            windows.append([])
    return [window for window in windows if window]


def role_of(token: int) -> str | None:
    """The label of a token on an axis of the tests."""
    return ("user", "assistant", None)[token % 3]


def check_values(found: dict[str, dict[str, float]], wanted: dict[str, dict[str, float]]) -> None:
    """The same channels, and equal values of the metrics that both have.

    The error bars of few short sequences magnify the rounding of the losses. Percentiles are exact
    to half a bin, which is 4.5 %.
    """
    assert set(found) == set(wanted)
    for channel, values in found.items():
        for metric in set(values) & set(wanted[channel]):
            rtol = 1e-3 if metric in ERROR_BARS else 0.045 if metric in PERCENTILES else 1e-5
            assert values[metric] == pytest.approx(wanted[channel][metric], rel=rtol), channel


@contextmanager
def faulty_count(at: int | None) -> Any:
    """An error of ours in the counting of micro-batch number `at`; None: none."""
    original = Counting._open_table
    calls = iter(range(1_000_000))

    def open_table(self: Counting) -> SumTable:
        if next(calls) == at:
            raise ZeroDivisionError("an error of ours")
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Counting, "_open_table", open_table)
        yield


def flat(batches: Sequence[Batch]) -> list[OneSequence]:
    """All sequences of some micro-batches."""
    return [sequence for batch in batches for sequence in batch]
