"""How far estimated channel losses are from measured ones.

    python -m benchmarks.estimate [FOLDER] 2> /dev/null

Trains with channel metrics in every step, hides the losses of the channels, estimates them from
the loss of the whole step and the token counts, and compares. FOLDER keeps the runs: a second call
estimates again without training.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from channel_metrics.analysis.estimate.mix import with_estimates
from channel_metrics.analysis.readers.keys import GLOBAL, Key
from channel_metrics.analysis.readers.readings import Problems, Reading
from channel_metrics.analysis.run import Run, run_from_readings
from channel_metrics.demo.config import load_config
from channel_metrics.demo.train import train

__all__ = ["compare", "hide", "main", "read_history"]

Entry = Mapping[str, Any]

_ROOT = Path(__file__).parents[1]
# Steps: as many as the larger texts of the second one allow in a few minutes.
_CONFIGS = {
    "four synthetic datasets": (_ROOT / "configs/fused_data/debug.yaml", 600),
    "Python's own files": (_ROOT / "configs/python_corpus.yaml", 400),
}
_BATCH = 8
# The measured loss of a step is that of a few samples: compared is its mean over neighbours.
_HALF_WIDTH = 15


def main(folder: Path) -> None:
    """Print one row per run and per logging interval."""
    print(
        "| run | logged every | identifiable | RMSE | of the loss of the whole run | in the band |"
    )
    print("|---|---|---|---|---|---|")
    for title, (config, steps) in _CONFIGS.items():
        history = _history(config, steps, folder / config.stem)
        for every in (1, 10):
            print(f"| {title} | {every} | {_row(history, every)} |", flush=True)


def read_history(path: Path) -> list[Entry]:
    """The training entries of a `trainer_state.json`."""
    entries: list[Entry] = json.loads(path.read_text(encoding="utf-8"))["log_history"]
    return [entry for entry in entries if "loss" in entry]


def hide(history: Sequence[Entry], channels: Sequence[str], every: int) -> tuple[Run, Run]:
    """What a run without channel metrics leaves: its loss every few steps; and what was in each."""

    def losses() -> Iterator[Reading]:
        for last in range(every, len(history) + 1, every):
            entries = history[last - every : last]
            mean = float(np.mean([entry["loss"] for entry in entries]))
            yield entries[-1]["step"], Key("train", GLOBAL, "loss"), mean

    def counts() -> Iterator[Reading]:
        for entry in history:
            for name in channels:
                if entry.get(f"{name}_tokens"):
                    yield entry["step"], Key("train", name, "tokens"), entry[f"{name}_tokens"]

    return _run(losses(), "hidden"), _run(counts(), "mix")


def compare(history: Sequence[Entry], channels: Sequence[str], run: Run) -> dict[str, float]:
    """Differences of the estimates in `run` from the measured losses, over all channels."""
    errors, of_whole, inside, points = [], [], [], 0
    whole = _measured(history, "loss", None)
    for name in channels:
        measured = _measured(history, f"{name}_loss", f"{name}_tokens")
        for (step, value), low, high in zip(
            _points(run, name, "loss_estimate"),
            run.series(name, "loss_estimate_low")[1],
            run.series(name, "loss_estimate_high")[1],
            strict=True,
        ):
            true = _near(*measured, step)
            errors.append(value - true)
            of_whole.append(_near(*whole, step) - true)
            inside.append(low <= true <= high)
            points += 1
    return {
        "points": points,
        "rmse": float(np.sqrt(np.mean(np.square(errors)))),
        "rmse_of_whole": float(np.sqrt(np.mean(np.square(of_whole)))),
        "inside": float(np.mean(inside)),
    }


def _row(history: Sequence[Entry], every: int) -> str:
    channels = sorted({k.removesuffix("_tokens") for e in history for k in e if _is_count(k)})
    run = with_estimates(*hide(history, channels, every))
    found = compare(history, channels, run)
    # As many points as the estimate has knots, which all channels share.
    knots = min(128, max(8, len(history) // every // 4)) * len(channels)
    return (
        f"{found['points'] / knots:.0%} | {found['rmse']:.3f} | {found['rmse_of_whole']:.3f} | "
        f"{found['inside']:.0%}"
    )


def _is_count(key: str) -> bool:
    return key.endswith("_tokens") and not key.startswith("eval_") and key != "num_tokens"


def _points(run: Run, name: str, metric: str) -> list[tuple[int, float]]:
    steps, values = run.series(name, metric)
    return list(zip(steps.tolist(), values.tolist(), strict=True))


def _measured(
    history: Sequence[Entry], key: str, weight: str | None
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    entries = [entry for entry in history if key in entry]
    return (
        np.array([entry["step"] for entry in entries]),
        np.array([float(entry[key]) for entry in entries]),
        np.array([float(entry[weight]) if weight else 1.0 for entry in entries]),
    )


def _near(
    steps: NDArray[np.int64], values: NDArray[np.float64], weights: NDArray[np.float64], step: int
) -> float:
    """A local line through the values around `step`, taken there; a mean would lag."""
    near = (np.abs(steps - step) <= _HALF_WIDTH).nonzero()[0]
    line = np.polyfit(steps[near] - step, values[near], 1, w=np.sqrt(weights[near]))
    return float(line[1])


def _history(config: Path, steps: int, folder: Path) -> list[Entry]:
    state = folder / "trainer_state.json"
    if not state.is_file():
        settings = load_config(config)
        training = settings.training | {
            "max_steps": steps,
            "per_device_train_batch_size": _BATCH,
            "gradient_accumulation_steps": 1,
            "logging_steps": 1,
            "eval_strategy": "no",
        }
        # The trainer prints every entry.
        with contextlib.redirect_stdout(sys.stderr):
            train(replace(settings, training=training), output_dir=folder)
    return read_history(state)


def _run(readings: Iterator[Reading], name: str) -> Run:
    return run_from_readings(readings, name=name, origin=name, problems=Problems())


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
