"""The keys that Megatron and Megatron-Bridge write to TensorBoard, W&B and their text logs."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["megatron_keys"]

_LOSSES = (
    "lm loss",
    "indexer loss",
    "load_balancing_loss",
    "seq_load_balancing_loss",
    "global_load_balancing_loss",
    "z_loss",
    *(f"mtp_{depth} loss" for depth in range(1, 9)),
)
# TensorBoard gets each of these a second time, over the samples.
_VALUES = (
    "learning-rate",
    "decoupled-learning-rate",
    "batch-size",
    "loss-scale",
    "world-size",
    "grad-norm",
    "num-zeros",
    "params-norm",
    "max-attention-logit",
)
_OTHERS = (
    "samples vs steps",
    "skipped-train-samples",
    "grpo_collection_iteration",
    "mem-reserved-bytes",
    "mem-allocated-bytes",
    "mem-max-allocated-bytes",
    "mem-allocated-count",
    "max_attention_logit",
    "iteration-time",
    "throughput",
    "throughput/tflops",
    "throughput/tflops/device",
    "iter-energy/gpu",
    "power/gpu",
    *(f"mtp_{d}{way}_acceptance_rate" for d in range(1, 9) for way in ("", "_cumulative")),
)
_OF_THE_TEXT_LOG = (
    "iteration",
    "consumed samples",
    "skipped samples",
    "elapsed time per iteration (ms)",
    "throughput per GPU (TFLOP/s/GPU)",
    "energy per GPU (J/iter/GPU)",
    "power per GPU (W/GPU)",
    "learning rate",
    "global batch size",
    "loss scale",
    "grad norm",
    "num zeros",
    "params norm",
    "number of skipped iterations",
    "number of nan iterations",
)
_SETS = 16


def megatron_keys(set_names: Iterable[str] = ()) -> frozenset[str]:
    """List all keys that no channel may use.

    Args:
        set_names: the names of `--validation-set-names`. The keys with numbers of sets are always
            in the list.
    """
    suffixes = ["", *(f"-{name}" for name in (*range(_SETS), *set_names))]
    scalars = [*_VALUES, *_LOSSES]
    for loss in _LOSSES:
        of_sets = [f"{loss} validation{suffix}" for suffix in suffixes]
        scalars += [*of_sets, *(f"{key} ppl" for key in of_sets)]
    text = [f"{loss} {kind}" for loss in _LOSSES for kind in ("value", "PPL")]
    over_samples = [f"{key} vs samples" for key in scalars]
    return frozenset([*scalars, *over_samples, *_OTHERS, *_OF_THE_TEXT_LOG, *text])
