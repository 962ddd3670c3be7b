"""Outliers of TRL's SFTTrainer: ids outlive its preparation; packed rows have the text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from trl_sft_tools import BFD, OF_LETTER, MySFT, sft
from trl_tools import text_records

from channel_metrics import MetricsConfig

END = "<|endoftext|>"


def lines_of(folder: Path, id_field: str = "id", **options: Any) -> list[dict[str, Any]]:
    records = [{**record, "id": n} for n, record in enumerate(text_records(96))]
    config = MetricsConfig(
        outliers={"folder": str(folder / "outliers"), "count": 50, "id_field": id_field}
    )
    sft(folder, MySFT, records, channel_metrics=config, **options)
    path = folder / "outliers" / "rank0.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("id_field", ["id", "@index"])
def test_padded_rows_have_ids(tmp_path: Path, id_field: str) -> None:
    texts = {str(n): record["text"] for n, record in enumerate(text_records(96))}
    lines = lines_of(tmp_path, id_field)
    assert lines
    for line in lines:
        # The loss of the first token is none.
        assert line["text"].removesuffix(END) and texts[line["id"]][1:] in line["text"]


def test_packed_rows_have_texts(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, packing=True, packing_strategy=BFD, padding_free=True)
    assert lines
    for line in lines:
        text, _, behind = line["text"].partition(END)
        assert not behind, "one record"
        letters = {OF_LETTER[ord(letter)] for letter in text if ord(letter) in OF_LETTER}
        assert letters == {line["channel"]}, line
