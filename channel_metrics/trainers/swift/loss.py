"""Token losses from ms-swift's own loss functions, while its trainer computes the loss.

ms-swift computes the loss of each token itself if it weights tokens (`loss_scale`, DFT), if it logs
channels, and under sequence parallelism. We keep these values. In all other cases the model
computes the loss, and `channel_metrics.capture.transformers` reads it.

Letters: B rows, S row length, T = B * S, of what this rank holds.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from swift.sequence_parallel import GatherLoss
from swift.trainers import seq2seq_trainer
from torch import Tensor

from channel_metrics.core.faults import FaultGuard
from channel_metrics.errors import UnsupportedVersionError
from channel_metrics.losses.cross_entropy import TokenLosses, is_correct, token_losses_of_logits
from channel_metrics.swap import wrapped

__all__ = ["SeenLosses", "check_loss_functions", "observe_token_losses", "own_channel_loss_off"]

_FUNCTIONS = ("per_token_loss_func", "per_token_loss_func_sp")


@dataclass
class SeenLosses:
    """The token losses of one `compute_loss` of ms-swift.

    losses: nll, correctness, targets and entropies [T]; None if the model computed the loss.
    factor: [T], by which DFT multiplied the nll; None without DFT.
    """

    with_correct: bool
    with_entropy: bool = False
    losses: TokenLosses | None = None
    factor: Tensor | None = None

    def keep(self, logits: Tensor, target: Tensor, losses: Tensor, *, dft: bool) -> None:
        """Keep the losses [T] that ms-swift computed from logits [..., V] and targets."""
        logits, target = logits.detach().flatten(0, -2), target.reshape(-1).to(logits.device)
        if dft:
            # DFT has changed the losses in place, so they are measured with a second softmax.
            self.losses = self._measured(logits, target)
            self.factor = torch.exp(-self.losses.nll)
            return
        nll = losses.detach().reshape(-1).float()
        if self.with_entropy:
            self.losses = replace(self._measured(logits, target), nll=nll, reported_sum=nll.sum())
            return
        with torch.no_grad():
            correct = is_correct(logits, target) if self.with_correct else None
        self.losses = TokenLosses(nll, correct, target, nll.sum())

    def _measured(self, logits: Tensor, target: Tensor) -> TokenLosses:
        return token_losses_of_logits(
            logits, target, with_correct=self.with_correct, with_entropy=self.with_entropy
        )


def check_loss_functions() -> None:
    """Raise `UnsupportedVersionError` unless ms-swift's loss functions are those we know."""
    for name in _FUNCTIONS:
        function = getattr(seq2seq_trainer, name, None)
        parameters = tuple(inspect.signature(function).parameters) if function else ()
        if parameters[:3] != ("outputs", "labels", "enable_dft_loss"):
            import swift

            raise UnsupportedVersionError(
                f"ms-swift {swift.__version__} has {name} with parameters {parameters}, but "
                "(outputs, labels, enable_dft_loss, ...) were expected; use a tested version "
                "(see docs/ms_swift.md)."
            )


@contextmanager
def observe_token_losses(
    *, with_correct: bool, with_entropy: bool, guard: FaultGuard
) -> Iterator[SeenLosses]:
    """Observe ms-swift's per-token loss functions inside the block."""
    seen = SeenLosses(with_correct, with_entropy)

    def of_rows(compute: Any, outputs: Any, labels: Tensor, *args: Any, **kwargs: Any) -> Any:
        losses = compute(outputs, labels, *args, **kwargs)
        target = torch.roll(labels, shifts=-1, dims=-1)
        seen.keep(outputs.logits, target, losses, dft=_dft(args, kwargs))
        return losses

    def of_parts(compute: Any, outputs: Any, labels: Tensor, *args: Any, **kwargs: Any) -> Any:
        # ms-swift gathers the losses of all parts. We keep those that this rank gives.
        gathered: list[Tensor] = []

        def gather(original: Any, loss: Tensor, *rest: Any) -> Any:
            gathered.append(loss.detach())
            return original(loss, *rest)

        with wrapped(GatherLoss, "apply", gather):
            losses = compute(outputs, labels, *args, **kwargs)
        seen.keep(outputs.logits, labels, gathered[0], dft=_dft(args, kwargs))
        return losses

    with ExitStack() as stack:
        for name, body in zip(_FUNCTIONS, (of_rows, of_parts), strict=True):
            stack.enter_context(wrapped(seq2seq_trainer, name, _shielded(guard, body)))
        yield seen


def _shielded(guard: FaultGuard, observing: Any) -> Any:
    return lambda original, *args, **kwargs: guard.shielded(original, observing, *args, **kwargs)


def _dft(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool(args[0] if args else kwargs.get("enable_dft_loss"))


@contextmanager
def own_channel_loss_off(args: Any, inputs: Any, *, inject: bool) -> Iterator[None]:
    """Switch off ms-swift's own loop over the channels of a batch inside the block.

    `enable_channel_loss` also makes ms-swift compute losses per token. A `loss_scale` does the
    same, and with ones the loss stays the same bit for bit.

    Args:
        args: the arguments of the trainer.
        inputs: the batch.
        inject: whether the batch gets a `loss_scale` of ones, if it has none. Without it, the model
            computes the loss.
    """
    if inject and inputs.get("loss_scale") is None:
        inputs["loss_scale"] = torch.ones_like(inputs["labels"], dtype=torch.float32)
    args.enable_channel_loss = False
    try:
        yield
    finally:
        args.enable_channel_loss = True
