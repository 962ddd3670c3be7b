"""The naive oracle: what the metrics are, in Python floats and a loop over tokens.

It shares no code with the library. Batches are lists; a padded batch is one flat list of tokens
and one bound per row, as in the batch contract.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

IGNORED = -100


@dataclass
class Sums:
    """What is known of one channel."""

    tokens: int = 0
    samples: int = 0
    nonfinite: int = 0
    nonfinite_weights: int = 0
    hits: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    weighted: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    of_sequences: list[tuple[int, float]] = field(default_factory=list)
    """(tokens with a finite loss, their nll) of each sequence."""
    text_losses: list[float] = field(default_factory=list)
    """The finite losses of the tokens that stand for text."""
    num_bytes: int = 0
    num_chars: int = 0
    hits_of_sequences: list[tuple[int, float]] = field(default_factory=list)
    """(judged tokens, those predicted) of each sequence."""
    excess: list[float] = field(default_factory=list)
    """The losses, and minus the nll of the reference model, of sequences with its tokens."""
    excess_tokens: int = 0
    entropies: list[float] = field(default_factory=list)

    @property
    def correct(self) -> float:
        return math.fsum(self.hits)


@dataclass
class Batch:
    """One micro-batch: T tokens, and N sequences whose bounds are `bounds` [N + 1].

    channels: one name per sequence, None for a sequence without a channel. causal: the loss at
    position t of a row is about the token at t + 1; `row_length` says where rows end.
    """

    losses: list[float]
    channels: Sequence[str | None]
    bounds: Sequence[int]
    labels: Sequence[int] | None = None
    loss_mask: Sequence[float] | None = None
    correct: Sequence[bool] | None = None
    weights: Sequence[float] | None = None
    entropy: Sequence[float] | None = None
    causal: bool = False
    row_length: int | None = None
    text: Mapping[int, str] = field(default_factory=dict)
    """The text of each token; empty for special ones."""
    references: Sequence[tuple[float, int] | None] = ()
    """nll and tokens of a reference model, of each sequence."""
    pads: frozenset[int] = frozenset()
    """The positions that are padding."""
    marks: Sequence[str | None] = ()
    """The label of each token, None for one without."""
    kinds: Mapping[int, str] = field(default_factory=dict)
    """What the tokens that are no text stand for."""


def reference_sums(batches: Sequence[Batch]) -> dict[str, Sums]:
    """{channel: sums}; a token past the last bound, or without a channel, is `unlabeled`."""
    found: dict[str, Sums] = {}
    for batch in batches:
        for number, (channel, start, end) in enumerate(_sequences(batch)):
            sums = found.setdefault(channel or "unlabeled", Sums())
            losses, hits = len(sums.losses), len(sums.hits)
            for target in range(start, end):
                _add_token(sums, batch, target)
            of_sequence, of_hits = sums.losses[losses:], sums.hits[hits:]
            sums.of_sequences.append((len(of_sequence), math.fsum(of_sequence)))
            sums.hits_of_sequences.append((len(of_hits), math.fsum(of_hits)))
            known = batch.references[number] if number < len(batch.references) else None
            if known is not None and known[1] == len(of_sequence):
                sums.excess += [*of_sequence, -known[0]]
                sums.excess_tokens += known[1]
        for channel, start, end in zip(
            batch.channels, batch.bounds, batch.bounds[1:], strict=False
        ):
            found[channel or "unlabeled"].samples += end > start
    return found


def reference_metrics(
    batches: Sequence[Batch], key_format: str = "{channel}_{metric}"
) -> dict[str, float]:
    """The keys and values of `compute()` with all metrics asked for."""
    sums = {name: s for name, s in reference_sums(batches).items() if s.tokens}
    all_tokens = sum(s.tokens for s in sums.values())
    return {
        key_format.format(channel=channel, metric=metric): value
        for channel, s in sums.items()
        for metric, value in values_of(s, all_tokens).items()
    }


def reference_token_axis(batches: Sequence[Batch], by: str) -> dict[str, dict[str, float]]:
    """{label: {metric: value}} of an axis by `position`, `length`, `column` or `modality`."""
    found: dict[str, Sums] = {}
    for batch in batches:
        for target in range(len(batch.losses)):
            _add_token(found.setdefault(_label(batch, target, by), Sums()), batch, target)
    sums = {label: s for label, s in found.items() if s.tokens}
    values = {s: values_of(of, sum(t.tokens for t in sums.values())) for s, of in sums.items()}
    return {s: {m: v for m, v in of.items() if m != "samples"} for s, of in values.items()}


def _label(batch: Batch, target: int, by: str) -> str:
    if by == "column":
        return batch.marks[target] or "unlabeled"
    if by == "modality":
        assert batch.labels is not None
        return batch.kinds.get(batch.labels[target], "text")
    for start, end in zip(batch.bounds, batch.bounds[1:], strict=False):
        if start <= target < end:
            last = target if by == "position" else end
            return bucket(sum(at not in batch.pads for at in range(start, last)))
    return "unlabeled"


def bucket(number: int) -> str:
    """The range that a number is in: 0, 1, 2 to 3, 4 to 7, ..., and all from 1048576 on."""
    if number < 2:
        return f"{number:07}"
    low = 2
    while 2 * low <= number and low < 1048576:
        low *= 2
    return f"{low:07}-{2 * low - 1:07}" if low < 1048576 else f"{low:07}-"


def _sequences(batch: Batch) -> list[tuple[str | None, int, int]]:
    inside = list(zip(batch.channels, batch.bounds, batch.bounds[1:], strict=False))
    return [*inside, (None, batch.bounds[-1], len(batch.losses))]


def _add_token(sums: Sums, batch: Batch, target: int) -> None:
    at = target
    if batch.causal:
        row_length = batch.row_length or len(batch.losses)
        if target % row_length == 0:
            return  # nothing in its row predicts it
        at = target - 1
    if batch.labels is not None and batch.labels[target] == IGNORED:
        return
    if batch.loss_mask is not None and batch.loss_mask[target] == 0:
        return
    sums.tokens += 1
    if batch.correct is not None:
        sums.hits.append(float(batch.correct[at]))
    if not math.isfinite(batch.losses[at]):
        sums.nonfinite += 1
        return
    sums.losses.append(batch.losses[at])
    if batch.entropy is not None and math.isfinite(batch.entropy[at]):
        sums.entropies.append(batch.entropy[at])
    if batch.labels is not None and (text := batch.text.get(batch.labels[target])):
        sums.text_losses.append(batch.losses[at])
        sums.num_bytes += len(text.encode())
        sums.num_chars += len(text)
    if batch.weights is None:
        return
    if not math.isfinite(batch.weights[at]):
        sums.nonfinite_weights += 1
    else:
        sums.weighted.append(batch.weights[at] * batch.losses[at])
        sums.weights.append(batch.weights[at])


def values_of(sums: Sums, all_tokens: int) -> dict[str, float]:
    """{metric: value} of one channel or label; `all_tokens` are those of all of them."""
    values: dict[str, float] = {
        "tokens": float(sums.tokens),
        "samples": float(sums.samples),
        "share": sums.tokens / all_tokens,
    }
    if sums.losses:
        values["loss"] = math.fsum(sums.losses) / len(sums.losses)
        values["ppl"] = math.exp(values["loss"])
    if math.fsum(sums.weights):
        values["weighted_loss"] = math.fsum(sums.weighted) / math.fsum(sums.weights)
    if sums.hits:
        values["token_acc"] = sums.correct / len(sums.hits)
    if sums.num_bytes:
        bits = math.fsum(sums.text_losses) / math.log(2)
        values["bits_per_byte"] = bits / sums.num_bytes
        values["bits_per_char"] = bits / sums.num_chars
    if sums.entropies:
        values["entropy"] = math.fsum(sums.entropies) / len(sums.entropies)
    if sums.excess_tokens:
        values["excess_loss"] = math.fsum(sums.excess) / sums.excess_tokens
    values |= percentiles(sums.of_sequences)
    values |= error_bars("loss", sums.of_sequences, math.inf)
    values |= error_bars("token_acc", sums.hits_of_sequences, 1.0)
    if sums.nonfinite + sums.nonfinite_weights:
        values["nonfinite"] = float(sums.nonfinite + sums.nonfinite_weights)
    return values


def entropy(logits: Sequence[float]) -> float:
    """The entropy in nats of a softmax."""
    highest = max(logits)
    total = math.fsum(math.exp(x - highest) for x in logits)
    shares = [math.exp(x - highest) / total for x in logits]
    return -math.fsum(p * math.log(p) for p in shares if p)


def error_bars(
    metric: str, sequences: Sequence[tuple[int, float]], highest: float = math.inf
) -> dict[str, float]:
    """Standard error and 95 % interval of a mean over tokens; sequences are the draws.

    sequences: (tokens, sum of their values) of each.
    """
    sequences = [(n, y) for n, y in sequences if n]
    m, tokens = len(sequences), sum(n for n, _ in sequences)
    if m < 2:
        return {}
    mean = math.fsum(y for _, y in sequences) / tokens
    error = math.sqrt(m / (m - 1) * math.fsum((y - mean * n) ** 2 for n, y in sequences)) / tokens
    half = student_t(m - 1) * error
    found = {f"{metric}_se": error}
    if mean in (0.0, highest) and highest < math.inf:
        half, found = 1 - 0.025 ** (1 / m), {}
    found[f"{metric}_low"] = max(mean - half, 0.0)
    found[f"{metric}_high"] = min(mean + half, highest)
    return found


def percentiles(sequences: Sequence[tuple[int, float]]) -> dict[str, float]:
    """Percentiles of the mean loss per sequence; sequences: (tokens, nll) of each."""
    means = sorted(y / n for n, y in sequences if n)
    found = {}
    for percent in (10, 50, 90) if means else ():
        exact = means[math.ceil(percent / 100 * len(means)) - 1]
        found[f"loss_p{percent}"] = min(max(exact, 2.0**-10), 2.0**5)
    return found


def slope(windows: Sequence[tuple[int, float]]) -> tuple[float, float] | None:
    """d loss / d own tokens, and its standard error: the normal equations in whole fractions.

    windows: (tokens, mean loss) of each, in order. A window stands for as many points as it has
    tokens, all in its middle, but for one degree of freedom only.
    """
    points, seen = [], 0
    for tokens, loss in windows:
        points.append((tokens, Fraction(2 * seen + tokens, 2), Fraction(loss)))
        seen += tokens
    if len(points) < 3:
        return None
    n, x, y, xx, xy = (
        sum((w * a**i * b**j for w, a, b in points), Fraction(0))
        for i, j in ((0, 0), (1, 0), (0, 1), (2, 0), (1, 1))
    )
    found = (n * xy - x * y) / (n * xx - x * x)
    start = (y - found * x) / n
    rest = sum((w * (b - start - found * a) ** 2 for w, a, b in points), Fraction(0))
    variance = rest / (len(points) - 2) * n / (n * xx - x * x)
    return float(found), math.sqrt(variance)


@functools.cache
def student_t(freedom: int) -> float:
    """Student's t of the 95 % interval: the density of its angle is cos(angle)^(freedom - 1)."""

    def between(angle: float, steps: int = 400) -> float:
        points = (math.cos(angle * i / steps) ** (freedom - 1) for i in range(1, steps))
        simpson = math.fsum(value * (4 if i % 2 else 2) for i, value in enumerate(points, 1))
        return (1 + simpson + math.cos(angle) ** (freedom - 1)) * angle / steps / 3

    low, high = 0.0, math.pi / 2
    wanted = 0.95 * between(high)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if between(middle) < wanted else (low, middle)
    return math.tan(low) * math.sqrt(freedom)
