"""`on_error`: an error in the metrics ends the run, or leaves it as it would be without them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import faults
import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from hf_case_tools import ddp, run_for_bits
from hf_tools import channel_logs, make_records, train
from rank_cases import Case, RanksOf
from transformers import Trainer

from channel_metrics import MetricsConfig
from channel_metrics.trainers.hf import attach

# Where it goes wrong, and the entries of the log that have channels all the same.
FAULTS = {
    "scan the data": 0,
    "collate": 0,
    "see the model's loss": 0,
    "record a micro-batch": 0,
    "log": 0,
    "start": 0,
    # At the first checkpoint, after the first log.
    "save": 1,
}


def trained(folder: Path, on_error: Any = None) -> Any:
    return train(
        folder,
        prepare=None
        if on_error is None
        else lambda trainer: attach(trainer, MetricsConfig(on_error=on_error)),
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        trainer_arguments={"eval_dataset": Dataset.from_list(make_records(10, seed=1))},
    )


def weights(trainer: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def of_trainer(trainer: Trainer) -> list[dict[str, float]]:
    keys = ("loss", "grad_norm", "eval_loss", "train_loss", "step", "epoch")
    return [{k: entry[k] for k in keys if k in entry} for entry in trainer.state.log_history]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trained(tmp_path_factory.mktemp("plain"))


@pytest.fixture(params=FAULTS)
def left(request: pytest.FixtureRequest) -> Iterator[int]:
    """One function of ours fails; the number of log entries that have channels nevertheless."""
    with faults.inject(request.param):
        yield FAULTS[request.param]


def test_warn_leaves_the_training_as_it_was(
    tmp_path: Path, plain: Trainer, left: int, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trained(tmp_path, "warn")
    assert torch.equal(weights(trainer), weights(plain))
    assert of_trainer(trainer) == of_trainer(plain)
    # One log and its evaluation before the checkpoint, or none.
    assert len(channel_logs(trainer)) == 2 * left
    warnings = [r.getMessage() for r in caplog.records if r.name == "channel_metrics"]
    assert len(warnings) == 1
    assert "training goes on: ZeroDivisionError: a fault of ours" in warnings[0]


def test_raise_ends_the_run(tmp_path: Path, left: int) -> None:
    with pytest.raises(ZeroDivisionError, match="a fault of ours"):
        trained(tmp_path, "raise")


def test_a_worker_process_says_it_and_the_run_goes_on(tmp_path: Path, plain: Trainer) -> None:
    """The records' channels are lists that fit no batch: an error in each worker."""
    records = [{**record, "channel": ["bbu", "rru"]} for record in make_records(64)]
    off, on = (
        train(
            tmp_path,
            records=records,
            dataloader_num_workers=1,
            prepare=prepare,
        )
        for prepare in (None, lambda t: attach(t, MetricsConfig(on_error="warn")))
    )
    assert torch.equal(weights(on), weights(off))
    assert not channel_logs(on)


def test_an_error_of_the_users_own_is_raised(tmp_path: Path) -> None:
    class Own(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            raise KeyError("the user's own")

    def prepare(trainer: Trainer) -> None:
        attach(trainer, MetricsConfig(on_error="warn"))

    with pytest.raises(KeyError, match="the user's own"):
        train(tmp_path, trainer_class=Own, prepare=prepare)


@ddp
def no_fault(folder: Path) -> Any:
    return run_for_bits(folder, False)


def _with_fault(folder: Path, place: str) -> Any:
    """In the second window, rank 1 has an error."""

    def prepare(trainer: Any) -> None:
        batches, window = trainer.data_collator.batches, trainer.channel_metrics._train.table

        def when(call: int, *args: Any) -> bool:
            # Not the window of an evaluation. Batches are made ahead of time, one or two of them.
            of_training = any(argument is window for argument in args)
            return len(batches) > 6 and dist.get_rank() == 1 and of_training

        stack.enter_context(faults.inject(place, when))

    with ExitStack() as stack:
        config = MetricsConfig(on_error="warn")
        return run_for_bits(folder, True, prepare=prepare, config=config)


@ddp
def fault_in_a_batch(folder: Path) -> Any:
    return _with_fault(folder, "record a micro-batch")


@ddp
def fault_in_a_sync(folder: Path) -> Any:
    return _with_fault(folder, "read a window")


@pytest.mark.parametrize("case", [fault_in_a_batch, fault_in_a_sync])
def test_a_fault_on_one_rank_keeps_no_other_waiting(ranks_of: RanksOf, case: Case) -> None:
    """Both ranks log one window, and train on as without metrics."""
    plain, ranks = ranks_of(no_fault), ranks_of(case)
    for off, on in zip(plain, ranks, strict=True):
        assert (on["weights"], on["random"]) == (off["weights"], off["random"])
        keys = [sorted(k for k in e if k.endswith("_tokens")) for e in on["logs"] if "loss" in e]
        assert keys[0] and not any(keys[1:])
        assert on["off"]
