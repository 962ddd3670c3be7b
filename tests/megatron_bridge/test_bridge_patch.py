"""The patch by itself, in a process that has Megatron-Bridge imported."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rank_cases import RanksOf

from channel_metrics import ConfigError
from megatron_bridge.launch import BRIDGE, needs_megatron_bridge

pytestmark = needs_megatron_bridge


def patched_and_reverted() -> list[str]:
    """What does not hold, of what must hold."""
    from megatron.bridge.training import eval as evaluation
    from megatron.bridge.training import finetune, gpt_step, pretrain, train

    from channel_metrics.trainers.megatron_bridge import patch

    def functions() -> list[Any]:
        return [
            pretrain.pretrain,
            finetune.pretrain,
            train.get_forward_backward_func,
            evaluation.get_forward_backward_func,
            gpt_step._partition_packed_batch_for_cp,
        ]

    before, wrong = functions(), []
    patch.apply()
    once = functions()
    patch.apply()
    if not patch.is_applied() or any(a is b for a, b in zip(before, once, strict=True)):
        wrong.append("something is not patched")
    if functions() != once:
        wrong.append("a second call does something")
    patch.revert()
    if patch.is_applied() or functions() != before:
        wrong.append("something is not put back")
    return wrong


def without_a_function() -> str:
    from megatron.bridge.training import pretrain, train

    from channel_metrics import UnsupportedVersionError
    from channel_metrics.trainers.megatron_bridge import patch

    del train.get_forward_backward_func
    before = pretrain.pretrain
    with pytest.raises(UnsupportedVersionError) as error:
        patch.apply()
    assert pretrain.pretrain is before
    return str(error.value)


def packs_in_an_object_store(folder: Path) -> Any:
    """Its client cannot be had here; Bridge asks it for files only."""
    from megatron.bridge.data.packing import parquet
    from megatron.core import msc_utils

    from channel_metrics.trainers.megatron_bridge import packs

    opened: list[str] = []

    def open_in_store(path: str, mode: str) -> Any:
        opened.append(mode)
        return (folder / path.removeprefix("msc://store/")).open(mode)

    msc_utils.msc = SimpleNamespace(open=open_in_store)
    msc_utils.MultiStorageClientFeature.enable()
    row = {"input_ids": [1, 2, 3], "loss_mask": [1, 1, 1], "seq_start_id": [0, 2]}
    rows, path = (
        [{**row, "channels": ["web", None]}, {**row, "channels": ["code"]}],
        "msc://store/p",
    )
    packs.write_packed_parquet(parquet.write_packed_parquet, rows, path)
    names = packs._names_of_packs(SimpleNamespace(_parquet_paths=[path]))
    return names.to_pylist(), opened


def test_packs_are_written_and_read_where_bridge_does(ranks_of: RanksOf, tmp_path: Path) -> None:
    store, job = tmp_path / "store", tmp_path / "job"
    store.mkdir()
    found = ranks_of.call(BRIDGE, packs_in_an_object_store, store, ranks=1, folder=job)
    assert found == [([["web", None], ["code"]], ["wb", "rb", "wb", "rb"])]


def test_apply_and_revert(ranks_of: RanksOf, tmp_path: Path) -> None:
    assert ranks_of.call(BRIDGE, patched_and_reverted, ranks=1, folder=tmp_path) == [[]]


def test_another_version_is_refused(ranks_of: RanksOf, tmp_path: Path) -> None:
    (said,) = ranks_of.call(BRIDGE, without_a_function, ranks=1, folder=tmp_path)
    assert "training.train.get_forward_backward_func" in said and "use 0.6" in said


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (SimpleNamespace(cuda_graph_impl="full_iteration"), "cuda_graph_impl"),
        (SimpleNamespace(dist_train=SimpleNamespace(use_dist_train=True)), "dist_train"),
    ],
)
def test_settings_with_which_nothing_could_be_counted(model: Any, said: str) -> None:
    from channel_metrics import MetricsConfig
    from channel_metrics.trainers.megatron_bridge.run import BridgeRun

    with pytest.raises(ConfigError, match=said):
        BridgeRun(SimpleNamespace(model=model), MetricsConfig())
