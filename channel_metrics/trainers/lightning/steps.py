"""Runs the steps of a LightningModule, and counts the tokens of their batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from channel_metrics.capture.observation import Forward, Observation
from channel_metrics.capture.reader import TokenLossReader
from channel_metrics.capture.transformers import is_causal
from channel_metrics.core.micro_batch import MicroBatch
from channel_metrics.data.collator import BOUNDS_KEY, CollatorFault
from channel_metrics.errors import ChannelError, UnsupportedVersionError
from channel_metrics.session import ChannelMetrics
from channel_metrics.trainers.lightning.models import language_model_in, trained_model

__all__ = ["StepCounter"]


@dataclass(frozen=True)
class _Batch:
    """What was taken out of a batch, and its labels."""

    channels: Any
    cu_seqlens: Tensor | None
    labels: Any


class StepCounter:
    """Observes the steps of one LightningModule.

    Args:
        metrics: counts the tokens.
        module: the LightningModule.
        model: the name of the model in it whose losses are counted; None looks for one.
    """

    def __init__(self, metrics: ChannelMetrics, module: Any, model: str | None) -> None:
        self.metrics, self.module, self._name = metrics, module, model
        with_correct = "token_acc" in metrics.config.metrics
        self._reader = TokenLossReader(with_correct=with_correct, guard=metrics.guard)
        # The batch that the next step is about; None if it must not be counted.
        self._batch: _Batch | None = None

    def take(self, batch: Any, *, counted: bool = True) -> None:
        """Remove our keys from a batch.

        Args:
            batch: what the data loader gave.
            counted: whether the next step counts its tokens.

        Raises:
            ChannelError: the batch has no channels, and the metrics are on.
        """
        self._batch, taken = None, None
        if isinstance(batch, MutableMapping):
            channels, bounds = batch.pop("channels", None), batch.pop(BOUNDS_KEY, None)
            taken = _Batch(channels, bounds, batch.get("labels"))
        if counted and self.metrics.measuring:
            with self.metrics.guard.guarded():
                if taken is None or taken.channels is None:
                    raise ChannelError(_no_channels(batch))
                if isinstance(taken.channels, CollatorFault):
                    raise taken.channels.error
                self._batch = taken

    def run(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `training_step`, `validation_step` or `test_step`, and count its batch."""
        return self.metrics.guard.shielded(step, self._observed, *args, **kwargs)

    def _observed(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Some optimizers run a step several times: its batch is counted the first time.
        batch, self._batch = self._batch, None
        if batch is None:
            return step(*args, **kwargs)
        # Hooks in a compiled step would be a part of its graph.
        compiled = self.module._compiler_ctx is not None
        observed = None if compiled else self._model
        seen = (
            nullcontext(Observation(False)) if observed is None else self._reader.observe(observed)
        )
        with seen as observation:
            output = step(*args, **kwargs)
        # Lightning skips the backward of a training step that returns None.
        skips = self.module.trainer.training and self.module.automatic_optimization
        if output is not None or not skips:
            given = output if isinstance(output, Mapping) else {}
            if "token_losses" in given:
                self.metrics.count(_by_hand(batch, given))
            else:
                self.metrics.count(self._of_model(batch, given, observation))
        return output

    @cached_property
    def _model(self) -> torch.nn.Module | None:
        # Looked for at the first step: `configure_model` and the strategy may make it anew.
        return trained_model(self.module, self._name)

    def _of_model(
        self, batch: _Batch, given: Mapping[str, Any], observation: Observation
    ) -> MicroBatch:
        """The losses of the observed model, or those of the logits that the step returned."""
        if not isinstance(batch.labels, Tensor):
            raise ChannelError("the batch must hold `labels`, one for each token; add them to it.")
        if "logits" in given and not observation.losses:
            observation = Observation(False, forwards=[Forward(outputs=given)])
        elif not observation.forwards and not observation.others:
            raise UnsupportedVersionError(_nothing_seen(self.module))
        model = self._model
        values, reported_sum = self._reader.read(
            observation,
            batch.labels,
            causal=None if model is None else is_causal(language_model_in(model)),
            by_rows=batch.cu_seqlens is None,
        )
        return MicroBatch.of_values(values, batch.channels, batch.cu_seqlens, reported_sum)


def _by_hand(batch: _Batch, given: Mapping[str, Any]) -> MicroBatch:
    losses, labels = given["token_losses"], given.get("labels")
    shapes = [getattr(value, "shape", None) for value in (losses, labels)]
    if shapes[0] is None or shapes[0] != shapes[1]:
        raise ChannelError(
            "a step that returns `token_losses` must also return `labels`, a tensor of the same "
            f"shape with the label that each loss is about, but they have the shapes {shapes[0]} "
            f"and {shapes[1]}."
        )
    return MicroBatch(
        token_losses=losses.detach(),
        labels=labels,
        channels=batch.channels,
        cu_seqlens=batch.cu_seqlens,
        correct=given.get("correct"),
    )


def _no_channels(batch: Any) -> str:
    came = f"the keys {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else type(batch)
    return (
        f"a batch must be a dict with `channels`, but is {came}; give its data loader the "
        "collate_fn `metrics.collator(collate_fn)` of this ChannelMetricsCallback. Several data "
        "loaders in one batch, and steps that take `dataloader_iter`, are not supported."
    )


def _nothing_seen(module: Any) -> str:
    return (
        f"the step of {type(module).__name__} called no transformers model that could be observed. "
        'Return {"loss": loss, "logits": logits} from it, or the losses of all tokens: '
        '{"loss": loss, "token_losses": losses, "labels": labels}.'
    )
