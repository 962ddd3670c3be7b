"""Runs the steps of a LightningModule, and counts the tokens of their batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from functools import cached_property
from typing import Any

import torch

from channel_metrics.capture.observation import Forward
from channel_metrics.data.batch_channels import take_channels
from channel_metrics.observing import Seen, observe
from channel_metrics.session import ChannelMetrics
from channel_metrics.trainers.lightning.models import trained_model

__all__ = ["StepCounter"]

_REMEDY = (
    'In Lightning, return {"loss": loss, "logits": logits} from the step, or the losses of all '
    'tokens: {"loss": loss, "token_losses": losses, "labels": labels}.'
)


class StepCounter:
    """Observes the steps of one LightningModule.

    Args:
        metrics: counts the tokens.
        module: the LightningModule.
        model: the name of the model in it whose losses are counted; None looks for one.
    """

    def __init__(self, metrics: ChannelMetrics, module: Any, model: str | None) -> None:
        self.metrics, self.module, self._name = metrics, module, model
        # The batch of the next step with our keys; None if it must not be counted.
        self._batch: dict[str, Any] | None = None
        self._real: tuple[int, int] | None = None

    def take(
        self, batch: Any, *, counted: bool = True, real: tuple[int, int] | None = None
    ) -> None:
        """Remove our keys from a batch.

        Args:
            batch: what the data loader gave.
            counted: whether the next step counts its tokens.
            real: (records without repetitions, all records), if some are repeated.
        """
        found = batch if isinstance(batch, MutableMapping) else {}
        self._batch, self._real = dict(found) if counted else None, real
        take_channels(found)

    def run(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `training_step`, `validation_step` or `test_step`, and count its batch."""
        return self.metrics.guard.shielded(step, self._observed, *args, **kwargs)

    def _observed(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Some optimizers run a step several times: its batch is counted the first time.
        batch, self._batch = self._batch, None
        if batch is None:
            return step(*args, **kwargs)
        trains = self.module.trainer.training and self.module.automatic_optimization
        with observe(self.metrics, self._model, batch, real=self._real, remedy=_REMEDY) as seen:
            output = step(*args, **kwargs)
            if output is None and trains:
                seen.discard()  # Lightning skips its backward.
            elif isinstance(output, Mapping):
                _hand_over(output, seen)
        return output

    @cached_property
    def _model(self) -> torch.nn.Module:
        # Looked for at the first step: `configure_model` and the strategy may make it anew.
        model = trained_model(self.module, self._name)
        # In a compiled step, hooks of the model would be a part of the graph.
        compiled = self.module._compiler_ctx is not None
        return torch.nn.Module() if model is None or compiled else model


def _hand_over(output: Mapping[str, Any], seen: Seen) -> None:
    """Take the token losses or logits that a step returned."""
    if "token_losses" in output:
        labels = output.get("labels")
        seen.token_losses(
            output["token_losses"],
            correct=output.get("correct"),
            labels=labels,
            causal=labels is None,
        )
    elif "logits" in output and seen.observation and not seen.observation.losses:
        # Read instead of what the model returned: whether they are shifted follows from the loss.
        seen.observation.forwards = [Forward(outputs=output)]
