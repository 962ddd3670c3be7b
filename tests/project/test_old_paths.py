"""Documented import paths that have moved still work, and say where to import from."""

from __future__ import annotations

import importlib
import sys
import warnings

import pytest

import channel_metrics

MOVED = {
    "linear_losses": "losses.linear",
    "trainers.hf_probe": "trainers.hf.probe",
    "trainers.megatron_cuts": "trainers.megatron.cuts",
    "trainers.megatron_step": "trainers.megatron.step",
}


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_an_old_path_warns_and_gives_the_same_objects(old: str, new: str) -> None:
    old, new = f"channel_metrics.{old}", f"channel_metrics.{new}"
    there = importlib.import_module(new)
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"^{old} is now {new}; ") as caught:
        here = importlib.import_module(old)
    assert caught[0].filename != here.__file__, "the warning shows the import, not the old module"
    # What is new has no old path.
    assert here.__all__ and set(here.__all__) <= set(there.__all__)
    for name in here.__all__:
        assert getattr(here, name) is getattr(there, name)


def test_no_old_path_takes_the_place_of_an_exported_name() -> None:
    assert not set(MOVED) & set(channel_metrics.__all__)


def test_documented_paths_that_stayed_do_not_warn() -> None:
    from channel_metrics.analysis.report.html import write_report

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from channel_metrics.analysis import report

        assert report.write_report is write_report
        with pytest.raises(AttributeError, match="no attribute 'read_report'"):
            _ = report.read_report
