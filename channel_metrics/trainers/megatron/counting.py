"""Channel metrics in a training loop over megatron-core's schedules. The patch uses this as well.

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

Loss functions run only on the last pipeline stage, so only this stage counts. All ranks of a
tensor-parallel group hold the same losses, and the first of them counts.

Letters: B rows, S row length, N sequences of a pack.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from channel_metrics.capture.vocab_parallel import Correctness
from channel_metrics.config import MetricsConfig
from channel_metrics.core.micro_batch import MicroBatch
from channel_metrics.core.places import Places
from channel_metrics.core.totals import RunTotals
from channel_metrics.errors import BoundaryError, ConfigError
from channel_metrics.session import ChannelMetrics

__all__ = ["MegatronChannelMetrics"]

Channels = Tensor | Sequence[str | None]


class MegatronChannelMetrics:
    """Counts tokens in the loss functions of Megatron's schedules.

    Make one per run. All chunks of a virtual pipeline share it, and evaluations are windows of its
    session.

    Args:
        channels: the names of the channels, the same on every rank.
        config: what is logged and under which keys.
        session: a `ChannelMetrics` to count into. Give it in place of `channels` and `config`.

    Raises:
        ConfigError, ChannelError: two names would share a log key, or a name is not allowed.
    """

    def __init__(
        self,
        channels: Iterable[str] = (),
        *,
        config: MetricsConfig | None = None,
        session: ChannelMetrics | None = None,
    ) -> None:
        names = tuple(channels)
        if session is not None and (names or config is not None):
            raise ConfigError(
                "session was given together with channels or config, which it has already; give "
                "them where you make the session."
            )
        if session is None:
            config = config or MetricsConfig()
            names = tuple(dict.fromkeys((*names, *config.channels)))
            session = ChannelMetrics(replace(config, channels=names))
        self.session = session
        self._correctness = Correctness(session.guard)
        self._warned_of_crossings = False

    @property
    def totals(self) -> RunTotals:
        """The totals of the run, up to the last closed training window."""
        return self.session.totals

    def watch(self, model: Any) -> None:
        """Measure token accuracy from now on, if a metric needs it.

        Args:
            model: the model of the forward step.
        """
        if self.session.with_correct:
            self._correctness.watch(model)

    def count(
        self,
        loss_func: Callable[..., Any],
        *,
        channels: Channels,
        loss_mask: Tensor,
        cu_seqlens: Tensor | None = None,
        packed_seq_params: Any = None,
        sequences: Tensor | None = None,
        weights: Tensor | None = None,
        labels: Tensor | None = None,
        reports_sum: bool = True,
        num_crossings: int = 0,
        places: Places | None = None,
    ) -> Callable[..., Any]:
        """Make a loss function that also counts the losses that it gets.

        Args:
            loss_func: the loss function that the schedule would call with the losses.
            channels: names or int64 ids, one per row [B] or one per sequence of a pack [N]. Or
                int64 ids, one per token, cut for context parallelism by the function that cuts the
                labels.
            loss_mask: [B, S], one entry per loss, 0 where a token is not supervised. If the losses
                are flattened to one row, the shape of the mask tells what the rows are.
            cu_seqlens: the boundaries of the sequences, int32 [N + 1], if `channels` has one entry
                per sequence. Do not pass it after a cut.
            packed_seq_params: Megatron's object with these boundaries, in place of `cu_seqlens`.
            sequences: int64 [N], the channel of each sequence, if `channels` has one id per token.
                The metric `samples` needs it.
            weights: the factor of each loss in `loss_func`, in the shape of the losses.
            labels: the token that each loss is about, in the shape of the losses. Metrics per byte
                need it.
            reports_sum: whether the sum that `loss_func` reports is the unweighted sum of these
                losses. If so, the two are compared.
            num_crossings: how many supervised targets belong to the sequence after that of the
                position that predicts them. There is one warning if there are any.
            places: where the targets stand, cut as the losses; by default, the bounds show it.

        Returns:
            A function that takes the arguments of `loss_func`, and returns its result.

        Raises:
            ChannelMetricsError: when the new function is called, if shapes or channels do not fit.
        """

        @functools.wraps(loss_func)
        def counting_loss_func(losses: Tensor, *args: Any, **kwargs: Any) -> Any:
            result = loss_func(losses, *args, **kwargs)
            off = kwargs.get("non_loss_data") or not self.session.measuring
            if off or not _is_first("tensor_model"):
                return result
            with self.session.guard.guarded():
                _refuse_capture(losses)
                self._warn_of_crossings(num_crossings)
                batch = self._micro_batch(
                    losses.detach(), channels, loss_mask, _bounds(cu_seqlens, packed_seq_params)
                )
                batch = replace(
                    batch,
                    sequences=sequences if _is_first("context") else None,
                    weights=None if weights is None else weights.reshape(batch.token_losses.shape),
                    labels=None if labels is None else _beside(labels, batch.token_losses),
                    reported_sum=_reported_sum(result) if reports_sum else None,
                    places=self._places(batch, places),
                )
                self.session.count(batch)
            return result

        return counting_loss_func

    def begin_step(self) -> None:
        """Begin a training step. If the step is run again, its first counts are dropped.

        Inside an evaluation, this does nothing.
        """
        if not self.session.evaluating:
            self.session.begin_step()
            self._correctness.forget()

    def end_step(self, *, discard: bool = False) -> None:
        """End a training step. Inside an evaluation, this does nothing.

        Args:
            discard: drop its counts, because the optimizer skipped it or it was not finished.
        """
        if not self.session.evaluating:
            self.session.end_step(discard=discard)

    def compute(self, step: int = 0, *, reset: bool = True) -> dict[str, float]:
        """Compute the metrics of the training window over all ranks.

        This is a collective: every rank must call it at the same points. It takes one all-reduce.

        Args:
            step: the iteration. Observers of the session get it when the window ends.
            reset: whether the window ends. If it goes on, the values hold no counts and no totals.

        Returns:
            {log key: value}, the same on every rank.
        """
        window = self.session.close(step) if reset else self.session.peek(step)
        return window.logs

    def _micro_batch(
        self, losses: Tensor, channels: Channels, loss_mask: Tensor, cu_seqlens: Tensor | None
    ) -> MicroBatch:
        """The micro-batch of these losses, in the layout of their channels."""
        correct = self._correctness.of(losses) if self.session.with_correct else None
        if loss_mask.numel() != losses.numel():
            raise BoundaryError(
                f"loss_mask of shape {list(loss_mask.shape)} does not fit losses of shape "
                f"{list(losses.shape)}; pass the mask that the loss function multiplies the "
                "losses with, cut as they are."
            )
        if cu_seqlens is None:
            losses, channels = _in_layout(losses, channels, loss_mask)
        return MicroBatch(
            token_losses=losses,
            channels=channels,
            cu_seqlens=cu_seqlens,
            loss_mask=loss_mask.reshape(losses.shape),
            correct=None if correct is None else correct.reshape(losses.shape),
        )

    def _places(self, batch: MicroBatch, given: Places | None) -> Places | None:
        """Where the targets stand: the boundaries show it for the tokens that predict them."""
        if given is not None:
            return given.map(lambda one: _beside(one, batch.token_losses))
        found = batch.of_tokens if self.session.token_axes.of_places else None
        return None if found is None else found.of_next()

    def _warn_of_crossings(self, count: int) -> None:
        if count and not self._warned_of_crossings:
            self._warned_of_crossings = True
            self.session.warn_once(
                f"{count} supervised targets of this micro-batch are the first token of the next "
                "sequence of their pack; they count for the channel of that sequence. A template "
                "or prompt format that masks them avoids it."
            )


def _beside(values: Tensor, losses: Tensor) -> Tensor:
    return values.reshape(losses.shape).to(losses.device, non_blocking=True)


def _in_layout(losses: Tensor, channels: Channels, loss_mask: Tensor) -> tuple[Tensor, Channels]:
    """Give losses and channels one layout: one channel per row, or one id per token."""
    is_ids = isinstance(channels, Tensor)
    count = cast(Tensor, channels).numel() if is_ids else len(channels)
    if not is_ids or cast(Tensor, channels).dim() == 1:
        for like in (losses, loss_mask):
            rows = tuple(like.shape) if like.dim() == 2 else (1, like.numel())
            if rows[0] == count:
                return losses.reshape(rows), channels
    if is_ids and count == losses.numel():
        return losses, cast(Tensor, channels).reshape(losses.shape)
    raise BoundaryError(
        f"expected one channel for each of the rows of the losses {list(losses.shape)} or of the "
        f"loss_mask {list(loss_mask.shape)}, or one id per token, but got {count} channels; for a "
        "pack of several sequences pass cu_seqlens or packed_seq_params."
    )


def _refuse_capture(losses: Tensor) -> None:
    if losses.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ConfigError(
            "the loss function runs inside the capture of a CUDA graph, whose replays run no "
            "Python that could count; do not capture whole iterations (FullCudaGraphWrapper)."
        )


def _is_first(group: str) -> bool:
    """Whether this rank is the first of its tensor-parallel or context-parallel group."""
    from megatron.core import parallel_state

    rank_of = getattr(parallel_state, f"get_{group}_parallel_rank")
    return not parallel_state.is_initialized() or rank_of() == 0


def _bounds(cu_seqlens: Tensor | None, packed_seq_params: Any) -> Tensor | None:
    """The boundaries of the sequences of a pack, with their padding if there is any."""
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
    """The sum of losses that a loss function reports for its own rank; None if it does not.

    Since megatron-core 0.13, a report is [sum, num_tokens]. In earlier versions and in custom
    functions, it may be a mean or a sum over ranks. These cannot be compared with our sum.
    """
    if not (isinstance(result, tuple) and len(result) == 3 and isinstance(result[2], dict)):
        return None
    report = next(iter(result[2].values()), None)
    return report.flatten()[0] if isinstance(report, Tensor) and report.numel() == 2 else None
