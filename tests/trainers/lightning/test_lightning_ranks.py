"""Lightning on two processes (ddp over gloo): the values of one process; nobody waits for long."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import faults
import pytest
import torch
import torch.distributed as dist
import transformers
from hf_case_tools import ddp
from hf_tools import make_records, tiny_model
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning_tools import Module, Run, check, flattened, quiet, run, still_model, weights
from packaging.version import Version
from rank_cases import RanksOf

from channel_metrics import MetricsConfig
from channel_metrics.ranks.ranks import Ranks
from channel_metrics.trainers.lightning import ChannelMetricsCallback

pytestmark = quiet

RECORDS = make_records(32)
HELD_OUT = make_records(8, seed=1)
TOTALS = MetricsConfig(metrics=("loss", "tokens", "tokens_total"))


def on_ranks(records: Any = RECORDS, **options: Any) -> Run:
    given: dict[str, Any] = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2}
    return run(records, **(given | options))


@ddp
def windows(folder: Path) -> Any:
    """Every rank knows other channels: records in turn, one kind for each rank."""
    records = [
        {**r, "channel": "even" if i % 2 == 0 else r["channel"]} for i, r in enumerate(RECORDS)
    ]
    calls, all_reduce = [0], Ranks.all_reduce

    class Counted(Ranks):
        def all_reduce(self, values: Any) -> Any:
            calls[0] += 1
            return all_reduce(self, values)

    callback = ChannelMetricsCallback()
    callback.metrics.ranks = Counted()
    counted: list[int] = []
    callback.metrics.on_window.append(lambda window: counted.append(calls[0]))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = on_ranks(
            records,
            held_out=[HELD_OUT],
            callback=callback,
            max_epochs=2,
        )
    return {
        "windows": [(window.split, window.step, window.logs) for window in found.windows],
        "calls": counted,
        "metrics": {k: v.item() for k, v in found.trainer.callback_metrics.items()},
        "advice": [str(w.message) for w in said if "sync_dist=True" in str(w.message)],
    }


def test_two_ranks_give_the_values_of_all(ranks_of: RanksOf) -> None:
    records = [
        {**r, "channel": "even" if i % 2 == 0 else r["channel"]} for i, r in enumerate(RECORDS)
    ]
    first, second = ranks_of(windows)
    assert first["windows"] == second["windows"] and first["metrics"] == second["metrics"]
    splits = [split for split, _, _ in first["windows"]]
    assert splits == ["train", "train", "val"] * 2
    for (split, _, logs), start in zip(first["windows"], (0, 16, 0) * 2, strict=True):
        if split == "val":
            check(logs, HELD_OUT, "val_")
            assert {k: first["metrics"][k] for k in logs} == pytest.approx(logs, rel=1e-6)
        else:
            check(logs, records[start : start + 16])
    # Names are agreed on at first; afterwards each window takes one all-reduce.
    calls = first["calls"]
    assert [calls[i] - calls[i - 1] for i in (3, 4, 5)] == [1, 1, 1]
    assert not first["advice"]


@ddp
def bits(folder: Path) -> Any:
    found = [
        on_ranks(
            held_out=[HELD_OUT],
            module=Module(tiny_model(), 1e-2),
            on=on,
            accumulate_grad_batches=2,
            max_epochs=2,
            in_order=False,
        )
        for on in (True, False)
    ]
    same = torch.equal(weights(found[0].module), weights(found[1].module))
    return same and found[0].module.losses == found[1].module.losses and bool(found[0].windows)


def test_training_is_the_same_bit_for_bit(ranks_of: RanksOf) -> None:
    assert ranks_of(bits) == [True, True]


@ddp
def resumed(folder: Path) -> Any:
    """A checkpoint in the middle of a window, resumed."""
    kept = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    options: dict[str, Any] = {"config": TOTALS, "log_every_n_steps": 2}
    on_ranks(callbacks=[kept], enable_checkpointing=True, **options)
    path = folder / "step=3.ckpt"
    stored = torch.load(path, weights_only=True)["callbacks"]["ChannelMetricsCallback"]
    again = on_ranks(ckpt_path=path, max_epochs=2, **options)
    assert again.callback is not None
    of_run = again.callback.metrics.totals
    return {
        "stored": {n: of["tokens_total"] for n, of in stored["totals"]["channels"].items()},
        "end": {name: of_run.of(name)["tokens_total"] for name in stored["totals"]["channels"]},
    }


def test_a_checkpoint_in_mid_window_has_the_tokens_of_all_ranks(ranks_of: RanksOf) -> None:
    def tokens(records: Any) -> dict[str, int]:
        found: dict[str, int] = {}
        for record in records:
            count = sum(label != -100 for label in record["labels"][1:])
            found[record["channel"]] = found.get(record["channel"], 0) + count
        return found

    first, second = ranks_of(resumed)
    assert first == second
    assert first["stored"] == tokens(RECORDS[:24])
    # One more step of the first epoch, which starts over, and the whole second epoch.
    rest = tokens([*RECORDS[:8], *RECORDS])
    assert first["end"] == {n: first["stored"][n] + rest[n] for n in first["stored"]}


@ddp
def a_fault_on_one_rank(folder: Path) -> Any:
    def when(call: int, *_: Any) -> bool:
        return dist.get_rank() == 1 and call == 3

    def trained(on: bool) -> Run:
        module = Module(tiny_model(), 1e-2)
        return on_ranks(module=module, held_out=[HELD_OUT], max_epochs=2, on=on)

    plain = trained(False)
    with faults.inject("record a micro-batch", when):
        found = trained(True)
    assert found.callback is not None
    return {
        "same": torch.equal(weights(found.module), weights(plain.module)),
        "windows": [window.step for window in found.windows],
        "off": found.callback.metrics.guard.off,
    }


def test_a_fault_on_one_rank_ends_the_metrics_of_all(ranks_of: RanksOf) -> None:
    for found in ranks_of(a_fault_on_one_rank):
        assert found == {"same": True, "windows": [2], "off": True}


@ddp
def uneven(folder: Path) -> Any:
    """Two evaluation sets, padded and packed; rank 1 repeats a record of both."""
    found = on_ranks(RECORDS[:8], held_out=[HELD_OUT[:5], HELD_OUT[:1]])
    # With a cache, transformers' attention crosses the boundaries of a pack.
    module = Module(still_model(use_cache=False))
    packed = on_ranks(RECORDS[:8], held_out=[HELD_OUT[:5]], collate=flattened, module=module)
    return [*found.logs("val_0"), *found.logs("val_1"), *packed.logs("val")]


def test_records_that_lightning_repeats_in_evaluation_count_once(ranks_of: RanksOf) -> None:
    """It fills up the ranks with the first records."""
    for several, one, packed in ranks_of(uneven):
        check(several, HELD_OUT[:5], "val_0_")
        check(one, HELD_OUT[:1], "val_1_")
        # Before transformers 5, a CPU does not separate the sequences.
        if Version(transformers.__version__) >= Version("5"):
            check(packed, HELD_OUT[:5], "val_")
