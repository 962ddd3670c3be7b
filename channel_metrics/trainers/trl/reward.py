"""Channel metrics in TRL's RewardTrainer: loss, accuracy, margin and rewards, per pair."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from channel_metrics.errors import UnsupportedVersionError
from channel_metrics.trainers.trl.pairs import PairChannelMetricsMixin
from channel_metrics.trainers.trl.state import SampleState
from channel_metrics.trainers.trl.sums import ratio

__all__ = ["RewardChannelMetricsMixin"]

_COLUMNS = ("chosen", "rejected", "margin", "accuracy")


class _RewardState(SampleState):
    """Sums over pairs."""

    columns = ("samples", *_COLUMNS, "loss", "loss_samples")

    def values(self, sums: Any) -> dict[str, float | None]:
        """TRL's names; `mean_reward` is over chosen and rejected alike, as in TRL."""
        means = {name: sums[name] / sums["samples"] for name in _COLUMNS}
        return {
            "loss": ratio(sums["loss"], sums["loss_samples"]),
            "accuracy": means["accuracy"],
            "margin": means["margin"],
            "mean_reward": (means["chosen"] + means["rejected"]) / 2,
            "rewards/chosen": means["chosen"],
            "rewards/rejected": means["rejected"],
        }


class RewardChannelMetricsMixin(PairChannelMetricsMixin):
    """Put before RewardTrainer: `class MyReward(RewardChannelMetricsMixin, RewardTrainer)`."""

    state_class = _RewardState
    args: Any

    def observe_pairs(
        self,
        compute: Callable[..., Any],
        num_pairs: int,
        model: Any,
        inputs: Any,
        *rest: Any,
        **kw: Any,
    ) -> tuple[Any, dict[str, Tensor]]:
        """The rewards that the model returned; the loss from them, by TRL's own formula.

        The mean of the losses is compared to the loss that TRL returned, in every batch.
        """
        seen: list[Any] = []

        def keep(_model: Any, _args: Any, outputs: Any) -> None:
            seen.append(outputs)

        margins = inputs.get("margin")
        handle = model.register_forward_hook(keep)
        try:
            result = compute(model, inputs, *rest, **kw)
        finally:
            handle.remove()
        logits = getattr(seen[0], "logits", None) if len(seen) == 1 else None
        if not isinstance(logits, Tensor) or logits.numel() != 2 * num_pairs:
            came = list(logits.shape) if isinstance(logits, Tensor) else f"{len(seen)} outputs"
            raise UnsupportedVersionError(
                f"the reward model must return logits of {2 * num_pairs} rows, chosen before "
                f"rejected, but returned {came}; detach the metrics for this model."
            )
        with torch.no_grad():
            return result, self._values(logits.detach(), margins)

    def _values(self, logits: Tensor, margins: Tensor | None) -> dict[str, Tensor]:
        chosen, rejected = logits.squeeze(-1).chunk(2)
        difference = chosen - rejected
        loss = -torch.nn.functional.logsigmoid(
            difference if margins is None else difference - margins
        )
        coefficient = self.args.center_rewards_coefficient
        if coefficient is not None:
            loss = loss + coefficient * (chosen + rejected) ** 2
        return {
            "chosen": chosen,
            "rejected": rejected,
            "margin": difference,
            "accuracy": (chosen > rejected).to(chosen.dtype),
            "loss": loss,
        }
