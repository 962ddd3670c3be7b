"""At most so many log keys in one run. What is left out is said once."""

from __future__ import annotations

from collections.abc import Callable, Mapping

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
            new = found.keys() - self._logged - self._keys.clashes
            is_over = len(self._logged) + len(new) > self._limit > 0
            if new and is_over and row != UNLABELED:
                left.append(row)
            else:
                self._logged |= new
            logs.update((key, value) for key, value in found.items() if key in self._logged)
        if left:
            self._warn_once(
                "the run has more than %d log keys (`max_keys`), so %d channels or labels are left "
                "out of the log, and more may follow: %s ... All are still counted. Set `top`, or "
                "take fewer metrics or axes.",
                self._limit,
                len(left),
                ", ".join(left[:5]),
            )
        return {key: value for key, value in logs.items() if key not in self._keys.clashes}
