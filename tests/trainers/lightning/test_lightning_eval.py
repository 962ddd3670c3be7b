"""Evaluation in Lightning: several data loaders, the test stage, evaluations that fail."""

from __future__ import annotations

from typing import Any

import pytest
from hf_tools import PaddingCollator, make_records
from lightning_tools import Module, check, loader, quiet, run, weights

from channel_metrics import MetricsConfig

pytestmark = quiet

RECORDS = make_records(16)
FIRST, SECOND = make_records(10, seed=1), make_records(7, seed=2)


def test_several_data_loaders_are_numbered() -> None:
    found = run(RECORDS, held_out=[FIRST, SECOND])
    (first,), (second,) = found.logs("val_0"), found.logs("val_1")
    check(first, FIRST, "val_0_")
    check(second, SECOND, "val_1_")
    logged = found.trainer.callback_metrics
    assert {key: logged[key].item() for key in first} == pytest.approx(first, rel=1e-6)
    assert {key: logged[key].item() for key in second} == pytest.approx(second, rel=1e-6)


def test_validation_inside_an_epoch_leaves_the_train_window_open() -> None:
    found = run(RECORDS, held_out=[FIRST], val_check_interval=1, accumulate_grad_batches=2)
    assert [(window.split, window.step) for window in found.windows] == [
        *[("val", 0), ("val", 1), ("val", 1), ("train", 2), ("val", 2)]
    ]
    check(found.logs("train")[0], RECORDS)
    for logs in found.logs("val"):
        check(logs, FIRST, "val_")


def test_validate_and_test_after_a_run_and_training_on() -> None:
    found = run(RECORDS[:8], config=MetricsConfig(metrics=("loss", "tokens", "tokens_total")))
    assert found.callback is not None
    collate = found.callback.collator(PaddingCollator())
    (validated,) = found.trainer.validate(found.module, loader(FIRST, collate), verbose=False)
    (tested,) = found.trainer.test(found.module, loader(SECOND, collate), verbose=False)
    for given, split in ((validated, "val"), (tested, "test")):
        (logs,) = found.logs(split)
        assert logs and not any(key.endswith("_total") for key in logs)
        assert {key: given[key] for key in logs} == pytest.approx(logs, rel=1e-6)
        assert f"{split}_loss" in given
    # The same trainer trains on: its totals go on too.
    found.trainer.fit_loop.max_epochs = 2
    found.trainer.fit(found.module, loader(RECORDS[:8], collate))
    first, second = found.logs("train")
    for key in (key for key in first if key.endswith("_tokens_total")):
        assert second[key] == 2 * first[key]


def test_a_run_that_only_tests() -> None:
    found = run(RECORDS[:4], limit_train_batches=0)
    assert found.callback is not None and not found.windows
    collate = found.callback.collator(PaddingCollator())
    (tested,) = found.trainer.test(found.module, loader(FIRST, collate), verbose=False)
    check({key: v for key, v in tested.items() if key != "test_loss"}, FIRST, "test_", rel=1e-5)


def test_eval_channels() -> None:
    found = run(RECORDS, held_out=[FIRST], config=MetricsConfig(eval_channels=("bbu",)))
    assert {key.split("_")[1] for key in found.logs("val")[0]} == {"bbu"}


def test_an_evaluation_that_fails_is_dropped() -> None:
    class FailsOnce(Module):
        failed = False

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            super().validation_step(batch, batch_idx)
            if batch_idx == 1 and not FailsOnce.failed:
                FailsOnce.failed = True
                raise RuntimeError("an evaluation that fails")

    found = run(RECORDS[:8])
    assert found.callback is not None
    collate = found.callback.collator(PaddingCollator())
    module = FailsOnce()
    with pytest.raises(RuntimeError, match="an evaluation that fails"):
        found.trainer.validate(module, loader(FIRST, collate), verbose=False)
    assert "validation_step" not in vars(module)
    assert not found.callback.metrics.evaluating
    found.trainer.validate(module, loader(FIRST, collate), verbose=False)
    (logs,) = found.logs("val")
    check(logs, FIRST, "val_")


def test_evaluation_leaves_the_training_as_it_was() -> None:
    """With an evaluation set that has other channels than the training."""
    held_out = [{**record, "channel": "other"} for record in FIRST]
    on, off = (
        run(RECORDS, held_out=[held_out], module=Module(learning_rate=1e-2), on=on, max_epochs=2)
        for on in (True, False)
    )
    assert weights(on.module).equal(weights(off.module))
    found = {key.rpartition("_other_")[0] for logs in on.logs("val") for key in logs}
    assert found == {"val"}
