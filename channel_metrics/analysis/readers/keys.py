"""Log keys, whoever wrote them: `eval_bbu_loss` is (eval, bbu, loss), `grad_norm` is the run's own.

Keys do not say which part of them is a channel. A name is taken for one if it was declared, or if
two metrics of ours bear it and one of them is no loss (`bbu_loss` and `bbu_tokens`). Only where
no such name is in the log, a loss alone is enough (`loss_bbu`, as ms-swift writes it).

>>> decode_keys(["loss", "bbu_loss", "bbu_tokens", "aux_loss"])["bbu_loss"]
Key(split='train', channel='bbu', metric='loss')
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Container, Iterable
from functools import lru_cache
from typing import NamedTuple

from channel_metrics.core.keys import sanitize
from channel_metrics.core.schema import TOKENS

__all__ = ["GLOBAL", "Key", "decode_keys"]

GLOBAL = ""


class Key(NamedTuple):
    """What a log key means."""

    split: str
    """`train`, `eval`, `test` or `probe`."""

    channel: str
    """The channel, or `GLOBAL`."""

    metric: str
    """Such as `loss`; of the run's own values their key, as it is."""


# What probes and estimates log beside the metrics of the schema.
_OF_ESTIMATES = (
    "loss_low",
    "loss_high",
    "loss_stderr",
    "loss_estimate",
    "loss_estimate_low",
    "loss_estimate_high",
)
_FORMATS = ("{channel}_{metric}", "{metric}/{channel}", "{channel}/{metric}", "{metric}_{channel}")
_SPLITS = (
    ("train/", "train"),
    ("eval/", "eval"),
    ("eval_", "eval"),
    ("test/", "test"),
    ("test_", "test"),
)
_PROBE = "dataset_"
# Only a probe logs an interval, so a channel that is called `dataset_x` is no probe.
_PROBED = re.compile(r"(?:^|/)dataset_(.+)_loss_low$")
# The same value under the names that trainers give it.
_SYNONYMS = {
    "lm loss": "loss",
    "lm_loss": "loss",
    "mean_token_accuracy": "token_acc",
    "lm loss validation": "loss",
}
# Of trainers, even where a channel is called `loss` or `grad`.
_OWN_KEYS = {*_SYNONYMS, "grad_norm", "learning_rate", "loss_scale", "num_tokens"}
# What stands before `_loss`, or after `loss_`, and is no dataset.
_NO_CHANNELS = """
train eval test val valid validation aux aux_moe moe_aux router_aux router z router_z mtp lm
total main load_balancing seq_load_balancing global_load_balancing kl policy value entropy
contrastive reg scale scaler sum mean avg nll sft dpo ce mlm nsp per_token best running ema
smoothed"""


def decode_keys(keys: Iterable[str | Key], channels: Iterable[str] = ()) -> dict[str | Key, Key]:
    """The meaning of each key; channels: names that are known, as declared.

    A `Key` means itself, and its channel is known.

    Where two keys mean the same (ms-swift's `loss_bbu` beside our `bbu_loss`), the one that comes
    first in the order of the formats above stands for both, and the other is left out.
    """
    keys = list(keys)
    texts = [key for key in keys if not isinstance(key, Key)]
    probed = {match[1] for key in texts if (match := _PROBED.search(key))}
    said = [key.channel for key in keys if isinstance(key, Key) and key.channel]
    declared = {sanitize(name): name for name in (*channels, *said)}
    certain = declared.keys() | probed
    split_of = {key: _split(key, probed, certain) for key in texts}
    known = _names_with_evidence(split_of.values()) | certain or _names_by_loss(split_of.values())
    # The rank and the key that stand for each meaning.
    best: dict[Key, tuple[int, str | Key]] = {
        key: (-1, key) for key in keys if isinstance(key, Key)
    }
    for key, (split, rest) in split_of.items():
        rank, channel, metric = _best(rest, known)
        meaning = Key(split, declared.get(channel, channel), _SYNONYMS.get(metric, metric))
        if meaning not in best or rank < best[meaning][0]:
            best[meaning] = rank, key
    return {key: meaning for meaning, (_, key) in best.items()}


def _split(key: str, probed: Container[str], declared: Container[str]) -> tuple[str, str]:
    """The split, and the key without it."""
    split = "eval" if key == "lm loss validation" else "train"
    rest = key
    for prefix, name in _SPLITS:
        if key.startswith(prefix) and len(key) > len(prefix):
            rest, split = key[len(prefix) :], name
            break
    # A channel may be called `eval_x`; it is one only if no shorter reading makes sense.
    is_name = not _has_known(rest, declared) and _has_known(key, declared)
    if is_name and key.startswith(("eval_", "test_")):
        split, rest = "train", key
    inner = rest.removeprefix(_PROBE)
    if inner != rest and _has_known(inner, probed):
        return "probe", inner
    return split, rest


def _has_known(rest: str, names: Container[str]) -> bool:
    return any(name in names for _, name, _ in _candidates(rest))


def _candidates(rest: str) -> list[tuple[int, str, str]]:
    """(number of the format, channel, metric): every way to read `rest` as a channel's metric.

    Of one format, those with the longest metric come first: `bbu_weighted_loss` is of `bbu`.
    """
    found = []
    for rank, ends in enumerate(_ends_of((*TOKENS.metric_names, *_OF_ESTIMATES))):
        for metric, head, tail in ends:
            if rest.startswith(head) and rest.endswith(tail) and len(rest) > len(head + tail):
                found.append((rank, rest[len(head) : len(rest) - len(tail)], metric))
    return found


@lru_cache(maxsize=1)
def _ends_of(metrics: tuple[str, ...]) -> list[list[tuple[str, str, str]]]:
    """For each format: (metric, what stands before the channel, what stands after it)."""
    longest_first = sorted(metrics, key=len, reverse=True)
    return [
        [(name, *_around_channel(key_format, name)) for name in longest_first]
        for key_format in _FORMATS
    ]


def _around_channel(key_format: str, metric: str) -> tuple[str, str]:
    head, tail = key_format.format(channel="\0", metric=metric).split("\0")
    return head, tail


def _names_with_evidence(splits: Iterable[tuple[str, str]]) -> set[str]:
    """Names that several metrics bear, one of which is no loss."""
    losses = {m.name for m in TOKENS.metrics if {"nll", "weighted_nll"} & set(m.needs)}
    metrics: dict[tuple[int, str], set[str]] = defaultdict(set)
    for _, rest in splits:
        for rank, name, metric in _first_of_each_format(rest):
            metrics[rank, name].add(metric)
    return {name for (_, name), found in metrics.items() if len(found) > 1 and found - losses}


def _names_by_loss(splits: Iterable[tuple[str, str]]) -> set[str]:
    """Names that have a loss, and are none of the names that trainers use for their own."""
    return {
        name
        for _, rest in splits
        for _, name, metric in _first_of_each_format(rest)
        if metric in ("loss", "loss_low", "loss_estimate") and not _is_no_channel(name)
    }


def _first_of_each_format(rest: str) -> Iterable[tuple[int, str, str]]:
    return {rank: (rank, name, metric) for rank, name, metric in _candidates(rest)[::-1]}.values()


def _is_no_channel(name: str) -> bool:
    plain = re.sub(r"[\s_\-]*\d*$", "", name.lower()).replace(" ", "_").replace("-", "_")
    return plain in _NO_CHANNELS.split()


def _best(rest: str, known: Collection[str]) -> tuple[int, str, str]:
    """(rank, channel, metric) of a key without its split; (last, GLOBAL, rest) if it has none."""
    for candidate in _candidates(rest):
        if candidate[1] in known:
            return candidate
    # Other metrics of a known channel, such as those of preference data.
    names = [name for name in known if rest.startswith((f"{name}_", f"{name}/"))]
    if names and rest not in _OWN_KEYS:
        name = max(names, key=len)
        return len(_FORMATS) - 1, name, rest[len(name) + 1 :]
    return len(_FORMATS), GLOBAL, rest
