"""Sends alerts to services, from threads of its own: the training never waits for a network.

Each target has a thread and a queue of its own. A queue that is full drops what is added, and a
target that fails is warned of once. At the end of the process, what waits is sent, within a limit.
"""

from __future__ import annotations

import atexit
import contextvars
import json
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from channel_metrics.errors import ChannelMetricsError, ConfigError

__all__ = ["Sender", "to_trackio", "to_wandb", "webhook"]

logger = logging.getLogger("channel_metrics")

Values = Mapping[str, Any]

_MAX_WAITING = 100
_SECONDS_PER_POST = 10.0
_SECONDS_AT_EXIT = 10.0


class Sender:
    """Calls a function with each alert, one after the other, in a thread.

    Args:
        name: that of the target, for warnings.
        target: takes the alert; it may be slow, and it may fail.
        names_error: whether a warning may hold the text of the error.
    """

    def __init__(
        self, name: str, target: Callable[[Any], object], names_error: bool = True
    ) -> None:
        self.name, self._target, self._names_error = name, target, names_error
        self._waiting: queue.Queue[tuple[contextvars.Context, Any] | None] = queue.Queue(
            _MAX_WAITING
        )
        self._thread: threading.Thread | None = None
        self._warned = False

    def send(self, alert: Any) -> None:
        """Add an alert to the queue. It never waits and never fails."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._work, name=f"alerts to {self.name}", daemon=True
            )
            self._thread.start()
            # Registered late, so that it runs before the services end their own runs.
            atexit.register(self.close)
        try:
            # Services keep their run in the context of the caller.
            self._waiting.put_nowait((contextvars.copy_context(), alert))
        except queue.Full:
            self._warn(f"more than {_MAX_WAITING} alerts wait for it")

    def close(self, seconds: float = _SECONDS_AT_EXIT) -> None:
        """Send what waits, for at most so long."""
        if self._thread is None:
            return
        end = time.monotonic() + seconds
        try:
            self._waiting.put(None, timeout=seconds)
        except queue.Full:
            return
        self._thread.join(max(0.0, end - time.monotonic()))

    def _work(self) -> None:
        while (found := self._waiting.get()) is not None:
            context, alert = found
            try:
                context.run(self._target, alert)
            except Exception as error:  # of any kind: an alert must not end the run
                self._warn(repr(error) if self._names_error else type(error).__name__)

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("alerts do not reach %s: %s", self.name, reason)


def webhook(variable: str) -> Callable[[Any], object]:
    """A target that posts alerts as JSON.

    Args:
        variable: the environment variable that holds the address. The address is never shown.

    Raises:
        ConfigError: the variable is not set, or holds no http address.
    """
    address = os.environ.get(variable, "")
    if not address.startswith(("http://", "https://")):
        came = "holds none" if address else "is not set"
        raise ConfigError(
            f"alerts go to a webhook, whose address (http or https) the environment variable "
            f"{variable} must hold, but it {came}."
        )

    def post(alert: Any) -> None:
        import urllib.request  # it takes a while, and few runs need it

        body = json.dumps({**alert.values, "text": alert.line}).encode()
        request = urllib.request.Request(
            address, data=body, headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=_SECONDS_PER_POST) as answer:
            answer.read()

    return post


def to_trackio(alert: Any) -> None:
    """Give an alert to the open run of trackio."""
    trackio = _module("trackio")
    if trackio is None or trackio.context_vars.current_run.get() is None:
        raise ChannelMetricsError("no run of trackio is open")
    trackio.alert(title=alert.title, text=alert.line, level=trackio.AlertLevel.WARN)


def to_wandb(alert: Any) -> None:
    """Give an alert to the open run of Weights & Biases."""
    wandb = _module("wandb")
    if wandb is None or wandb.run is None:
        raise ChannelMetricsError("no run of wandb is open")
    wandb.run.alert(title=alert.title, text=alert.line, level=wandb.AlertLevel.WARN)


def _module(name: str) -> Any:
    """A module that the run has imported; alerts import none themselves."""
    return sys.modules.get(name)
