"""The sequences with the highest and the lowest mean loss, per label.

They are kept on the device of the losses, in a table of fixed size: K of each kind per label. Each
micro-batch is compared with it there, so nothing is read back, and nothing grows with the data.

Letters: R rows (labels, and the unlabeled ones), N sequences, K kept ones, T tokens, P words that
are kept of a sequence: its number of tokens, 8 of its record id, and the tokens of its text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from channel_metrics.core.cu_seqlens import can_read

__all__ = ["ID_WORDS", "Extreme", "Extremes", "first_tokens", "id_words", "text_of_id"]

# A record id has at most so many int64, of 8 bytes each.
ID_WORDS = 8
_NO_TOKEN = -1


@dataclass(frozen=True)
class Extreme:
    """One sequence. kind: `highest` or `lowest`. row: of the table; 0 is unlabeled. tokens: the
    first supervised ones."""

    kind: str
    row: int
    loss: float
    num_tokens: int
    record_id: str | None
    tokens: tuple[int, ...]


class Extremes:
    """The K highest and the K lowest mean losses of each row.

    Args:
        count: K.
        num_text: how many tokens of a sequence are kept; 0 for none.

    Attributes:
        lacks_sequences: whether tokens came without their whole sequences.
    """

    def __init__(self, count: int, num_text: int) -> None:
        self.count, self.num_text = count, num_text
        self.lacks_sequences = False
        # [2, R, K] and [2, R, K, P]; the lowest losses are kept as the highest of -loss.
        self._scores: Tensor | None = None
        self._words: Tensor | None = None

    def reset(self) -> None:
        """Forget all sequences."""
        self._scores = self._words = None

    @torch.no_grad()
    def add(
        self,
        rows: Tensor,
        sums: dict[str, Tensor],
        record_ids: Tensor | None,
        tokens: Tensor | None,
        num_rows: int,
    ) -> None:
        """Compare the sequences of a micro-batch with those that are kept.

        Args:
            rows: int64 [N] or [N + 1], the row of each sequence.
            sums: {column: the same shape}, with `nll` and `tokens`.
            record_ids: int64 [N, ID_WORDS], see `id_words`; None if they are not known.
            tokens: int64 [N, num_text], see `first_tokens`; None if they are not known.
            num_rows: R.
        """
        size = rows.numel()
        finite = sums["tokens"] - sums["nonfinite"] if "nonfinite" in sums else sums["tokens"]
        mean = sums["nll"] / finite.clamp(min=1)
        parts = [sums["tokens"].long().unsqueeze(1)]
        for given, width, empty in (
            (record_ids, ID_WORDS, 0),
            (tokens, self.num_text, _NO_TOKEN),
        ):
            held = rows.new_full((size, width), empty)
            if given is not None:
                held[: len(given)] = given.to(rows.device, non_blocking=True)
            parts.append(held)
        scores = torch.stack([mean, -mean]).float().where(finite > 0, -torch.inf)
        own = rows == torch.arange(num_rows, device=rows.device).unsqueeze(1)
        scores = scores.unsqueeze(1).where(own, -torch.inf)
        words = torch.cat(parts, dim=1)
        self._keep(scores, words.expand(2, num_rows, *words.shape))

    @torch.no_grad()
    def merge(self, other: Extremes) -> None:
        """Add the sequences of another table with the same rows."""
        if other._scores is not None and other._words is not None:
            self._keep(other._scores, other._words)

    def found(self) -> list[Extreme]:
        """The sequences, the most extreme one of each row first. It waits for the device."""
        if self._scores is None or self._words is None:
            return []
        scores, words = self._scores.cpu(), self._words.cpu()
        return [
            _extreme(kind, row, sign * float(scores[side, row, place]), words[side, row, place])
            for side, (kind, sign) in enumerate((("highest", 1), ("lowest", -1)))
            for row, place in (scores[side] > -torch.inf).nonzero().tolist()
        ]

    def _keep(self, scores: Tensor, words: Tensor) -> None:
        """Choose among those that are kept and [2, R, M] more, with words [2, R, M, P]."""
        if self._scores is None or self._words is None:
            self._scores, places = scores.topk(min(self.count, scores.shape[2]), dim=2)
            self._words = _picked(words, places)
            return
        more = scores.shape[1] - self._scores.shape[1]  # labels join during the run
        kept = pad(self._scores.to(scores.device), (0, 0, 0, max(more, 0)), value=-torch.inf)
        kept_words = pad(self._words.to(words.device), (0, 0, 0, 0, 0, max(more, 0)))
        scores = pad(scores, (0, 0, 0, max(-more, 0)), value=-torch.inf)
        words = pad(words, (0, 0, 0, 0, 0, max(-more, 0)))
        scores, size = torch.cat([kept, scores], dim=2), kept.shape[2]
        self._scores, places = scores.topk(min(self.count, scores.shape[2]), dim=2)
        if can_read(places) and not (places >= size).any():  # on the host, a look costs little
            self._words = kept_words
            return
        # Not of one tensor with all words, which would be large.
        old, new = _picked(kept_words, places.clamp(max=size - 1)), (places - size).clamp(min=0)
        self._words = old.where((places < size).unsqueeze(3), _picked(words, new))


def _picked(words: Tensor, places: Tensor) -> Tensor:
    """[2, R, K, P] of [2, R, M, P]."""
    return words.gather(2, places.unsqueeze(3).expand(*places.shape, words.shape[3]))


def first_tokens(labels: Tensor, mask: Tensor, cu_seqlens: Tensor | None, count: int) -> Tensor:
    """int64 [N, count]: the first supervised tokens of each sequence, then -1.

    Args:
        labels: int64 [T] or [B, S].
        mask: bool, the supervised positions.
        cu_seqlens: int32 [N + 1]; without it, each row is a sequence.
    """
    mask = mask.reshape(-1)
    if cu_seqlens is None:
        width = labels.shape[-1]
        ends = torch.arange(width, labels.numel() + 1, width, device=labels.device)
    else:
        ends = cu_seqlens[1:].long()
    size = len(ends)
    places = torch.arange(labels.numel(), device=labels.device)
    sequence = torch.searchsorted(ends, places, right=True)
    # How many supervised tokens there are up to each position, and before each sequence.
    running = pad(mask.cumsum(0), (1, 0))
    starts = pad(ends, (1, 0)) if cu_seqlens is None else cu_seqlens.long()
    before = running.index_select(0, starts)
    rank = running[1:] - 1 - before.index_select(0, sequence)
    kept = mask & (rank < count) & (sequence < size)
    target = (sequence * count + rank).where(kept, size * count)
    found = labels.new_full((size * count + 1,), _NO_TOKEN)
    return found.scatter_(0, target, labels.reshape(-1))[:-1].view(size, count)


def id_words(name: str | None) -> list[int]:
    """The first 64 bytes of a record id, as int64; zeros if there is none."""
    held = ("" if name is None else name).encode()[: 8 * ID_WORDS].ljust(8 * ID_WORDS, b"\0")
    return [int.from_bytes(held[i : i + 8], "big", signed=True) for i in range(0, len(held), 8)]


def text_of_id(words: list[int]) -> str | None:
    """What `id_words` was made of."""
    held = b"".join(word.to_bytes(8, "big", signed=True) for word in words)
    return held.rstrip(b"\0").decode(errors="ignore") or None


def _extreme(kind: str, row: int, loss: float, words: Tensor) -> Extreme:
    num_tokens, *more = words.tolist()
    tokens = tuple(token for token in more[ID_WORDS:] if token != _NO_TOKEN)
    return Extreme(kind, row, loss, num_tokens, text_of_id(more[:ID_WORDS]), tokens)
