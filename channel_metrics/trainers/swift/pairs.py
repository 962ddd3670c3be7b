"""Channel metrics of preference pairs in `swift rlhf`: dpo, orpo, cpo (simpo) and rm.

The rewards and losses of the pairs are those that ms-swift's trainers compute themselves. Some
losses also have the nll of the chosen answers, per token. It follows from their log probabilities.

Letters: N pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from channel_metrics.core.checks import IGNORE_INDEX
from channel_metrics.core.schema import Schema
from channel_metrics.session import ChannelMetrics
from channel_metrics.trainers.hf.batch import Scratch
from channel_metrics.trainers.swift.pair_schema import pair_schema
from channel_metrics.trainers.swift.rlhf import SwiftRLHFMixin
from channel_metrics.trainers.trl.records import not_called

__all__ = ["SwiftCPOMixin", "SwiftDPOMixin", "SwiftORPOMixin", "SwiftRewardMixin"]

# Losses of DPO that are not one per pair.
_NO_PAIR_LOSSES = {"aot": "sorts the pairs", "aot_unpaired": "sorts the answers"}


@dataclass
class _Computed:
    """What the trainer has computed for a batch.

    losses: for each loss type: (losses, rewards of the chosen, of the rejected answers), [N].
    forwards: the results of `concatenated_forward`; the first is that of the trained model.
    """

    losses: list[tuple[Tensor, ...]] = field(default_factory=list)
    forwards: list[Any] = field(default_factory=list)


@dataclass
class _PairScratch(Scratch):
    """computed: only while a batch is observed, because it holds the graph of the batch."""

    computed: _Computed | None = None


class _PairMixin(SwiftRLHFMixin):
    # The method that gives the losses of the pairs.
    _loss_name = ""
    channel_scratch: _PairScratch
    accelerator: Any
    aux_loss_enabled: bool

    def _new_scratch(self, session: ChannelMetrics) -> _PairScratch:
        return _PairScratch(super()._new_scratch(session).reader)

    def _schema(self) -> Schema:
        return pair_schema(self._nll_weight())

    def _nll_weight(self) -> float:
        """The factor of the nll of the chosen answers in the trainer's loss."""
        return 0.0

    def _why_no_loss(self) -> str | None:
        """Why the trainer's loss is not one per pair; None if it is."""
        if self.aux_loss_enabled:
            return "the auxiliary loss of the experts is one number per batch"
        return None

    def concatenated_forward(self, *args: Any, **kwargs: Any) -> Any:
        theirs: Any = super()
        result = theirs.concatenated_forward(*args, **kwargs)
        computed = self.channel_scratch.computed
        if computed is not None:
            computed.forwards.append(result)
        return result

    def _kept(self, result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The same losses and rewards, which are kept if the batch is observed."""
        computed = self.channel_scratch.computed
        if computed is not None:
            computed.losses.append(tuple(part.detach() for part in result[:3]))
        return result

    def _observed_batch(
        self, compute: Any, model: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> Any:
        session, scratch = self.channel_metrics, self.channel_scratch
        assert session is not None
        taken = self._taken_channels(batch)
        scratch.computed = computed = _Computed()
        try:
            result = compute(model, batch, *args, **kwargs)
        finally:
            scratch.computed = None
        if not computed.losses:
            raise not_called(self, self._loss_name)
        with torch.no_grad():
            values = self._values(computed, batch)
            ours = self._batch_loss(values, kwargs.get("pair_loss_scale"))
        self._count_records(session, taken.channels, values, ours=ours, theirs=result[0].detach())
        return result

    def _values(self, computed: _Computed, batch: Any) -> dict[str, Tensor]:
        """{column: values [N]}"""
        raise NotImplementedError

    def _batch_loss(self, values: Mapping[str, Tensor], scale: Any) -> Tensor | None:
        """The loss of the batch, from the values; None if it does not follow from them.

        scale: with packing, ms-swift multiplies the sum over the pairs by it.
        """
        if "loss_samples" not in values:
            return None
        loss = values["loss"].mean() if scale is None else values["loss"].sum() * scale
        if "nll" in values:
            loss = loss + self._nll_weight() * values["nll"].sum() / values["nll_tokens"].sum()
        return loss

    def _pairs(self, chosen: Tensor, rejected: Tensor, loss: Tensor) -> dict[str, Tensor]:
        values = {
            "samples": torch.ones_like(chosen),
            "chosen": chosen,
            "rejected": rejected,
            "accuracies": (chosen > rejected).to(chosen.dtype),
            "margins": chosen - rejected,
        }
        reason = self._why_no_loss()
        if reason is None:
            return values | {"loss": loss, "loss_samples": torch.ones_like(loss)}
        assert self.channel_metrics is not None
        self.channel_metrics.warn_once(
            f"the loss per channel is left out: {reason}. The rewards per channel are exact."
        )
        return values


class SwiftDPOMixin(_PairMixin):
    """For `swift rlhf --rlhf_type dpo`."""

    _loss_name = "dpo_loss"
    loss_type: Any
    loss_weights: list[float] | None

    def dpo_loss(self, *args: Any, **kwargs: Any) -> Any:
        theirs: Any = super()
        return self._kept(theirs.dpo_loss(*args, **kwargs))

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

    def _values(self, computed: _Computed, batch: Any) -> dict[str, Tensor]:
        policy = computed.forwards[0]
        weighted = list(zip(self._types(), computed.losses, strict=True))
        chosen, rejected = (
            torch.stack([weight * losses[at] for (_, weight), losses in weighted]).sum(0)
            for at in (1, 2)
        )
        # The loss type `sft` is the nll.
        losses = [weight * found[0] for (name, weight), found in weighted if name != "sft"]
        values = self._pairs(chosen, rejected, torch.stack([0 * chosen, *losses]).sum(0))
        if self._nll_weight():
            values["nll"] = -policy["chosen_logps"]
            values["nll_tokens"] = policy["chosen_completion_token_counts"].to(chosen)
        return values


class SwiftORPOMixin(_PairMixin):
    """For `swift rlhf --rlhf_type orpo`."""

    _loss_name = "odds_ratio_loss"

    def odds_ratio_loss(self, *args: Any, **kwargs: Any) -> Any:
        theirs: Any = super()
        return self._kept(theirs.odds_ratio_loss(*args, **kwargs))

    def _nll_weight(self) -> float:
        return 1.0

    def _values(self, computed: _Computed, batch: Any) -> dict[str, Tensor]:
        (odds, chosen, rejected), mean_logps = computed.losses[0], computed.forwards[0][0]
        # TRL subtracts the mean of what it calls losses.
        return self._pairs(chosen, rejected, -odds) | _nll(batch, mean_logps, are_means=True)


class SwiftCPOMixin(_PairMixin):
    """For `swift rlhf --rlhf_type cpo` and `simpo`."""

    _loss_name = "cpo_loss"
    loss_type: str
    cpo_alpha: float

    def cpo_loss(self, *args: Any, **kwargs: Any) -> Any:
        theirs: Any = super()
        return self._kept(theirs.cpo_loss(*args, **kwargs))

    def _nll_weight(self) -> float:
        return self.cpo_alpha

    def _values(self, computed: _Computed, batch: Any) -> dict[str, Tensor]:
        (losses, chosen, rejected), logps = computed.losses[0], computed.forwards[0][0]
        values = self._pairs(chosen, rejected, losses)
        if self.cpo_alpha:
            values |= _nll(batch, logps, are_means=self.loss_type in ("ipo", "simpo"))
        return values


class SwiftRewardMixin(_PairMixin):
    """For `swift rlhf --rlhf_type rm`."""

    def _observed_loss(
        self,
        compute: Any,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The trainer's own loss. With it, the trainer returns the rewards."""
        session = self.channel_metrics
        if session is None or not (model.training or session.evaluating):
            return compute(model, inputs, return_outputs, *args, **kwargs)
        taken, margin = self._taken_channels(inputs), inputs.get("margin")
        loss, outputs = compute(model, inputs, True, *args, **kwargs)
        with torch.no_grad():
            chosen, rejected = (
                outputs[f"rewards_{side}"].squeeze(-1) for side in ("chosen", "rejected")
            )
            values = self._reward_values(chosen, rejected, margin)
        self._count_records(
            session,
            taken.channels,
            values,
            ours=values["loss"].mean(),
            theirs=loss.detach() * self._divisor(*args, **kwargs),
        )
        return (loss, outputs) if return_outputs else loss

    def _reward_values(
        self, chosen: Tensor, rejected: Tensor, margin: Tensor | None
    ) -> dict[str, Tensor]:
        gap = chosen - rejected if margin is None else chosen - rejected - margin.to(chosen)
        loss = -torch.nn.functional.logsigmoid(gap)
        if self.args.center_rewards_coefficient is not None:
            loss = loss + self.args.center_rewards_coefficient * (chosen + rejected) ** 2
        return self._pairs(chosen, rejected, loss)

    def _divisor(self, num_items_in_batch: Any = None, **_: Any) -> int:
        """What ms-swift has divided the loss by."""
        accumulated = num_items_in_batch is not None and self.model_accepts_loss_kwargs
        return int(self.args.gradient_accumulation_steps) if accumulated else 1


def _nll(batch: Any, chosen_logps: Tensor, *, are_means: bool) -> dict[str, Tensor]:
    """The nll of the chosen answers and their tokens, [N]; `are_means`: logps are per token."""
    tokens = (batch["labels"][: chosen_logps.shape[0], 1:] != IGNORE_INDEX).sum(1).to(chosen_logps)
    return {"nll": -chosen_logps * (tokens if are_means else 1), "nll_tokens": tokens}
