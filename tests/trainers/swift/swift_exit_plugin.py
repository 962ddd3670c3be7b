"""An `--external_plugins` file for ms-swift; see `SECONDS_FOR_WORKERS` in tests/gloo_workers.py."""

from __future__ import annotations

import atexit
import time

atexit.register(time.sleep, 0.1)
