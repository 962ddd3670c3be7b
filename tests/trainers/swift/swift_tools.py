"""Real runs of ms-swift, alone and with channel metrics, and what they leave to look at."""

from __future__ import annotations

import functools
import importlib.util
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch as replaced

import faults
import pytest
import torch
import torch.distributed as dist
from collectives import watched
from fork_client import Preload
from hf_case_tools import weights_hash
from said import warnings_of_ours
from torch.utils._python_dispatch import TorchDispatchMode

from channel_metrics import MetricsConfig

SWIFT = Preload(("swift_tools:use_cpu", "swift_tools:load_rlhf"))
# Triton decides when a kernel is defined whether it will be interpreted.
INTERPRETED = Preload(SWIFT.names, (("TRITON_INTERPRET", "1"),))
needs_swift = pytest.mark.skipif(
    importlib.util.find_spec("swift") is None,
    reason="ms-swift is only in the main environment (Python 3.11): `make test` runs this",
)
ON = MetricsConfig()
TIMES = ("runtime", "per_second", "elapsed", "remaining", "speed", "step_time")


def use_cpu() -> None:
    """Import ms-swift; let it run on a CPU, and no slower than it must."""
    import datasets
    import swift  # noqa: F401 - first: its parts cannot be imported alone
    from swift.arguments import sft_args
    from swift.trainers import Seq2SeqTrainer  # noqa: F401 - each run would import it anew

    datasets.disable_progress_bars()
    # With num_proc=1, `map` starts a process, which costs more than all that there is to map.
    dataset_map = datasets.Dataset.map

    @functools.wraps(dataset_map)
    def map_here(*args: Any, num_proc: int | None = None, **kwargs: Any) -> Any:
        return dataset_map(*args, **kwargs)

    datasets.Dataset.map = map_here
    # There is no flash attention for a CPU. transformers' own sdpa keeps packed sequences apart
    # too.
    sft_args.SftArguments._check_padding_free = lambda self: setattr(
        self, "padding_free", self.padding_free or self.packing
    )


def load_rlhf() -> None:
    """Import the trainers of `swift rlhf`."""
    from swift import rlhf_trainers

    for kind in ("CPO", "DPO", "GRPO", "KTO", "ORPO", "Reward"):
        getattr(rlhf_trainers, f"{kind}Trainer")


def run(given: dict[str, Any], metrics: MetricsConfig | None = ON) -> dict[str, Any]:
    """One run of `swift sft`, `pt` or `rlhf`: its log, a hash of its weights, its random numbers,
    the collectives that it called, our warnings, and its trainer.

    metrics: None is ms-swift alone.
    """
    import channel_metrics.patches.ms_swift as patch
    from swift import (
        PretrainArguments,
        RLHFArguments,
        SftArguments,
        pretrain_main,
        rlhf_main,
        sft_main,
    )
    from swift.pipelines.train.sft import SwiftSft

    kept: list[Any] = []
    train = SwiftSft.train

    def keep(self: Any, trainer: Any) -> Any:
        kept.append(trainer)
        return train(self, trainer)

    SwiftSft.train = keep
    patch.revert()
    if metrics is not None:
        patch.apply(metrics)
    try:
        with counted_collectives() as collectives, warnings_of_ours() as told:
            if "rlhf_type" in given:
                rlhf_main(RLHFArguments(**given))
            elif given.get("use_chat_template") is False:
                pretrain_main(PretrainArguments(**given))
            else:
                sft_main(SftArguments(**given))
    finally:
        SwiftSft.train = train
        patch.revert()
    (trainer,) = kept
    return {
        "log": [timeless(entry) for entry in trainer.state.log_history],
        "weights": weights_hash(trainer.model),
        "random": int(torch.get_rng_state().sum()),
        "collectives": collectives,
        "told": told,
        "trainer": trainer,
    }


def timeless(entry: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in entry.items() if not any(part in k for part in TIMES)}


def both(given: dict[str, Any], metrics: MetricsConfig = ON) -> dict[str, Any]:
    """The run of ms-swift alone, and with our metrics; plain values."""
    return both_and_template(given, metrics)[0]


def both_and_template(
    given: dict[str, Any], metrics: MetricsConfig = ON, **alone: Any
) -> tuple[dict[str, Any], Any]:
    """What `both` gives, and the template. alone: other arguments for ms-swift alone."""
    found = {"off": run(given | alone, None), "on": run(given, metrics)}
    trainers = [of_run.pop("trainer") for of_run in found.values()]
    return found, trainers[-1].template


@contextmanager
def counted_collectives() -> Iterator[Counter[str]]:
    """How often each collective of torch.distributed was called from Python."""
    counts: Counter[str] = Counter()
    with replaced.multiple(dist, **watched(lambda name, *_, **__: counts.update([name]))):
        yield counts


class _Reads(TorchDispatchMode):
    """Counts the operations that read values of tensors, or make a shape out of them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types here
        self.count = 0
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & {*func.tags}
        # Indexing has the tag for the sake of bool masks.
        indexing = func is torch.ops.aten.index.Tensor
        if (
            reads
            and not self.paused
            and not (indexing and all(i is None or i.dtype != torch.bool for i in args[1]))
        ):
            self.count += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_reads() -> Iterator[list[int]]:
    """How often each micro-batch (inputs, forward, loss, backward) would wait for a device.

    Without the accumulator's update: it checks more of what lies on a host, and its own tests
    show that it waits for no device.
    """
    from swift.trainers import Seq2SeqTrainer

    counts: list[int] = []
    reads = _Reads()
    step = Seq2SeqTrainer.training_step

    def counting(*args: Any, **kwargs: Any) -> Any:
        reads.count = 0
        with reads:
            loss = step(*args, **kwargs)
        counts.append(reads.count)
        return loss

    def uncounted(update: Any, *args: Any, **kwargs: Any) -> Any:
        reads.paused = True
        try:
            return update(*args, **kwargs)
        finally:
            reads.paused = False

    with (
        replaced.object(Seq2SeqTrainer, "training_step", counting),
        faults.around("add to a window", uncounted),
    ):
        yield counts
