"""Runs chosen tests with each set of versions, and writes what came to docs/compatibility.md.

    PYTHONPATH=tests python -m matrix [NAMES OF ROWS]

It installs real releases, so it needs a package index and some GB of disk; `make clean` frees them.
The outcomes are kept in results.json beside this file, with a date for each row.
"""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from matrix import page
from matrix.install import CACHE, ROOT, install, versions
from matrix.rows import ROWS, Row


def outcome_of(row: Row) -> dict[str, Any]:
    """Install a row and run its tests."""
    python = install(row)
    report = CACHE / f"{row.name}.xml"
    report.unlink(missing_ok=True)
    started = time.monotonic()
    with (CACHE / f"{row.name}.log").open("w") as log:
        subprocess.run(
            [
                *(str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"),
                # Old releases warn of much that is not ours.
                *("-o", "filterwarnings=default", f"--junitxml={report}"),
                *row.tests,
            ],
            cwd=ROOT,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "seconds": round(time.monotonic() - started),
        "versions": versions(python),
        **counts(report),
    }


def counts(report: Path) -> dict[str, Any]:
    """The numbers of tests that passed and were skipped, and the names of those that failed."""
    if not report.exists():
        raise SystemExit(f"pytest wrote no report; see {report.with_suffix('.log')}")
    found: dict[str, Any] = {"passed": 0, "skipped": 0, "failed": []}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            found["failed"].append(f"{case.get('classname')}::{case.get('name')}")
        else:
            found["skipped" if "skipped" in kinds else "passed"] += 1
    return found


def main(names: list[str]) -> int:
    unknown = set(names) - {row.name for row in ROWS}
    if unknown:
        print(f"no rows {sorted(unknown)}; there are {', '.join(row.name for row in ROWS)}")
        return 2
    CACHE.mkdir(exist_ok=True)
    results = page.load()
    for row in ROWS:
        if names and row.name not in names:
            continue
        results[row.name] = found = outcome_of(row)
        page.write(results)
        print(
            f"{row.name}: {found['passed']} passed, {len(found['failed'])} failed, "
            f"{found['skipped']} skipped in {found['seconds']} s",
            flush=True,
        )
        for test in found["failed"]:
            print(f"  failed: {test}", flush=True)
    return int(any(found["failed"] for found in results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
