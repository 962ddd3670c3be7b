"""The errors that a user of this library can meet.

Every message follows one pattern: what was expected, what came, what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

__all__ = [
    "BoundaryError",
    "ChannelError",
    "ChannelMetricsError",
    "CollectiveError",
    "ConfigError",
    "StoppedError",
    "UnsupportedVersionError",
    "hint",
]


class ChannelMetricsError(ValueError):
    """Base of all errors raised by this library."""


class BoundaryError(ChannelMetricsError):
    """Sequence boundaries that are malformed, or that do not fit the tokens."""


class ChannelError(ChannelMetricsError):
    """Channel names or ids that are missing, unknown, ambiguous, or out of step with the batch."""


class CollectiveError(ChannelMetricsError):
    """A collective of ours that failed. Always raised, because the ranks are out of step."""


class ConfigError(ChannelMetricsError):
    """A wrong configuration: unknown keys, wrong values, names that would share a key."""


class StoppedError(ChannelMetricsError):
    """Raised on all ranks at a sync when one of them has stopped measuring."""


class UnsupportedVersionError(ChannelMetricsError):
    """A framework version, or a use of it, that an adapter cannot observe correctly."""


def hint(name: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown name: the nearest known name, or all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}."
