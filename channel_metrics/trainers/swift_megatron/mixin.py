"""The mixin that gives ms-swift's Megatron trainer channel metrics."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from swift.megatron.trainers.base import BaseMegatronTrainer
from torch import Tensor

from channel_metrics.core.checks import IGNORE_INDEX
from channel_metrics.session import ChannelMetrics
from channel_metrics.trainers.megatron import MegatronChannelMetrics
from channel_metrics.trainers.swift.data import CHANNEL_COLUMN, records_of
from channel_metrics.trainers.swift_megatron.batch import SequenceChannels, sequence_channels
from channel_metrics.windows import Evaluation

__all__ = ["HOOKS", "SwiftMegatronMixin"]

# The methods that are extended here, with their parameters in ms-swift.
HOOKS = {
    "_compute_channel_loss": ("self", "losses", "loss_mask", "channels", "packed_seq_params"),
    "_log_callback": ("self", "logs", "n_steps"),
    "_prepare_batch": ("self", "data", "vp_stage"),
    "evaluate": ("self", "val_data_iterator"),
    "loss_func": ("self", "output_tensor", "labels", "loss_scale", "channels", "packed_seq_params"),
    "save_checkpoint": ("self",),
    "setup_training": ("self", "train_dataset", "val_dataset"),
    "train_step": ("self", "train_data_iterator"),
}
# ms-swift adds it to the keys of an evaluation after it has called us.
_EVAL_PREFIX = "eval_"


# The base lets `attach` change the class of a trainer that exists.
class SwiftMegatronMixin(BaseMegatronTrainer):  # type: ignore[misc]  # ms-swift has no types
    """A mixin for `MegatronTrainer` classes, see `attach`.

    channel_metrics: the session. channel_counting: counts the micro-batches. channel_evaluation:
    the open evaluation, and the stack that ends it.
    """

    channel_metrics: ChannelMetrics
    channel_counting: MegatronChannelMetrics
    channel_evaluation: tuple[Evaluation, ExitStack] | None = None

    # ---- one micro-batch ------------------------------------------------------------------

    def _prepare_batch(self, data: Any, vp_stage: int | None = None) -> Any:
        given = dict(data)  # ms-swift shifts and cuts it
        batch = super()._prepare_batch(data, vp_stage)
        session = self.channel_metrics
        # Only the last pipeline stage keeps the labels.
        if session.measuring and batch.get("labels") is not None:
            with session.guard.guarded():
                batch["channel"] = sequence_channels(
                    self.args,
                    given,
                    session.labels,
                    session.classes,
                    with_places=bool(session.token_axes.of_places),
                )
        return batch

    def loss_func(
        self,
        output_tensor: Tensor,
        *,
        labels: Tensor,
        loss_scale: Tensor | None = None,
        channels: list[str | None] | None = None,
        packed_seq_params: Any = None,
    ) -> Any:
        """ms-swift's loss, counted per channel."""
        loss_func = super().loss_func
        session = self.channel_metrics
        if isinstance(channels, SequenceChannels) and session.measuring:
            with session.guard.guarded():
                loss_func = self.channel_counting.count(
                    loss_func,
                    channels=channels.ids,
                    loss_mask=labels != IGNORE_INDEX,
                    cu_seqlens=_to(channels.cu_seqlens, labels),
                    sequences=channels.sequences,
                    weights=self._token_weights(output_tensor, loss_scale),
                    labels=labels if session.with_targets else None,
                    reports_sum=loss_scale is None and not self.args.enable_dft_loss,
                    num_crossings=channels.num_crossings,
                    places=channels.places,
                )
        return loss_func(
            output_tensor,
            labels=labels,
            loss_scale=loss_scale,
            channels=channels,
            packed_seq_params=packed_seq_params,
        )

    def _token_weights(self, losses: Tensor, loss_scale: Tensor | None) -> Tensor | None:
        """The factor of each nll [B, S] in ms-swift's loss; None if it is not needed."""
        dft = self.args.enable_dft_loss
        if not dft and loss_scale is None and not self.args.enable_channel_loss:
            return None
        nll = losses.detach().float()
        weights = torch.exp(-nll) if dft else torch.ones_like(nll)
        return weights if loss_scale is None else weights * loss_scale

    def _compute_channel_loss(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Nothing, because `loss_{channel}` is computed from our sums when ms-swift logs.

        After the metrics have ended on all ranks, ms-swift's own function is used again.
        """
        off = self.channel_metrics.guard.off
        return super()._compute_channel_loss(*args, **kwargs) if off else {}

    # ---- windows --------------------------------------------------------------------------

    def setup_training(self, train_dataset: Any, val_dataset: Any) -> Any:
        """Learn the channels, and go on with the totals of the checkpoint."""
        session = self.channel_metrics
        with session.guard.guarded():
            session.start(_resumed_checkpoint(self.args) if self.state.iteration else None)
            given = (("train", train_dataset), ("eval", val_dataset))
            sets = [(split, records_of(dataset)) for split, dataset in given if dataset is not None]
            known = [session.declare(found, split, (CHANNEL_COLUMN,)) for split, found in sets]
            if known and all(known):
                session.check_eval_channels()
        return super().setup_training(train_dataset, val_dataset)

    def train_step(self, train_data_iterator: Any) -> Any:
        """One step. Its tokens count even if the optimizer skips it, as in ms-swift's log."""
        self._watch()
        self.channel_counting.begin_step()
        result = super().train_step(train_data_iterator)
        self.channel_counting.end_step()
        return result

    def evaluate(self, val_data_iterator: Any) -> Any:
        """An evaluation with a window of its own, which ends when ms-swift logs it."""
        self._watch()
        evaluation = self.channel_metrics.evaluation("eval", self.state.iteration, _EVAL_PREFIX)
        with ExitStack() as stack:
            self.channel_evaluation = stack.enter_context(evaluation), stack
            try:
                return super().evaluate(val_data_iterator)
            finally:
                self.channel_evaluation = None

    def _log_callback(self, logs: dict[str, Any], n_steps: int) -> None:
        super()._log_callback(logs, n_steps)
        session = self.channel_metrics
        if self.channel_evaluation is None:
            session.write(session.close(self.state.iteration), logs)
            return
        evaluation, stack = self.channel_evaluation
        stack.close()
        window = evaluation.window
        if window is not None:
            short = {key.removeprefix(_EVAL_PREFIX): value for key, value in window.logs.items()}
            session.write(replace(window, logs=short), logs)

    def save_checkpoint(self) -> Any:
        """The checkpoint, with the totals in it."""
        from swift.utils import is_master

        result = super().save_checkpoint()
        self.channel_metrics.save(Path(self.state.last_model_checkpoint), is_writer=is_master())
        return result

    def _watch(self) -> None:
        session = self.channel_metrics
        # Not `measuring`: tensor-parallel ranks must stop together, when all know of an error.
        if not session.guard.off:
            with session.guard.guarded():
                for model in self.unwrapped_models:
                    self.channel_counting.watch(model)


def _to(bounds: Tensor | None, like: Tensor) -> Tensor | None:
    return None if bounds is None else bounds.to(like.device, non_blocking=True)


def _resumed_checkpoint(args: Any) -> Path:
    """The folder that ms-swift took the iteration from."""
    of_weights = args.adapters[0] if args.adapters and args.tuner_type != "full" else args.model
    return Path(args.mcore_adapter or args.mcore_model or of_weights)
