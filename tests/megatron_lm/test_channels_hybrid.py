"""`--channels` with a HybridModel, as `pretrain_hybrid.py` and `pretrain_mamba.py` build it.

`pretrain_mamba.py` of Megatron-LM's main branch only runs `pretrain_hybrid.py`. Neither is in the
wheel of megatron-core. With MEGATRON_LM_PATH set to a checkout, both are run; else a script of the
tests that builds the same model.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lm import oracle, windows
from megatron_lm.data import Data
from megatron_lm.launch import Launcher, Run, checkout, needs_megatron_training
from megatron_lm.test_channels_layouts import METRICS, check_against_megatron

pytestmark = needs_megatron_training

HYBRID = """
from megatron.training.argument_utils import hybrid_config_from_args as gpt_config_from_args
"""
OURS = "a script of the tests"
SCRIPTS = ["pretrain_hybrid.py", "pretrain_mamba.py"] if checkout() else [OURS]


def train(launcher: Launcher, data: Data, folder: Path, layout: str, name: str) -> Run:
    path = Path(*checkout(), name).resolve()
    if name == OURS:
        path = windows.script_with(folder, "hybrid", HYBRID)
    pattern = "*-|*-" if layout == "pp2" else "*-*-"
    model = ("--hybrid-layer-pattern", pattern, "--spec", "megatron_lm.hybrid_spec", "hybrid_stack")
    args = (*data.blend(), *model, "--channels", *oracle.NAMES, *METRICS)
    seen = (oracle.sample_order, oracle.token_losses)
    return launcher.run(layout, *args, patch=True, script=path, observe=seen)


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scripts")


@pytest.mark.parametrize("layout", ["dp1", "dp2", "tp2", "pp2"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_hybrid_model(
    launcher: Launcher, data: Data, scripts: Path, layout: str, name: str
) -> None:
    """Each channel, against a loop over the tokens, or against one process."""
    run = train(launcher, data, scripts, layout, name)
    check_against_megatron(run)
    assert "HybridModel: pp_rank" in run.ranks[0].said
    if layout in ("dp1", "pp2"):  # the last rank has all losses, in the order of the samples
        seen = run.ranks[-1].seen
        wanted = oracle.naive(seen["sample_order"], seen["token_losses"])
    else:
        wanted = oracle.logged(train(launcher, data, scripts, "dp1", name))
    for log, expected in zip(oracle.logged(run), wanted, strict=True):
        assert log == pytest.approx(expected, rel=1e-5)
