"""Gives Megatron-LM's training loop the option `--channels`.

These functions of `megatron.training` are patched (core 0.13 to 0.19 and main have them):

| name | purpose |
|---|---|
| arguments.add_megatron_arguments, validate_args | the options are added and checked |
| training.build_pretraining_data_loader | each sample gets its channel |
| core.utils.get_batch_on_this_cp_rank and its variants | ids are cut like the labels |
| training.get_forward_backward_func | the loss functions count |
| training.training_log, evaluate, evaluate_and_print_results | the values are logged |
| training.save_checkpoint, load_checkpoint | the totals are saved and resumed |
| training.PagedStashRunner.prepare_for_rerun, since 0.19 | what runs again counts once |

Without `--channels` on the command line, the training loop works as before. Call `apply` before the
script imports from megatron.
"""

from __future__ import annotations

import sys

import megatron.core

from channel_metrics import swap
from channel_metrics.trainers.megatron import hooks
from channel_metrics.trainers.megatron.cuts import patch_loop, unpatch_loop
from channel_metrics.trainers.megatron.hooks import current_run

__all__ = ["apply", "current_run", "is_applied", "revert"]

_KEY = "megatron"
_TRAINING = "megatron.training.training"
_BODIES = {
    "megatron.training.arguments": (hooks.add_megatron_arguments, hooks.validate_args),
    _TRAINING: (
        hooks.build_pretraining_data_loader,
        hooks.evaluate,
        hooks.evaluate_and_print_results,
        hooks.get_forward_backward_func,
        hooks.load_checkpoint,
        hooks.save_checkpoint,
        hooks.training_log,
    ),
}
_REMEDY = (
    "--channels needs Megatron-LM core 0.13 or later with its training loop. The loop is in the "
    "Megatron-LM repository (put it on PYTHONPATH) and, since 0.17, in megatron-core[training]; "
    "your own loop can use channel_metrics.trainers.megatron"
)


def apply() -> None:
    """Patch Megatron. A second call does nothing.

    Raises:
        UnsupportedVersionError: this version lacks a function. Then nothing is patched.
    """
    bodies = {(path, body.__name__): body for path, of_it in _BODIES.items() for body in of_it}
    version = f"megatron-core {megatron.core.__version__}"
    patch_loop(bodies, key=_KEY, version=version, remedy=_REMEDY, package="megatron")
    runner = getattr(sys.modules[_TRAINING], "PagedStashRunner", None)
    if runner is not None:
        body = hooks.prepare_for_rerun
        swap.wrap(runner, body.__name__, body, key=_KEY)


def revert() -> None:
    """Put the original functions back, also in modules that imported them, and forget the run."""
    hooks.forget_run()
    unpatch_loop(_KEY)


def is_applied() -> bool:
    """Whether Megatron is patched now."""
    return swap.is_applied(_KEY)
