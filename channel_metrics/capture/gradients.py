"""Which channels the gradient of the last normalisation layer comes from.

A hook on the layer keeps its input until the backward pass, and a hook on its output gets the
gradient g of each position. Their products g * x are added up per sequence and channel.

Letters: B rows, S row length, T = B * S, N sequences, H is the hidden size.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from channel_metrics.capture.last_norm import find_last_norm, normed_by
from channel_metrics.config import MetricsConfig
from channel_metrics.core.faults import FaultGuard
from channel_metrics.core.gradients import GRADIENTS, gradient_columns
from channel_metrics.core.labels import LabelTable
from channel_metrics.core.micro_batch import MicroBatch
from channel_metrics.core.rows import table_rows
from channel_metrics.core.table import SumTable
from channel_metrics.core.totals import RunTotals
from channel_metrics.errors import ConfigError

__all__ = ["GradientTable", "Gradients", "Session"]


class GradientTable(SumTable):
    """Sums of gradients [H] for each label."""

    def __init__(self, labels: LabelTable, size: int) -> None:
        super().__init__(labels, gradient_columns(size))

    @torch.no_grad()
    def add_gradients(self, labels: Any, gradients: Tensor, *, whole: bool) -> None:
        """Add gradients [N, H], or [N + 1, H] if the last one belongs to no sequence.

        whole: whether they are those of whole sequences, so that their squares count.
        """
        self.to(gradients.device)
        rows = table_rows(self._ids(labels).flatten(), self._num_rows(), len(gradients))
        exact = gradients.to(self.dtype)
        squares = exact.square().sum(-1) if whole else exact.new_zeros(len(exact))
        values = torch.cat([(squares > 0).to(exact)[None], squares[None], exact.t()])
        in_place = self.dtype == torch.float64
        sums = self._sums if in_place else torch.zeros_like(self._sums)
        sums.index_add_(1, rows, values)
        if not in_place:
            self._add_up(sums)


@dataclass(eq=False)
class _Forward:
    """A forward of the layer [B, S].

    kept: the positions whose logits the model computes, as transformers takes `logits_to_keep`: a
    mask, indices, or how many of the last; 0 for all. batch: what was computed from it; None until
    it is known. positions: int64, those of the losses in a row; None for all.
    """

    inputs: Tensor
    kept: Tensor | int
    batch: MicroBatch | None = None
    positions: Tensor | None = None


class Session(Protocol):
    """What `Gradients` asks of a `ChannelMetrics`."""

    config: MetricsConfig
    labels: LabelTable
    guard: FaultGuard
    totals: RunTotals
    on_count: list[Callable[[MicroBatch], object]]

    def warn_once(self, message: str, *values: object) -> None:
        """Warn."""


class Gradients:
    """The gradients of the train window of a session, if the config asks for metrics of them."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.wanted = any(one.name in session.config.metrics for one in GRADIENTS)
        if self.wanted:
            session.on_count.append(self._bind)
        self._table: GradientTable | None = None
        # Forwards that no micro-batch is known of yet.
        self._open: deque[weakref.ref[_Forward]] = deque(maxlen=2)
        self._run: object = None
        self._kept: Tensor | int = 0

    def watch(self, model: Any) -> None:
        """Measure at the last normalisation layer of a model.

        It does nothing if no metric of the config needs this. All ranks must call it before the
        first batch, or none. The HF Trainer and the trainers built on it do so themselves.

        Args:
            model: a causal language model of transformers, before it is wrapped or compiled.

        Raises:
            ConfigError: that layer cannot be found, or was found to be of another kind.
        """
        if not self.wanted:
            return
        if self._table is not None:
            raise ConfigError("`watch` was called before; one model can be watched per session.")
        norm: Any = find_last_norm(model)
        self._normed = normed_by(norm, model)
        self._table = GradientTable(self._session.labels, norm.weight.numel())
        # Not a bound method: the model would keep the session of an old trainer alive.
        me = weakref.ref(self)
        norm.register_forward_hook(
            lambda *of: None if (found := me()) is None else found._seen(*of)
        )
        model.register_forward_pre_hook(
            lambda *of: None if (found := me()) is None else found._begins(*of), with_kwargs=True
        )

    @property
    def table(self) -> GradientTable | None:
        """The sums of this rank; None if no model is watched."""
        self._begin_run()
        return self._table

    def reset(self) -> None:
        """Begin the next window."""
        if self._table is not None:
            self._table.reset()

    def _begin_run(self) -> None:
        """Forget what a run before this one has left."""
        if self._table is not None and self._run is not self._session.totals:
            self._table.reset()
        self._run = self._session.totals

    def _begins(self, _model: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            self._kept = kwargs.get("logits_to_keep", 0)

    def _seen(self, _norm: Any, args: tuple[Any, ...], output: Any) -> None:
        # A compiled graph must not hold our state.
        if torch.compiler.is_compiling() or not isinstance(output, Tensor):
            return
        if output.requires_grad and args and self._session.guard.measuring:
            forward = _Forward(args[0].detach(), self._kept)
            # The graph holds it, so a forward without a backward pass is forgotten with its graph.
            output.register_hook(partial(self._add, forward))
            self._open.append(weakref.ref(forward))

    def _bind(self, batch: MicroBatch) -> None:
        """The last forward was over this micro-batch."""
        if self._table is None:
            self._session.warn_once(
                "the metrics `grad_...` are left out, because this trainer does not say which "
                "model it trains; in a loop of your own, call `metrics.gradients.watch(model)`."
            )
            return
        self._begin_run()
        forwards = [forward for ref in self._open if (forward := ref()) is not None]
        self._open.clear()
        if len(forwards) != 1:
            self._tell(f"{len(forwards)} forwards with gradients were seen in place of one")
            return
        (forward,), shape = forwards, batch.token_losses.shape
        *rows, size = forward.inputs.shape[:-1]
        in_row = shape.numel() // max(math.prod(rows), 1)
        positions = _kept_positions(forward.kept, size, in_row, forward.inputs.device)
        if math.prod(rows) * (size if positions is None else len(positions)) != shape.numel():
            self._tell(f"the layer had {list(forward.inputs.shape)}, for losses of {list(shape)}")
            return
        forward.batch, forward.positions = batch, positions

    def _add(self, forward: _Forward, slope: Tensor) -> None:
        """Called by the backward pass with the gradient of the layer's output."""
        guard = self._session.guard
        with guard.guarded():
            if guard.measuring and self._table is not None and forward.batch is not None:
                inputs, kept = forward.inputs, forward.positions
                if kept is not None:
                    slope, inputs = slope.index_select(-2, kept), inputs.index_select(-2, kept)
                products = _products(slope, self._normed(inputs))
                gradients, whole = _of_sequences(products, forward.batch)
                self._table.add_gradients(forward.batch.channels, gradients, whole=whole)

    def _tell(self, reason: str) -> None:
        self._session.warn_once(
            "a micro-batch is left out of the metrics `grad_...`, because the gradient of the last "
            "normalisation layer is not known: %s.",
            reason,
        )


def _kept_positions(
    kept: Tensor | int, size: int, in_row: int, device: torch.device
) -> Tensor | None:
    """int64: the positions of a row of `size` whose losses there are, `in_row` of them if `kept` is
    a mask; None for all. Nothing waits for the device."""
    if isinstance(kept, Tensor) and kept.dtype != torch.bool:
        return kept.to(device)
    if isinstance(kept, Tensor):
        return (~kept).to(torch.uint8).argsort(stable=True)[:in_row].to(device)
    return torch.arange(max(size - kept, 0), size, device=device) if kept else None


@torch.no_grad()
def _products(slope: Tensor, normed: Tensor) -> Tensor:
    """g * x [T, H], in float32 or float64."""
    exact = torch.promote_types(torch.promote_types(slope.dtype, normed.dtype), torch.float32)
    return (slope.to(exact) * normed).flatten(0, -2)


def _of_sequences(products: Tensor, batch: MicroBatch) -> tuple[Tensor, bool]:
    """The gradients of sequences, and True; those of tokens, and False, if channels are ids [T]."""
    shape, bounds = batch.token_losses.shape, batch.cu_seqlens
    if batch.per_token:
        return products, False
    if bounds is None:
        rows = products.view(shape[0] if len(shape) == 2 else 1, -1, products.shape[-1])
        return rows.sum(1), True
    # A position predicts the token after it, which decides the channel.
    moved = torch.nn.functional.pad(products, (0, 0, 1, -1))
    ends = torch.nn.functional.pad(bounds, (0, 1), value=len(products)).to(products.device)
    summed = torch.segment_reduce(
        moved, "sum", lengths=ends.diff().long(), axis=0, unsafe=True, initial=0
    )
    return summed, True
