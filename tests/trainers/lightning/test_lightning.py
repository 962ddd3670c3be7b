"""Lightning on one process: the windows, the log points, and training as it is without them."""

from __future__ import annotations

import copy
import pickle
import statistics
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import pytorch_lightning
import torch
from hf_tools import PaddingCollator, make_records, tiny_model, token_table
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning_tools import Module, check, flattened, loader, quiet, run, still_model, weights

from channel_metrics import MetricsConfig
from channel_metrics.capture import reader
from channel_metrics.trainers.lightning import ChannelMetricsCallback

pytestmark = quiet

RECORDS = make_records(28)
HELD_OUT = make_records(10, seed=1)


def test_windows_close_at_the_log_points_and_at_the_end() -> None:
    found = run(RECORDS)
    assert [window.step for window in found.windows] == [2, 4, 6, 7]
    for window, start in zip(found.windows, (0, 8, 16, 24), strict=True):
        check(window.logs, RECORDS[start : start + 8])
    # Lightning counts steps from 0 in its loggers.
    assert [step for step, _ in found.entries] == [1, 3, 5, 6]
    for window, (_, values) in zip(found.windows, found.entries, strict=True):
        assert {k: v for k, v in values.items() if k != "epoch"} == window.logs


def test_the_losses_are_those_of_the_model_without_a_second_softmax(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def measured(*args: Any) -> None:
        raise AssertionError("a second softmax")

    monkeypatch.setattr(reader, "token_losses_from_outputs", measured)
    check(run(RECORDS[:8]).windows[0].logs, RECORDS[:8])


def test_accumulated_micro_batches_are_one_step() -> None:
    found = run(RECORDS, accumulate_grad_batches=2)
    # 7 batches are 4 steps: Lightning makes a step of the last one.
    assert [window.step for window in found.windows] == [2, 4]
    check(found.windows[0].logs, RECORDS[:16])
    check(found.windows[1].logs, RECORDS[16:])


def test_a_window_goes_on_in_the_next_epoch() -> None:
    found = run(RECORDS[:12], max_epochs=2)
    assert [window.step for window in found.windows] == [2, 4, 6]
    check(found.windows[1].logs, [*RECORDS[8:12], *RECORDS[:4]])


def test_an_absent_channel_is_not_logged_again() -> None:
    records = [{**r, "channel": "bbu" if i < 8 else "rru"} for i, r in enumerate(RECORDS[:16])]
    found = run(records)
    first, second = ({*values} - {"epoch"} for _, values in found.entries)
    assert {key.partition("_")[0] for key in first} == {"bbu"}
    assert {key.partition("_")[0] for key in second} == {"rru"}


@pytest.mark.parametrize("workers", [0, 2])
def test_training_is_the_same_bit_for_bit(workers: int) -> None:
    options: dict[str, Any] = {
        "held_out": [HELD_OUT],
        "workers": workers,
        "accumulate_grad_batches": 2,
        "max_epochs": 2,
    }
    with_them, without = (
        run(RECORDS, module=Module(tiny_model(), 1e-2), on=on, **options) for on in (True, False)
    )
    assert torch.equal(weights(with_them.module), weights(without.module))
    assert with_them.module.losses == without.module.losses
    assert len(with_them.windows) == 4 + 2
    assert (
        with_them.trainer.callback_metrics["val_loss"]
        == without.trainer.callback_metrics["val_loss"]
    )


def test_the_sanity_check_of_the_validation_does_not_count() -> None:
    found = run(RECORDS[:8], held_out=[HELD_OUT], num_sanity_val_steps=2)
    assert [window.split for window in found.windows] == ["train", "val"]
    check(found.logs("val")[0], HELD_OUT, "val_")


def test_limits_and_overfit_batches() -> None:
    found = run(RECORDS, held_out=[HELD_OUT], limit_train_batches=2, limit_val_batches=2)
    check(found.logs("train")[0], RECORDS[:8])
    check(found.logs("val")[0], HELD_OUT[:8], "val_")
    found = run(RECORDS, overfit_batches=2, max_epochs=2)
    for logs in found.logs("train"):
        check(logs, RECORDS[:8])


def test_fast_dev_run_logs_its_step() -> None:
    (window,) = run(RECORDS, fast_dev_run=True).windows
    check(window.logs, RECORDS[:4])


def test_csv_and_tensorboard_hold_the_values(tmp_path: Path) -> None:
    import csv

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers: list[Any] = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tb")]
    found = run(RECORDS, held_out=[HELD_OUT], logger=loggers)
    with (Path(loggers[0].log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    events = EventAccumulator(str(loggers[1].log_dir))
    events.Reload()
    for window in found.windows:
        step = window.step - 1
        for key, value in window.logs.items():
            in_csv = [float(row[key]) for row in rows if row[key] and int(row["step"]) == step]
            assert in_csv == pytest.approx([value], rel=1e-6)
            in_events = [event.value for event in events.Scalars(key) if event.step == step]
            assert in_events == pytest.approx([value], rel=1e-6)


def test_early_stopping_of_lightning_on_an_objective() -> None:
    found = run(
        RECORDS,
        held_out=[HELD_OUT],
        callbacks=[EarlyStopping(monitor="val_macro_loss", patience=2, min_delta=1e-6)],
        config=MetricsConfig(metrics=("loss", "macro_loss")),
        max_epochs=9,
    )
    assert found.trainer.current_epoch == 3, "the model does not learn"


def test_callbacks_monitor_the_values(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val_bbu_loss", filename="{epoch}-{val_bbu_loss:.4f}")
    of_train = ModelCheckpoint(
        tmp_path, monitor="bbu_loss", every_n_train_steps=2, filename="train-{step}"
    )
    of_all = ModelCheckpoint(tmp_path, monitor="val_macro_loss", filename="of_all-{epoch}")
    of_worst = ModelCheckpoint(tmp_path, monitor="val_worst_loss", filename="worst-{epoch}")
    # A threshold that no loss is below: it stops after the first validation.
    stop = EarlyStopping(monitor="val_bbu_loss", patience=1, min_delta=100.0)
    found = run(
        RECORDS,
        held_out=[HELD_OUT],
        module=Module(still_model(), 1e-2),
        callbacks=[best, of_train, of_all, of_worst, stop],
        config=MetricsConfig(metrics=("loss", "tokens", "macro_loss", "worst_loss")),
        enable_checkpointing=True,
        max_epochs=9,
    )
    assert found.trainer.current_epoch == 2
    losses = [logs["val_bbu_loss"] for logs in found.logs("val")]
    assert best.best_model_score == pytest.approx(min(losses), rel=1e-6)
    assert f"val_bbu_loss={min(losses):.4f}" in best.best_model_path
    validations = [window for window in found.windows if window.split != "train"]
    of_channels = [
        [v["loss"] for name, v in window.values.items() if name != "unlabeled"]
        for window in validations
    ]
    macro = min(map(statistics.fmean, of_channels))
    assert of_all.best_model_score == pytest.approx(macro, rel=1e-6)
    assert of_worst.best_model_score == pytest.approx(min(map(max, of_channels)), rel=1e-6)
    assert of_train.best_model_score == pytest.approx(
        min(logs["bbu_loss"] for logs in found.logs("train")[:-1] if "bbu_loss" in logs), rel=1e-6
    )


def test_a_key_of_the_module_stays(caplog: pytest.LogCaptureFixture) -> None:
    class Logs(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("bbu_loss", 7.0)
            return super().training_step(batch, batch_idx)

    found = run(RECORDS, module=Logs())
    assert {values["bbu_loss"] for _, values in found.entries if "bbu_loss" in values} == {7.0}
    assert sum("'bbu_loss' is already logged" in r.getMessage() for r in caplog.records) == 1


@pytest.mark.parametrize("sanity", [0, 2])
def test_a_key_that_the_module_logs_at_the_end_of_an_evaluation_stays(
    sanity: int, caplog: pytest.LogCaptureFixture
) -> None:
    class Logs(Module):
        def on_validation_epoch_end(self) -> None:
            self.log("val_bbu_loss", 100.0)

    options: dict[str, Any] = {"held_out": [HELD_OUT], "num_sanity_val_steps": sanity}
    found = run(RECORDS[:8], module=Logs(), max_epochs=2, **options)
    assert found.trainer.callback_metrics["val_bbu_loss"] == 100
    logged = [values["val_bbu_loss"] for _, values in found.entries if "val_bbu_loss" in values]
    assert logged == [100, 100]
    assert sum("'val_bbu_loss' is already logged" in r.getMessage() for r in caplog.records) == 1


def test_values_of_an_evaluation_are_not_rounded() -> None:
    found = run(RECORDS[:8], held_out=[HELD_OUT])
    (window,) = (window for window in found.windows if window.split == "val")
    logged = next(values for _, values in found.entries if "val_bbu_loss" in values)
    assert {key: logged[key] for key in window.logs} == window.logs
    assert found.trainer.callback_metrics["val_bbu_loss"].item() == window.logs["val_bbu_loss"]


def test_a_channel_with_a_key_of_lightnings_habit_is_refused() -> None:
    from channel_metrics import ConfigError

    with pytest.raises(ConfigError, match="the trainer's own key"):
        ChannelMetricsCallback(MetricsConfig(channels=("val",)))


def test_flattened_batches_have_their_boundaries() -> None:
    counts = MetricsConfig(metrics=("tokens", "samples"))
    found = run(RECORDS[:8], collate=flattened, config=counts)
    assert sum(v for k, v in found.windows[0].logs.items() if k.endswith("_samples")) == 8
    for channel in {record["channel"] for record in RECORDS[:8]}:
        of_it = [r for r in RECORDS[:8] if r["channel"] == channel]
        tokens = sum(label != -100 for record in of_it for label in record["labels"][1:])
        assert found.windows[0].logs[f"{channel}_tokens"] == tokens


def test_predictions_are_left_alone() -> None:
    class Predicts(Module):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.model(**batch).logits.shape[0]

    found = run(RECORDS[:8], module=Predicts())
    assert found.callback is not None
    collate = found.callback.collator(PaddingCollator())
    assert found.trainer.predict(found.module, loader(RECORDS[:8], collate)) == [4, 4]
    assert len(found.windows) == 1


def test_the_module_can_be_copied_and_pickled_while_it_is_trained() -> None:
    class Copies(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            assert pickle.loads(pickle.dumps(pl_module)).learning_rate == 0.5
            other = copy.deepcopy(pl_module)
            # A step of the copy runs the model of the copy.
            assert other.training_step.__self__ is other

    module = Module(learning_rate=0.5)
    run(RECORDS[:8], module=module, callbacks=[Copies()])
    steps = {"training_step", "validation_step", "test_step"}
    assert not steps & vars(module).keys() and not steps & vars(module.trainer.strategy).keys()
    pickle.dumps(ChannelMetricsCallback())


def test_pytorch_lightning_takes_it_too() -> None:
    class Same(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.learning_rate = still_model(), 0.0
            self.losses: list[Any] = []

        training_step = Module.training_step
        configure_optimizers = Module.configure_optimizers

    callback = ChannelMetricsCallback()
    windows: list[Any] = []
    callback.metrics.on_window.append(windows.append)
    trainer = pytorch_lightning.Trainer(
        callbacks=[callback],
        accelerator="cpu",
        max_epochs=1,
        log_every_n_steps=2,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(Same(), loader(RECORDS[:8], callback.collator(PaddingCollator())))
    check(windows[0].logs, RECORDS[:8])
    assert isinstance(callback, L.Callback)


def test_excess_loss_over_a_reference() -> None:
    records = [
        record | {"ref_nll": 1.7 * n, "ref_tokens": sum(t != -100 for t in record["labels"])}
        for n, record in enumerate(RECORDS[:8])
    ]
    found = run(records, config=MetricsConfig(metrics=("excess_loss",))).windows[0].logs
    table, wanted = token_table(still_model(), RECORDS[:8]), {}
    for name in {record["channel"] for record in records}:
        own = [record for record in records if record["channel"] == name]
        losses = [loss for r in own for loss, _ in table[tuple(r["input_ids"])][1]]
        excess = sum(losses) - sum(record["ref_nll"] for record in own)
        wanted[f"{name}_excess_loss"] = excess / len(losses)
    assert found == pytest.approx(wanted, rel=1e-5)
