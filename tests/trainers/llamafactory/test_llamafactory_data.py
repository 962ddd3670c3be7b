"""The rows that LLaMA-Factory makes, and the records that they are made of."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from llamafactory_tools import ONLY_HERE, STUBS

from channel_metrics.errors import UnsupportedVersionError
from channel_metrics.trainers.hf.columns import LENGTHS_COLUMN, NAMES_COLUMN

pytestmark = [ONLY_HERE, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(STUBS))
    from channel_metrics.trainers.llamafactory import data

    return data


class Texts:
    """A tokenizer whose tokens are the digits of a text; 0 begins a row."""

    eos_token, add_bos_token, bos_token_id = "9", True, 0

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[int(digit) for digit in text] for text in texts]}


def test_packs_that_are_made_in_another_way(data: Any) -> None:
    class Other(data.PackedSupervisedDatasetProcessor):  # type: ignore[misc]  # it has no types
        def _encode_data_example(self, prompt: Any, **kwargs: Any) -> Any:
            return list(prompt), list(prompt)

        def preprocess_dataset(self, examples: Any) -> Any:
            ids = [self._encode_data_example(prompt=prompt)[0] for prompt in examples["_prompt"]]
            return {"input_ids": [self.pack(ids)]}

    def processor(pack: Any) -> Any:
        made = Other(None, None, None, SimpleNamespace(cutoff_len=8))
        made.pack = pack
        return data.NumberedRecords(made)

    records = {"_prompt": [[5, 6], [7], [7], [8, 9]], NAMES_COLUMN: ["a", "b", "c", "d"]}
    # Not even the last record of a length comes first.
    other_order = processor(lambda ids: [*ids[3], *ids[1], *ids[2], *ids[0], 0, 0])
    made = other_order.preprocess_dataset(records)
    assert made["input_ids"] == [[8, 9, 7, 7, 5, 6, 0, 0]]
    assert made[NAMES_COLUMN] == [["d", "b", "c", "a"]]
    # The padding is nobody's sequence; its tokens are not trained on.
    assert made[LENGTHS_COLUMN] == [[2, 1, 1, 2]]
    others = processor(lambda ids: [token % 10 for part in ids for token in part])
    with pytest.raises(UnsupportedVersionError, match=r"cannot be matched .* use 0\.9\.5"):
        others.preprocess_dataset(records)


def test_blocks(data: Any) -> None:
    """Texts are cut where a block ends; the first token of a block is overwritten."""
    settings = SimpleNamespace(packing=True, cutoff_len=4, template="default")
    inner = data.PretrainDatasetProcessor(None, Texts(), None, settings)
    texts = ["11", "", "22222", "33"]
    records = {"_prompt": [[{"content": text}] for text in texts], NAMES_COLUMN: list("abcd")}
    made = data.NumberedRecords(inner).preprocess_dataset(records)
    assert made["input_ids"] == [[0, 1, 9, 9], [0, 2, 2, 2], [0, 9, 3, 3]]
    assert made[NAMES_COLUMN] == [["a", "b"], ["c"], ["c", "d"]]
    assert made[LENGTHS_COLUMN] == [[3, 1], [4], [2, 2]]
