"""`ChannelMetricsCallback`: where a Lightning Trainer's batches, log points and checkpoints are."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from channel_metrics import swap
from channel_metrics.config import MetricsConfig
from channel_metrics.data.collator import ChannelCollator
from channel_metrics.data.repeats import real_records_of_sampler
from channel_metrics.errors import ChannelMetricsError, ConfigError
from channel_metrics.extras import need
from channel_metrics.session import ChannelMetrics
from channel_metrics.trainers.lightning.known import Known
from channel_metrics.trainers.lightning.steps import StepCounter
from channel_metrics.windows import Window

__all__ = ["ChannelMetricsCallback"]

if TYPE_CHECKING:
    from lightning.pytorch import Callback

    _BASES = (Callback,)
else:
    # The same code under two names. Each Trainer takes only callbacks of its own package.
    _NAMES = ("lightning.pytorch", "pytorch_lightning")
    _FOUND = [name for name in _NAMES if find_spec(name.partition(".")[0])]
    _BASES = tuple(need(name, extra="lightning").Callback for name in _FOUND or _NAMES[:1])

# Keys that Lightning or most modules log.
_RESERVED_KEYS = frozenset({"loss", "train_loss", "val_loss", "test_loss", "epoch", "step"})
_STEPS = ("training_step", "validation_step", "test_step")
# Lightning keeps what is logged by the name of the hook that logs it: our own name.
_HOOK = "channel_metrics"


class ChannelMetricsCallback(*_BASES):  # type: ignore[misc]  # bases that are found at import
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
        self.metrics.ends_run = True
        self._model = model
        self._steps: StepCounter
        self._known: Known
        self._undo = ExitStack()
        self._fits = self._raised = False
        self._last_step = 0
        # The keys that we have logged.
        self._own: set[str] = set()
        # The open evaluation: its data loaders, the number of the current one, and its windows.
        self._loaders: list[Any] = []
        self._loader = -1
        self._windows: Generator[int] | None = None

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
        # With steps behind it, the same trainer trains on.
        if self._fits and not trainer.global_step:
            with session.guard.guarded():
                session.start()
        self._steps = StepCounter(session, pl_module, self._model)
        self._known = Known(session)
        self._known.watch(trainer, self._undo)
        # Not those of the module, which may be copied or pickled while it is trained.
        for name in _STEPS:
            self._undo.enter_context(swap.wrapped(trainer.strategy, name, self._steps.run))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._undo.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._raised = True
        self._undo.close()
        # The window of an evaluation that failed is dropped, without a collective.
        if self._windows is not None:
            self._windows.close()

    # ---- training --------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        with self.metrics.guard.guarded():
            self._known.check(trainer)

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
        self._stop(trainer)

    def _stop(self, trainer: Any) -> None:
        """End the run if an observer asked for it, on all ranks alike."""
        if self.metrics.stop_reason:
            trainer.should_stop = True

    def _values(self, trainer: Any, window: Window) -> dict[str, Tensor]:
        """The values that are logged. A key that the module logs itself is left to it."""
        theirs = trainer.logged_metrics.keys() - self._own
        theirs |= {one.meta.name for one in trainer._results.values() if one.meta.fx != _HOOK}
        logs: dict[str, float] = dict.fromkeys(theirs, 0.0)
        self.metrics.write(window, logs)
        ours = {key: value for key, value in logs.items() if key not in theirs}
        self._own |= ours.keys()
        # Lightning would round a float to float32.
        return {k: torch.tensor(v, dtype=torch.float64, device="cpu") for k, v in ours.items()}

    # ---- evaluation ------------------------------------------------------------------------

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._loaders, self._loader = trainer._evaluation_loop._combined_loader.flattened, -1
        self._windows = None if trainer.sanity_checking else self._evaluate(trainer)

    def _evaluate(self, trainer: Any) -> Generator[int]:
        """Open the window of one data loader after the other, and log them in the end."""
        stage, closed = trainer.state.stage.dataloader_prefix, []
        for number in range(len(self._loaders)):
            name = stage if len(self._loaders) == 1 else f"{stage}_{number}"
            with self.metrics.evaluation(name, trainer.global_step, f"{name}_") as found:
                yield number
            if found.window is not None:
                closed.append(found.window)
        for window in closed:
            self._log_evaluation(trainer, window)
        self._stop(trainer)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._windows is None:
            self._steps.take(batch, counted=False)
            return
        while self._loader < dataloader_idx:
            self._loader = next(self._windows)
        real = real_records_of_sampler(self._loaders[dataloader_idx], batch_idx)
        self._steps.take(batch, real=real)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        # Every rank closes all windows in the same order, also those of loaders without a batch.
        for _ in self._windows or ():
            pass

    def _log_evaluation(self, trainer: Any, window: Window) -> None:
        # Not `pl_module.log`: with a value that the module logs in the same hook under the same
        # key, Lightning would log the mean of both. Here, that of the module comes last and stays.
        for key, value in self._values(trainer, window).items():
            # `sync_dist` without a function: the values are those of all ranks already.
            trainer._results.log(_HOOK, key, value, sync_dist=True, batch_size=1)

    def on_predict_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *args: Any) -> None:
        self._steps.take(batch, counted=False)

    on_test_start = on_validation_start
    on_test_batch_start = on_validation_batch_start
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
        """Go on from the totals of a checkpoint."""
        # Lightning also calls this for the checkpoint that it tests.
        if not self._fits:
            return
        state, session = checkpoint["callbacks"].get(self.state_key), self.metrics
        if not state:
            session.warn_once(
                "the checkpoint was written without channel metrics, so "
                f"{' and '.join(session.schema.run_metrics)} count from here."
            )
            return
        try:
            session.load_state_dict(state)
        except ChannelMetricsError as error:
            # The counts from here on are right.
            if session.guard.raises:
                raise ChannelMetricsError(
                    f"the totals in {trainer.ckpt_path} cannot be read: {error} To go on with "
                    'totals that start at zero, set on_error="warn" in the config.'
                ) from error
            session.warn_once(f"{error} The totals of the run start at zero.")
