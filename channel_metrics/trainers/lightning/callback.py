"""`ChannelMetricsCallback`: where a Lightning Trainer's batches, log points and checkpoints are."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from channel_metrics import swap
from channel_metrics.config import MetricsConfig
from channel_metrics.data.batch_channels import take_channels
from channel_metrics.data.collator import ChannelCollator
from channel_metrics.data.repeats import real_records_of_sampler
from channel_metrics.data.scan import learn_classes
from channel_metrics.errors import ConfigError, UnsupportedVersionError
from channel_metrics.extras import need
from channel_metrics.observing import observe
from channel_metrics.session import ChannelMetrics
from channel_metrics.trainers.event_evaluations import EventEvaluations
from channel_metrics.trainers.lightning.models import trained_model
from channel_metrics.trainers.wanted import check_sets
from channel_metrics.windows import Window

__all__ = ["ChannelMetricsCallback"]

# The same code under two names. Each Trainer takes only callbacks of its own package.
_NAMES = ("lightning.pytorch", "pytorch_lightning")
_FOUND = [name for name in _NAMES if find_spec(name.partition(".")[0])]
_BASES: Any = tuple(need(name, extra="lightning").Callback for name in _FOUND or _NAMES[:1])

# (records without repetitions, all records) of a batch; None if nothing is repeated.
_Real = tuple[int, int] | None

# Keys that Lightning or most modules log.
_RESERVED_KEYS = frozenset({"loss", "train_loss", "val_loss", "test_loss", "epoch", "step"})
_STEPS = ("training_step", "validation_step", "test_step")
# What this callback uses of the Trainer, and Lightning does not document.
_PRIVATE = (
    "__class__._evaluation_loop",  # its value is an error outside of evaluations
    "_results",
    "lightning_module._compiler_ctx",
    "_logger_connector.log_metrics",
    "fit_loop._should_accumulate",
    "fit_loop.epoch_loop._batches_that_stepped",
    "validate_loop._combined_loader",
)
# Lightning keeps what is logged by the name of the hook that logs it: our own name.
_HOOK = "channel_metrics"
_REMEDY = (
    'In Lightning, return {"loss": loss, "logits": logits} from the step, or the losses of all '
    'tokens: {"loss": loss, "token_losses": losses, "labels": labels}.'
)


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
        self._name = model
        self._model: torch.nn.Module | None = None
        self._trainer: Any = None
        self._undo = ExitStack()
        # The batch of the next step with our keys, and which of its records are no repetitions.
        self._batch: tuple[dict[str, Any], _Real] | None = None
        # The keys that we have logged.
        self._own: set[str] = set()
        self._evaluations = EventEvaluations(self.metrics)

    def collator(self, base: Callable[[list[Any]], Any]) -> ChannelCollator:
        """A `collate_fn` like `base` that also adds the channels. `base` must return a dict."""
        return self.metrics.collator(base)

    # ---- the run ---------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        _check_release(trainer)
        sampler = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
        if sampler.get("num_replicas", trainer.world_size) != trainer.world_size:
            raise ConfigError(
                f"{type(trainer.strategy).__name__} with tensor parallelism is not supported: it "
                "gives several ranks the same batches, whose tokens would be counted twice."
            )
        session, self._trainer, self._model = self.metrics, trainer, None
        session.ranks = replace(session.ranks, alone=trainer.world_size == 1)
        # With steps behind it, the same trainer trains on.
        if stage == "fit" and not trainer.global_step:
            with session.guard.guarded():
                session.start()
        # Not those of the module, which may be copied or pickled while it is trained.
        for name in _STEPS:
            self._undo.enter_context(swap.wrapped(trainer.strategy, name, self._step))
        self._undo.enter_context(swap.wrapped(trainer.strategy, "process_dataloader", self._learn))

    def _learn(self, original: Callable[..., Any], loader: Any) -> Any:
        """Tell a collator the names of class numbers, before the workers of its loader start."""
        collate = getattr(loader, "collate_fn", None)
        if isinstance(collate, ChannelCollator):
            with self.metrics.guard.guarded():
                learn_classes(collate.classes, loader.dataset, collate.fields)
        return original(loader)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._evaluations.drop()
        self._undo.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "")

    # ---- steps -----------------------------------------------------------------------------

    def _take(self, batch: Any, real: _Real = None, *, counted: bool = True) -> None:
        """Remove our keys from a batch, and keep them for the next step if it must count."""
        found = batch if isinstance(batch, MutableMapping) else {}
        self._batch = (dict(found), real) if counted else None
        take_channels(found)

    def _step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.metrics.guard.shielded(step, self._counted, *args, **kwargs)

    def _counted(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Some optimizers run a step several times: its batch is counted the first time.
        taken, self._batch = self._batch, None
        if taken is None:
            return step(*args, **kwargs)
        (batch, real), module = taken, self._trainer.lightning_module
        if self._model is None:  # not before: `configure_model` and the strategy may make it anew
            self._model = trained_model(module, self._name)
        with observe(self.metrics, self._model, batch, real=real, remedy=_REMEDY) as seen:
            output = step(*args, **kwargs)
            if output is None and self._trainer.training and module.automatic_optimization:
                seen.discard()  # Lightning skips its backward.
            seen.returned(output)
        return output

    # ---- training --------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.metrics.sampler is not None:
            self.metrics.sampler.followed()
        with self.metrics.guard.guarded():
            train = _datasets(trainer.train_dataloader)
            held = _datasets(trainer.val_dataloaders) if trainer.enable_validation else []
            sets = zip(_splits("val", len(held)), held, strict=True)
            check_sets(self.metrics, train, dict(sets), _monitored(trainer))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *args: Any) -> None:
        self._take(batch)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        # Lightning also logs if `trainer.should_stop` is set, which not all ranks may know.
        step, every = trainer.fit_loop.epoch_loop._batches_that_stepped, trainer.log_every_n_steps
        due = trainer.fast_dev_run or (every and (step + 1) % every == 0)
        if due and not trainer.fit_loop._should_accumulate():
            self._log_train(trainer, step)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._log_train(trainer, trainer.fit_loop.epoch_loop._batches_that_stepped - 1)

    def _log_train(self, trainer: Any, step: int) -> None:
        # Not `log_dict`: Lightning would log the last value of a channel that is absent again.
        values = self._values(trainer, self.metrics.close(trainer.global_step))
        trainer.callback_metrics.update(values)
        trainer._logger_connector.log_metrics(values, step=step)

    def _values(self, trainer: Any, window: Window) -> dict[str, Tensor]:
        """The values to log. If an observer asked for it at this window, the run is ended."""
        if self.metrics.stop_reason:  # on all ranks alike
            trainer.should_stop = True
        # Keys that the module logs itself are left to it.
        theirs = trainer.logged_metrics.keys() - self._own
        theirs |= {one.meta.name for one in trainer._results.values() if one.meta.fx != _HOOK}
        ours: dict[str, float] = {}
        self.metrics.write(window, ours, theirs)
        self._own |= ours.keys()
        # Lightning would round a float to float32.
        return {k: torch.tensor(v, dtype=torch.float64, device="cpu") for k, v in ours.items()}

    # ---- evaluation ------------------------------------------------------------------------

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            splits = _splits(trainer.state.stage.dataloader_prefix, len(_evaluated(trainer)))
            self._evaluations.begin(splits, trainer.global_step)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        real = real_records_of_sampler(_evaluated(trainer)[dataloader_idx], batch_idx)
        self._take(batch, real, counted=not trainer.sanity_checking)
        if not trainer.sanity_checking:
            self._evaluations.reach(dataloader_idx)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        for window in self._evaluations.end():
            # Not `pl_module.log`: with a value that the module logs in the same hook under the same
            # key, Lightning would log the mean of both. Here, the module's comes last and stays.
            for key, value in self._values(trainer, window).items():
                # `sync_dist` without a function: the values are those of all ranks already.
                trainer._results.log(_HOOK, key, value, sync_dist=True, batch_size=1)

    def on_predict_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *args: Any) -> None:
        self._take(batch, counted=False)

    on_test_start = on_validation_start
    on_test_batch_start = on_validation_batch_start
    on_test_epoch_end = on_validation_epoch_end

    # ---- checkpoints -----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The totals of the run, for a checkpoint. A collective, except after an exception."""
        return self.metrics.totals_state(alone=getattr(self._trainer, "interrupted", False))

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        """Go on from the totals of a checkpoint."""
        # Lightning also calls this for the checkpoint that it tests.
        if trainer.state.fn == "fit":
            state = checkpoint["callbacks"].get(self.state_key)
            self.metrics.resume_state(state, str(trainer.ckpt_path))


def _check_release(trainer: Any) -> None:
    for path in _PRIVATE:
        try:
            attrgetter(path)(trainer)
        except AttributeError as error:
            package = sys.modules[_FOUND[0].partition(".")[0]]
            raise UnsupportedVersionError(
                f"{package.__name__} {package.__version__} has a Trainer without {path}; use "
                "lightning 2.6, or remove ChannelMetricsCallback."
            ) from error


def _splits(stage: str, count: int) -> list[str]:
    """The names of the `count` data sets of an evaluation."""
    return [stage] if count == 1 else [f"{stage}_{number}" for number in range(count)]


def _datasets(loaders: Any) -> list[Any]:
    return [getattr(loader, "dataset", None) for loader in tree_leaves(loaders)]


def _evaluated(trainer: Any) -> Any:
    return trainer._evaluation_loop._combined_loader.flattened


def _monitored(trainer: Any) -> Iterator[tuple[str, str]]:
    """(who watches a logged key, the key)"""
    plateaus = [one for one in trainer.lr_scheduler_configs if one.reduce_on_plateau]
    watching = [(one.scheduler, one.monitor) for one in plateaus]
    watching += [(one, getattr(one, "monitor", None)) for one in trainer.callbacks]
    for one, key in watching:
        if isinstance(key, str):
            yield f"`monitor` of {type(one).__name__}", key
