"""The rows that LLaMA-Factory makes, and the records that they are made of."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from llamafactory_tools import ONLY_HERE, STUBS

from channel_metrics.errors import UnsupportedVersionError

pytestmark = [ONLY_HERE, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(STUBS))
    from channel_metrics.trainers.llamafactory import data

    return data


def test_packs_that_are_made_in_another_way_are_an_error(data: Any) -> None:
    class Other(data.PackedSupervisedDatasetProcessor):
        def _encode_data_example(self, prompt: Any, **kwargs: Any) -> Any:
            return prompt, prompt

        def preprocess_dataset(self, examples: Any) -> Any:
            ids = [self._encode_data_example(prompt=prompt)[0] for prompt in examples["_prompt"]]
            row, positions = self.pack(ids)
            return {"input_ids": [row], "position_ids": [positions]}

    def processor(pack: Any) -> Any:
        made = Other(None, None, None, SimpleNamespace(cutoff_len=8))
        made.pack = pack
        return data.ChannelProcessor(made)

    records = {"_prompt": [[5, 6], [7], [8, 9]], "channel": ["a", "b", "c"]}
    last_first = processor(lambda ids: ([8, 9, 7, 5, 6, 0, 0], [0, 1, 0, 0, 1, 0, 0]))
    made = last_first.preprocess_dataset(records)
    assert made["channel"] == [["c", "b", "a"]] and made["channel_lengths"] == [[2, 1, 2]]
    first_first = processor(lambda ids: ([5, 6, 7, 8, 9, 0, 0], [0, 1, 0, 0, 1, 0, 0]))
    with pytest.raises(UnsupportedVersionError, match=r"cannot be matched .* use 0\.9\.5"):
        first_first.preprocess_dataset(records)


def test_blocks(data: Any) -> None:
    assert data._blocks(["a", "b", "c"], [3, 0, 6], 4) == [
        (["a", "c"], [3, 1]),
        (["c"], [4]),
    ]
