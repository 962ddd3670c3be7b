"""`import channel_metrics` costs what `import torch` costs: it brings in no other package."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
import torch
before = set(sys.modules)
import channel_metrics
print(*{name.partition(".")[0] for name in set(sys.modules) - before})
"""


def test_import_brings_in_no_other_package() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=True, timeout=120
    )
    imported = set(done.stdout.split()) - sys.stdlib_module_names - {"torch"}
    assert imported == {"channel_metrics"}
