"""SFTTrainer with use_liger_kernel=True, under both versions of TRL.

trl 0.29 trains with Liger's fused loss. trl 1.16 takes only Liger's other kernels and has a fused
head of its own, whatever the flag.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from liger_tools import interpreted, needs_liger
from trl import SFTTrainer
from trl_liger_layouts import LAYOUTS
from trl_sft_tools import OLD, MySFT, config, sft
from trl_tools import text_records, tiny_model, token_records

from channel_metrics import ChannelError
from channel_metrics.demo.tiny import byte_tokenizer
from channel_metrics.trainers.hf import attach
from channel_metrics.trainers.trl.columns import column_names

# trl 1.16 announces that it will take the flag away.
pytestmark = pytest.mark.filterwarnings("ignore:`use_liger_kernel=True` is deprecated")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    program = Path(__file__).with_name("trl_liger_run.py")
    return interpreted(program, tmp_path_factory.mktemp("trl_liger"))


@needs_liger
@pytest.mark.parametrize("layout", LAYOUTS)
def test_metrics_equal_the_oracle_in_training_and_evaluation(
    results: dict[str, Any], layout: str
) -> None:
    found, expected = results[layout]["found"], results[layout]["expected"]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-6)
    accuracies = [v for entry in found for k, v in entry.items() if k.endswith("token_acc")]
    assert max(accuracies) > 0


@needs_liger
@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_is_the_same_up_to_rounding(results: dict[str, Any], layout: str) -> None:
    off, on = results[layout]["off"], results[layout]["on"]
    assert on["channels"] > off["channels"] == 0
    for key, values in off["told"].items():
        assert values and on["told"][key] == pytest.approx(values, rel=1e-6), key
    # Adam makes much of the rounding where a gradient is 0.
    assert on["norms"] == pytest.approx(off["norms"], rel=1e-4)
    if not OLD:
        assert (on["told"], on["norms"]) == (off["told"], off["norms"])


@needs_liger
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_logits_never_exist(results: dict[str, Any], layout: str) -> None:
    """Not in the evaluation either."""
    off, on = results[layout]["off"], results[layout]["on"]
    assert on["rows"] == off["rows"] < on["tokens"]
    assert on["rows"] == 0 or results["unfused"]["rows"] > 2 * on["rows"]


@needs_liger
def test_the_patch_keeps_the_channels_of_unmodified_scripts(results: dict[str, Any]) -> None:
    assert results["patched"]["patch"] == results["patched"]["mixin"] != []


@pytest.mark.parametrize("stream", [False, True])
def test_columns_are_those_of_trl_and_the_channel(tmp_path: Path, stream: bool) -> None:
    columns, rows = [], []
    for trainer_class in (SFTTrainer, MySFT):
        records = [record | {"labels": record["input_ids"]} for record in token_records(9)]
        given = Dataset.from_list([record | {"size": 1} for record in records])
        trainer = trainer_class(
            model=tiny_model(),
            args=config(tmp_path, use_liger_kernel=True, max_length=5, shuffle_dataset=True),
            train_dataset=given.to_iterable_dataset() if stream else given,
            processing_class=byte_tokenizer(),
        )
        columns.append(column_names(trainer.train_dataset))
        ready: Any = trainer.train_dataset
        rows.append([row["input_ids"] for row in ready])
    assert rows[0] == rows[1]
    assert set(columns[1]) == {*columns[0], "channel"}
    assert ("labels" in columns[1]) != OLD


@pytest.mark.skipif(
    not OLD,
    reason="newer TRL keeps the columns with use_liger_kernel=True; `make test` runs this",
)
def test_attach_after_the_columns_are_gone_is_refused(tmp_path: Path) -> None:
    message = r"was prepared by .* \(columns input_ids\); attach comes too late with use_liger_"
    with pytest.raises(ChannelError, match=message):
        sft(tmp_path, prepare=attach, records=text_records(9), use_liger_kernel=True)
