"""Channel metrics in a loop over megatron-core's schedules; what the patch for scripts is made of.

    metrics = MegatronChannelMetrics(["web", "code", "math"])

    def forward_step(data_iterator, model):
        batch = next(data_iterator)
        metrics.watch(model)                       # for token accuracy
        output = model(..., labels=batch["labels"])
        loss = partial(loss_func, batch["loss_mask"])
        return output, metrics.count(
            loss, channels=batch["channels"], loss_mask=batch["loss_mask"]
        )

    forward_backward_func(forward_step_func=forward_step, ...)
    values = metrics.compute()                     # on every rank: {"web_loss": ...}

Loss functions run on the last pipeline stage only, so nothing is counted elsewhere; of the
tensor-parallel ranks, which all hold the same losses, the first one counts.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from channel_metrics.capture.vocab_parallel import Correctness
from channel_metrics.config import MetricsConfig
from channel_metrics.core.accumulator import ChannelLossAccumulator
from channel_metrics.core.faults import FaultGuard
from channel_metrics.core.keys import ChannelTable, metric_key
from channel_metrics.core.labels import UNLABELED
from channel_metrics.core.totals import RunTotals
from channel_metrics.errors import BoundaryError
from channel_metrics.ranks.sync import MISMATCH_TOLERANCE, sync
from channel_metrics.trainers.megatron.ids import in_layout

__all__ = ["MegatronChannelMetrics"]


class MegatronChannelMetrics:
    """Counts tokens in the loss functions of Megatron's schedules.

    channels: a `ChannelTable`, or the names of a new one, the same on every rank. config: what
    is logged and under which keys. guard: what an error here does to the run; by default what
    `config.on_error` says.
    """

    def __init__(
        self,
        channels: ChannelTable | Iterable[str] = (),
        *,
        config: MetricsConfig | None = None,
        guard: FaultGuard | None = None,
    ) -> None:
        self.config = config or MetricsConfig()
        self.guard = guard or FaultGuard(self.config.on_error)
        if not isinstance(channels, ChannelTable):
            channels = ChannelTable(channels, key_format=self.config.key_format)
        self.table = channels
        self.totals = RunTotals()
        self._correctness = Correctness(self.guard)
        # What a step counted stays apart until the step is over: it may be run again.
        self._step, self._window = self._new_sums(), self._new_sums()
        self._warned = False
        self.has_warned_of_crossings = False

    def watch(self, model: Any) -> None:
        """Measure token accuracy in `model` from now on, if `token_acc` is among the metrics."""
        if "token_acc" in self.config.metrics:
            self._correctness.watch(model)

    def count(
        self,
        loss_func: Callable[..., Any],
        *,
        channels: Tensor | Sequence[str | None],
        loss_mask: Tensor,
        cu_seqlens: Tensor | None = None,
        packed_seq_params: Any = None,
        sequences: Tensor | None = None,
        weights: Tensor | None = None,
        reports_sum: bool = True,
    ) -> Callable[..., Any]:
        """`loss_func`, which when called also counts the losses it is given.

        channels: the channel of each row [B] or of each sequence of a pack (ids or names), or
            ids per token, cut for context parallelism exactly as the labels are. loss_mask: of
            the shape of the losses, 0 where not supervised. cu_seqlens, packed_seq_params: the
            sequences of a pack, where `channels` is one per sequence; not after a cut.
        sequences: where `channels` is one per token, the channel of each sequence, for `samples`.
        weights: what `loss_func` multiplies each loss with, of their shape, for `weighted_loss`.
        reports_sum: whether the sum that `loss_func` reports is that of these losses, unweighted.
        """

        @functools.wraps(loss_func)
        def counting_loss_func(losses: Tensor, *args: Any, **kwargs: Any) -> Any:
            result = loss_func(losses, *args, **kwargs)
            if kwargs.get("non_loss_data") or not self.guard.measuring or not _counts_here():
                return result
            with self.guard.guarded(), torch.no_grad():
                bounds = _bounds(cu_seqlens, packed_seq_params)
                reported = _reported_sum(result) if reports_sum else None
                self._add(losses.detach(), channels, loss_mask, bounds, reported, weights=weights)
                if sequences is not None and _is_first_shard():
                    self._add_samples(sequences)
            return result

        return counting_loss_func

    def begin_step(self) -> None:
        """Forget what was counted since the last `end_step`: the step is run (again)."""
        self._step.reset()
        self._correctness.forget()

    def end_step(self, *, discard: bool = False) -> None:
        """The step is over; `discard` it if the optimizer skipped it."""
        with self.guard.guarded():
            if not discard:
                self._window.merge_state([self._step])
            self.begin_step()

    def compute(self, *, reset: bool = True) -> dict[str, float]:
        """The metrics of the window over all ranks, under their log keys. A collective.

        Every rank calls this at the same points; it takes one all-reduce. `reset` opens the next
        window; without it the window goes on, and is counted in the totals when it ends.
        """
        self.end_step()
        values: dict[str, float] = {}
        if not self.guard.off:
            with self.guard.guarded():
                values = self._close_window(reset)
        return values

    def totals_now(self) -> RunTotals:
        """The totals of all ranks, those of the open window among them. A collective."""
        self.end_step()
        totals = self.totals
        if not self.guard.off:
            with self.guard.guarded():
                totals = self.totals.copy().add(sync(self._window, guard=self.guard))
        return totals

    def _close_window(self, reset: bool) -> dict[str, float]:
        summed = sync(self._window, guard=self.guard)
        if summed.mismatch() > MISMATCH_TOLERANCE and not self._warned:
            self._warned = True
            warnings.warn(_mismatch_message(summed.mismatch()), stacklevel=4)
        totals = self.totals.copy().add(summed)
        if reset:
            self.totals = totals
            self._window.reset()
        return self._values(summed, totals)

    def _values(self, summed: ChannelLossAccumulator, totals: RunTotals) -> dict[str, float]:
        found = summed.compute_by_channel()
        named = [name for name in (*summed.table.names, UNLABELED) if any(totals.of(name).values())]
        for name in named if self.config.run_metrics else ():
            of_run = totals.of(name)
            found.setdefault(name, {}).update({m: of_run[m] for m in self.config.run_metrics})
        return {
            metric_key(self.config.key_format, name, metric): value
            for name, values in found.items()
            for metric, value in values.items()
        }

    def _add(
        self,
        losses: Tensor,
        channels: Tensor | Sequence[str | None],
        loss_mask: Tensor,
        cu_seqlens: Tensor | None,
        reported_sum: Tensor | None,
        *,
        weights: Tensor | None,
    ) -> None:
        correct = None
        if "token_acc" in self.config.metrics:
            correct = self._correctness.of(losses)
        if losses.device != self._step.device:
            self._step.to(losses.device)
            self._window.to(losses.device)
        ids = channels
        if isinstance(channels, Tensor):
            ids = channels.to(losses.device, non_blocking=True)
            # Rows that were flattened into one are rows again: cheaper than ids per token.
            if cu_seqlens is None and ids.dim() == 1 and ids.numel() != losses.numel():
                losses = losses.reshape(ids.numel(), -1)
            elif cu_seqlens is None:
                ids = in_layout(ids, losses.shape)
        self._step.update(
            losses,
            channels=ids,
            cu_seqlens=cu_seqlens,
            loss_mask=_of_shape("loss_mask", loss_mask, losses),
            correct=None if correct is None else correct.reshape(losses.shape),
            weights=None if weights is None else weights.reshape(losses.shape),
            reported_sum=reported_sum,
        )

    def _add_samples(self, sequences: Tensor) -> None:
        """Sequences without a token here: their tokens are counted apart from them."""
        nothing = torch.zeros(sequences.numel(), device=self._step.device)
        bounds = torch.arange(sequences.numel() + 1, device=self._step.device)
        self._step.update(
            nothing,
            channels=sequences.to(self._step.device, non_blocking=True),
            cu_seqlens=bounds,
            loss_mask=nothing,
        )

    def _new_sums(self) -> ChannelLossAccumulator:
        return ChannelLossAccumulator(
            self.table, metrics=self.config.window_metrics, device=_sync_device()
        )


def _of_shape(name: str, values: Tensor, losses: Tensor) -> Tensor:
    if values.numel() != losses.numel():
        raise BoundaryError(
            f"{name} of shape {list(values.shape)} does not fit losses of shape "
            f"{list(losses.shape)}; pass the mask that the loss function multiplies the losses "
            "with, cut as they are."
        )
    return values.reshape(losses.shape)


def _counts_here() -> bool:
    from megatron.core import parallel_state

    return not parallel_state.is_initialized() or (
        parallel_state.get_tensor_model_parallel_rank() == 0
    )


def _is_first_shard() -> bool:
    """Whether this rank is the one of its context-parallel group that counts sequences."""
    from megatron.core import parallel_state

    return not parallel_state.is_initialized() or (parallel_state.get_context_parallel_rank() == 0)


def _sync_device() -> torch.device:
    """Where sums must be to be reduced over the ranks; ranks that count nothing reduce too."""
    if dist.is_initialized() and "nccl" in dist.get_backend():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _bounds(cu_seqlens: Tensor | None, packed_seq_params: Any) -> Tensor | None:
    """Where the tokens of a pack sit: the padded bounds, where they differ from the lengths."""
    if cu_seqlens is not None or packed_seq_params is None:
        return cu_seqlens
    for name in ("cu_seqlens_q_padded", "cu_seqlens_q"):
        bounds = getattr(packed_seq_params, name, None)
        if bounds is not None:
            return cast(Tensor, bounds)
    raise BoundaryError(
        "packed_seq_params has neither cu_seqlens_q_padded nor cu_seqlens_q; without them the "
        "sequences of a pack cannot be told apart."
    )


def _reported_sum(result: Any) -> Tensor | None:
    """The sum of losses that a loss function reports for its own rank, if it does.

    Since megatron-core 0.13 that is the first entry of a report, [sum, num_tokens]; before, and
    in custom functions, the report may be a mean or a sum over ranks, which cannot be compared.
    """
    if not (isinstance(result, tuple) and len(result) == 3 and isinstance(result[2], dict)):
        return None
    report = next(iter(result[2].values()), None)
    return report.flatten()[0] if isinstance(report, Tensor) and report.numel() == 2 else None


def _mismatch_message(mismatch: float) -> str:
    return (
        "the losses per channel do not add up to the loss that the loss function reported: the "
        f"relative difference is {mismatch:.1e}. The loss mask that was counted is not the one "
        "that was trained on; pass the mask that the loss function uses."
    )
