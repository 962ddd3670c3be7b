"""An `--external_plugins` file for ms-swift: see `SECONDS_FOR_WORKERS` in tests/distributed.py."""

from __future__ import annotations

import atexit
import time

atexit.register(time.sleep, 0.1)
