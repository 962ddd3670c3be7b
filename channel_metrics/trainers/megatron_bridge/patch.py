"""Gives Megatron-Bridge's training loop channel metrics.

These functions of `megatron.bridge` are patched (0.6 has them):

| name | purpose |
|---|---|
| training.pretrain.pretrain | a session is made, and registered for Bridge's events |
| training.train.get_forward_backward_func, also in training.eval | the loss functions count |
| data.loaders.build_train_valid_test_datasets | batches get their channels |
| training.gpt_step._partition_packed_batch_for_cp, core's cuts | ids are cut like the labels |
| data.packing.offline.fill_packing_strategy, parquet.write_packed_parquet | packs name channels |
| training.checkpointing.save_checkpoint | the totals are saved |
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any

from channel_metrics import swap
from channel_metrics.config import MetricsConfig
from channel_metrics.trainers.megatron.cuts import follow_labels, patch_loop, unpatch_loop
from channel_metrics.trainers.megatron.step import counting_schedule
from channel_metrics.trainers.megatron_bridge.data import with_channels
from channel_metrics.trainers.megatron_bridge.packs import (
    fill_packing_strategy,
    write_packed_parquet,
)
from channel_metrics.trainers.megatron_bridge.run import BridgeRun
from channel_metrics.trainers.patching import config_of_environment

__all__ = ["apply", "is_applied", "revert"]

_KEY = "megatron_bridge"
_PACKAGE = "megatron.bridge"
Original = Callable[..., Any]

_runs: list[BridgeRun] = []


def apply(config: MetricsConfig | None = None) -> None:
    """Patch Megatron-Bridge. A second call does nothing.

    Args:
        config: None means the file that CHANNEL_METRICS_CONFIG names, or else the default config.

    Raises:
        UnsupportedVersionError: this version lacks a function. Then nothing is patched.
    """
    bodies = _bodies(config or config_of_environment())
    version = f"{_PACKAGE} {import_module(_PACKAGE).__version__}"
    again = config is not None
    patch_loop(bodies, key=_KEY, package=_PACKAGE, version=version, remedy="use 0.6", again=again)


def revert() -> None:
    """Put the original functions back, also in modules that imported them."""
    unpatch_loop(_KEY)


def is_applied() -> bool:
    """Whether Megatron-Bridge is patched now."""
    return swap.is_applied(_KEY)


def _bodies(config: MetricsConfig) -> dict[tuple[str, str], Any]:
    fill = functools.partial(fill_packing_strategy, config.label_fields)
    return {
        ("megatron.bridge.training.pretrain", "pretrain"): functools.partial(_pretrain, config),
        ("megatron.bridge.training.train", "get_forward_backward_func"): _schedule,
        ("megatron.bridge.data.loaders", "build_train_valid_test_datasets"): _datasets,
        ("megatron.bridge.training.gpt_step", "_partition_packed_batch_for_cp"): follow_labels,
        ("megatron.bridge.data.packing.offline", "fill_packing_strategy"): fill,
        ("megatron.bridge.data.packing.parquet", "write_packed_parquet"): write_packed_parquet,
        ("megatron.bridge.training.checkpointing", "save_checkpoint"): _save,
    }


def _pretrain(settings: MetricsConfig, original: Original, /, *args: Any, **kwargs: Any) -> Any:
    from megatron.bridge.training.callbacks import CallbackManager, normalize_callbacks

    call = inspect.signature(original).bind(*args, **kwargs)
    manager = normalize_callbacks(call.arguments.get("callbacks")) or CallbackManager()
    call.arguments["callbacks"] = manager
    run = BridgeRun(call.arguments["config"], settings)
    _runs.append(run)
    for event in manager.events.intersection(dir(run)):
        manager.register(event, functools.partial(_fire, run, event))
    try:
        return original(*call.args, **call.kwargs)
    finally:
        _runs.remove(run)


def _fire(run: BridgeRun, event: str, context: Any) -> None:
    # A script may use its manager for several trainings.
    if run in _runs:
        getattr(run, event)(context)


def _schedule(original: Original, *args: Any, **kwargs: Any) -> Any:
    forward_backward = original(*args, **kwargs)
    return counting_schedule(forward_backward, _runs[-1].metrics) if _runs else forward_backward


def _datasets(original: Original, *args: Any, **kwargs: Any) -> Any:
    # Bridge hides the warnings of all loggers. Ours say what is not measured, or not right.
    from megatron.training.utils.log_utils import warning_filter

    logging.getLogger("channel_metrics").removeFilter(warning_filter)
    found = original(*args, **kwargs)
    if not _runs or _runs[-1].bridge.dataset.dataloader_type == "external":
        return found
    run = _runs[-1]
    return [with_channels(run.session, run.bridge.dataset, dataset) for dataset in found]


def _save(original: Original, state: Any, *args: Any, **kwargs: Any) -> Any:
    # Not at Bridge's event on_checkpoint_save: with async_save, it comes some iterations later.
    result = original(state, *args, **kwargs)
    # A script may also save another model, with a state of its own.
    if _runs and state.cfg is _runs[-1].bridge and not kwargs.get("non_persistent_ckpt"):
        _runs[-1].save(state)
    return result
