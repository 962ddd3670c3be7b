"""Whether weights that follow from the windows help: fixed mixes against adaptive ones.

    python -m benchmarks.adaptive FOLDER

Trains configs/adaptive_mix.yaml with each rule and three seeds, from equal weights and from uneven
ones, for the same number of records. FOLDER keeps the results: a second call goes on. A minute for
each of the 27 runs on one core.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from channel_metrics.demo.config import load_config
from channel_metrics.demo.train import train

__all__ = ["main", "row"]

_CONFIG = Path(__file__).parents[1] / "configs/adaptive_mix.yaml"
_SEEDS = (1, 2, 3)
_REFERENCE_SEED = 0
_STARTS = {
    "equal": {"stdlib": 1, "tests": 1, "topics": 1, "packages": 1},
    "6 : 2 : 1 : 1": {"stdlib": 6, "tests": 2, "topics": 1, "packages": 1},
}
_RULES = ("fixed", "loss", "excess", "speed")
# Of Student's t with two degrees of freedom.
_T95 = 4.303

Result = dict[str, Any]


def main(folder: Path, steps: int | None = None) -> None:
    """Print one row per start and rule."""
    folder.mkdir(parents=True, exist_ok=True)
    print("| start | rule | eval macro loss | minus fixed, 95 % | last weights | tokens |")
    print("|---|---|---|---|---|---|")
    reference = _run(folder, "equal", "fixed", _REFERENCE_SEED, {}, steps=steps)["losses"]
    for start in _STARTS:
        fixed: list[Result] = []
        for rule in _RULES:
            runs = [_run(folder, start, rule, seed, reference, steps=steps) for seed in _SEEDS]
            fixed = fixed or runs
            print(f"| {start} | {rule} | {row(runs, fixed)} |", flush=True)


def row(runs: Sequence[Result], fixed: Sequence[Result]) -> str:
    """Means over the seeds, and the difference seed by seed, with its 95 % interval."""
    macro = [run["macro"] for run in runs]
    differences = [run["macro"] - base["macro"] for run, base in zip(runs, fixed, strict=True)]
    weights = [statistics.mean(run["weights"][name] for run in runs) for name in runs[0]["weights"]]
    half = _T95 * _error(differences)
    return " | ".join(
        (
            f"{statistics.mean(macro):.3f} ± {_error(macro):.3f}",
            "" if runs is fixed else f"{statistics.mean(differences):+.3f} ± {half:.3f}",
            " ".join(f"{weight:.2f}" for weight in weights),
            f"{statistics.mean(run['tokens'] for run in runs):,.0f}",
        )
    )


def _error(values: Sequence[float]) -> float:
    """The standard error of the mean."""
    return float(statistics.stdev(values) / len(values) ** 0.5)


def _run(
    folder: Path,
    start: str,
    rule: str,
    seed: int,
    reference: Mapping[str, float],
    *,
    steps: int | None,
) -> Result:
    """What came of a run; it is trained if the folder does not have it."""
    name = f"{'-'.join(str(n) for n in _STARTS[start].values())}_{rule}_{seed}"
    path = folder / f"{name}.json"
    if path.exists():
        found: Result = json.loads(path.read_text())
        return found
    config = load_config(_CONFIG)
    sampler = {**config.metrics.sampler, "start": _STARTS[start], "rule": rule}
    if rule == "excess":
        sampler["reference"] = reference
    metrics = replace(config.metrics, sampler=sampler, live_table=False)
    config = replace(config, seed=seed, metrics=metrics)
    logs = train(config, output_dir=folder / name, max_steps=steps).log_history
    result = _result(logs, list(_STARTS[start]))
    path.write_text(json.dumps(result) + "\n")
    return result


def _result(logs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Result:
    windows = [log for log in logs if "loss" in log]
    (last,) = [log for log in logs if "eval_macro_loss" in log][-1:]
    return {
        "macro": last["eval_macro_loss"],
        "losses": {name: last[f"eval_{name}_loss"] for name in names},
        "weights": {name: windows[-1][f"{name}_weight"] for name in names},
        "tokens": sum(log.get(f"{name}_tokens", 0) for log in windows for name in names),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
