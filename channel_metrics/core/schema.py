"""Defines what is counted and what is logged: columns are sums, metrics are formulas over sums.

Both are registered here only. Log keys, reserved keys, the readers of logs, the report and the
reference in the docs all use this registry. So they know an entry that is added here, or by
`TOKENS.register`:

    TOKENS.register(
        Column("easy", "tokens", "tokens with a loss below 1", per_token=lambda v: v.losses < 1),
        Metric("easy_share", ("easy", "tokens"), lambda s: ratio(s["easy"], s["tokens"])),
    )

This module does not import torch, so tools that only read logs start fast.
"""

from __future__ import annotations

import math
from functools import partial
from operator import itemgetter

from channel_metrics.core.error_bars import error_bars
from channel_metrics.core.excess import excess_loss
from channel_metrics.core.gradients import GRADIENTS
from channel_metrics.core.percentiles import percentiles
from channel_metrics.core.registry import Column, Metric, Schema, Sums, ratio, ratio_of
from channel_metrics.core.slopes import SLOPES

__all__ = ["DEFAULT_METRICS", "TOKENS", "Column", "Metric", "Schema", "Sums", "ratio", "ratio_of"]

_OF_LOGITS = "one maximum over the logits"

DEFAULT_METRICS = ("loss", "token_acc", "tokens", "share")


def _loss(sums: Sums) -> float | None:
    return ratio(sums["nll"], sums["tokens"] - sums["nonfinite"])


def _perplexity(sums: Sums) -> float | None:
    loss = _loss(sums)
    try:
        return None if loss is None else math.exp(loss)
    except OverflowError:
        return math.inf


def _nonfinite(sums: Sums) -> float | None:
    return sums["nonfinite"] + sums["nonfinite_weight"] or None


def _bits_per(size: str, sums: Sums) -> float | None:
    return ratio(sums["text_nll"] / math.log(2), sums[size])


# No lambdas, so that a table of sums can be pickled.
TOKENS = Schema("tokens", count="tokens", extra=(*SLOPES, *GRADIENTS))
TOKENS.register(
    Column("tokens", "tokens", "supervised tokens", total=True, per_token="mask"),
    Column("samples", "sequences", "sequences with a position", total=True, per_sequence="filled"),
    Column("nll", "nats", "token losses that are finite", per_token="nll"),
    Column("correct", "tokens", "tokens whose target was predicted", per_token="correct"),
    Column("judged", "tokens", "tokens for which `correct` was given", per_token="judged"),
    Column("nonfinite", "tokens", "tokens whose loss is NaN or infinite", per_token="nonfinite"),
    Column("weighted_nll", "nats", "weight * loss", per_token="weighted_nll"),
    Column("weight", "weight", "the weights of tokens", per_token="weight"),
    Column(
        "nonfinite_weight",
        "tokens",
        "tokens with a finite loss whose weight is NaN or infinite",
        per_token="nonfinite_weight",
    ),
    Metric(
        "loss",
        ("nll", "tokens", "nonfinite"),
        _loss,
        unit="nats",
        doc="nll / tokens; raw: before weights, label smoothing and loss scaling",
        label="Loss (nats per token)",
    ),
    Metric(
        "weighted_loss",
        ("weighted_nll", "weight"),
        ratio_of("weighted_nll", "weight"),
        unit="nats",
        doc="weighted nll / weight; only where tokens are weighted",
    ),
    Metric(
        "token_acc",
        ("correct", "judged"),
        ratio_of("correct", "judged"),
        doc="correct / tokens; a target that ties for the maximum counts as correct",
        label="Token accuracy",
        cost=_OF_LOGITS,
    ),
    Metric(
        "ppl",
        ("nll", "tokens", "nonfinite"),
        _perplexity,
        unit="choices",
        doc="exp(loss): the model is as unsure as between so many equally likely tokens",
    ),
    Metric(
        "tokens",
        ("tokens",),
        itemgetter("tokens"),
        unit="tokens",
        doc="supervised tokens in the window",
        adds_up=True,
    ),
    Metric(
        "samples",
        ("samples",),
        itemgetter("samples"),
        unit="sequences",
        doc="sequences in the window",
        adds_up=True,
    ),
    Metric(
        "share",
        ("tokens",),
        ratio_of("tokens", "all"),
        doc="tokens / tokens of all channels, `unlabeled` among them",
        label="Share of the tokens",
    ),
    Metric(
        "nonfinite",
        ("nonfinite", "nonfinite_weight"),
        _nonfinite,
        unit="tokens",
        doc="tokens with a NaN or infinite loss or weight, if any: in `tokens` and `share`; "
        "such a loss is not in `loss`, such a weight not in `weighted_loss`",
        adds_up=True,
        always=True,
    ),
)
TOKENS.register(
    Column(
        "text_nll",
        "nats",
        "finite losses of the tokens that stand for known text",
        per_token="text_nll",
        optional=True,
    ),
    Column("text_bytes", "bytes", "their UTF-8 bytes", per_token="text_bytes", optional=True),
    Column(
        "text_chars",
        "characters",
        "the characters that begin in them",
        per_token="text_chars",
        optional=True,
    ),
    Metric(
        "bits_per_byte",
        ("text_nll", "text_bytes"),
        partial(_bits_per, "text_bytes"),
        unit="bits",
        doc="nll / ln 2 / UTF-8 bytes, of the tokens that stand for known text: no special tokens",
        cost="a look-up per token",
    ),
    Metric(
        "bits_per_char",
        ("text_nll", "text_chars"),
        partial(_bits_per, "text_chars"),
        unit="bits",
        doc="nll / ln 2 / characters, of the same tokens",
        cost="a look-up per token",
    ),
)
TOKENS.register(
    Column(
        "entropy_sum", "nats", "entropies of the prediction", per_token="entropy", optional=True
    ),
    Column(
        "entropy_tokens",
        "tokens",
        "tokens for which it was measured",
        per_token="measured",
        optional=True,
    ),
    Metric(
        "entropy",
        ("entropy_sum", "entropy_tokens"),
        ratio_of("entropy_sum", "entropy_tokens"),
        unit="nats",
        doc="the mean of -sum(p ln p), the entropy of the predicted distribution; how sure the "
        "model is of itself",
        cost="one softmax over the logits",
    ),
)
TOKENS.register(
    *error_bars("loss", "nll", "nats"), *error_bars("token_acc", "correct", "", _OF_LOGITS)
)
TOKENS.register(*percentiles())
TOKENS.register(*excess_loss())
