"""Functions that replace those of Megatron's training loop, see `megatron.patch`.

Each hook has the name of the function that it replaces. It takes that function as `original`, and
passes it the other arguments. Without `--channels`, it only calls `original`, except that the hook
of the parser always adds our options.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from channel_metrics.trainers.megatron import arguments as megatron_arguments
from channel_metrics.trainers.megatron.log import write
from channel_metrics.trainers.megatron.run import MegatronRun, folder_of
from channel_metrics.trainers.megatron.step import counting_schedule
from channel_metrics.windows import Window

__all__ = [
    "add_megatron_arguments",
    "build_pretraining_data_loader",
    "current_run",
    "evaluate",
    "evaluate_and_print_results",
    "forget_run",
    "get_forward_backward_func",
    "load_checkpoint",
    "prepare_for_rerun",
    "save_checkpoint",
    "training_log",
    "validate_args",
]

Original = Callable[..., Any]

_runs: list[MegatronRun] = []
# The calls of evaluate_and_print_results that run now. The innermost is the last.
_evaluations: list[_Evaluations] = []


def current_run() -> MegatronRun | None:
    """The run of this process; None without `--channels`. Made at the first call."""
    from megatron.training import get_args

    args = get_args()
    if not megatron_arguments.is_on(args):
        return None
    if not _runs or _runs[-1].args is not args:
        _runs[:] = [MegatronRun(args)]
    return _runs[-1]


def forget_run() -> None:
    """Forget the run, so that the next `current_run` makes a new one."""
    _runs.clear()


# ---- the command line -----------------------------------------------------------------------


def add_megatron_arguments(original: Original, parser: Any) -> Any:
    """Add our options to the parser."""
    return megatron_arguments.add_arguments(original(parser))


def validate_args(original: Original, args: Any, *rest: Any, **kwargs: Any) -> Any:
    """Check our options after Megatron has checked its own. Raises `ConfigError`."""
    result = original(args, *rest, **kwargs)
    megatron_arguments.validate(args)
    return result


# ---- data and forward steps -----------------------------------------------------------------


def build_pretraining_data_loader(
    original: Original, dataset: Any, *args: Any, **kwargs: Any
) -> Any:
    """Build a data loader whose samples have channels."""
    run = current_run()
    if run is not None and dataset is not None and run.args.dataloader_type != "external":
        dataset = run.dataset(dataset)
    return original(dataset, *args, **kwargs)


def get_forward_backward_func(original: Original, *args: Any, **kwargs: Any) -> Any:
    """Return a schedule whose loss functions count."""
    forward_backward = original(*args, **kwargs)
    run = current_run()
    return forward_backward if run is None else counting_schedule(forward_backward, run.metrics)


def prepare_for_rerun(original: Original, *args: Any, **kwargs: Any) -> Any:
    """Forget an iteration in which experts got more tokens than they can hold: it runs again."""
    run = current_run()
    if run is not None:
        run.session.begin_step()
    return original(*args, **kwargs)


# ---- logs -----------------------------------------------------------------------------------


def training_log(original: Original, *args: Any, **kwargs: Any) -> Any:
    """End the step. At the end of a log interval, close the window and write its values."""
    result = original(*args, **kwargs)
    run = current_run()
    if run is not None:
        call = inspect.signature(original).bind(*args, **kwargs).arguments
        iteration, interval = call["iteration"], run.args.log_interval
        # In a skipped iteration, Megatron changes neither the weights nor its own averages.
        run.metrics.end_step(discard=bool(call["skipped_iter"]))
        if iteration % interval == 0:
            window = run.session.close(iteration)
        elif call.get("is_first_iteration"):
            # Megatron logs its first iteration, but the interval goes on.
            window = run.session.peek(iteration)
        else:
            return result
        with run.session.guard.guarded():
            _write(f"iteration {iteration:8d}", window)
    return result


def evaluate(original: Original, *args: Any, **kwargs: Any) -> Any:
    """Run an evaluation with a window of its own."""
    run = current_run()
    if run is None:
        return original(*args, **kwargs)
    now = _evaluations[-1] if _evaluations else None
    iteration = getattr(run.args, "curr_iteration", 0) if now is None else now.iteration
    prefix = "eval_" if now is None else now.next_prefix()
    with run.session.evaluation(prefix.rstrip("_"), iteration, prefix) as evaluation:
        result = original(*args, **kwargs)
        if result[0] is None:
            # Megatron has stopped the evaluation, because its time limit was reached.
            evaluation.discard()
    if now is not None and evaluation.window is not None:
        with run.session.guard.guarded():
            _write(now.title, evaluation.window)
    return result


def evaluate_and_print_results(original: Original, *args: Any, **kwargs: Any) -> Any:
    """Write the values of the evaluations that `original` runs."""
    run = current_run()
    if run is None:
        return original(*args, **kwargs)
    call = inspect.signature(original).bind(*args, **kwargs).arguments
    _evaluations.append(_Evaluations(run.args, call))
    try:
        return original(*args, **kwargs)
    finally:
        _evaluations.pop()


class _Evaluations:
    """The evaluations of one call of evaluate_and_print_results. Each validation set has one."""

    def __init__(self, args: Any, call: dict[str, Any]) -> None:
        self.title = f"validation at {call['prefix']}"
        self.iteration: int = call["iteration"]
        self._kind = "test_" if "test set" in str(call["prefix"]) else "eval_"
        self._several = bool(getattr(args, "multiple_validation_sets", False))
        self._names = getattr(args, "validation_set_names", None)
        self._index = 0

    def next_prefix(self) -> str:
        """The prefix of the next evaluation: `eval_`, or `eval_SET_` if there are several sets."""
        index, self._index = self._index, self._index + 1
        if not self._several:
            return self._kind
        return f"{self._kind}{self._names[index] if self._names else index}_"


def _write(title: str, window: Window) -> None:
    from megatron.training import print_rank_last
    from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

    write(title, window, print_rank_last, get_tensorboard_writer(), get_wandb_writer())


# ---- checkpoints ----------------------------------------------------------------------------


def save_checkpoint(original: Original, iteration: int, *args: Any, **kwargs: Any) -> Any:
    """Save the checkpoint, and the totals in its folder."""
    result = original(iteration, *args, **kwargs)
    run = current_run()
    if run is not None and run.args.save and not kwargs.get("non_persistent_ckpt"):
        run.session.save(folder_of(run.args.save, iteration))
    return result


def load_checkpoint(original: Original, *args: Any, **kwargs: Any) -> Any:
    """Load the checkpoint, and resume its totals."""
    result = original(*args, **kwargs)
    run = current_run()
    iteration = result[0]
    # At iteration 0, only the weights were loaded (--finetune, --pretrained-checkpoint).
    if run is not None and iteration and run.args.load:
        run.session.resume(folder_of(run.args.load, iteration))
    return result
