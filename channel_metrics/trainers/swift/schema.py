"""ms-swift's own loss of a channel, `loss_{channel}`, as a metric beside ours.

With `--enable_channel_loss`, ms-swift logs the weighted loss of a channel, divided by its number of
tokens. It logs this for every channel, whatever our config chooses.
"""

from __future__ import annotations

from collections.abc import Callable

from channel_metrics.core.keys import KeyBook
from channel_metrics.core.schema import TOKENS, Metric, Schema, ratio
from channel_metrics.errors import ConfigError

__all__ = ["own_loss_metric", "schema_with_own_loss"]


def own_loss_metric() -> Metric:
    """`loss_{channel}` as ms-swift defines it. It calls samples without a channel `None`."""
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
        key_format: that of the config.
        rewrite: how the log writers change keys, see `KeyBook`.

    Raises:
        ConfigError: if the format gives one of our metrics the key of ms-swift's.
    """
    schema = TOKENS.extended(own_loss_metric())
    try:
        KeyBook(key_format, schema=schema, rewrite=rewrite)
    except ConfigError as error:
        raise ConfigError(
            f"{error} Or leave out --enable_channel_loss, whose loss_<channel> has another meaning."
        ) from None
    return schema
