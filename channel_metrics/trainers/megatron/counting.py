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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from channel_metrics.capture.vocab_parallel import Correctness
from channel_metrics.config import MetricsConfig
from channel_metrics.core.micro_batch import MicroBatch
from channel_metrics.core.totals import RunTotals
from channel_metrics.errors import BoundaryError, ConfigError
from channel_metrics.session import ChannelMetrics

__all__ = ["MegatronChannelMetrics"]

Channels = Tensor | Sequence[str | None]


class MegatronChannelMetrics:
    """Counts tokens in the loss functions of Megatron's schedules.

    One for a run: the chunks of a virtual pipeline share it, and evaluations are windows of its
    session.

    Args:
        channels: the names of the channels, the same on every rank.
        config: what is logged and under which keys.
        session: a `ChannelMetrics` to count into, in place of the other two.

    Raises:
        ConfigError, ChannelError: for names that would share a log key.
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
        """The totals of the run, up to the last window that has ended."""
        return self.session.totals

    def watch(self, model: Any) -> None:
        """Measure token accuracy in `model` from now on, if `token_acc` is among the metrics."""
        if self._measures_accuracy:
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
        reports_sum: bool = True,
        num_crossings: int = 0,
    ) -> Callable[..., Any]:
        """`loss_func`, which when called also counts the losses it is given.

        Args:
            loss_func: called with the losses, as Megatron's schedules do.
            channels: the channel of each row [B], or of each sequence of a pack (ids or names);
                or ids per token, cut for context parallelism exactly as the labels are.
            loss_mask: of the shape of the losses, 0 where not supervised. Where the losses are
                one row and the mask has B of them, the mask says what the rows are.
            cu_seqlens, packed_seq_params: the sequences of a pack, where `channels` is one per
                sequence; not after a cut.
            sequences: where `channels` is one per token, the channel of each sequence, for
                `samples`.
            weights: what `loss_func` multiplies each loss with, of their shape.
            reports_sum: whether the sum that `loss_func` reports is that of these losses,
                unweighted.
            num_crossings: how many supervised targets belong to another sequence than the
                position that predicts them. The first time, it is warned of.
        """

        @functools.wraps(loss_func)
        def counting_loss_func(losses: Tensor, *args: Any, **kwargs: Any) -> Any:
            result = loss_func(losses, *args, **kwargs)
            if kwargs.get("non_loss_data") or not self.session.measuring or not _counts_here():
                return result
            with self.session.guard.guarded():
                _refuse_capture(losses)
                self._warn_of_crossings(num_crossings)
                batch = self._micro_batch(
                    losses.detach(), channels, loss_mask, _bounds(cu_seqlens, packed_seq_params)
                )
                batch = replace(
                    batch,
                    sequences=sequences if _is_first_shard() else None,
                    weights=None if weights is None else weights.reshape(batch.token_losses.shape),
                    reported_sum=_reported_sum(result) if reports_sum else None,
                )
                self.session.count(batch)
            return result

        return counting_loss_func

    def begin_step(self) -> None:
        """A step begins, or is run again: what it has counted so far is forgotten.

        Steps are those of training: inside an evaluation this does nothing.
        """
        if not self.session.evaluating:
            self.session.begin_step()
            self._correctness.forget()

    def end_step(self, *, discard: bool = False) -> None:
        """The step is over; `discard` it if the optimizer skipped it, or if it was not finished.

        Inside an evaluation this does nothing.
        """
        if not self.session.evaluating:
            self.session.end_step(discard=discard)

    def compute(self, step: int = 0, *, reset: bool = True) -> dict[str, float]:
        """The metrics of the training window over all ranks, under their log keys. A collective.

        Every rank calls this at the same points; it takes one all-reduce.

        Args:
            step: the iteration, for the observers of the session.
            reset: whether the window ends. One that goes on has no counts and no totals yet.
        """
        window = self.session.close(step) if reset else self.session.peek(step)
        return window.logs

    @property
    def _measures_accuracy(self) -> bool:
        return "token_acc" in self.session.config.metrics

    def _micro_batch(
        self, losses: Tensor, channels: Channels, loss_mask: Tensor, cu_seqlens: Tensor | None
    ) -> MicroBatch:
        """The tokens that the schedule has computed, in the layout that their channels speak of."""
        correct = self._correctness.of(losses) if self._measures_accuracy else None
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

    def _warn_of_crossings(self, count: int) -> None:
        if count and not self._warned_of_crossings:
            self._warned_of_crossings = True
            self.session.warn_once(
                f"{count} supervised targets of this micro-batch are the first token of the next "
                "sequence of their pack; they count for the channel of that sequence. A template "
                "or prompt format that masks them avoids it."
            )


def _in_layout(losses: Tensor, channels: Channels, loss_mask: Tensor) -> tuple[Tensor, Channels]:
    """Losses and channels without bounds: one channel per row, or one id per token."""
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


def _counts_here() -> bool:
    from megatron.core import parallel_state

    return not parallel_state.is_initialized() or (
        parallel_state.get_tensor_model_parallel_rank() == 0
    )


def _is_first_shard() -> bool:
    """Whether this rank is the one of its context-parallel group that counts sequences."""
    from megatron.core import parallel_state

    return not parallel_state.is_initialized() or (parallel_state.get_context_parallel_rank() == 0)


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
