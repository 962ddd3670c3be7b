"""Channel metrics in `swift rlhf` but grpo: preference pairs, and the answers of KTO.

The rewards and losses are those that ms-swift's trainers compute themselves. Some losses also have
the nll of the chosen answers, per token. It follows from their log probabilities.

Letters: N pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from channel_metrics.core.checks import IGNORE_INDEX
from channel_metrics.core.schema import Schema
from channel_metrics.session import ChannelMetrics
from channel_metrics.trainers.swift.data import ColumnMixin, wrapped_collator
from channel_metrics.trainers.trl.collator import RecordCollator
from channel_metrics.trainers.trl.kto import KTORecordsMixin
from channel_metrics.trainers.trl.records import BatchRecordsMixin, Call, RecordsMixin
from channel_metrics.trainers.trl.reward import RewardChannelMetricsMixin
from channel_metrics.trainers.trl.samples import pair_schema, pair_values

__all__ = ["SwiftCPOMixin", "SwiftDPOMixin", "SwiftKTOMixin", "SwiftORPOMixin", "SwiftRewardMixin"]

# Losses of DPO that are not one per pair.
_NO_PAIR_LOSSES = {"aot": "sorts the pairs", "aot_unpaired": "sorts the answers"}


class _SwiftRecordsMixin(ColumnMixin, RecordsMixin):
    """The channel of a record is in the dataset column that ms-swift keeps."""

    args: Any
    aux_loss_enabled: bool

    def _with_channels(self, session: ChannelMetrics, dataset: Any, description: str) -> Any:
        self._declare(session, dataset, description)
        return wrapped_collator(session, self.data_collator, RecordCollator)


class _PairMixin(_SwiftRecordsMixin, BatchRecordsMixin):
    def _schema(self) -> Schema:
        return pair_schema(self._nll_weight())

    def _nll_weight(self) -> float:
        """The factor of the nll of the chosen answers in the trainer's loss."""
        raise NotImplementedError

    def _why_no_loss(self) -> str | None:
        """Why the trainer's loss is not one per pair; None if it is."""
        if self.aux_loss_enabled:
            return "the auxiliary loss of the experts is one number per batch"
        return None

    def _pairs(self, chosen: Tensor, rejected: Tensor, loss: Tensor) -> dict[str, Tensor]:
        reason = self._why_no_loss()
        if reason is None:
            return pair_values(chosen, rejected, loss)
        assert self.channel_metrics is not None
        self.channel_metrics.warn_once(
            f"the loss per channel is left out: {reason}. The rewards per channel are exact."
        )
        return pair_values(chosen, rejected)

    def _batch_loss(self, values: Mapping[str, Tensor], **given: Any) -> Tensor | None:
        if "loss" not in values:
            return None
        # With packing, ms-swift multiplies the sum over the pairs by this.
        scale = given.get("pair_loss_scale")
        loss = values["loss"].mean() if scale is None else values["loss"].sum() * scale
        if "nll" in values:
            loss = loss + self._nll_weight() * values["nll"].sum() / values["nll_tokens"].sum()
        return loss


class SwiftDPOMixin(_PairMixin):
    """For `swift rlhf --rlhf_type dpo`."""

    channel_loss = "dpo_loss"
    loss_type: Any
    loss_weights: list[float] | None

    def _types(self) -> list[tuple[str, float]]:
        """The loss types, and their weights."""
        types = self.loss_type if isinstance(self.loss_type, list) else [self.loss_type]
        weights = getattr(self, "loss_weights", None) or [1.0] * len(types)
        return list(zip(types, weights, strict=True))

    def _nll_weight(self) -> float:
        of_sft = sum(weight for name, weight in self._types() if name == "sft")
        return float(of_sft + (self.args.rpo_alpha or 0.0))

    def _why_no_loss(self) -> str | None:
        for name, _ in self._types():
            if name in _NO_PAIR_LOSSES:
                return f"loss_type {name} {_NO_PAIR_LOSSES[name]} of a batch"
        if self._nll_weight() and self.args.ld_alpha is not None:
            return "with ld_alpha, the nll of a chosen answer is not known"
        return super()._why_no_loss()

    def _values(self, calls: Sequence[Call], batch: Any) -> dict[str, Tensor]:
        weighted = list(zip(self._types(), calls, strict=True))
        chosen, rejected = (
            torch.stack([weight * call.results[at] for (_, weight), call in weighted]).sum(0)
            for at in (1, 2)
        )
        # The loss type `sft` is the nll.
        losses = [weight * call.results[0] for (name, weight), call in weighted if name != "sft"]
        values = self._pairs(chosen, rejected, torch.stack([0 * chosen, *losses]).sum(0))
        if self._nll_weight():
            policy = calls[0].args[-1]
            values["nll"] = -policy["chosen_logps"]
            values["nll_tokens"] = policy["chosen_completion_token_counts"].to(chosen)
        return values


class SwiftCPOMixin(_PairMixin):
    """For `swift rlhf --rlhf_type cpo` and `simpo`."""

    channel_loss = "cpo_loss"
    loss_type: str
    cpo_alpha: float

    def _nll_weight(self) -> float:
        return self.cpo_alpha

    def _logps_are_means(self) -> bool:
        """Whether the log probability of an answer is the mean of its tokens, not the sum."""
        return self.loss_type in ("ipo", "simpo")

    def _values(self, calls: Sequence[Call], batch: Any) -> dict[str, Tensor]:
        losses, chosen, rejected = calls[0].results
        values = self._pairs(chosen, rejected, losses)
        if self._nll_weight():
            supervised = batch["labels"][: len(chosen), 1:] != IGNORE_INDEX
            tokens = supervised.sum(1).to(chosen)
            logps = calls[0].args[0]
            values["nll"] = -logps * (tokens if self._logps_are_means() else 1)
            values["nll_tokens"] = tokens
        return values


class SwiftORPOMixin(SwiftCPOMixin):
    """For `swift rlhf --rlhf_type orpo`."""

    channel_loss = "odds_ratio_loss"

    def _nll_weight(self) -> float:
        return 1.0

    def _logps_are_means(self) -> bool:
        return True

    def _pairs(self, chosen: Tensor, rejected: Tensor, loss: Tensor) -> dict[str, Tensor]:
        # TRL subtracts the mean of what it calls losses.
        return super()._pairs(chosen, rejected, -loss)


class SwiftRewardMixin(_SwiftRecordsMixin, RewardChannelMetricsMixin):
    """For `swift rlhf --rlhf_type rm`."""

    def _schema(self) -> Schema:
        return pair_schema()


class SwiftKTOMixin(_SwiftRecordsMixin, KTORecordsMixin):
    """For `swift rlhf --rlhf_type kto`."""

    def _loss_is_mean(self) -> bool:
        # The auxiliary loss of experts belongs to no answer.
        return not self.aux_loss_enabled
