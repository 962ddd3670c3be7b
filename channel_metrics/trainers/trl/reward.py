"""Channel metrics in TRL's RewardTrainer: loss, accuracy, margin and rewards, per pair."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from channel_metrics.core.schema import Column, Metric, Schema, Sums
from channel_metrics.errors import UnsupportedVersionError
from channel_metrics.trainers.trl.pairs import PairChannelMetricsMixin
from channel_metrics.trainers.trl.samples import mean, pair_losses, pair_values, sample_schema

__all__ = ["RewardChannelMetricsMixin"]


def _mean_reward(sums: Sums) -> float | None:
    """The mean over chosen and rejected answers, as in TRL."""
    samples = sums["samples"]
    return (sums["chosen"] / samples + sums["rejected"] / samples) / 2 if samples else None


# TRL's names.
_SCHEMA = sample_schema(
    "pairs",
    Column("chosen", "rewards", "rewards of the chosen answers"),
    Column("rejected", "rewards", "rewards of the rejected answers"),
    Column("margins", "rewards", "chosen - rejected"),
    Column("accuracies", "pairs", "pairs whose chosen answer has the higher reward"),
    *pair_losses(),
    mean("accuracy", "accuracies"),
    mean("margin", "margins", "rewards"),
    Metric(
        "mean_reward",
        ("chosen", "rejected", "samples"),
        _mean_reward,
        unit="rewards",
        doc="the reward of an answer, chosen or rejected",
        always=True,
    ),
    mean("rewards/chosen", "chosen", "rewards"),
    mean("rewards/rejected", "rejected", "rewards"),
)


class RewardChannelMetricsMixin(PairChannelMetricsMixin):
    """Put before RewardTrainer: `class MyReward(RewardChannelMetricsMixin, RewardTrainer)`."""

    args: Any

    def _schema(self) -> Schema:
        return _SCHEMA

    def observe_pairs(
        self, compute: Callable[[], Any], num_pairs: int, model: Any, inputs: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        """The rewards that the model returned, and the loss by TRL's own formula."""
        seen: list[Any] = []

        def keep(_model: Any, _args: Any, outputs: Any) -> None:
            seen.append(outputs)

        margins = inputs.get("margin")
        handle = model.register_forward_hook(keep)
        try:
            result = compute()
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
        gap = chosen - rejected if margins is None else chosen - rejected - margins.to(chosen)
        loss = -torch.nn.functional.logsigmoid(gap)
        coefficient = self.args.center_rewards_coefficient
        if coefficient is not None:
            loss = loss + coefficient * (chosen + rejected) ** 2
        return pair_values(chosen, rejected, loss)
