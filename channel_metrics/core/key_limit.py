"""At most so many log keys in one run. What is left out is said once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set

from channel_metrics.core.keys import KeyBook
from channel_metrics.core.labels import UNLABELED

__all__ = ["KeyLimit"]


class KeyLimit:
    """Forms the logs of windows. Rows that come after the limit get no keys.

    Args:
        keys: the keys of the run.
        limit: how many there may be; 0: any number.
        warn_once: is told what is left out.
    """

    def __init__(self, keys: KeyBook, limit: int, warn_once: Callable[..., None]) -> None:
        self._keys, self._limit, self._warn_once = keys, limit, warn_once
        self._logged: set[str] = set()

    def logs(self, values: Mapping[str, Mapping[str, float]], prefix: str) -> dict[str, float]:
        """{log key: value} of {row: {metric: value}}; `unlabeled` always has its keys."""
        logs: dict[str, float] = {}
        left = []
        for row, of_row in values.items():
            found = {self._keys.key(row, metric, prefix): v for metric, v in of_row.items()}
            fitting = self._fitting(found, always=row == UNLABELED)
            if found.keys() - fitting.keys() - self._keys.clashes:
                left.append(row)
            logs |= fitting
        self._say("channels or labels", left)
        return {key: value for key, value in logs.items() if key not in self._keys.clashes}

    @property
    def taken(self) -> Set[str]:
        """Keys that observers may not add."""
        return self._keys.reserved | self._keys.clashes

    def added(self, values: Mapping[str, float]) -> dict[str, float]:
        """What fits of {log key: value} that observers add."""
        logs: dict[str, float] = {}
        for key, value in values.items():
            logs |= self._fitting({key: value})
        self._say("values of settings such as `budget`", [key for key in values if key not in logs])
        return logs

    def _fitting(self, found: dict[str, float], *, always: bool = False) -> dict[str, float]:
        """What is logged of the values of one row: all, or what was logged before."""
        new = found.keys() - self._logged - self._keys.clashes
        if not always and len(self._logged) + len(new) > self._limit > 0:
            new &= self._keys.watched
        self._logged |= new
        return {key: value for key, value in found.items() if key in self._logged}

    def _say(self, what: str, left: list[str]) -> None:
        if left:
            self._warn_once(
                f"the run has more than %d log keys (`max_keys`), so %d {what} are left "
                "out of the log, and more may follow: %s ... All are still counted. Set `top`, or "
                "take fewer metrics or axes.",
                self._limit,
                len(left),
                ", ".join(left[:5]),
            )
