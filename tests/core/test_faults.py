"""`FaultGuard`: with "warn", errors of ours end the metrics, and nothing else."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from channel_metrics.core.faults import FaultGuard
from channel_metrics.errors import CollectiveError, StoppedError


class Trainer:
    """Something to observe: counts its calls."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[tuple[int, ...]] = []
        self.error = error

    def step(self, *args: int) -> int:
        self.calls.append(args)
        if self.error is not None:
            raise self.error
        return sum(args)


def after(original: Any, *args: int) -> int:
    original(*args)
    raise ZeroDivisionError("ours")


def before(original: Any, *args: int) -> int:
    raise ZeroDivisionError("ours")


def fine(original: Any, *args: int) -> int:
    result: int = original(*args)
    return result


@pytest.mark.parametrize("observing", [before, after])
def test_warn_gives_the_result_of_the_original(
    observing: Any, caplog: pytest.LogCaptureFixture
) -> None:
    guard, trainer = FaultGuard("warn"), Trainer()
    with caplog.at_level(logging.WARNING, logger="channel_metrics"):
        assert guard.shielded(trainer.step, observing, 1, 2) == 3
        assert guard.shielded(trainer.step, observing, 3, 4) == 7
    assert trainer.calls == [(1, 2), (3, 4)]
    assert not guard.measuring and not guard.off
    (record,) = caplog.records
    assert "off for the rest of this run, training goes on" in record.getMessage()
    assert "ZeroDivisionError: ours" in record.getMessage()
    assert "test_faults.py" in record.getMessage()


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_errors_of_the_original_are_its_own(on_error: Any) -> None:
    guard, trainer = FaultGuard(on_error), Trainer(error=KeyError("theirs"))
    with pytest.raises(KeyError, match="theirs"):
        guard.shielded(trainer.step, fine, 1)
    assert guard.measuring and trainer.calls == [(1,)]


@pytest.mark.parametrize("observing", [before, after])
def test_raise_raises(observing: Any) -> None:
    guard = FaultGuard()
    with pytest.raises(ZeroDivisionError):
        guard.shielded(Trainer().step, observing, 1)
    with pytest.raises(ZeroDivisionError), guard.guarded():
        before(None)
    assert guard.measuring


def test_a_guarded_block_ends_at_the_error(caplog: pytest.LogCaptureFixture) -> None:
    guard = FaultGuard("warn")
    reached = []
    for _ in range(2):
        with guard.guarded():
            reached.append(1)
            before(None)
            reached.append(2)
    assert reached == [1, 1] and not guard.measuring
    assert len(caplog.records) == 1


def test_all_ranks_know_after_a_sync(caplog: pytest.LogCaptureFixture) -> None:
    """A rank that was told by others says so once; one that had the error has said it before."""
    told, failed = FaultGuard("warn"), FaultGuard("warn")
    with failed.guarded():
        before(None)
    for guard in (told, failed):
        with guard.guarded():
            raise StoppedError("1 of the ranks")
        assert guard.off and not guard.measuring
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "ours" in messages[0] and messages[1].endswith("1 of the ranks")


def test_a_set_up_that_was_never_seen_to_work_raises(caplog: pytest.LogCaptureFixture) -> None:
    """Without `on_error`: until the first window has been summed and shown, then no more."""
    guard, trainer = FaultGuard(None), Trainer()
    with pytest.raises(ZeroDivisionError), guard.guarded():
        before(None)
    with pytest.raises(ZeroDivisionError):
        guard.shielded(trainer.step, after, 1)
    assert guard.measuring and guard.raises
    guard.proven = True
    assert not guard.raises
    assert guard.shielded(trainer.step, after, 1, 2) == 3
    assert not guard.measuring and not guard.off
    (record,) = caplog.records
    assert "on_error is warn after the first window" in record.getMessage()


@pytest.mark.parametrize(("on_error", "raises"), [("raise", True), ("warn", False)])
def test_on_error_does_not_ask_whether_anything_is_proven(on_error: Any, raises: bool) -> None:
    guard = FaultGuard(on_error)
    for guard.proven in (False, True):
        assert guard.raises is raises


@pytest.mark.parametrize("on_error", ["raise", "warn", None])
def test_a_collective_that_failed_is_raised_always(on_error: Any) -> None:
    guard = FaultGuard(on_error)
    guard.proven = True
    with pytest.raises(CollectiveError, match="out of step"), guard.guarded():
        raise CollectiveError("out of step")
    trainer = Trainer()

    def observing(original: Any) -> None:
        original()
        raise CollectiveError("out of step")

    with pytest.raises(CollectiveError):
        guard.shielded(trainer.step, observing)
    assert guard.measuring


def test_the_first_error_is_kept() -> None:
    guard = FaultGuard("warn")
    for error in (ZeroDivisionError("first"), KeyError("second")):
        with guard.guarded():
            raise error
    assert isinstance(guard.error, ZeroDivisionError)


def test_an_error_of_ours_after_one_of_the_trainer() -> None:
    """Ours does not stand in for it: the trainer's is raised."""

    def instead(original: Any) -> None:
        try:
            original()
        except RuntimeError:
            raise ZeroDivisionError("ours") from None

    trainer = Trainer(RuntimeError("theirs"))
    with pytest.raises(RuntimeError, match="theirs"):
        FaultGuard("warn").shielded(trainer.step, instead)
