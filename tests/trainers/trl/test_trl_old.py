"""What an older trl lacks is refused at the start, and the patch leaves such a training alone.

`make matrix` runs it; with the versions of `make test` there is nothing to refuse.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from packaging.version import Version
from trl import DPOConfig, DPOTrainer
from trl_tools import arguments, logs, pair_records, run, weights

from channel_metrics import UnsupportedVersionError
from channel_metrics.trainers.hf import attach

pytestmark = pytest.mark.skipif(
    Version(trl.__version__) >= Version("0.29"), reason="nothing to refuse"
)


def dpo(folder: Path, **keywords: Any) -> Any:
    return run(DPOTrainer, DPOConfig(**arguments(folder)), pair_records(64), **keywords)


def test_attach_names_the_version_that_is_needed(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedVersionError, match=r"DPOTrainer need trl 0\.29 or later, but"):
        dpo(tmp_path, prepare=attach)


def test_the_patch_leaves_the_training_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import channel_metrics.patches.hf_trainer as patch

    patch.revert()
    plain = dpo(tmp_path)
    patch.apply()
    try:
        patched = dpo(tmp_path)
    finally:
        patch.revert()
    assert torch.equal(weights(plain), weights(patched))
    assert not logs(patched)
    told = [message for message in caplog.messages if "need trl 0.29 or later" in message]
    assert len(told) == 1
