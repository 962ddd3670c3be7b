"""The table of the sequences with the highest and lowest loss, and the words of their ids."""

from __future__ import annotations

import pytest
import torch

from channel_metrics.core.extremes import Extremes, first_tokens, id_words, text_of_id


def test_memory_does_not_grow_with_the_data() -> None:
    extremes = Extremes(2, 4)
    for _ in range(20):
        sums = {"nll": torch.rand(50), "tokens": torch.ones(50)}
        extremes.add(torch.randint(0, 3, (50,)), sums, None, None, 3)
        assert len(extremes._waiting) <= 5, "of 256 sequences"
    assert extremes._scores is not None and extremes._words is not None
    assert extremes._scores.shape == (2, 3, 2) and extremes._words.shape == (2, 3, 2, 1 + 8 + 4)
    assert extremes._words.untyped_storage().nbytes() == extremes._words.numel() * 8


@pytest.mark.parametrize("rows", [(2, 3), (3, 2)])
def test_two_tables_that_know_different_numbers_of_rows(rows: tuple[int, int]) -> None:
    tables = [Extremes(1, 0), Extremes(1, 0)]
    for extremes, count in zip(tables, rows, strict=True):
        sums = {"nll": torch.tensor([6.0 * count]), "tokens": torch.tensor([3.0])}
        extremes.add(torch.tensor([count - 1]), sums, None, None, count)
        extremes.found()
    tables[0].merge(tables[1])
    found = [(one.kind, one.row, one.loss, one.num_tokens) for one in tables[0].found()]
    assert found == [(kind, r, 2.0 * r + 2, 3) for kind in ("highest", "lowest") for r in (1, 2)]


def test_the_first_supervised_tokens() -> None:
    labels = torch.tensor([-100, 5, -100, 6, 7, 8, -100, 9, 1])
    bounds = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    found = first_tokens(labels, labels != -100, bounds, 2)
    assert found.tolist() == [[5, -1], [-1, -1], [6, 7]]
    by_row = first_tokens(labels.view(3, 3), labels != -100, None, 2)
    assert by_row.tolist() == [[5, -1], [6, 7], [9, 1]]


def test_a_micro_batch_without_tokens_has_no_first_ones() -> None:
    nothing, bounds = torch.zeros(1, 0, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)
    for cu_seqlens in (bounds, None):
        found = first_tokens(nothing, nothing.bool(), cu_seqlens, 2)
        assert found.tolist() == [[-1, -1]]


@pytest.mark.parametrize("name", ["7", "x" * 64, "ä" * 32, None])
def test_a_record_id_survives(name: str | None) -> None:
    assert text_of_id(id_words(name)) == name


def test_a_long_record_id_is_cut() -> None:
    assert text_of_id(id_words("x" + "ä" * 40)) == "x" + "ä" * 31
