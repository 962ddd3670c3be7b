"""Channel metrics in `swift rlhf --rlhf_type grpo`: rewards of the completions.

The metrics are those of TRL's GRPOTrainer. The rewards come from ms-swift's own function that
makes statistics of them for its log. So they are what it logs, also with `kl_in_reward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from swift.rlhf_trainers import grpo_trainer
from torch import Tensor

from channel_metrics.core.labels import channel_of
from channel_metrics.session import ChannelMetrics
from channel_metrics.swap import wrapped
from channel_metrics.trainers.swift.data import CHANNEL_COLUMN, declare
from channel_metrics.trainers.trl.grpo import GRPOChannelMetricsMixin, GRPOScratch
from channel_metrics.trainers.trl.records import not_called

__all__ = ["SwiftGRPOMixin"]


@dataclass
class _SwiftScratch(GRPOScratch):
    """samples: the completions that were scored on this rank, after resampling.

    total: the reward of each completion of all ranks.
    """

    samples: Sequence[Any] = ()
    total: Tensor | None = None


class SwiftGRPOMixin(GRPOChannelMetricsMixin):
    """For `swift rlhf --rlhf_type grpo`."""

    channel_scratch: _SwiftScratch

    def _new_scratch(self, session: ChannelMetrics) -> _SwiftScratch:
        return _SwiftScratch(super()._new_scratch(session).reader)

    def _declare(self, session: ChannelMetrics, dataset: Any, split: str) -> bool:
        return declare(session, dataset, split)

    def _with_channels(self, session: ChannelMetrics, dataset: Any, description: str) -> Any:
        self._declare(session, dataset, description)
        # The trainer gets the records themselves, so the collator need not add channels.
        return self.data_collator

    def _score_completions(self, samples: Any) -> Any:
        theirs: Any = super()
        samples = theirs._score_completions(samples)
        if self.channel_metrics is not None:
            self.channel_scratch.samples = samples
        return samples

    def _observed_completions(self, generate: Any, inputs: list[dict[str, Any]]) -> Any:
        """ms-swift's own completions, whose rewards are counted."""
        session, scratch = self.channel_metrics, self.channel_scratch
        assert session is not None
        scratch.samples, scratch.total, scratch.scored = (), None, None

        def keep(original: Any, *, rewards: Tensor, rewards_per_func: Tensor, **more: Any) -> Any:
            scratch.total, scratch.scored = rewards.detach(), rewards_per_func.detach()
            return original(rewards=rewards, rewards_per_func=rewards_per_func, **more)

        with wrapped(grpo_trainer, "compute_reward_metrics", keep):
            output = generate(inputs)
        if scratch.scored is None:
            raise not_called(self, "compute_reward_metrics")
        channels = [channel_of(sample.extra, (CHANNEL_COLUMN,)) for sample in scratch.samples]
        session.add(channels, self._values(scratch.scored, len(channels)))
        return output

    def _total_rewards(self, rewards: Tensor) -> Tensor:
        """The reward of each completion, as ms-swift has added it up."""
        assert self.channel_scratch.total is not None
        return self.channel_scratch.total
