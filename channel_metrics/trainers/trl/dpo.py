"""Channel metrics in TRL's DPOTrainer: rewards, margins, accuracies and the loss, per pair.

- The rewards are the [num_pairs] tensors that TRL hands to `accelerator.gather`, in the order
  chosen, rejected, accuracies, margins.
- The loss of a pair is computed from its rewards by TRL's formula. In every batch the mean is
  compared to the loss that TRL returned. A loss that does not agree is not logged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import trl
from torch import Tensor

from channel_metrics.core.schema import Schema
from channel_metrics.errors import UnsupportedVersionError
from channel_metrics.session import ChannelMetrics
from channel_metrics.trainers.hf.batch import Scratch
from channel_metrics.trainers.trl.dpo_losses import FORMULAS, Pairs
from channel_metrics.trainers.trl.pairs import PairChannelMetricsMixin, agree
from channel_metrics.trainers.trl.samples import PAIR_REWARDS, pair_schema

__all__ = ["DPOChannelMetricsMixin"]


_SCHEMA = pair_schema()


@dataclass
class _DPOScratch(Scratch):
    """checked: whether the gathered tensors have been checked."""

    checked: bool = False


class DPOChannelMetricsMixin(PairChannelMetricsMixin):
    """Put before DPOTrainer: `class MyDPO(DPOChannelMetricsMixin, DPOTrainer)`."""

    channel_scratch: _DPOScratch
    # What DPOTrainer has.
    args: Any
    beta: float
    loss_types: list[str]
    loss_weights: list[float]
    label_smoothing: float
    f_divergence_type: str
    f_alpha_divergence_coef: float
    use_weighting: bool

    def _schema(self) -> Schema:
        return _SCHEMA

    def _new_scratch(self, session: ChannelMetrics) -> _DPOScratch:
        return _DPOScratch(super()._new_scratch(session).reader)

    def observe_pairs(
        self, compute: Callable[[], Any], num_pairs: int, model: Any, inputs: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        """The rewards that TRL gathered, and the loss of each pair from them."""
        with _kept_gathers(self.accelerator, num_pairs) as gathered:
            result = compute()
        self._check_gathered(gathered, num_pairs)
        values = dict(zip(PAIR_REWARDS, gathered, strict=False))
        reason = self._why_no_loss()
        if reason is None:
            loss = self._pair_losses(values, inputs["completion_mask"])
            returned = result[0] if isinstance(result, tuple) else result
            # This waits for the device, as TRL does a dozen times per batch for its own metrics.
            if bool(agree(loss.mean(), returned.detach(), values["chosen"].dtype)):
                return result, {**values, "loss": loss, "loss_samples": torch.ones_like(loss)}
            reason = (
                f"for loss_type={self.loss_types}, the formulas of channel_metrics do not give "
                f"the loss that trl {trl.__version__} returned"
            )
        assert self.channel_metrics is not None
        self.channel_metrics.warn_once(
            f"the DPO loss per channel is left out: {reason}. The rewards per channel are exact."
        )
        return result, values

    def _why_no_loss(self) -> str | None:
        """Why the loss of a pair does not follow from its rewards; None if it does."""
        unknown = sorted(set(self.loss_types) - FORMULAS.keys())
        if unknown:
            return f"there is no formula per pair for loss_type={unknown}"
        if self.use_weighting:
            return "use_weighting=True weights each pair by the probabilities of its tokens"
        if getattr(self, "aux_loss_enabled", False):
            return "the auxiliary loss of the experts is one number per batch"
        return None

    def _pair_losses(self, rewards: dict[str, Tensor], completion_mask: Tensor) -> Tensor:
        """The weighted sum of TRL's losses, [num_pairs]."""
        limit = self.args.max_length
        # trl 0.29 cuts the rows after this point. Answers are at the end of a row.
        if getattr(self.args, "truncation_mode", "keep_start") == "keep_start":
            completion_mask = completion_mask[:, :limit]
        lengths = completion_mask.sum(dim=1).clamp(min=1.0, max=limit).chunk(2)
        pairs = Pairs(
            chosen=rewards["chosen"],
            rejected=rewards["rejected"],
            chosen_length=lengths[0],
            rejected_length=lengths[1],
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            discopop_tau=self.args.discopop_tau,
            f_divergence_type=self.f_divergence_type,
            f_alpha_divergence_coef=self.f_alpha_divergence_coef,
        )
        weighted = zip(self.loss_types, self.loss_weights, strict=True)
        return torch.stack([weight * FORMULAS[name](pairs) for name, weight in weighted]).sum(0)

    def _check_gathered(self, gathered: Sequence[Tensor], num_pairs: int) -> None:
        """Check once, by their values, that the gathered tensors are those we expect."""
        if self.channel_scratch.checked:
            return
        fits = len(gathered) >= len(PAIR_REWARDS)
        if fits:
            chosen, rejected, accuracies, margins = gathered[: len(PAIR_REWARDS)]
            fits = torch.equal(margins, chosen - rejected) and torch.equal(
                accuracies, (chosen > rejected).to(accuracies.dtype)
            )
        if not fits:
            raise UnsupportedVersionError(
                f"DPOTrainer must gather {', '.join(PAIR_REWARDS)} of its {num_pairs} pairs, in "
                f"this order, but trl {trl.__version__} gathered {len(gathered)} tensors of that "
                "size, or others; use a tested version (see docs/trl.md)."
            )
        self.channel_scratch.checked = True


@contextmanager
def _kept_gathers(accelerator: Any, num_pairs: int) -> Iterator[list[Tensor]]:
    """The tensors [num_pairs] of this rank that are handed to `accelerator.gather`."""
    kept: list[Tensor] = []
    before = vars(accelerator).get("gather")
    original = accelerator.gather

    def gather(tensor: Any) -> Any:
        if isinstance(tensor, Tensor) and tensor.shape == (num_pairs,):
            kept.append(tensor.detach())
        return original(tensor)

    accelerator.gather = gather
    try:
        yield kept
    finally:
        if before is None:
            del accelerator.gather
        else:
            accelerator.gather = before
