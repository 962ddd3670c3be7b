"""A `MixedStream` in transformers' Trainer: weights are logged and followed, on 1 and 2 ranks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from hf_case_tools import NO_DISPATCH, ddp, fixed_records, told
from hf_case_tools import run as run_ranks
from hf_tools import PaddingCollator, tiny_model, train
from paths import ROOT
from rank_cases import Case, RanksOf
from sampler_tools import CONFIG, check_draws, sources, values, weights
from transformers import TrainingArguments

from channel_metrics import ChannelMetricsError, ConfigError, MetricsConfig, MixedStream
from channel_metrics.trainers.hf import attach

ROWS = 4
# Two workers are two batches ahead each, and transformers one.
LAG = (2 * 2 + 1) * ROWS


def run(folder: Path, workers: int = 0, resume: Path | None = None, **arguments: Any) -> Any:
    """Eight steps with a window per step, on this process. Its collator remembers the records."""
    # One batch more than the workers are ahead.
    stream = MixedStream(sources(), batch_size=ROWS, lag=arguments.pop("lag", LAG))
    collator = PaddingCollator()

    def prepare(trainer: Any) -> None:
        attach(trainer, CONFIG)
        if resume is not None:
            trainer.train = partial(trainer.train, resume_from_checkpoint=str(resume))

    given: dict[str, Any] = {
        "max_steps": 8,
        "logging_steps": 1,
        "dataloader_num_workers": workers,
        "model": tiny_model(attention_dropout=0.0),
        "trainer_arguments": {"data_collator": collator},
    }
    return train(folder, prepare=prepare, records=stream, **(given | arguments))


def of(trainer: Any) -> list[dict[str, float]]:
    return values(entry for entry in trainer.state.log_history if "loss" in entry)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder, save_strategy="steps", save_steps=5)


def test_weights_are_logged_and_followed(whole: Any) -> None:
    _, trainer = whole
    found = of(trainer)
    # The change after step 1 holds from its lag on, which is the first record of step 7.
    assert weights(found)[:6] == [0.5] * 6
    assert weights(found)[6] == pytest.approx(5.5 / 6.5)
    check_draws(found, ROWS, LAG)


def test_workers_change_nothing(tmp_path: Path, whole: Any) -> None:
    assert of(run(tmp_path, workers=2)) == of(whole[1])


def test_accumulated_steps_need_no_more_lag(tmp_path: Path) -> None:
    trainer = run(tmp_path, lag=ROWS, gradient_accumulation_steps=2)
    # It holds from the middle of the second step on, which is that of the logged weight.
    assert weights(of(trainer))[:2] == pytest.approx([0.5, 5.5 / 6.5])
    with pytest.raises(ChannelMetricsError, match=f"its lag is {ROWS - 1}; make it at least 4"):
        run(tmp_path, lag=ROWS - 1, gradient_accumulation_steps=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_goes_on_with_the_draw(tmp_path: Path, whole: Any, workers: int) -> None:
    folder, trainer = whole
    checkpoint = folder / "checkpoint-5"
    resumed = run(tmp_path, workers, checkpoint, ignore_data_skip=True)
    assert of(resumed)[-3:] == of(trainer)[-3:]


def test_batches_that_the_trainer_skips_are_an_error(tmp_path: Path, whole: Any) -> None:
    with pytest.raises(ChannelMetricsError, match="ignore_data_skip=True"):
        run(tmp_path, resume=whole[0] / "checkpoint-5")


def test_a_training_set_that_does_not_follow_is_an_error_before_the_first_step(
    tmp_path: Path,
) -> None:
    steps: list[int] = []

    def prepare(trainer: Any) -> None:
        attach(trainer, CONFIG)
        trainer.training_step = lambda *_: steps.append(1)

    with pytest.raises(ConfigError, match="but no dataset follows it"):
        train(tmp_path, prepare=prepare, records=sources()["bbu"])
    assert not steps


def on_ranks(folder: Path, workers: int, *, dispatch: bool) -> Any:
    stream = MixedStream(
        sources(fixed_records),
        batch_size=ROWS if dispatch else 2 * ROWS,
        lag=2 * LAG,
    )

    trainer = run_ranks(
        folder,
        config=CONFIG,
        records=stream,
        max_steps=8,
        logging_steps=1,
        dataloader_num_workers=workers,
        accelerator_config={} if dispatch else NO_DISPATCH,
    )
    return told(trainer, values=of(trainer))


@ddp
def dispatched(folder: Path) -> Any:
    return on_ranks(folder, 0, dispatch=True)


@ddp
def dispatched_by_workers(folder: Path) -> Any:
    return on_ranks(folder, 2, dispatch=True)


@ddp
def read_by_all(folder: Path) -> Any:
    return on_ranks(folder, 0, dispatch=False)


@ddp
def read_by_all_workers(folder: Path) -> Any:
    return on_ranks(folder, 2, dispatch=False)


CASES = (dispatched, dispatched_by_workers, read_by_all, read_by_all_workers)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_together_follow_the_weights(ranks_of: RanksOf, case: Case) -> None:
    """The windows are those of one rank with twice the batch."""
    first, second = ranks_of(case)
    assert first["values"] == second["values"] and not first["warned"]
    assert first["values"] == ranks_of(dispatched)[0]["values"]
    assert weights(first["values"])[5] == 0.5 < weights(first["values"])[6]
    check_draws(first["values"], 2 * ROWS, 2 * LAG)


def test_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs/sampler.md").read_text()
    settings = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert MetricsConfig.from_mapping(settings).sampler["min"] == 0.05
    arguments = TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        max_steps=2,
        logging_steps=1,
        per_device_train_batch_size=4,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    names = {"model": tiny_model(), "collate": PaddingCollator(), "args": arguments, **sources()}
    # Those of ms-swift and TRL are run by tests of these trainers.
    for block in text.split("```python\n")[1:3]:
        exec(block.split("```")[0], names)
    assert "'bbu_weight': 0.75" in capsys.readouterr().out
    assert weights(of(names["trainer"])) == [0.25, 0.25]
