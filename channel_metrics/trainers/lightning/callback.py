"""`ChannelMetricsCallback`: where a Lightning Trainer's batches, log points and checkpoints are."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from channel_metrics import swap
from channel_metrics.config import MetricsConfig
from channel_metrics.data.collator import ChannelCollator
from channel_metrics.errors import ChannelMetricsError, ConfigError
from channel_metrics.extras import need
from channel_metrics.session import ChannelMetrics
from channel_metrics.trainers.lightning.steps import StepCounter
from channel_metrics.windows import Window

__all__ = ["ChannelMetricsCallback"]

if TYPE_CHECKING:
    from lightning.pytorch import Callback

    _BASES = (Callback,)
else:
    # The same code under two names. Each Trainer takes only callbacks of its own package.
    _PACKAGES = [name for name in ("lightning", "pytorch_lightning") if find_spec(name)]
    _BASES = tuple(
        need("lightning.pytorch" if name == "lightning" else name, extra="lightning").Callback
        for name in _PACKAGES or ["lightning"]
    )

# Keys that Lightning or most modules log.
_RESERVED_KEYS = frozenset({"loss", "train_loss", "val_loss", "test_loss", "epoch", "step"})
_STEPS = ("training_step", "validation_step", "test_step")


class ChannelMetricsCallback(*_BASES):  # type: ignore[misc]
    """Give it to the Trainer, and its `collator` to the data loaders.

    Args:
        config: what is measured and logged; None means the default config.
        model: the name of the model in the LightningModule whose losses are counted, such as
            `student`. None takes the transformers model that the module trains.
        on_window: functions that get each closed `Window`, see `ChannelMetrics`.

    Attributes:
        metrics: the session, a `ChannelMetrics`.
    """

    def __init__(
        self,
        config: MetricsConfig | None = None,
        *,
        model: str | None = None,
        on_window: Iterable[Callable[[Window], Any]] = (),
    ) -> None:
        self.metrics = ChannelMetrics(config, reserved=_RESERVED_KEYS, on_window=on_window)
        self._model = model
        self._steps: StepCounter
        self._undo = ExitStack()
        self._fits = self._raised = False
        self._last_step = 0
        # The keys that we have logged.
        self._own: set[str] = set()
        # The evaluation that is open: its windows, the number of the data loader, what was closed.
        self._windows: Generator[None] | None = None
        self._loader = -1
        self._closed: list[Window] = []

    def collator(self, base: Callable[[list[Any]], Any]) -> ChannelCollator:
        """A `collate_fn` like `base` that also adds the channels. `base` must return a dict."""
        return self.metrics.collator(base)

    # ---- the run ---------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        sampler = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
        if sampler.get("num_replicas", trainer.world_size) != trainer.world_size:
            raise ConfigError(
                f"{type(trainer.strategy).__name__} gives the same batches to several ranks "
                "(tensor parallelism), whose tokens would be counted twice; this is not supported."
            )
        self._fits, self._raised = stage == "fit", False
        session = self.metrics
        session.ranks = replace(session.ranks, alone=trainer.world_size == 1)
        if self._fits:
            totals = session.totals
            with session.guard.guarded():
                session.start()
            if trainer.global_step:
                # The same trainer trains on.
                session.totals = totals
        self._steps = StepCounter(session, pl_module, self._model)
        for name in _STEPS:
            self._undo.enter_context(swap.wrapped(pl_module, name, self._steps.run))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._undo.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._raised = True
        self._undo.close()
        # The window of an evaluation that failed is dropped, without a collective.
        if self._windows is not None:
            self._windows.close()

    # ---- training --------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self._steps.take(batch)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Lightning also logs if `trainer.should_stop` is set, which not all ranks may know.
        self._last_step = trainer.fit_loop.epoch_loop._batches_that_stepped
        every = trainer.log_every_n_steps
        due = trainer.fast_dev_run or (every and (self._last_step + 1) % every == 0)
        if due and not trainer.fit_loop._should_accumulate():
            self._log_train(trainer, None)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._log_train(trainer, self._last_step)

    def _log_train(self, trainer: Any, step: int | None) -> None:
        # Not `log_dict`: Lightning would log the last value of a channel that is absent again.
        values = self._values(trainer, self.metrics.close(trainer.global_step))
        trainer.callback_metrics.update(values)
        trainer._logger_connector.log_metrics(values, step=step)

    def _values(self, trainer: Any, window: Window) -> dict[str, Tensor]:
        """The values that are logged. A key that the module logs itself is left to it."""
        logs = {key: 0.0 for key in trainer.logged_metrics if key not in self._own}
        theirs = set(logs)
        self.metrics.write(window, logs)
        self._own |= logs.keys() - theirs
        # Lightning would round a float to float32.
        return {
            key: torch.tensor(value, dtype=torch.float64, device="cpu")
            for key, value in logs.items()
            if key not in theirs
        }

    # ---- evaluation ------------------------------------------------------------------------

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        loaders = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
        stage = trainer.state.stage.dataloader_prefix
        names = [f"{stage}_{i}" for i in range(len(loaders))] if len(loaders) > 1 else [stage]
        self._windows = self._each([] if trainer.sanity_checking else names, trainer)
        self._loader, self._closed = -1, []
        with self.metrics.guard.guarded():
            self._warn_of_repetitions(trainer)

    def _warn_of_repetitions(self, trainer: Any) -> None:
        found = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
        found = list(found.values()) if isinstance(found, Mapping) else found
        for loader in found if isinstance(found, (list, tuple)) else [found]:
            sampler = getattr(loader, "sampler", None)
            if isinstance(sampler, DistributedSampler) and not sampler.drop_last:
                repeated = sampler.total_size - len(sampler.dataset)  # type: ignore[arg-type]
                if repeated:
                    self.metrics.warn_once(
                        f"Lightning repeats {repeated} records of an evaluation set so that all "
                        f"{trainer.world_size} ranks get as many; they are counted twice. For "
                        "exact values, evaluate on one device, or with as many records as fit."
                    )

    def _each(self, names: list[str], trainer: Any) -> Generator[None]:
        """Open the window of one data loader after the other."""
        for name in names:
            with self.metrics.evaluation(name, trainer.global_step, f"{name}_") as found:
                yield
            if found.window is not None:
                self._closed.append(found.window)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        counted = not (trainer.sanity_checking or trainer.predicting)
        self._steps.take(batch, counted=counted)
        while counted and self._loader < dataloader_idx:
            assert self._windows is not None
            next(self._windows)
            self._loader += 1

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        # Every rank closes all windows in the same order, also those of loaders without a batch.
        for _ in self._windows or ():
            pass
        for window in self._closed:
            values = self._values(trainer, window)
            with warnings.catch_warnings():
                # The values are those of all ranks already.
                keys = "|".join(map(re.escape, values))
                advice = rf"It is recommended to use `self\.log\('({keys})'"
                warnings.filterwarnings("ignore", advice)
                pl_module.log_dict(values, on_step=False, on_epoch=True, batch_size=1)
                # Here Lightning computes what was logged, with that warning.
                _ = trainer.callback_metrics

    on_test_start = on_validation_start
    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_epoch_end = on_validation_epoch_end

    # ---- checkpoints -----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The totals of the run, for a checkpoint. A collective, except after an exception."""
        session = self.metrics
        if self._raised and not session.ranks.is_one:
            return {"totals": session.totals.state_dict()}
        totals = session.totals_now()
        return {} if totals is None else {"totals": totals.state_dict()}

    def on_load_checkpoint(
        self, trainer: Any, pl_module: Any, checkpoint: Mapping[str, Any]
    ) -> None:
        if self._fits and not checkpoint["callbacks"].get(self.state_key):
            self.metrics.warn_once(
                "the checkpoint was written without channel metrics, so "
                f"{' and '.join(self.metrics.schema.run_metrics)} count from here."
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the totals of a checkpoint."""
        # Lightning also calls this for the checkpoint that it tests.
        if self._fits:
            try:
                self.metrics.load_state_dict(state)
            except ChannelMetricsError as error:
                # The counts from here on are right.
                if self.metrics.guard.raises:
                    raise
                self.metrics.warn_once(f"{error} The totals of the run start at zero.")
