"""ms-swift's own loss of a channel, `loss_{channel}`, as a metric beside ours.

With `--enable_channel_loss` ms-swift logs what it optimises, after weights, over the unweighted
number of tokens. It logs that for every channel, whatever a config of ours chooses.
"""

from __future__ import annotations

from collections.abc import Callable

from channel_metrics.core.keys import KeyBook
from channel_metrics.core.schema import TOKENS, Metric, Schema, ratio
from channel_metrics.errors import ConfigError

__all__ = ["own_loss_metric", "schema_with_own_loss"]


def own_loss_metric() -> Metric:
    """`loss_{channel}` with ms-swift's meaning; it calls samples without a channel `None`."""
    return Metric(
        "channel_loss",
        ("weighted_nll", "tokens", "nonfinite"),
        lambda s: ratio(s["weighted_nll"], s["tokens"] - s["nonfinite"]),
        unit="nats",
        doc="weighted nll / tokens; what ms-swift logs with --enable_channel_loss",
        key="loss_{channel}",
        unlabeled="None",
        every_channel=True,
        always=True,
    )


def schema_with_own_loss(key_format: str, rewrite: Callable[[str], str] = str) -> Schema:
    """The token schema of a run with `--enable_channel_loss`.

    Args:
        key_format: of the config. rewrite: what the log writers do to keys, see `KeyBook`.

    Raises:
        ConfigError: for a format that gives one of our metrics the key of ms-swift's.
    """
    schema = TOKENS.extended(own_loss_metric())
    try:
        KeyBook(key_format, schema=schema, rewrite=rewrite)
    except ConfigError as error:
        raise ConfigError(
            f"{error} Or leave --enable_channel_loss out, which logs loss_<channel> with a "
            "meaning of its own."
        ) from None
    return schema
