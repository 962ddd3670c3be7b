"""Numbers in the upper bits of token ids."""

from __future__ import annotations

import torch

from channel_metrics.data.numbered import number_of, numbered, without_numbers


def test_tokens_carry_the_number_of_their_record() -> None:
    ids = [0, 7, 2**31 - 1]
    row = [*numbered(ids, 3), *numbered(torch.tensor(ids), 2**20), *ids]
    assert [number_of(token) for token in row] == [3] * 3 + [2**20] * 3 + [0] * 3
    assert without_numbers(row) == ids * 3
    assert {type(token) for token in row} == {int}
