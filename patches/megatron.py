"""Importing this gives Megatron-LM's training loop the option `--channels`, in unmodified scripts.

    import channel_metrics.patches.megatron      # before the script imports from megatron

What is patched, by name, in `megatron.training` (core 0.13 to 0.19 and main have these names):

| name | what for |
|---|---|
| arguments.add_megatron_arguments, validate_args | the options, and their errors at start |
| training.build_pretraining_data_loader | each sample gets its channel |
| core.utils.get_batch_on_this_cp_rank and the like | the ids are cut as the labels are |
| training.get_forward_backward_func | the loss functions count |
| training.training_log, evaluate, evaluate_and_print_results | the values are logged |
| training.save_checkpoint, load_checkpoint | the totals of the run |

Without `--channels` in the command line, each of them does what it did before. `revert()`
undoes all of it; importing or applying twice patches once.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron.core
from channel_metrics.patches import announce

from channel_metrics.errors import UnsupportedVersionError
from channel_metrics.trainers.megatron import arguments as megatron_arguments
from channel_metrics.trainers.megatron.cuts import (
    MARK,
    follow_cuts,
    megatron_modules,
    replace_everywhere,
)
from channel_metrics.trainers.megatron.log import write
from channel_metrics.trainers.megatron.run import MegatronRun
from channel_metrics.trainers.megatron.step import counting_forward_step

__all__ = ["apply", "current_run", "is_applied", "revert"]

_REQUIRED = {
    "megatron.training.arguments": ("add_megatron_arguments", "validate_args"),
    "megatron.training.training": (
        "build_pretraining_data_loader",
        "evaluate",
        "evaluate_and_print_results",
        "get_forward_backward_func",
        "load_checkpoint",
        "save_checkpoint",
        "training_log",
    ),
    "megatron.core.utils": ("get_batch_on_this_cp_rank",),
}

_runs: list[MegatronRun] = []
# (title, prefix of keys, iteration) of the evaluations that are printed now.
_evaluations: list[_Evaluations] = []


def apply() -> None:
    """Patch megatron; a second call does nothing.

    Raises `UnsupportedVersionError`, and patches nothing, if a name is missing.
    """
    if is_applied():
        return
    arguments, training, _ = _modules().values()
    replace_everywhere(arguments, "add_megatron_arguments", _with_arguments)
    replace_everywhere(arguments, "validate_args", _with_validation)
    replace_everywhere(training, "build_pretraining_data_loader", _with_channels)
    follow_cuts()
    replace_everywhere(training, "get_forward_backward_func", _with_counting)
    replace_everywhere(training, "training_log", _with_log)
    replace_everywhere(training, "evaluate", _with_evaluation)
    replace_everywhere(training, "evaluate_and_print_results", _with_evaluations)
    replace_everywhere(training, "save_checkpoint", _with_save)
    replace_everywhere(training, "load_checkpoint", _with_load)
    announce(f"channel metrics: patched megatron.training (core {megatron.core.__version__})")


def revert() -> None:
    """Put everything back, also where it was imported from; forgets the run."""
    _runs.clear()
    for module in megatron_modules():
        for name, value in list(vars(module).items()):
            original = getattr(value, MARK, None)
            if original is not None:
                setattr(module, name, original)


def is_applied() -> bool:
    """Whether megatron is patched now."""
    training = sys.modules.get("megatron.training.training")
    return hasattr(getattr(training, "training_log", None), MARK)


def current_run() -> MegatronRun | None:
    """The channels of the run of this process; None where `--channels` was not given."""
    from megatron.training import get_args

    args = get_args()
    if not megatron_arguments.is_on(args):
        return None
    if not _runs or _runs[-1].args is not args:
        _runs[:] = [MegatronRun(args)]
    return _runs[-1]


class _Evaluations:
    """The evaluations of one call of evaluate_and_print_results: one per validation set."""

    def __init__(self, args: Any, call: dict[str, Any]) -> None:
        self.title = f"validation at {call['prefix']}"
        self.iteration: int = call["iteration"]
        self._kind = "test_" if "test set" in str(call["prefix"]) else "eval_"
        self._several = bool(getattr(args, "multiple_validation_sets", False))
        self._names = getattr(args, "validation_set_names", None)
        self._index = 0

    def next_prefix(self) -> str:
        """`eval_`, or `eval_SET_` where there are several sets."""
        index, self._index = self._index, self._index + 1
        if not self._several:
            return self._kind
        return f"{self._kind}{self._names[index] if self._names else index}_"


def _with_arguments(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_megatron_arguments(parser: Any) -> Any:
        return megatron_arguments.add_arguments(original(parser))

    return add_megatron_arguments


def _with_validation(original: Callable[..., Any]) -> Callable[..., Any]:
    def validate_args(args: Any, *rest: Any, **kwargs: Any) -> Any:
        result = original(args, *rest, **kwargs)
        megatron_arguments.validate(args)
        return result

    return validate_args


def _with_channels(original: Callable[..., Any]) -> Callable[..., Any]:
    def build_pretraining_data_loader(dataset: Any, *args: Any, **kwargs: Any) -> Any:
        run = current_run()
        if run is not None and dataset is not None and run.args.dataloader_type != "external":
            dataset = run.dataset(dataset)
        return original(dataset, *args, **kwargs)

    return build_pretraining_data_loader


def _with_counting(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Any:
        forward_backward = original(*args, **kwargs)
        run = current_run()
        return forward_backward if run is None else _counting(forward_backward, run)

    return get_forward_backward_func


def _counting(forward_backward: Callable[..., Any], run: MegatronRun) -> Callable[..., Any]:
    @functools.wraps(forward_backward)
    def counting_forward_backward(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("collect_non_loss_data"):
            return forward_backward(*args, **kwargs)
        metrics = run.evaluation if kwargs.get("forward_only") else run.train
        if metrics is run.train:
            # Megatron may run an iteration again, to find faulty devices.
            metrics.begin_step()
        kwargs["forward_step_func"] = counting_forward_step(kwargs["forward_step_func"], metrics)
        return forward_backward(*args, **kwargs)

    return counting_forward_backward


def _with_log(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def training_log(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        run = current_run()
        if run is not None:
            call = signature.bind(*args, **kwargs).arguments
            iteration, interval = call["iteration"], run.args.log_interval
            # Megatron leaves the weights alone then, and its own averages as well.
            run.train.end_step(discard=bool(call["skipped_iter"]))
            # Megatron logs its first iteration without ending the interval.
            if iteration % interval == 0 or call.get("is_first_iteration"):
                ends = iteration % interval == 0
                values = run.train.compute(reset=ends)
                with run.guard.guarded():
                    values = values if ends else run.without_counts(values)
                    write(f"iteration {iteration:8d}", values, iteration)
        return result

    return training_log


def _with_evaluation(original: Callable[..., Any]) -> Callable[..., Any]:
    def evaluate(*args: Any, **kwargs: Any) -> Any:
        run = current_run()
        if run is None:
            return original(*args, **kwargs)
        run.evaluation.begin_step()
        result = original(*args, **kwargs)
        is_timed_out = result[0] is None
        values = run.evaluation.compute()
        if _evaluations and not is_timed_out:
            now = _evaluations[-1]
            with run.guard.guarded():
                write(now.title, values, now.iteration, now.next_prefix())
        return result

    return evaluate


def _with_evaluations(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def evaluate_and_print_results(*args: Any, **kwargs: Any) -> Any:
        run = current_run()
        if run is None:
            return original(*args, **kwargs)
        _evaluations.append(_Evaluations(run.args, signature.bind(*args, **kwargs).arguments))
        try:
            return original(*args, **kwargs)
        finally:
            _evaluations.pop()

    return evaluate_and_print_results


def _with_save(original: Callable[..., Any]) -> Callable[..., Any]:
    def save_checkpoint(iteration: int, *args: Any, **kwargs: Any) -> Any:
        result = original(iteration, *args, **kwargs)
        run = current_run()
        if run is not None and run.args.save and not kwargs.get("non_persistent_ckpt"):
            from megatron.training.utils import is_last_rank

            with run.guard.guarded():
                run.save(_folder(run.args.save, iteration), is_writer=is_last_rank())
        return result

    return save_checkpoint


def _with_load(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        run = current_run()
        iteration = result[0]
        # Iteration 0 is a start from given weights (--finetune, --pretrained-checkpoint).
        if run is not None and iteration and run.args.load:
            with run.guard.guarded():
                run.load(_folder(run.args.load, iteration))
        return result

    return load_checkpoint


def _folder(root: str, iteration: int) -> Path:
    return Path(root) / f"iter_{iteration:07d}"


def _modules() -> dict[str, Any]:
    """The modules to patch; raises if one of them, or a name in it, is not there."""
    found: dict[str, Any] = {}
    missing: list[str] = []
    for path, names in _REQUIRED.items():
        try:
            found[path] = importlib.import_module(path)
        except ModuleNotFoundError as error:
            missing.append(f"{path} ({error})")
            continue
        missing += [f"{path}.{name}" for name in names if not hasattr(found[path], name)]
    if missing:
        raise UnsupportedVersionError(
            f"--channels needs Megatron-LM core 0.13 or later with its training loop, but "
            f"megatron-core {megatron.core.__version__} lacks {', '.join(missing)}. The loop is "
            "in the Megatron-LM repository (put it on PYTHONPATH) and, since 0.17, in "
            "megatron-core[training]; your own loop can use channel_metrics.trainers.megatron."
        )
    return found


apply()
