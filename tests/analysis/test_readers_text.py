"""What programs print, in the shape of their own source, gives the values that were printed.

No run of these trainers was at hand, except for transformers. Each log below follows the statement
that prints it: Megatron-LM `training.py`, NeMo `progress_printer.py`, torchtitan `metrics.py`,
OLMo-core `console_logger.py`, NeMo Automodel `train_ft.py` and `diffusion/train.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.analysis_tools import series_of
from channel_metrics.analysis.readers.keys import GLOBAL, Key
from channel_metrics.analysis.run import Run, load_run

RULE = "-" * 90
MEGATRON = f"""\
 [2026-11-23 03:18:15.477057] iteration      238/    1000 | consumed samples:         1904 | \
elapsed time per iteration (ms): 192.7 | lm loss: 2.500000E+00 | loss scale: 1.0 |
{RULE}
 validation loss at iteration 238 | lm loss value: 2.400000E+00 | lm loss PPL: 1.102318E+01 |
{RULE}
 validation-web loss at iteration 238 | lm loss value: 2.100000E+00 | lm loss PPL: 8.166170E+00 |
 validation loss at iteration 238 [hplt] | lm loss value: 2.200000E+00 | lm loss PPL: 9.03E+00 |
 validation loss at iteration 238 [code] | lm loss value: 1.200000E+00 | lm loss PPL: 3.32E+00 |
 extra_validation news-a loss at iteration 238 | lm loss value: 2.300000E+00 |
 valid loss at iteration 45000 | lm loss value: 2.327E+00 |
 validation loss at iteration 1000 on validation set | lm loss value: 2.0E+00 | lm loss PPL: 7.4 |
 validation loss at iteration 1000 on test set | lm loss value: 1.9E+00 | lm loss PPL: 6.7E+00 |
"""
# Each of its lines ends with a blank.
MEGATRON = MEGATRON.replace("|\n", "| \n")
NEMO = """\
[NeMo I 2024-11-15 10:22:04 utils:259] Setting up optimizer with config OptimizerConfig(lr=0.0003)
Training epoch 0, iteration 0/3 | lr: 3e-07 | global_batch_size: 8 | global_step: 0 | \
reduced_train_loss: 1.371 | train_step_timing in s: 7.126
Training epoch 0, iteration 1/3 | lr: 6e-07 | global_batch_size: 8 | global_step: 1 | \
reduced_train_loss: 1.3 | train_step_timing in s: 2.5 | consumed_samples: 16 | val_loss: 1.2
0: Training epoch 1, iteration 0/3 | lr: 9e-07 | global_batch_size: 8 | global_step: 2 | \
reduced_train_loss: 1.25 | train_step_timing in s: 2.5 | consumed_samples: 24 | val_loss: 1.2
Validation: iteration 1/8
Training epoch 1, iteration 1/3 | lr: 1e-06 | global_batch_size: 8 | reduced_train_loss: 1.2 | \
consumed_samples: 32 | val_loss: 1.1
"""
TITAN = "[rank0]:[titan] 2026-05-04 13:58:42,191 - root - INFO - "
TORCHTITAN = f"""\
{TITAN}Training starts at step 1
{TITAN}\x1b[31mstep: 10  \x1b[32mloss: 10.52980  \x1b[38;2;180;60;0mgrad_norm:  1.5870  \
\x1b[36mmemory: 47.71GiB(34.12%)  \x1b[34mtps: 51,534  \x1b[36mtflops: 1,099.43  \
\x1b[35mmfu: 10.05%\x1b[39m
{TITAN}\x1b[33mvalidate step: 10  \x1b[32mloss: 10.6000  \x1b[36mmemory: 47.71GiB(34.12%)  \
\x1b[34mtps: 60,534\x1b[39m
{TITAN}step: 20  loss:  9.50000  grad_norm:  1.5  memory: 47.71GiB(34.12%)  tps: 9  mfu: N/A
"""
OLMO = """\
2026-03-01 10:00:00 INFO [step=1/1000,epoch=1,eta=17m]
    train/CE loss=11.25
    train/PPL=76,879
    optim/total grad norm=1.500
    throughput/device/TPS (actual avg)=51,234
2026-03-01 10:00:01 INFO [step=2/1000,epoch=1]
2026-03-01 10:00:01 INFO Running lm evals...
2026-03-01 10:00:02 INFO [eval=lm,step=5/5]
2026-03-01 10:00:02 INFO Finished lm evals in 1.0 seconds. Metrics:
    c4/CE loss=9.123
2026-03-01 10:00:03 INFO [step=10/1000,epoch=1,eta=16m]
    train/CE loss=nan
    optim/LR (group 0)=2.00E-05
"""
AUTOMODEL = """\
2026-01-01 10:00:00 | INFO | root | step 5 | epoch 1 | loss 1.0672 | grad_norm 3.6800 | \
lr 1.00e-05 | mem 4.14 GiB | tps 1234.50(617.25/gpu) | num_label_tokens 645
2026-01-01 10:00:01 | INFO | root | [val] name "default" | step 5 | epoch 1 | loss 0.9033 | \
lr 1.00e-05 | num_label_tokens 22
2026-01-01 10:00:01 | INFO | root | [val] name "web" | step 5 | epoch 1 | loss 0.8033 | lr \
1.00e-05 | num_label_tokens 20
2026-01-01 10:00:01 | INFO | root | [val] step 9 | epoch 1 | loss 0.8 | lr 1.00e-05
"""
DIFFUSION = """\
2026-01-01 10:00:00 | INFO | root | [TRAIN] step=1070 epoch=3 loss=0.125000 avg_loss=0.250000 \
lr=1.000e-05 grad_norm=0.500 step_time=0.300s samples_per_sec=9.00 mem=4.14GB
epoch=3 step=1080 train_loss=0.120000 train_acc=0.214500 lr=8.000e-05
"""


def read(tmp_path: Path, text: str, name: str = "slurm-1.out") -> Run:
    (tmp_path / name).write_text(text, encoding="utf-8")
    run = load_run(tmp_path)
    assert not run.problems.count, run.problems
    return run


def test_validation_sets_of_megatron_are_channels_of_the_evaluation(tmp_path: Path) -> None:
    run = read(tmp_path, MEGATRON)
    assert series_of(run, GLOBAL, "loss") == {238: 2.5}
    assert series_of(run, GLOBAL, "loss", "eval") == {238: 2.4, 1000: 2.0, 45000: 2.327}
    assert series_of(run, GLOBAL, "loss", "test") == {1000: 1.9}
    losses = {name: series_of(run, name, "loss", "eval")[238] for name in run.channels()}
    assert losses == {"web": 2.1, "hplt": 2.2, "code": 1.2, "news-a": 2.3}
    assert run.channels("train") == []
    assert series_of(run, "web", "ppl", "eval") == {238: 8.16617}


def test_two_records_of_megatron_on_one_line(tmp_path: Path) -> None:
    line = " iteration 1/ 9 | lm loss: 3.0E+00 | iteration 2/ 9 | lm loss: 2.0E+00 | "
    line += "validation loss at iteration 2 | lm loss value: 2.5E+00 |\n"
    run = read(tmp_path, line)
    assert series_of(run, GLOBAL, "loss") == {1: 3.0, 2: 2.0}
    assert series_of(run, GLOBAL, "loss", "eval") == {2: 2.5}


def test_megatron_below_a_long_preamble(tmp_path: Path) -> None:
    preamble = "  rank 7: building the datasets ............... 128 | index: 5\n" * 20_000
    run = read(tmp_path, preamble + MEGATRON)
    assert series_of(run, GLOBAL, "loss") == {238: 2.5}


def test_nemo_2_counts_global_steps_and_has_no_channel(tmp_path: Path) -> None:
    run = read(tmp_path, NEMO)
    assert series_of(run, GLOBAL, "loss") == {0: 1.371, 1: 1.3, 2: 1.25, 3: 1.2}
    assert series_of(run, GLOBAL, "loss", "eval") == {1: 1.2, 3: 1.1}
    assert run.channels() == []


def test_torchtitan_with_colours(tmp_path: Path) -> None:
    run = read(tmp_path, TORCHTITAN)
    assert series_of(run, GLOBAL, "loss") == {10: 10.5298, 20: 9.5}
    assert series_of(run, GLOBAL, "loss", "eval") == {10: 10.6}
    assert series_of(run, GLOBAL, "grad_norm") == {10: 1.587, 20: 1.5}
    assert series_of(run, GLOBAL, "tps") == {10: 51534.0, 20: 9.0}
    assert run.channels() == []


def test_olmo_core(tmp_path: Path) -> None:
    run = read(tmp_path, OLMO)
    losses = series_of(run, GLOBAL, "loss")
    assert losses == pytest.approx({1: 11.25, 10: float("nan")}, nan_ok=True)
    assert series_of(run, GLOBAL, "ppl") == {1: 76879.0}
    assert series_of(run, GLOBAL, "optim/LR (group 0)") == {10: 2e-05}
    # The lines of this evaluation do not say at which step it was.
    assert {key.metric for key in run.keys if "CE" in key.metric} == set()
    assert run.channels() == []
    assert "some evaluations are left out" in str(run.problems.notes)


def olmo_evaluated(loss: str) -> str:
    return f"""\
2026-03-01 10:00:02 INFO Running lm evals...
2026-03-01 10:00:02 INFO [eval=lm,step=5/5]
2026-03-01 10:00:02 INFO Finished lm evals in 1.0 seconds. Metrics:
    c4_en-validation/CE loss={loss}
    c4_en-validation/PPL=76,879
    wiki/CE loss=2.5
2026-03-01 10:00:02 INFO Finished downstream evals in 1.0 seconds. Metrics:
    arc_easy (accuracy)=0.25
2026-03-01 10:00:02 INFO Evaluation speed:
    arc_easy (accuracy) (+variants): 0.1 sec (2 batches)
    Total evaluation time: 2.0 seconds (7 batches)
"""


def olmo_step(step: int, *, is_evaluated: bool) -> str:
    timed = "    throughput/in-loop eval time (s)=2.000\n" if is_evaluated else ""
    head = f"2026-03-01 10:00:03 INFO [step={step}/1000,epoch=1,eta=16m]\n"
    return f"{head}    train/CE loss={step}\n{timed}    optim/total grad norm=1.0\n"


def test_an_evaluation_of_olmo_core_belongs_to_the_step_with_its_time(tmp_path: Path) -> None:
    """The metrics of several steps are printed together, after the evaluation at the last one."""
    before = olmo_evaluated("9.0")  # An evaluation at the start has no step.
    text = before + olmo_step(8, is_evaluated=False) + olmo_evaluated("4.0")
    text += olmo_step(9, is_evaluated=False) + olmo_step(10, is_evaluated=True)
    text += olmo_step(19, is_evaluated=False) + olmo_evaluated("3.0")
    text += olmo_step(20, is_evaluated=True)
    run = read(tmp_path, text)
    assert series_of(run, "c4_en-validation", "loss", "eval") == {10: 4.0, 20: 3.0}
    assert series_of(run, "c4_en-validation", "ppl", "eval") == {10: 76879.0, 20: 76879.0}
    assert series_of(run, "wiki", "loss", "eval") == {10: 2.5, 20: 2.5}
    assert series_of(run, GLOBAL, "downstream/arc_easy (accuracy)", "eval") == {10: 0.25, 20: 0.25}
    assert series_of(run, GLOBAL, "loss") == {8: 8, 9: 9, 10: 10, 19: 19, 20: 20}
    assert series_of(run, GLOBAL, "optim/total grad norm") == dict.fromkeys((8, 9, 10, 19, 20), 1.0)
    assert sorted(run.channels()) == ["c4_en-validation", "wiki"]
    assert [note for note in run.problems.notes if "evaluations are left out" in note]
    assert not run.problems.count


def test_evaluations_of_olmo_core_with_their_steps_need_no_note(tmp_path: Path) -> None:
    run = read(tmp_path, olmo_evaluated("4.0") + olmo_step(10, is_evaluated=True))
    assert run.problems.notes == [] and run.channels("eval") == ["c4_en-validation", "wiki"]


def test_automodel_with_bars(tmp_path: Path) -> None:
    run = read(tmp_path, AUTOMODEL)
    assert series_of(run, GLOBAL, "loss") == {5: 1.0672}
    assert series_of(run, GLOBAL, "tps") == {5: 1234.5}
    assert series_of(run, GLOBAL, "num_label_tokens") == {5: 645.0}
    assert series_of(run, GLOBAL, "loss", "eval") == {5: 0.9033, 9: 0.8}
    assert series_of(run, "web", "loss", "eval") == {5: 0.8033}
    assert run.channels("train") == []


def test_automodel_with_pairs(tmp_path: Path) -> None:
    run = read(tmp_path, DIFFUSION)
    assert series_of(run, GLOBAL, "loss") == {1070: 0.125, 1080: 0.12}
    assert series_of(run, GLOBAL, "grad_norm") == {1070: 0.5}
    assert run.channels() == []


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("reduced_train_loss", Key("train", GLOBAL, "loss")),
        ("loss_metrics/global_avg_loss", Key("train", GLOBAL, "loss")),
        ("validation_metrics/loss", Key("eval", GLOBAL, "loss")),
        ("lm loss validation-web", Key("eval", "web", "loss")),
        ("lm loss validation-web ppl", Key("eval", "web", "ppl")),
        ("lm-loss-validation/lm loss validation", Key("eval", GLOBAL, "loss")),
    ],
)
def test_the_same_values_as_tags_of_event_files(tmp_path: Path, key: str, expected: Key) -> None:
    (tmp_path / "a.csv").write_text(f"step,{key}\n4,1.5\n")
    assert load_run(tmp_path).keys == (expected,)
