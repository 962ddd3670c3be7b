"""The real Trainer beside a webhook that is slow, or that fails: the training does not notice."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_tools import CHANNELS, make_records, train
from webhook_tools import serve

from channel_metrics import MetricsConfig
from channel_metrics.trainers.hf import attach

__all__ = ["serve"]

# Each source is exhausted in the first window.
SETTINGS: dict[str, Any] = {
    "alerts": {"to": ["webhook"], "kinds": ["exhausted"]},
    "budget": {"records": dict.fromkeys(CHANNELS, 0.5)},
}


def run(folder: Path, prepare: Any = None) -> Any:
    return train(folder, records=make_records(64), prepare=prepare)


@pytest.mark.parametrize("server", [{"seconds": 60}, {"status": 500}], ids=["slow", "failing"])
def test_a_webhook_delays_and_changes_nothing(
    tmp_path: Path, serve: Any, server: dict[str, Any]
) -> None:
    off = run(tmp_path / "off")
    posted = serve(**server)
    begin = time.monotonic()
    on = run(tmp_path / "on", lambda trainer: attach(trainer, MetricsConfig(**SETTINGS)))
    assert time.monotonic() - begin < 30, "an answer takes 60 seconds"
    assert posted.arrived.wait(10) and posted.bodies[0]["alert"] == "exhausted"
    for mine, theirs in zip(on.model.parameters(), off.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
