"""How many bytes and characters of text each token id stands for.

Bits per byte and per character do not depend on the tokenizer, so models with different ones can be
compared. `channel_metrics.core.token_text` makes the table from a tokenizer.

>>> sizes = TextSizes(torch.tensor([0, 3, 1]), torch.tensor([0, 2, 1]))
>>> sizes.of(torch.tensor([[1, 2], [-100, 7]]))[0].tolist()
[[3, 1], [0, 0]]
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["TextSizes"]


class TextSizes:
    """A lookup by token id.

    A size of 0 means that a token stands for no text that is known: a special token, an unknown
    one, an id past the end of the table. Such tokens do not count in metrics per byte.

    Args:
        num_bytes: int64 [V], the UTF-8 bytes of each token.
        num_chars: int64 [V], the characters that begin in each token.
    """

    def __init__(self, num_bytes: Tensor, num_chars: Tensor) -> None:
        # The first and the last entry are for ids that are no token.
        self._table = torch.nn.functional.pad(torch.stack([num_bytes, num_chars]), (1, 1))

    @property
    def num_bytes(self) -> Tensor:
        """int64 [V]."""
        return self._table[0, 1:-1]

    @property
    def num_chars(self) -> Tensor:
        """int64 [V]."""
        return self._table[1, 1:-1]

    def of(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The bytes and the characters of token ids of any shape."""
        if self._table.device != ids.device:
            self._table = self._table.to(ids.device)
        places = (ids.long() + 1).clamp(0, self._table.shape[1] - 1)
        num_bytes, num_chars = self._table.index_select(1, places.flatten())
        return num_bytes.view(ids.shape), num_chars.view(ids.shape)
