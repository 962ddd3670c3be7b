"""Real runs of ms-swift, alone and with channel metrics, and what they leave to look at.

Importing this imports ms-swift: only for the processes that run it.
"""

from __future__ import annotations

from typing import Any

import datasets
import torch
from hf_case_tools import weights_hash
from swift import SftArguments, sft_main
from swift.arguments import sft_args
from swift.pipelines.train.sft import SwiftSft

from channel_metrics import MetricsConfig

ON = MetricsConfig()
TIMES = ("runtime", "per_second", "elapsed", "remaining", "speed")

datasets.disable_progress_bars()
# There is no flash attention for a CPU. transformers' own sdpa keeps packed sequences apart too.
sft_args.SftArguments._check_padding_free = lambda self: setattr(
    self, "padding_free", self.padding_free or self.packing
)


def run(given: dict[str, Any], metrics: MetricsConfig | None = ON) -> dict[str, Any]:
    """One `sft_main`: its log, a hash of its weights, its random numbers, and its trainer.

    metrics: None is ms-swift alone.
    """
    import channel_metrics.patches.ms_swift as patch

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
        sft_main(SftArguments(**given))
    finally:
        SwiftSft.train = train
        patch.revert()
    (trainer,) = kept
    return {
        "log": [timeless(entry) for entry in trainer.state.log_history],
        "weights": weights_hash(trainer.model),
        "random": int(torch.get_rng_state().sum()),
        "trainer": trainer,
    }


def timeless(entry: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in entry.items() if not any(part in k for part in TIMES)}


def both(given: dict[str, Any], metrics: MetricsConfig = ON) -> dict[str, Any]:
    """The run of ms-swift alone, and with our metrics; plain values."""
    found = {"off": run(given, None), "on": run(given, metrics)}
    for of_run in found.values():
        del of_run["trainer"]
    return found
