"""Runs the tests of transformers or TRL with and without our patch.

    TRL_PATH=/path/to/trl python tests/upstream [options for pytest]
    TRANSFORMERS_PATH=/path/to/transformers python tests/upstream [options for pytest]

The checkout should be of the release that is installed. It fails if a test passes only without the
patch. What they load from the hub is replaced, see `stand_ins`; tests that need more than
that fail in both runs. `--channels` before all other options gives the data a column `channel`, and
an error of the metrics then ends the test.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TRL_TESTS = ("sft", "dpo", "reward", "grpo")


def outcomes(report: Path) -> dict[str, str]:
    """{test: passed, failed or skipped}"""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "passed"
        found[f"{case.get('classname')}::{case.get('name')}"] = (
            "skipped" if "skipped" in kinds else outcome
        )
    return found


def run(
    checkout: Path, tests: list[str], patch: str | None, where: Path, options: list[str]
) -> dict[str, str]:
    """The outcome of each test; patch: applied before they are imported."""
    report = where / f"{patch or 'plain'}.xml"
    plugin = [] if patch is None else ["-p", "patched"]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(
            [str(HERE), str(ROOT), str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
        "HF_HUB_OFFLINE": "1",
        # Else the data of an earlier run are taken from the cache.
        "HF_DATASETS_CACHE": str(where / "cache"),
        "CHANNEL_METRICS_PATCH": patch or "",
    }
    subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "on_cpu", *plugin),
            *("-o", "addopts=", "--rootdir", str(checkout), f"--junitxml={report}"),
            *(str(checkout / test) for test in tests),
            *options,
        ],
        cwd=where,
        env=env,
        stdout=(where / f"{patch or 'plain'}.txt").open("w"),
        check=False,
    )
    return outcomes(report) if report.exists() else {}


def main(options: list[str]) -> int:
    trl, transformers = (os.environ.get(f"{name}_PATH") for name in ("TRL", "TRANSFORMERS"))
    if not (trl or transformers):
        print("set TRL_PATH or TRANSFORMERS_PATH to a checkout of the release that is installed")
        return 2
    checkout = Path(trl or transformers or "").resolve()
    if trl:
        patch, tests = "trl", [f"tests/test_{name}_trainer.py" for name in TRL_TESTS]
    else:
        patch = "hf_trainer"
        tests = [str(p.relative_to(checkout)) for p in checkout.glob("tests/trainer/test_*.py")]
    channels = options[:1] == ["--channels"]
    where = Path(tempfile.mkdtemp(prefix="upstream-"))
    subprocess.run(
        [sys.executable, str(HERE / "stand_ins.py"), str(where), *options[: int(channels)]],
        check=True,
    )
    options = options[int(channels) :]
    if channels:
        # Else an error of ours would only end the metrics, and the test would pass.
        (where / "metrics.yaml").write_text("on_error: raise\n")
        os.environ["CHANNEL_METRICS_CONFIG"] = str(where / "metrics.yaml")
    plain, patched = (run(checkout, tests, name, where, options) for name in (None, patch))
    if not plain or not patched:
        print(f"no results; what pytest said is in {where}")
        return 2
    for name, found in (("without the patch", plain), ("with it", patched)):
        counts = Counter(found.values())
        print(f"{name}: " + ", ".join(f"{count} {kind}" for kind, count in counts.items()))
    lost = [test for test, kind in plain.items() if kind == "passed" != patched.get(test)]
    for test in lost:
        print(f"passes only without the patch: {test}")
    print(f"what pytest said is in {where}")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
