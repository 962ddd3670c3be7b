"""Channel metrics in `swift rlhf --rlhf_type grpo`: rewards of the completions.

The metrics are those of TRL's GRPOTrainer. The rewards come from ms-swift's own function that
makes statistics of them for its log. So they are what it logs, also with `kl_in_reward`.
"""

from __future__ import annotations

from typing import Any

from swift.rlhf_trainers import grpo_trainer
from torch import Tensor

from channel_metrics.core.labels import channel_of
from channel_metrics.session import ChannelMetrics
from channel_metrics.swap import wrapped
from channel_metrics.trainers.swift.data import CHANNEL_COLUMN, ColumnMixin
from channel_metrics.trainers.trl.grpo import GRPOChannelMetricsMixin
from channel_metrics.trainers.trl.records import not_called

__all__ = ["SwiftGRPOMixin"]


class SwiftGRPOMixin(ColumnMixin, GRPOChannelMetricsMixin):
    """For `swift rlhf --rlhf_type grpo`."""

    def _with_channels(self, session: ChannelMetrics, dataset: Any, description: str) -> Any:
        self._declare(session, dataset, description)
        # The trainer gets the records themselves, so the collator need not add channels.
        return self.data_collator

    def _observed_completions(self, generate: Any, inputs: list[dict[str, Any]]) -> Any:
        """ms-swift's own completions, whose rewards are counted."""
        session = self.channel_metrics
        assert session is not None
        kept: dict[str, Any] = {}

        def keep_scored(original: Any, samples: Any) -> Any:
            # Those of this rank, after resampling.
            kept["samples"] = original(samples)
            return kept["samples"]

        def keep_rewards(
            original: Any, *, rewards: Tensor, rewards_per_func: Tensor, **more: Any
        ) -> Any:
            kept["scored"], kept["total"] = rewards_per_func.detach(), rewards.detach()
            return original(rewards=rewards, rewards_per_func=rewards_per_func, **more)

        with (
            wrapped(self, "_score_completions", keep_scored),
            wrapped(grpo_trainer, "compute_reward_metrics", keep_rewards),
        ):
            output = generate(inputs)
        if "scored" not in kept:
            raise not_called(self, "compute_reward_metrics")
        channels = [channel_of(sample.extra, (CHANNEL_COLUMN,)) for sample in kept["samples"]]
        session.add(channels, self._values(kept["scored"], kept["total"], len(channels)))
        return output
