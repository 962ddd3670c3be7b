"""What was in each window: step by step, against a double loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.analysis_tools import run_of, series_of, write_jsonl
from channel_metrics import ChannelMetricsError
from channel_metrics.analysis.estimate.mix import load_mix, windows_of, with_estimates, with_mix
from channel_metrics.analysis.readers.keys import GLOBAL
from channel_metrics.analysis.run import RUN_FILE, Run, load_run

NAMES = ("a", "b", "c")


def sample_lines(steps: range, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [
        {"step": step, "id": f"{step}-{i}", "dataset": str(rng.choice(NAMES)), "tokens": int(n)}
        for step in steps
        for i, n in enumerate(rng.integers(1, 100, 4))
    ]


def shares_by_hand(lines: list[dict[str, Any]], steps: range) -> dict[str, float]:
    """The mean over the steps of the shares of the tokens."""
    found = dict.fromkeys(NAMES, 0.0)
    for step in steps:
        inside = [line for line in lines if line["step"] == step]
        for line in inside:
            found[line["dataset"]] += line["tokens"] / sum(s["tokens"] for s in inside)
    return {name: value / len(steps) for name, value in found.items()}


def joined_windows(folder: Path, log_steps: list[int], lines: list[dict[str, Any]]) -> Any:
    """As `with_estimates` builds them; caught on the way to the estimate."""
    from channel_metrics.analysis.estimate import mix as module

    log = [{"step": step, "loss": 1.0 + step} for step in log_steps]
    run = load_run(write_jsonl(folder / "logging.jsonl", log))
    mix = load_mix(write_jsonl(folder / "samples.jsonl", lines))
    return module._windows(run, mix, module._shift(run, mix), None)


def test_windows_of_several_steps(tmp_path: Path) -> None:
    lines = sample_lines(range(1, 31))
    windows = joined_windows(tmp_path, [5, 10, 15, 20, 25, 30], lines)
    assert windows.steps.tolist() == [5, 10, 15, 20, 25, 30]
    assert windows.losses.tolist() == [6, 11, 16, 21, 26, 31]
    for row, last in enumerate(windows.steps.tolist()):
        expected = shares_by_hand(lines, range(last - 4, last + 1))
        found = dict(zip(windows.channels, windows.weights[row], strict=True))
        assert found == pytest.approx(expected)
    assert windows.totals.sum() == sum(line["tokens"] for line in lines)
    assert windows.metric == "tokens"
    assert windows.num_left_out == 0


def test_a_step_whose_samples_are_not_known_leaves_its_window_out(tmp_path: Path) -> None:
    lines = [line for line in sample_lines(range(1, 31)) if line["step"] not in (7, 30)]
    windows = joined_windows(tmp_path, [5, 10, 15, 20, 25, 30], lines)
    assert windows.steps.tolist() == [5, 15, 20, 25]
    assert windows.num_left_out == 2


def test_the_window_after_a_lost_line_is_not_longer(tmp_path: Path) -> None:
    lines = sample_lines(range(1, 31))
    windows = joined_windows(tmp_path, [5, 10, 20, 25, 30], lines)
    found = dict(zip(windows.channels, windows.weights[2], strict=True))
    assert found == pytest.approx(shares_by_hand(lines, range(16, 21)))


def test_a_log_that_begins_late_begins_with_a_window_of_the_usual_length(tmp_path: Path) -> None:
    lines = sample_lines(range(1, 31))
    windows = joined_windows(tmp_path, [20, 25, 30], lines)
    found = dict(zip(windows.channels, windows.weights[0], strict=True))
    assert found == pytest.approx(shares_by_hand(lines, range(16, 21)))


def test_samples_that_count_from_zero_are_moved(tmp_path: Path) -> None:
    lines = sample_lines(range(30))
    windows = joined_windows(tmp_path, [5, 10, 15, 20, 25, 30], lines)
    found = dict(zip(windows.channels, windows.weights[0], strict=True))
    assert found == pytest.approx(shares_by_hand(lines, range(5)))
    run = with_mix(load_run(tmp_path / "logging.jsonl"), load_mix(tmp_path / "samples.jsonl"))
    assert any("counts steps from 0" in note for note in run.problems.notes)
    assert min(series_of(run, "a", "tokens")) >= 1


def test_windows_of_a_log_that_says_what_was_in_them() -> None:
    log = [
        {"step": 10, "loss": 2.0, "a_tokens": 30, "a_samples": 1, "b_tokens": 10, "b_samples": 2},
        {"step": 20, "loss": 1.5, "a_tokens": 25, "a_samples": 1},
        {"step": 25, "loss": 1.0},
    ]
    windows = windows_of(run_of(log))
    assert windows is not None
    assert windows.channels == ["a", "b"]
    assert windows.weights.tolist() == [[0.75, 0.25], [1, 0]]
    assert windows.totals.tolist() == [40, 25]
    assert windows.num_left_out == 1
    assert windows_of(run_of([{"step": 1, "loss": 1.0}])) is None


def test_without_token_counts_the_samples_are_counted_and_that_is_said(tmp_path: Path) -> None:
    lines = [{k: v for k, v in s.items() if k != "tokens"} for s in sample_lines(range(1, 41))]
    mix = load_mix(write_jsonl(tmp_path / "samples.jsonl", lines))
    run = with_estimates(run_of([{"step": s, "loss": 1.0 + s % 3} for s in range(1, 41)]), mix)
    assert any("not of tokens" in note for note in run.problems.notes)


def test_losses_of_single_samples_are_exact_and_nothing_is_estimated(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = [line | {"loss": float(rng.random())} for line in sample_lines(range(1, 41))]
    mix = load_mix(write_jsonl(tmp_path / "samples.jsonl", lines))
    run = with_estimates(run_of([{"step": s, "loss": 9.0} for s in range(1, 41)]), mix)
    for name in NAMES:
        for step, value in series_of(run, name, "loss").items():
            own = [s for s in lines if s["step"] == step and s["dataset"] == name]
            nll = sum(line["loss"] * line["tokens"] for line in own)
            assert value == pytest.approx(nll / sum(line["tokens"] for line in own))
        assert not run.has(name, "loss_estimate")
    # The run's own loss is not replaced by the mean of the samples.
    assert set(series_of(run, GLOBAL, "loss").values()) == {9.0}


@pytest.mark.parametrize("form", ["lines", "one line", "many lines"])
def test_an_order_of_samples_is_a_mix(tmp_path: Path, form: str) -> None:
    data = [{"id": f"s{i}", "channel": NAMES[i % 3], "tokens": 10 + i} for i in range(9)]
    order = [f"s{i}" for i in (0, 4, 8, 1, 1, 2)]
    texts = {
        "lines": "\n".join(order),
        "one line": json.dumps(order),
        "many lines": json.dumps(order, indent=1),
    }
    (tmp_path / "order").write_text(texts[form])
    source = write_jsonl(tmp_path / "data.jsonl", data)
    mix = load_mix(tmp_path / "order", sample_data=source, batch_size=3)
    assert series_of(mix, "a", "tokens") == {1: 10}
    assert series_of(mix, "b", "tokens") == {1: 14, 2: 22}
    assert series_of(mix, "c", "tokens") == {1: 18, 2: 12}
    assert not mix.problems.count


def test_half_of_what_an_order_needs_is_an_error(tmp_path: Path) -> None:
    order = tmp_path / "order"
    order.write_text("a\n")
    with pytest.raises(ChannelMetricsError, match="sample_data None and batch_size 3"):
        load_mix(order, batch_size=3)
    with pytest.raises(ChannelMetricsError, match="is no file"):
        load_mix(tmp_path)


def test_the_tokens_of_channels_in_the_log_are_enough_for_an_estimate(tmp_path: Path) -> None:
    """No loss of a channel, no other metric, no configured mix."""
    rng = np.random.default_rng(0)
    log = []
    for step in range(1, 121):
        tokens = rng.integers(0, 400, 2) + 1
        loss = float((tokens * [1.0, 3.0]).sum() / tokens.sum() + rng.normal(0, 0.01))
        log.append({"step": step, "loss": loss, "a_tokens": int(tokens[0])})
        log[-1] |= {"b_tokens": int(tokens[1]), "num_tokens": 1000 * step}
    run = with_estimates(load_run(write_jsonl(tmp_path / "a.jsonl", log)))
    assert run.channels() == ["a", "b"]
    for name, expected in (("a", 1.0), ("b", 3.0)):
        values = list(series_of(run, name, "loss_estimate").values())
        assert len(values) > 20
        assert values == pytest.approx([expected] * len(values), abs=0.1)


def test_a_resumed_run_with_estimates_keeps_its_resumes_and_records(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    log = []
    for step in [*range(1, 41), *range(31, 81)]:
        tokens = rng.integers(10, 100, 2)
        entry = {"step": step, "loss": float(tokens @ [1.0, 2.0] / tokens.sum())}
        entry |= {"bbu_tokens": int(tokens[0]), "rru_tokens": int(tokens[1])}
        log.append(entry | {"grad_norm": float(step)})
    write_jsonl(tmp_path / "logging.jsonl", log)
    facts = {"ratios": {"bbu": 1, "rru": 1}, "records": {"bbu": 300, "rru": 500}}
    (tmp_path / RUN_FILE).write_text(json.dumps(facts))
    plain = load_run(tmp_path)
    run = with_estimates(plain)
    assert run.resumes == plain.resumes == (31,)
    assert run.records == facts["records"] and run.ratios == {"bbu": 1.0, "rru": 1.0}
    for key in plain.keys:
        for read in (Run.series, Run.overwritten):
            before, after = (read(r, key.channel, key.metric, key.split) for r in (plain, run))
            assert [part.tolist() for part in before] == [part.tolist() for part in after]
    assert len(run.overwritten("bbu", "tokens")[0]) == 10
    steps, estimates = run.series("bbu", "loss_estimate")
    assert len(steps) > 10 and estimates == pytest.approx(1.0, abs=0.01)
    assert len(run.overwritten("bbu", "loss_estimate")[0]) == 0
    assert len(run.store) == len(plain.store) + 6 * len(steps)


def test_a_mix_takes_the_place_of_what_the_log_says_of_it(tmp_path: Path) -> None:
    log = [{"step": step, "loss": 1.0, "a_tokens": 7, "b_tokens": 7} for step in range(1, 5)]
    run = run_of(log)
    lines = [{"step": step, "id": step, "dataset": "a", "tokens": 5} for step in range(1, 5)]
    once = with_mix(run, load_mix(write_jsonl(tmp_path / "samples.jsonl", lines)))
    for line in lines:
        line["tokens"] = 6
    twice = with_mix(once, load_mix(write_jsonl(tmp_path / "samples.jsonl", lines)))
    for joined, tokens in ((once, 5.0), (twice, 6.0)):
        assert series_of(joined, "a", "tokens") == dict.fromkeys(range(1, 5), tokens)
        assert series_of(joined, "b", "tokens") == dict.fromkeys(range(1, 5), 7.0)
        keys = [key for key, _, _ in joined.all_series()]
        assert len(keys) == len(set(keys))
