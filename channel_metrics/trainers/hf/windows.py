"""The windows of a transformers Trainer, and its totals in checkpoints."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import transformers
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, default_compute_objective

from channel_metrics.core.totals import totals_path
from channel_metrics.data.mixed_stream import MixedStream
from channel_metrics.session import ChannelMetrics
from channel_metrics.trainers.hf.callbacks import tell_callbacks
from channel_metrics.trainers.hf.eval_keys import (
    check_best_metric,
    check_stop_when,
    declare_evaluations,
    own_keys,
)
from channel_metrics.trainers.hf.loaders import ChannelLoadersMixin
from channel_metrics.windows import Window

__all__ = ["ChannelWindowsMixin"]


class ChannelWindowsMixin(ChannelLoadersMixin):
    """Closes a window when the trainer logs, and keeps the totals in its checkpoints."""

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        loop = super()._inner_training_loop
        tell_callbacks(self)
        session = self.channel_metrics
        if session is not None:
            self._follow(session)
            with session.guard.guarded():
                called = inspect.signature(loop).bind(*args, **kwargs).arguments
                checkpoint = called.get("resume_from_checkpoint") or None
                self._start(session, None if checkpoint is None else Path(checkpoint))
                declare_evaluations(self, session)
                self._check_eval_channels(session)
                check_best_metric(self, session)
                check_stop_when(self, session)
        return loop(*args, **kwargs)

    def _follow(self, session: ChannelMetrics) -> None:
        """Let the training set follow the sampler; it is an error if nothing does."""
        if session.sampler is None:
            return
        if isinstance(self.train_dataset, MixedStream):
            self.train_dataset.follow(session)
        elif not self.channel_whole_script:  # such a trainer may be left alone
            session.sampler.followed()

    def _start(self, session: ChannelMetrics, checkpoint: Path | None) -> None:
        """Begin a run, and load the totals of its checkpoint."""
        missing: Path | None = None
        if checkpoint is not None and self.channel_whole_script and not totals_path(checkpoint):
            # A trainer that is left alone writes no totals. Who has channels is warned later.
            checkpoint, missing = None, checkpoint
        session.start(checkpoint)
        self.channel_scratch.no_totals = missing

    def _check_eval_channels(self, session: ChannelMetrics) -> None:
        """Check `eval_channels` before training, if all datasets can be scanned."""
        if not session.config.eval_channels or self.eval_dataset is None:
            return
        held = self.eval_dataset
        sets = [("train", self.train_dataset)]
        sets += [
            ("eval", dataset) for dataset in (held.values() if isinstance(held, dict) else [held])
        ]
        known = [self._declare(session, dataset, split) for split, dataset in sets]
        if all(known):
            session.check_eval_channels()

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        session = self.channel_metrics
        if session is not None:
            # Subclasses may declare other parameters, so the base class tells which one `trial` is.
            save = inspect.signature(transformers.Trainer._save_checkpoint)
            trial = save.bind(self, *args, **kwargs).arguments.get("trial")
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            # The totals are written first, so that a complete checkpoint always has them.
            session.save(
                Path(self._get_output_dir(trial=trial)) / folder, is_writer=self.args.should_save
            )
        return super()._save_checkpoint(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> Any:
        if self.channel_metrics is None:
            return super()._maybe_log_save_evaluate(*args, **kwargs)
        # The log of the loop comes first. Callbacks may log another `loss` after it.
        # As transformers decides whether it logs: its own log is then the next one.
        last, step = getattr(self, "_globalstep_last_logged", -1), self.state.global_step
        self.channel_scratch.logs_next = self.control.should_log and step > last
        try:
            return super()._maybe_log_save_evaluate(*args, **kwargs)
        finally:
            self.channel_scratch.logs_next = False

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        session = self.channel_metrics
        if session is not None:
            # Only the training loop logs on every rank. So only its logs close a window: the
            # regular ones, and the last one of the run.
            regular = self.channel_scratch.logs_next
            final = "train_loss" in logs and "train_runtime" in logs
            self.channel_scratch.logs_next = False
            if regular or final:
                self._write(session, session.close(self.state.global_step), logs)
        super().log(logs, *args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> Any:
        session, held = self.channel_metrics, eval_dataset
        held = self.eval_dataset if held is None else held
        if session is not None and isinstance(held, dict):
            # All of them before the first: its channels must not take the keys of later sets.
            first = kwargs.get("metric_key_prefix", "eval")
            self._reserve(session, [f"{first}_{name}_" for name in held])
        return super().evaluate(eval_dataset, *args, **kwargs)

    def _reserve(self, session: ChannelMetrics, prefixes: list[str]) -> None:
        """Keep the keys that transformers itself logs with these prefixes free."""
        for error in session.keys.reserve(own_keys(prefixes)):
            session.warn_once(f"{error} It is left out of the log.")

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        session = self.channel_metrics
        if session is None:
            return super().evaluation_loop(*args, **kwargs)
        loop = inspect.signature(transformers.Trainer.evaluation_loop)
        called = loop.bind(self, *args, **kwargs)
        called.apply_defaults()
        split = called.arguments["metric_key_prefix"]
        self._reserve(session, [f"{split}_"])
        with session.evaluation(split, self.state.global_step, f"{split}_") as evaluation:
            output = super().evaluation_loop(*args, **kwargs)
        if evaluation.window is not None and output.metrics is not None:
            # A notebook of transformers shows the last key that ends with `_loss` as the loss of
            # the whole set, so that loss must stay last.
            own_loss = {k: output.metrics.pop(k) for k in (f"{split}_loss",) if k in output.metrics}
            self.channel_scratch.own_keys |= self._write(session, evaluation.window, output.metrics)
            output.metrics.update(own_loss)
        return output

    def _write(self, session: ChannelMetrics, window: Window, logs: dict[str, float]) -> set[str]:
        """Put the values into the trainer's own log. Returns the keys that were added."""
        before = set(logs)
        if self.channel_whole_script and not window.names:
            # No rank has met a channel, so the trainer's own log already shows everything.
            if window.split == "train" and window.values:
                session.guard.off = True
        else:
            folder, self.channel_scratch.no_totals = self.channel_scratch.no_totals, None
            if folder is not None:
                session.resume(folder)  # warns that the totals start at zero
            session.write(window, logs)
        if session.stop_reason:
            self.control.should_training_stop = True
        return set(logs) - before

    def hyperparameter_search(
        self, hp_space: Any = None, compute_objective: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        default = (None, default_compute_objective)
        if self.channel_metrics is not None and compute_objective in default:
            compute_objective = self._objective_without_channels
        return super().hyperparameter_search(hp_space, compute_objective, *args, **kwargs)

    def _objective_without_channels(self, metrics: dict[str, float]) -> float:
        """Call the default objective without our keys, because it adds up all that it gets."""
        own = self.channel_scratch.own_keys
        theirs = {key: value for key, value in metrics.items() if key not in own}
        return float(default_compute_objective(theirs))
