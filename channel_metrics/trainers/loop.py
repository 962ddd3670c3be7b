"""What a loop of one's own needs beside `ChannelMetrics`: an evaluation in one line.

metrics = ChannelMetrics()
loader = DataLoader(train_set, batch_size=8, collate_fn=metrics.collator(base))
for step, batch in enumerate(loader, start=1):
    with metrics.observe(model, batch):
        loss = model(**batch).loss
    ...                                              # backward and optimizer, as before
    if step % 100 == 0:
        print(metrics.close(step).logs)              # {"bbu_loss": ..., ...}
        print(evaluate(metrics, model, eval_loader, step=step))
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from channel_metrics.data.repeats import real_records_of_sampler, repeats_unseen
from channel_metrics.observing import observe
from channel_metrics.session import ChannelMetrics

__all__ = ["evaluate"]


def evaluate(
    metrics: ChannelMetrics,
    model: torch.nn.Module,
    loader: Iterable[MutableMapping[str, Any]],
    *,
    step: int,
    split: str = "eval",
    accelerator: Any = None,
) -> dict[str, float]:
    """Evaluate a model that computes its loss itself, such as one of transformers. A collective.

    The model runs in evaluation mode, without gradients. Afterwards, each of its modules is in the
    mode that it was in.

    Args:
        metrics: of the run. Its train window is not touched.
        model: as the loop calls it.
        loader: its batches come from a collator that `metrics.collator` has made. The records
            that a `DistributedSampler` repeats at the end are not counted.
        step: the optimizer step.
        split: the name of the evaluation set; the log keys begin with it.
        accelerator: the `Accelerator` that prepared the loader, if any. The records that it
            repeats to fill the last batch of all ranks are not counted.

    Returns:
        {log key: value}, such as `eval_bbu_loss`; the same on all ranks.
    """
    if accelerator is not None and repeats_unseen(loader, accelerator):
        metrics.warn_once(
            "every rank reads the evaluation stream itself (dispatch_batches=False): if its "
            "records do not fill the last batch of all ranks, accelerate repeats the first ones, "
            "which cannot be told from others here, and they are counted twice."
        )
    with _evaluating(model), metrics.evaluation(split, step, prefix=f"{split}_") as found:
        for number, batch in enumerate(loader):
            _move(batch, model)
            real = real_records_of_sampler(loader, number)
            with observe(metrics, model, batch, accelerator=accelerator, real=real):
                model(**batch)
    return found.logs


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        # Not model.train(): some modules may be frozen in evaluation mode.
        for module, training in modes:
            module.training = training


def _move(batch: MutableMapping[str, Any], model: torch.nn.Module) -> None:
    """Move the tensors of a batch to the device of the model."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    for key, value in batch.items():
        if isinstance(value, Tensor):
            batch[key] = value.to(device)
