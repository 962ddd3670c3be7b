"""Where in a table of sums each sum belongs."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["table_rows"]


def table_rows(ids: Tensor, num_rows: int, num_sums: int, *, checked: bool = False) -> Tensor:
    """int64 [num_sums]: the row of a table that each sum is added to.

    Row 0 is `unlabeled`, row i + 1 is channel i. Ids outside the table, and tokens past the last
    bound, count as unlabeled, so that no token is lost.

    Args:
        ids: [N], -1 for unlabeled.
        num_rows: of the table.
        num_sums: N, or N + 1 if the last sum holds the tokens past the last bound.
        checked: whether the ids are known to be in the table, or -1.
    """
    rows = ids.long() + 1
    if not checked:
        rows = rows.where((rows > 0) & (rows < num_rows), 0)
    return torch.nn.functional.pad(rows, (0, 1)) if num_sums > ids.numel() else rows
