"""What the mixin takes from a batch and from the trainer, and leaves as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_tools import train

from channel_metrics.trainers.hf import attach
from channel_metrics.trainers.hf.batch import has_token_labels

IDS = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"labels": IDS}, True),
        ({"shift_labels": IDS}, True),
        ({"labels": IDS[0], "input_ids": IDS[0]}, True),
        ({"labels": IDS[0], "input_ids": IDS}, False),
        ({"labels": IDS.float(), "input_ids": IDS}, False),  # one number per class
        ({"labels": IDS.tolist(), "input_ids": IDS}, False),
        ({"input_ids": IDS}, False),
    ],
)
def test_labels_of_tokens(batch: dict[str, Any], expected: bool) -> None:
    assert has_token_labels(batch) is expected


def test_the_trainer_keeps_the_columns_that_it_kept(tmp_path: Path) -> None:
    plain: Any = train(tmp_path, max_steps=1)
    observed: Any = train(tmp_path, prepare=attach, max_steps=1)
    assert observed._signature_columns == plain._signature_columns
