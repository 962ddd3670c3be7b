"""The sequences with the highest and the lowest mean loss, per label.

They are kept on the device of the losses, in a table of fixed size: K of each kind per label. The
sequences of some micro-batches wait together, and are then compared with it there. So nothing is
read back, and nothing grows with the data.

Letters: R rows (labels, and the unlabeled ones), N sequences, K kept ones, T tokens, P words that
are kept of a sequence: its number of tokens, 8 of its record id, and the tokens of its text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["ID_WORDS", "Extreme", "Extremes", "first_tokens", "id_words", "text_of_id"]

# A record id has at most so many int64, of 8 bytes each.
ID_WORDS = 8
_NO_TOKEN = -1
# With so many sequences that wait, the table is changed.
_MAX_WAITING = 256


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
        # Of micro-batches: rows [N], mean losses [N], words [N, P].
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        self._num_rows = 0

    def reset(self) -> None:
        """Forget all sequences."""
        self._scores = self._words = None
        self._waiting = []

    @torch.no_grad()
    def add(
        self,
        rows: Tensor,
        sums: dict[str, Tensor],
        record_ids: Tensor | None,
        tokens: Tensor | None,
        num_rows: int,
    ) -> None:
        """Add the sequences of a micro-batch.

        Args:
            rows: int64 [N] or [N + 1], the row of each sequence.
            sums: {column: the same shape}, with `nll` and `tokens`.
            record_ids: int64 [N, ID_WORDS], see `id_words`; None if they are not known.
            tokens: int64 [N, num_text], see `first_tokens`; None if they are not known.
            num_rows: R.
        """
        size = rows.numel()
        finite = sums["tokens"] - sums["nonfinite"] if "nonfinite" in sums else sums["tokens"]
        mean = (sums["nll"] / finite).float()  # NaN without a finite loss
        parts = [sums["tokens"].long().unsqueeze(1)]
        for given, width, empty in (
            (record_ids, ID_WORDS, 0),
            (tokens, self.num_text, _NO_TOKEN),
        ):
            held = rows.new_full((size, width), empty)
            if given is not None:
                held[: len(given)] = given.to(rows.device, non_blocking=True)
            parts.append(held)
        self._wait([(rows, mean, torch.cat(parts, dim=1))], num_rows)

    @torch.no_grad()
    def merge(self, other: Extremes) -> None:
        """Add the sequences of another table with the same rows."""
        if other._scores is not None and other._words is not None:
            self._keep(other._scores, other._words)
        self._wait(other._waiting, other._num_rows)

    def found(self) -> list[Extreme]:
        """The sequences, the most extreme one of each row first. It waits for the device."""
        self._compare()
        if self._scores is None or self._words is None:
            return []
        scores, words = self._scores.cpu(), self._words.cpu()
        there = scores > -torch.inf
        places, losses = there.nonzero().tolist(), scores[there].tolist()
        return [
            _extreme(("highest", "lowest")[side], row, -loss if side else loss, held)
            for (side, row, _), loss, held in zip(
                places, losses, words[there].tolist(), strict=True
            )
        ]

    def _wait(self, more: list[tuple[Tensor, Tensor, Tensor]], num_rows: int) -> None:
        self._waiting += more
        self._num_rows = max(self._num_rows, num_rows)
        if sum(len(mean) for _, mean, _ in self._waiting) >= _MAX_WAITING:
            self._compare()

    @torch.no_grad()
    def _compare(self) -> None:
        """Compare the sequences that wait with those that are kept."""
        if not self._waiting:
            return
        device = self._waiting[-1][0].device  # that of the losses may have changed
        rows, mean, words = (
            torch.cat([part.to(device) for part in parts])
            for parts in zip(*self._waiting, strict=True)
        )
        self._waiting = []
        scores = torch.stack([mean, -mean]).where(~mean.isnan(), -torch.inf)
        own = rows == torch.arange(self._num_rows, device=rows.device).unsqueeze(1)
        scores = scores.unsqueeze(1).where(own, -torch.inf)
        self._keep(scores, words.expand(2, self._num_rows, *words.shape))

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
    if not labels.numel():
        num_sequences = len(labels) if cu_seqlens is None else len(cu_seqlens) - 1
        return labels.new_full((num_sequences, count), _NO_TOKEN)
    labels, width = labels.reshape(-1), labels.shape[-1]
    if cu_seqlens is None:
        bounds = torch.arange(0, labels.numel() + 1, width, device=labels.device)
    else:
        bounds = cu_seqlens.long()
    # How many supervised tokens there are up to each position, and before each bound.
    running = mask.reshape(-1).cumsum(0)
    before = pad(running, (1, 0)).index_select(0, bounds)
    wanted = before[:-1].unsqueeze(1) + torch.arange(1, count + 1, device=labels.device)
    places = torch.searchsorted(running, wanted).clamp(max=labels.numel() - 1)
    return labels[places].where(wanted <= before[1:].unsqueeze(1), _NO_TOKEN)


def id_words(name: str | None) -> list[int]:
    """The first 64 bytes of a record id, as int64; zeros if there is none."""
    text = (name or "").encode(errors="replace")
    held = text[: 8 * ID_WORDS].ljust(8 * ID_WORDS, b"\0")
    return [int.from_bytes(held[i : i + 8], "big", signed=True) for i in range(0, len(held), 8)]


def text_of_id(words: list[int]) -> str | None:
    """What `id_words` was made of."""
    held = b"".join(word.to_bytes(8, "big", signed=True) for word in words)
    return held.rstrip(b"\0").decode(errors="ignore") or None


def _extreme(kind: str, row: int, loss: float, words: list[int]) -> Extreme:
    num_tokens, *more = words
    tokens = tuple(token for token in more[ID_WORDS:] if token != _NO_TOKEN)
    return Extreme(kind, row, loss, num_tokens, text_of_id(more[:ID_WORDS]), tokens)
