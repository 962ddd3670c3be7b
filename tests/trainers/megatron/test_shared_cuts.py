"""Two loops in one process share megatron-core's functions that cut batches."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from channel_metrics import UnsupportedVersionError
from channel_metrics.trainers.megatron import cuts

utils = pytest.importorskip("megatron.core.utils")
LOOPS = ("loop_a", "loop_b")


def body(original: Any, *args: Any) -> Any:
    return original(*args)


def patch(name: str, function: str = "train") -> None:
    bodies = {(name, function): body}
    cuts.patch_loop(bodies, key=name, version=name, remedy="update it", package=name)


@pytest.fixture(autouse=True)
def loops(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in LOOPS:
        module = ModuleType(name)
        module.train = lambda: 1  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    yield
    for name in LOOPS:
        cuts.unpatch_loop(name)


def test_the_cuts_are_followed_until_no_loop_is_left() -> None:
    original = utils.get_batch_on_this_cp_rank
    patch("loop_a")
    patch("loop_b")
    cuts.unpatch_loop("loop_b")
    assert utils.get_batch_on_this_cp_rank is not original
    cuts.unpatch_loop("loop_a")
    assert utils.get_batch_on_this_cp_rank is original


def test_a_loop_that_cannot_be_patched_takes_nothing_from_another() -> None:
    original = utils.get_batch_on_this_cp_rank
    with pytest.raises(UnsupportedVersionError):
        patch("loop_b", "lacking")
    assert utils.get_batch_on_this_cp_rank is original
    patch("loop_a")
    with pytest.raises(UnsupportedVersionError):
        patch("loop_b", "lacking")
    assert utils.get_batch_on_this_cp_rank is not original
