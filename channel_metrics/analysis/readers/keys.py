"""The meaning of log keys: `eval_bbu_loss` is (eval, bbu, loss), `grad_norm` is the run's own.

A key does not say which part of it is a channel. A name is a channel if
- it was declared, or
- two metrics of ours have it, and one of them is no loss (`bbu_loss` and `bbu_tokens`), or
- it is a set that transformers evaluates (`eval_web_loss` and `eval_web_runtime`), or
- no such name is in the log, and several names have tokens (`bbu_tokens` beside `rru_tokens`), or
- none of these is in the log, and the name has a loss (`loss_bbu`, as ms-swift writes it).

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

__all__ = ["GLOBAL", "Key", "decode_keys", "is_over_steps", "is_training"]

GLOBAL = ""


class Key(NamedTuple):
    """What a log key means."""

    split: str
    """`train`, `eval`, `test` or `probe`."""

    channel: str
    """The channel, or `GLOBAL`."""

    metric: str
    """A metric such as `loss`; for the run's own values, their whole key."""


# Metrics of estimates, which are not in the schema.
_OF_ESTIMATES = (
    "loss_stderr",
    "loss_estimate",
    "loss_estimate_low",
    "loss_estimate_high",
)
# Values of the settings `budget` and `sampler`.
_OF_SETTINGS = ("target_share", "achieved_share", "source_epochs", "eta_hours", "weight")
_FORMATS = ("{channel}_{metric}", "{metric}/{channel}", "{channel}/{metric}", "{metric}_{channel}")
_SPLITS = (
    ("train/", "train"),
    ("eval/", "eval"),
    ("eval_", "eval"),
    ("val_", "eval"),
    ("val/", "eval"),
    ("validation/", "eval"),
    ("valid_", "eval"),
    ("test/", "test"),
    ("test_", "test"),
)
_PROBE = "dataset_"
# A probe logs an interval, but no share and no standard error; a channel `dataset_x` may.
_PROBED = re.compile(r"(?:^|/)dataset_(.+)_loss_low$")
_NOT_PROBED = re.compile(r"(?:^|/)dataset_(.+)_(?:share|tokens|loss_se)$")
# Names of trainers for our metrics.
_SYNONYMS = {
    "lm loss": "loss",
    "lm_loss": "loss",
    "mean_token_accuracy": "token_acc",
    "reduced_train_loss": "loss",
}
# Whole keys of trainers that would look like those of a channel.
_OF_TRAINERS = {
    "loss_metrics/global_avg_loss": ("train", "loss"),  # torchtitan
    "loss_metrics/global_max_loss": ("train", "loss_metrics/global_max_loss"),
    "validation_metrics/loss": ("eval", "loss"),
    "train/CE loss": ("train", "loss"),  # OLMo-core
    "train/PPL": ("train", "ppl"),
}
# Megatron's tag of an evaluation, with the name of the set: `lm loss validation-web`.
_MEGATRON = re.compile(
    r"(?:lm-loss-validation/)?(?P<key>.+) validation(?:-(?P<set>.+?))?(?P<ppl> ppl)?"
)
# A set that OLMo-core evaluates. What its other evaluators log is no loss per token.
_OLMO = re.compile(r"eval/lm/(?P<set>.+)/(?P<metric>CE loss|PPL)")
# Megatron logs some of its values a second time, over samples or tokens in place of steps.
_OTHER_SCALE = re.compile(r" vs (samples|tokens|gigaflos)\b")
# Keys of trainers, even if a channel is named `loss` or `grad`.
_OWN_KEYS = {*_SYNONYMS, "grad_norm", "learning_rate", "loss_scale", "num_tokens"}
# Words before `_loss` or after `loss_` that are no channels.
_NO_CHANNELS = """
train eval test val valid validation aux aux_moe moe_aux router_aux router z router_z mtp lm
total main load_balancing seq_load_balancing global_load_balancing kl policy value entropy
contrastive reg scale scaler macro worst sum mean avg nll sft dpo ce mlm nsp per_token best running
ema smoothed reduced_train predict"""
# Words before `_tokens` that are no channels.
_NO_SOURCES = """
num total n input inputs output prompt completion generated trained seen consumed supervised padding
pad padded valid loss target label text image video vision audio response reasoning thinking cached
effective step batch global local max min real active dropped special new context"""


def decode_keys(keys: Iterable[str | Key], channels: Iterable[str] = ()) -> dict[str | Key, Key]:
    """The meaning of each key.

    If two keys mean the same (ms-swift's `loss_bbu` and our `bbu_loss`), only the one whose format
    comes first in `_FORMATS` is in the result.

    Args:
        keys: keys of the log. A `Key` means itself, and its channel is a known one.
        channels: names that are channels, as declared.
    """
    keys = list(keys)
    fixed = {key: means for key in keys if (means := _fixed(key)) is not None}
    texts = [key for key in keys if not isinstance(key, Key) and key not in fixed]
    probed = {match[1] for key in texts if (match := _PROBED.search(key))}
    probed -= {match[1] for key in texts if (match := _NOT_PROBED.search(key))}
    probed -= {name.removeprefix(_PROBE) for name in channels if name.startswith(_PROBE)}
    said = [means.channel for means in fixed.values() if means.channel]
    declared = {sanitize(name): name for name in (*channels, *said)}
    certain = declared.keys() | probed
    split_of = {key: _split(key, probed, certain) for key in texts}
    splits = list(split_of.values())
    known = (
        _names_with_evidence(splits) | certain or _names_by_mix(splits) or _names_by_loss(splits)
    )
    known = known | _evaluation_sets(splits)
    # {meaning: (number of the format, key)}
    best: dict[Key, tuple[int, str | Key]] = {means: (-1, key) for key, means in fixed.items()}
    for key, (split, rest) in split_of.items():
        rank, channel, metric = _best(rest, known)
        meaning = Key(split, declared.get(channel, channel), _SYNONYMS.get(metric, metric))
        if meaning not in best or rank < best[meaning][0]:
            best[meaning] = rank, key
    return {key: meaning for meaning, (_, key) in best.items()}


def is_over_steps(key: str | Key) -> bool:
    """Whether a key is logged over steps, going by its name."""
    return isinstance(key, Key) or not _OTHER_SCALE.search(key)


def is_training(key: str | Key) -> bool:
    """Whether a key is logged over steps by the training, not by an evaluation."""
    if isinstance(key, Key):
        return key.split == "train"
    if not is_over_steps(key) or _MEGATRON.fullmatch(key):
        return False
    return not any(key.startswith(head) for head, split in _SPLITS if split != "train")


def _fixed(key: str | Key) -> Key | None:
    """The meaning of a key that does not depend on the others; None if it does."""
    if isinstance(key, Key):
        return key
    if key in _OF_TRAINERS:
        split, metric = _OF_TRAINERS[key]
        return Key(split, GLOBAL, metric)
    if match := _OLMO.fullmatch(key):
        return Key("eval", match["set"], "loss" if match["metric"] == "CE loss" else "ppl")
    match = _MEGATRON.fullmatch(key)
    if match is None:
        return None
    metric = "ppl" if match["ppl"] else _SYNONYMS.get(match["key"], match["key"])
    return Key("eval", match["set"] or GLOBAL, metric)


def _split(key: str, probed: Container[str], declared: Container[str]) -> tuple[str, str]:
    """The split, and the key without it."""
    split, rest = "train", key
    for prefix, name in _SPLITS:
        if key.startswith(prefix) and len(key) > len(prefix):
            rest, split = key[len(prefix) :], name
            break
    # A channel may be named `eval_x`. This is assumed only if `x` is not a known channel.
    is_name = not _has_known(rest, declared) and _has_known(key, declared)
    if is_name and key.startswith(("eval_", "val_", "test_")):
        split, rest = "train", key
    inner = rest.removeprefix(_PROBE)
    if inner != rest and _has_known(inner, probed):
        return "probe", inner
    return split, rest


def _has_known(rest: str, names: Container[str]) -> bool:
    return any(name in names for _, name, _ in _candidates(rest))


def _candidates(rest: str) -> list[tuple[int, str, str]]:
    """(number of the format, channel, metric) for every way to read `rest` as a channel's metric.

    Within a format, longer metrics come first, so `bbu_weighted_loss` belongs to `bbu`.
    """
    found = []
    for rank, ends in enumerate(_ends_of((*TOKENS.metric_names, *_OF_ESTIMATES, *_OF_SETTINGS))):
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
    """Names that several metrics have, one of which is no loss."""
    losses = {m.name for m in TOKENS.metrics if {"nll", "weighted_nll"} & set(m.needs)}
    metrics: dict[tuple[int, str], set[str]] = defaultdict(set)
    for _, rest in splits:
        for rank, name, metric in _first_of_each_format(rest):
            metrics[rank, name].add(metric)
    return {name for (_, name), found in metrics.items() if len(found) > 1 and found - losses}


def _evaluation_sets(splits: Iterable[tuple[str, str]]) -> set[str]:
    """Names of sets: transformers logs a loss and a runtime for each (`eval_web_runtime`)."""
    rests = {rest for split, rest in splits if split == "eval"}
    names = {rest.removesuffix("_runtime") for rest in rests if rest.endswith("_runtime")}
    return {name for name in names if f"{name}_loss" in rests}


def _names_by_mix(splits: Iterable[tuple[str, str]]) -> set[str]:
    """Names that have tokens: one alone would not be a mix."""
    names = {
        name
        for split, rest in splits
        for rank, name, metric in _first_of_each_format(rest)
        if split == "train" and rank == 0 and metric == "tokens"
    }
    names = {n for n in names if not set(re.split(r"[\W_]+", n.lower())) & set(_NO_SOURCES.split())}
    return names if len(names) > 1 else set()


def _names_by_loss(splits: Iterable[tuple[str, str]]) -> set[str]:
    """Names that have a loss, without the names that trainers use for losses of their own."""
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
