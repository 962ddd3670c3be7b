"""TRL trainers without an adapter, and which adapter a class gets."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer, SFTTrainer
from trl_tools import arguments, pair_records, run

from channel_metrics import UnsupportedVersionError
from channel_metrics.trainers.hf import ChannelMetricsMixin, attach
from channel_metrics.trainers.trl import (
    DPOChannelMetricsMixin,
    GRPOChannelMetricsMixin,
    KTOChannelMetricsMixin,
    OtherChannelMetricsMixin,
    RewardChannelMetricsMixin,
    SFTChannelMetricsMixin,
    mixin_for,
)

ROOT = Path(__file__).parents[3]


@pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated")
@pytest.mark.filterwarnings("ignore:.*[Ee]xperimental.*")
def test_a_trainer_without_labels_is_refused_at_the_first_batch(tmp_path: Path) -> None:
    module = importlib.import_module("trl.experimental.cpo")
    config = module.CPOConfig(**arguments(tmp_path))
    with pytest.raises(UnsupportedVersionError, match="need `labels` in the batch"):
        run(module.CPOTrainer, config, pair_records(32), prepare=attach)


def test_each_class_gets_its_adapter() -> None:
    expected = {
        DPOTrainer: DPOChannelMetricsMixin,
        GRPOTrainer: GRPOChannelMetricsMixin,
        KTOTrainer: KTOChannelMetricsMixin,
        RewardTrainer: RewardChannelMetricsMixin,
        SFTTrainer: SFTChannelMetricsMixin,
    }
    for trainer_class, mixin in expected.items():
        mine: Any = type("Mine", (trainer_class,), {})
        derived: Any = type("Derived", (trainer_class,), {"__module__": "trl.experimental.new"})
        assert mixin_for(trainer_class) is mixin_for(mine) is mixin
        # Another loss under TRL's own name: only what holds for all trainers.
        assert mixin_for(derived) is OtherChannelMetricsMixin
    assert issubclass(OtherChannelMetricsMixin, ChannelMetricsMixin)
    assert not issubclass(Trainer, ChannelMetricsMixin)


def test_trl_is_imported_for_its_own_trainers_only() -> None:
    code = (
        "import sys, transformers\n"
        "from channel_metrics.trainers.hf import ChannelMetricsMixin, attaching\n"
        "assert attaching._mixin_for(transformers.Trainer) is ChannelMetricsMixin\n"
        "assert 'trl' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
