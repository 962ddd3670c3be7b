"""Which tokens each window of a run must hold, in any data-parallel layout, without the library.

The tokens of a row tell the data set that it comes from (see `data`), so that nothing is asked of
what is tested. An evaluation may be ended on its way, as a caller of Megatron's sees it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from reference import Batch, reference_metrics

from megatron_lm.data import END_OF_DOCUMENT
from megatron_lm.launch import Run, default_script
from megatron_lm.oracle import Result

# Of the evaluations of a run, counted from 1: one dies, and one reaches the limit of time.
DIES, TIMES_OUT = 2, 4
MARKER = 'if __name__ == "__main__":'


class EvaluationDied(RuntimeError):
    """What the caller of the evaluation catches."""


def micro_batches() -> Result:
    """All micro-batches of this rank: {"train": [rows, ...], "eval": [[rows, ...], ...]}.

    A row is [channel, losses, correct]. Of evaluations there is one list for each.
    """
    from megatron.training import training

    return recorded(training)


def recorded(training: Any) -> Result:
    """`micro_batches` of a loop whose function `evaluate` is in the module `training`."""
    from megatron.core.models.common.language_module.language_module import LanguageModule

    found: dict[str, list[Any]] = {"train": [], "eval": []}
    compute, evaluate = LanguageModule.compute_language_model_loss, training.evaluate

    @functools.wraps(compute)
    def recording(self: Any, labels: Any, logits: Any) -> Any:
        right = (logits.argmax(-1).transpose(0, 1) == labels).tolist()
        losses = compute(self, labels, logits)
        rows = [
            [source_of(own), of_row, correct]
            for own, of_row, correct in zip(labels.tolist(), losses.tolist(), right, strict=True)
        ]
        (found["train"] if torch.is_grad_enabled() else found["eval"][-1]).append(rows)
        return losses

    @functools.wraps(evaluate)
    def beginning(*args: Any, **kwargs: Any) -> Any:
        found["eval"].append([])
        return evaluate(*args, **kwargs)

    LanguageModule.compute_language_model_loss = recording
    training.evaluate = beginning
    return lambda: found


def source_of(row: Sequence[int]) -> str:
    """The data set that a row of `data.Data` was drawn from."""
    tokens = set(row) - {END_OF_DOCUMENT}
    if max(tokens) < 20:
        return "code"
    return "math" if min(tokens) >= 100 and max(tokens) < 140 else "web"


def ended_on_the_way() -> Result:
    """Evaluation `DIES` raises after three micro-batches, and its caller goes on with training;
    `TIMES_OUT` reaches the limit of time after its first iteration, which is lifted again."""
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.training import get_args, training

    compute, evaluate = LanguageModule.compute_language_model_loss, training.evaluate
    print_results = training.evaluate_and_print_results
    number, left = [0], [-1]

    @functools.wraps(compute)
    def dying(self: Any, labels: Any, logits: Any) -> Any:
        if left[0] == 0:
            raise EvaluationDied
        left[0] -= 1
        return compute(self, labels, logits)

    @functools.wraps(evaluate)
    def ending(*args: Any, **kwargs: Any) -> Any:
        number[0] += 1
        limit = get_args().exit_duration_in_mins
        if number[0] == TIMES_OUT:
            get_args().exit_duration_in_mins = 1e-9
        left[0] = 3 if number[0] == DIES else -1
        try:
            return evaluate(*args, **kwargs)
        finally:
            get_args().exit_duration_in_mins, left[0] = limit, -1

    @functools.wraps(print_results)
    def catching(prefix: str, step: Any, iterator: Any, model: Any, *args: Any, **kw: Any) -> Any:
        mode = training.get_rerun_state_machine().get_mode()
        try:
            print_results(prefix, step, iterator, model, *args, **kw)
        except EvaluationDied:
            training.get_rerun_state_machine().set_mode(mode)
            args[2].timers = training.get_timers()
        if number[0] in (DIES, TIMES_OUT):  # what Megatron leaves behind at such an end
            training.get_timers()("evaluate").stop()
            for chunk in model:
                chunk.train()

    LanguageModule.compute_language_model_loss = dying
    training.evaluate, training.evaluate_and_print_results = ending, catching
    return lambda: number[0]


# The metrics that the runs ask for.
_CHOSEN = ("_loss", "_token_acc", "_ppl", "_tokens", "_samples", "_share")


def expected(run: Run, kind: str, first: int, last: int | None = None) -> dict[str, float]:
    """What the micro-batches `first` to `last` of each rank add up to, under the default keys.

    kind: "train", or "eval 1" for those of the first evaluation.
    """
    split, _, number = kind.partition(" ")
    chosen = []
    for rank in run.ranks:
        seen = rank.seen["micro_batches"][split]
        chosen += (seen[int(number) - 1] if number else seen)[first:last]
    values = reference_metrics([as_batch(rows) for rows in chosen])
    return {key: value for key, value in values.items() if key.endswith(_CHOSEN)}


def as_batch(rows: list[Any]) -> Batch:
    bounds = [0]
    for _, losses, _ in rows:
        bounds.append(bounds[-1] + len(losses))
    return Batch(
        losses=[loss for _, losses, _ in rows for loss in losses],
        channels=[name for name, _, _ in rows],
        bounds=bounds,
        correct=[bool(right) for _, _, correct in rows for right in correct],
    )


def script_with(folder: Path, name: str, addition: str) -> Path:
    """The script of the tests with `addition` before its main part, at which all is defined."""
    before, marker, after = default_script().read_text().partition(MARKER)
    assert marker and MARKER not in after
    path = folder / f"{name}.py"
    path.write_text(f"{before}{addition}\n\n{marker}{after}")
    return path


def saved_totals(folder: Path) -> dict[str, int]:
    """The totals in the folder of a checkpoint: {"web_tokens_total": ...}."""
    (path,) = folder.glob("channel_metrics*.json")
    channels = json.loads(path.read_text())["channels"]
    return {f"{name}_{key}": n for name, totals in channels.items() for key, n in totals.items()}
