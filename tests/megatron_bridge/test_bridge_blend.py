from __future__ import annotations

import pytest
from megatron_lm import oracle
from megatron_lm.data import Data

from megatron_bridge.launch import LAYOUTS, BridgeLauncher, needs_megatron_bridge

pytestmark = needs_megatron_bridge


def blend(data: Data) -> dict:
    pairs = data.weighted()
    return {"dataset": {"blend": [list(pairs[1::2]), [float(w) for w in pairs[::2]]], "split": "80,20,0"}}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_blend(launcher: BridgeLauncher, data: Data, layout: str) -> None:
    run = launcher.train(layout, blend(data))
    logs = oracle.logged(run)
    print(run.scalars.keys()); print(logs[0], run.scalars["lm loss"])
    assert [oracle.total_loss(log) for log in logs] == pytest.approx(list(run.scalars["lm loss"].values()), rel=1e-5)
