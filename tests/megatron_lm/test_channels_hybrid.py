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
from megatron_lm.launch import Launcher, checkout, needs_megatron_training
from megatron_lm.test_channels_layouts import check_against_megatron

pytestmark = needs_megatron_training

HYBRID = """
from megatron.training.argument_utils import hybrid_config_from_args as gpt_config_from_args
"""
OURS = "a script of the tests"
SCRIPTS = ["pretrain_hybrid.py", "pretrain_mamba.py"] if checkout() else [OURS]


@pytest.mark.parametrize("layout", ["dp2", "tp2", "pp2"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_hybrid_model(
    launcher: Launcher, data: Data, tmp_path: Path, layout: str, name: str
) -> None:
    path = Path(*checkout(), name).resolve()
    if name == OURS:
        path = windows.script_with(tmp_path, "hybrid", HYBRID)
    pattern = "*-|*-" if layout == "pp2" else "*-*-"
    model = ("--hybrid-layer-pattern", pattern, "--spec", "megatron_lm.hybrid_spec", "hybrid_stack")
    args = (*data.blend(), *model, "--channels", *oracle.NAMES)
    run = launcher.run(layout, *args, patch=True, script=path)
    check_against_megatron(run)
    assert set(run.scalars) >= {f"{name}_token_acc" for name in oracle.NAMES}
    assert "HybridModel: pp_rank" in run.ranks[0].said
