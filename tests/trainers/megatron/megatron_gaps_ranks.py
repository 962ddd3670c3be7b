"""A loop of one's own over megatron-core that is not as smooth as that of `megatron_core_ranks`.

Imported by the ranks alone, after `megatron_lm.cpu.install()`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron_core_ranks import LENGTH, METRICS, MICRO_BATCHES, NAMES, ROWS, Loop, batches, forward

from channel_metrics import MetricsConfig
from channel_metrics.trainers.megatron import MegatronChannelMetrics

TOTALS = ("tokens_total", "samples_total")
LVIS = NAMES.index("lvis")


def everything() -> dict[str, Any]:
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)
    cases = (lie, evaluation, totals, unlabeled, peek)
    return {case.__name__: case() for case in cases}


class EvaluationDied(RuntimeError):
    """What the loop catches."""


class GapsLoop(Loop):
    """`lie`: what the reported sum is multiplied with. `dies_at`: the micro-batch that raises.
    `channels`: in place of those of the batches."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics = new_metrics()
        self.lie, self.dies_at, self.channels = 1.0, -1, None

    def forward_step(self, data_iterator: Any, model: Any) -> Any:
        batch = next(data_iterator)
        if self.channels is not None:
            batch["channels"] = self.channels(batch["channels"])
        self.metrics.watch(model)
        counted = self.metrics.count(
            partial(self.loss_func, batch),
            channels=batch["channels"],
            loss_mask=batch["loss_mask"],
        )
        return forward(model, batch), counted

    def loss_func(
        self, batch: dict[str, Any], losses: torch.Tensor, non_loss_data: bool = False
    ) -> Any:
        right = self.logits.pop().argmax(-1).transpose(0, 1) == batch["labels"]
        if non_loss_data:
            return right
        if len(self.seen) == self.dies_at:
            raise EvaluationDied
        self.seen.append((batch, losses.detach().clone(), right))
        total, tokens = (losses * batch["loss_mask"]).sum(), batch["loss_mask"].sum().int()
        report = torch.stack([self.lie * total.detach(), tokens.float()])
        return total, tokens, {"lm loss": report}

    def pass_over(self, step: int, **options: Any) -> Any:
        """The micro-batches of `step` through the real schedule."""
        return get_forward_backward_func()(
            forward_step_func=self.forward_step,
            data_iterator=batches(step),
            model=[self.model],
            num_microbatches=MICRO_BATCHES,
            seq_length=LENGTH,
            micro_batch_size=ROWS,
            **{"forward_only": False, **options},
        )

    def window(self) -> tuple[dict[str, float], dict[str, float]]:
        """One step: what is logged, and what a loop over its tokens says."""
        self.run(self.forward_step)
        return self.metrics.compute(), self.naive()


def new_metrics() -> MegatronChannelMetrics:
    return MegatronChannelMetrics(NAMES, config=MetricsConfig(metrics=(*METRICS, *TOTALS)))


@contextmanager
def told() -> Iterator[list[str]]:
    """What the library says, by a warning or by its logger."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("channel_metrics")
    logger.addHandler(handler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
        found += [str(warning.message) for warning in caught]
    logger.removeHandler(handler)


def lie() -> dict[str, Any]:
    """First an honest window; then two in which rank 1 reports too much."""
    loop = GapsLoop()
    with told() as honest:
        loop.window()
    if dist.get_rank() == 1:
        loop.lie = 1.01
    with told() as lying:
        windows = [loop.window(), loop.window()]
    return {"honest": honest, "lying": lying, "windows": windows}


def evaluation() -> dict[str, Any]:
    """In the middle of a training window: one that dies, and one that ends with a pass whose
    losses are not asked for."""
    loop = GapsLoop()
    loop.run(loop.forward_step)
    train, of_train = loop.metrics, loop.seen
    loop.metrics, loop.seen, loop.dies_at = new_metrics(), [], 1
    loop.metrics.begin_step()
    with torch.no_grad():
        try:
            loop.pass_over(7, forward_only=True)
        except EvaluationDied:
            died = len(loop.seen)
        loop.seen, loop.dies_at = [], -1
        loop.metrics.begin_step()
        loop.pass_over(8, forward_only=True)
        outputs = loop.pass_over(9, forward_only=True, collect_non_loss_data=True)
    evaluated = loop.metrics.compute(), loop.naive()
    loop.metrics, loop.seen = train, of_train
    return {
        "died": died,
        "outputs": len(outputs),
        "eval": evaluated,
        "train": loop.window(),
    }


def totals() -> list[Any]:
    """Three windows; the second has no lvis."""
    loop = GapsLoop()
    found = []
    for without_lvis in (False, True, False):
        loop.channels = (lambda ids: ids.masked_fill(ids == LVIS, 0)) if without_lvis else None
        found.append(loop.window())
    return found


def unlabeled() -> list[str]:
    loop = GapsLoop()
    loop.channels = lambda ids: torch.full_like(ids, -1)
    with told() as found:
        loop.window()
    return found


def peek() -> dict[str, Any]:
    """Values in the middle of a window, which goes on."""
    loop = GapsLoop()
    loop.run(loop.forward_step)
    seen = list(loop.seen)
    middle = loop.metrics.compute(reset=False), loop.naive()
    loop.seen = seen
    return {"middle": middle, "end": loop.window()}
