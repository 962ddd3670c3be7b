"""Channel metrics in TRL's DPOTrainer: rewards, margins, accuracies and the loss, per pair.

TRL computes all of them per pair and then averages. Nothing is computed twice here:

- the rewards are the [num_pairs] tensors that TRL hands to `accelerator.gather`, in the order
  chosen, rejected, accuracies, margins;
- the losses are what TRL takes the mean of at the end of each turn of its loop over
  `trainer.loss_types`. That list is replaced by one that knows when the loop runs, and a
  `TorchFunctionMode` sees the calls of `mean` inside the loop, and only there.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import trl
from torch import Tensor
from torch.overrides import TorchFunctionMode

from channel_metrics.errors import UnsupportedVersionError
from channel_metrics.trainers.trl.pairs import PairChannelMetricsMixin
from channel_metrics.trainers.trl.state import SampleState
from channel_metrics.trainers.trl.sums import ratio

__all__ = ["DPOChannelMetricsMixin"]

# In the order in which TRL gathers them.
_GATHERED = ("chosen", "rejected", "accuracies", "margins")
# Their values per pair are not about that pair alone: sorted over the batch, or its mean.
_COUPLED = frozenset({"aot", "aot_unpaired", "sft"})


class _DPOState(SampleState):
    """Sums over pairs."""

    columns = ("samples", *_GATHERED, "loss", "loss_samples")
    checked = False

    def values(self, sums: Any) -> dict[str, float | None]:
        """TRL's names of the rewards, and the loss where it is one per pair."""
        rewards = {f"rewards/{name}": sums[name] / sums["samples"] for name in _GATHERED}
        return {"loss": ratio(sums["loss"], sums["loss_samples"]), **rewards}


class DPOChannelMetricsMixin(PairChannelMetricsMixin):
    """Put before DPOTrainer: `class MyDPO(DPOChannelMetricsMixin, DPOTrainer)`."""

    state_class = _DPOState
    # What DPOTrainer has.
    loss_types: Any
    loss_weights: list[float]

    def observe_pairs(
        self,
        compute: Callable[..., Any],
        num_pairs: int,
        model: Any,
        inputs: Any,
        *rest: Any,
        **kw: Any,
    ) -> tuple[Any, dict[str, Tensor]]:
        """Rewards and losses of the pairs, while TRL computes its loss."""
        if getattr(self, "_compute_loss_liger", None) and getattr(self, "use_liger_kernel", False):
            raise UnsupportedVersionError(
                "channel metrics need the loss of each DPO pair, but use_liger_kernel=True "
                "computes one loss for all in a fused kernel; set it to False or detach."
            )
        losses: _WatchedTypes | None = None
        with _kept_gathers(self.accelerator, num_pairs) as gathered:
            types = getattr(self, "loss_types", None)
            if types is None:
                raise UnsupportedVersionError(
                    f"trl {trl.__version__} has no DPOTrainer.loss_types; the loss of each pair "
                    "cannot be seen. Use a tested version (see docs/trl.md)."
                )
            losses = _WatchedTypes(types)
            self.loss_types = losses
            try:
                result = compute(model, inputs, *rest, **kw)
            finally:
                losses.close()
                self.loss_types = types
        self._check_gathered(gathered, num_pairs)
        values = dict(zip(_GATHERED, gathered, strict=False))
        per_pair = self._pair_losses(losses, num_pairs)
        return result, values if per_pair is None else {**values, "loss": per_pair}

    def loss_is_mean_of_pairs(self) -> bool:
        """Not with the auxiliary loss of experts: it is one number per batch."""
        return not getattr(self, "aux_loss_enabled", False)

    def _pair_losses(self, losses: _WatchedTypes, num_pairs: int) -> Tensor | None:
        state: Any = self.channel_metrics
        coupled = sorted(_COUPLED.intersection(losses))
        if coupled:
            state.warn_once(
                f"the DPO loss {', '.join(coupled)} is computed over the batch, not per pair: "
                "there is no loss per channel; the rewards are exact."
            )
            return None
        shapes = [list(found.shape) for found in losses.found]
        if shapes != [[num_pairs]] * len(losses):
            raise UnsupportedVersionError(
                f"the DPO losses {list(losses)} must each be the mean of [{num_pairs}] values, "
                f"one per pair, but trl {trl.__version__} took it of {shapes}; detach the metrics."
            )
        weighted = zip(self.loss_weights, losses.found, strict=True)
        return torch.stack([weight * found for weight, found in weighted]).sum(dim=0)

    def _check_gathered(self, gathered: Sequence[Tensor], num_pairs: int) -> None:
        """Once, on the values: whether the gathered tensors are what we take them for."""
        state: Any = self.channel_metrics
        if state.checked:
            return
        fits = len(gathered) >= len(_GATHERED)
        if fits:
            chosen, rejected, accuracies, margins = gathered[: len(_GATHERED)]
            fits = torch.equal(margins, chosen - rejected) and torch.equal(
                accuracies, (chosen > rejected).to(accuracies.dtype)
            )
        if not fits:
            raise UnsupportedVersionError(
                f"DPOTrainer must gather {', '.join(_GATHERED)} of its {num_pairs} pairs, in this "
                f"order, but trl {trl.__version__} gathered {len(gathered)} tensors of that size, "
                "or others; use a tested version (see docs/trl.md)."
            )
        state.checked = True


class _WatchedTypes(list[str]):
    """`loss_types`, which keeps what the mean was last taken of in each turn of a loop over it."""

    def __init__(self, types: Sequence[str]) -> None:
        super().__init__(types)
        self.found: list[Tensor] = []
        self._loop: Generator[str, None, None] | None = None

    def __iter__(self) -> Iterator[str]:
        self._loop = self._watched()
        return self._loop

    def close(self) -> None:
        """Leave the loop, if an error has not let it end."""
        if self._loop is not None:
            self._loop.close()

    def _watched(self) -> Generator[str, None, None]:
        with _Means() as means:
            for index in range(len(self)):
                means.last = None
                yield self[index]
                if means.last is not None:
                    self.found.append(means.last)


class _Means(TorchFunctionMode):
    """Keeps the tensor whose mean over all entries was taken last; changes nothing."""

    last: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.mean, torch.mean) and len(args) == 1 and not kwargs:
            self.last = args[0].detach()
        return func(*args, **kwargs)


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
