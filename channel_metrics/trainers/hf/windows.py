"""The windows of a transformers Trainer: where it logs, evaluates, saves and resumes."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import transformers
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from channel_metrics.session import ChannelMetrics
from channel_metrics.trainers.hf.callbacks import tell_callbacks
from channel_metrics.trainers.hf.loaders import ChannelLoadersMixin

__all__ = ["ChannelWindowsMixin"]


class ChannelWindowsMixin(ChannelLoadersMixin):
    """Closes the windows where the trainer logs, and keeps the totals in its checkpoints."""

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        loop = super()._inner_training_loop
        tell_callbacks(self)
        session = self.channel_metrics
        if session is not None:
            with session.guard.guarded():
                called = inspect.signature(loop).bind(*args, **kwargs).arguments
                checkpoint = called.get("resume_from_checkpoint") or None
                session.start(None if checkpoint is None else Path(checkpoint))
                self._check_eval_channels(session)
        return loop(*args, **kwargs)

    def _check_eval_channels(self, session: ChannelMetrics) -> None:
        """Where all names can be known before training, a wrong one is said before training."""
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
            # Subclasses take anything and pass it on.
            save = inspect.signature(transformers.Trainer._save_checkpoint)
            trial = save.bind(self, *args, **kwargs).arguments.get("trial")
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            # Written first: a checkpoint that is complete has its totals.
            session.save(
                Path(self._get_output_dir(trial=trial)) / folder, is_writer=self.args.should_save
            )
        return super()._save_checkpoint(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> Any:
        if self.channel_metrics is None:
            return super()._maybe_log_save_evaluate(*args, **kwargs)
        self.channel_scratch.in_training_loop = True
        try:
            return super()._maybe_log_save_evaluate(*args, **kwargs)
        finally:
            self.channel_scratch.in_training_loop = False

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        session = self.channel_metrics
        if session is not None:
            # Only the logs of the training loop itself are called on every rank, and only they
            # close a window: the one with `loss`, and the last one of the run.
            regular = self.channel_scratch.in_training_loop and "loss" in logs
            final = "train_loss" in logs and "train_runtime" in logs
            if regular or final:
                session.write(session.close(self.state.global_step), logs)
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        session = self.channel_metrics
        if session is None:
            return super().evaluation_loop(*args, **kwargs)
        loop = inspect.signature(transformers.Trainer.evaluation_loop)
        called = loop.bind(self, *args, **kwargs)
        called.apply_defaults()
        split = called.arguments["metric_key_prefix"]
        with session.evaluation(split, self.state.global_step, f"{split}_") as evaluation:
            output = super().evaluation_loop(*args, **kwargs)
        if evaluation.window is not None and output.metrics is not None:
            # transformers' notebook takes the last `..._loss` for the loss of the whole set.
            own_loss = {k: output.metrics.pop(k) for k in (f"{split}_loss",) if k in output.metrics}
            session.write(evaluation.window, output.metrics)
            output.metrics.update(own_loss)
        return output
