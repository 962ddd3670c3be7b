"""`analyze` and `report` on a log of 500 MB: time and peak memory.

    python -m benchmarks.large_log [MEGABYTES]

The log is one JSON object per step, with five metrics of 20 channels, as our Trainer writes it. It
is written to a temporary folder.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHANNELS = tuple(f"dataset_{index:02d}" for index in range(20))
COMMANDS = ("analyze", "report")


def write_log(path: Path, num_bytes: int) -> tuple[int, int]:
    """Write a log of at least `num_bytes`; returns the number of steps and of values."""
    rng = random.Random(0)
    step = num_values = 0
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < num_bytes:
            step += 1
            entry = _entry(step, rng)
            num_values += len(entry) - 1
            file.write(json.dumps(entry) + "\n")
    return step, num_values


def _entry(step: int, rng: random.Random) -> dict[str, float]:
    tokens = [rng.randint(50, 4000) for _ in CHANNELS]
    entry: dict[str, float] = {"step": step, "grad_norm": rng.random(), "learning_rate": 1e-5}
    nll = 0.0
    for name, count in zip(CHANNELS, tokens, strict=True):
        loss = 0.5 + 3 * math.exp(-step / 20_000) + rng.gauss(0, 0.1)
        nll += loss * count
        entry |= {f"{name}_loss": loss, f"{name}_token_acc": math.exp(-abs(loss))}
        entry |= {f"{name}_tokens": count, f"{name}_samples": count // 50 + 1}
        entry[f"{name}_share"] = count / sum(tokens)
    return entry | {"loss": nll / sum(tokens)}


def measure(command: tuple[str, ...]) -> tuple[float, float, float]:
    """Seconds, CPU seconds and peak MB of a command, in a process of its own."""
    start = time.perf_counter()
    call = [sys.executable, "-m", "channel_metrics", *command]
    child = subprocess.Popen(call, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    if code := os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"{' '.join(command)} ended with code {code}.")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6


def main(megabytes: int = 500) -> None:
    """Print one line for each command."""
    with tempfile.TemporaryDirectory() as name:
        log = Path(name) / "logging.jsonl"
        steps, values = write_log(log, megabytes * 10**6)
        print(f"{log.stat().st_size / 1e6:.0f} MB, {steps:,} steps, {values:,} values")
        print("command | s | CPU, s | peak memory, MB | written, MB")
        for command in COMMANDS:
            out = Path(name) / "out"
            is_report = command == "report"
            target = ("--output", f"{out}/r.html") if is_report else ("--output-dir", str(out))
            out.mkdir()
            seconds, cpu, peak = measure((command, str(log), *target))
            size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / 1e6
            print(f"{command} | {seconds:.1f} | {cpu:.1f} | {peak:.0f} | {size:.1f}", flush=True)
            shutil.rmtree(out)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
