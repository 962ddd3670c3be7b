"""The numbers in docs/TRAINING_PLAYBOOK.md are those of the logs that docs/playbook.py wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from statistics import fmean

import pytest
from paths import ROOT

from analysis.judging_tools import LOGS, bad_in, told_in
from channel_metrics.analysis.run import load_run

PAGE = " ".join((ROOT / "docs/TRAINING_PLAYBOOK.md").read_text(encoding="utf-8").split())


def entries(file: str) -> list[dict[str, float]]:
    """A log in tests/analysis/logs."""
    return [json.loads(line) for line in (LOGS / file).read_text().splitlines()]


ENTRIES = {
    path.stem.removeprefix("playbook_"): entries(path.name)
    for path in LOGS.glob("playbook_*.jsonl")
} | {"starved": entries("playbook_starved/log.jsonl")}


def series(name: str, key: str) -> dict[int, float]:
    """{step: value} of a key in the log of a case."""
    return {int(entry["step"]): entry[key] for entry in ENTRIES[name] if key in entry}


def at(name: str, key: str, step: int) -> str:
    return f"{series(name, key)[step]:.2f}"


def first(name: str, key: str) -> float:
    return next(iter(series(name, key).values()))


def last(name: str, key: str) -> float:
    return [*series(name, key).values()][-1]


def shares(name: str, channel: str) -> Iterator[float]:
    """The share of a channel in each window that has it, in percent."""
    for entry in ENTRIES[name]:
        if f"{channel}_tokens" in entry:
            tokens = (value for key, value in entry.items() if key.endswith("_tokens"))
            yield 100 * entry[f"{channel}_tokens"] / sum(tokens)


def whole_share(name: str, channel: str) -> float:
    """The share of a channel in the whole run, in percent."""
    keys = (f"{one}_tokens" for one in ("bbu", "rru", "lvis", "lang_chat"))
    sums = {key: sum(series(name, key).values()) for key in keys}
    return 100 * sums[f"{channel}_tokens"] / sum(sums.values())


def per_sample(name: str) -> float:
    tokens, samples = (series(name, f"lang_chat_{key}").values() for key in ("tokens", "samples"))
    return sum(tokens) / sum(samples)


def lowest(name: str, key: str) -> int:
    """The step with the lowest value."""
    values = series(name, key)
    return min(values, key=values.__getitem__)


def healthy() -> Iterator[str]:
    ends = {n: f"{last('healthy', f'{n}_loss'):.1f}" for n in ("bbu", "rru", "lvis", "lang_chat")}
    yield f"`bbu` from {first('healthy', 'bbu_loss'):.1f} to {ends['bbu']}, `rru` to {ends['rru']}"
    yield f"`lvis` to {ends['lvis']} and `lang_chat` to {ends['lang_chat']}"


def forgetting() -> Iterator[str]:
    name = "forgetting"
    yield f"from {first(name, 'loss'):.1f} to {last(name, 'loss'):.3f}, which looks fine. In eval"
    yield f"`bbu` falls to {last(name, 'eval_bbu_loss'):.2f}"
    rises = {
        n: f"from {at(name, f'eval_{n}_loss', 60)} to {last(name, f'eval_{n}_loss'):.2f}"
        for n in ("rru", "lvis", "lang_chat")
    }
    yield f"`rru` rises {rises['rru']}, `lvis` {rises['lvis']}"
    yield f"and `lang_chat` {rises['lang_chat']}"


def imbalance() -> Iterator[str]:
    name = "imbalance"
    low, *_, high = sorted(shares(name, "lang_chat"))
    windows = len(series(name, "lang_chat_loss")), len(series(name, "loss"))
    yield f"{low:.0f} to {high:.0f} % of the tokens, and a value in {windows[0]} of {windows[1]}"
    assert last(name, "loss") < last("healthy", "loss")
    yield f"falls to {last(name, 'loss'):.2f}, lower than in the healthy run"
    key = "eval_lang_chat_loss"
    yield f"`lang_chat` rises from {at(name, key, lowest(name, key))} to {last(name, key):.2f}"


def broken() -> Iterator[str]:
    name = "broken"
    accuracy = f"{last(name, 'rru_token_acc'):.2f}"
    yield f"`rru_loss` stops at {last(name, 'rru_loss'):.2f} and `rru_token_acc` at {accuracy}"
    ends = [f"{last(of, 'loss'):.2f}" for of in (name, "healthy")]
    yield f"The loss of the run ends at {ends[0]} instead of {ends[1]}"
    ends = [f"{last(of, 'bbu_loss'):.2f}" for of in (name, "healthy")]
    yield f"`bbu_loss` ends at {ends[0]} instead of {ends[1]}"
    key = "eval_rru_loss"
    assert lowest(name, key) == 40
    yield f"is at {at(name, key, 40)} at step 40, and then rises to {last(name, key):.2f}"


def starved() -> Iterator[str]:
    name = "starved"
    end = max(series(name, "lvis_tokens"))
    yield f"end at step {end}, and the run goes on to step {max(series(name, 'loss'))}"
    yield f"from {first(name, 'loss'):.1f} to {last(name, 'loss'):.2f}, which looks fine"
    key = "eval_lvis_loss"
    assert lowest(name, key) == 40
    yield f"`lvis` is at {at(name, key, 40)} at step 40 and rises to {last(name, key):.2f}"
    (alert,) = load_run(LOGS / "playbook_starved").alerts
    yield f"This line came {alert.step - end} steps after the last record"
    yield f"alert at step {alert.step}: {alert.channel}: {alert.kind}: {alert.text}"
    assert sum(series(name, "lvis_samples").values()) == 64
    lines = bad_in(load_run(LOGS / "playbook_starved"))
    assert len(lines) == 3
    yield " ".join(f"! {line}" for line in lines)


def template() -> Iterator[str]:
    name = "template"
    yield f"rise from {per_sample('healthy'):.0f} to {per_sample(name):.0f}"
    both = [f"{whole_share(of, 'lang_chat'):.0f}" for of in ("healthy", name)]
    yield f"the share of the whole run from {both[0]} to {both[1]} %"
    ends = [f"{last(of, 'lang_chat_loss'):.2f}" for of in (name, "healthy")]
    yield f"`lang_chat_loss` ends at {ends[0]} instead of {ends[1]}, which looks better"
    ends = [f"{last(of, 'eval_lang_chat_loss'):.2f}" for of in (name, "healthy")]
    yield f"ends at {ends[0]} instead of {ends[1]}."


def overfitting() -> Iterator[str]:
    name = "overfitting"
    assert lowest(name, "eval_bbu_loss") == 160
    yield f"`bbu_loss` falls to {last(name, 'bbu_loss'):.3f}"
    yield f"`eval_bbu_loss` stops at {at(name, 'eval_bbu_loss', 160)} at step 160"
    assert lowest(name, "eval_loss") == max(series(name, "eval_loss"))
    yield f"from {at(name, 'eval_loss', 160)} at step 160 to {last(name, 'eval_loss'):.2f} at"
    late = [value for step, value in series(name, "loss").items() if step >= 165]
    yield f"from step 165 on, it is between {min(late):.2f} and {max(late):.2f}"


def drift() -> Iterator[str]:
    name = "drift"
    yield f"`loss` falls to {last(name, 'loss'):.3f}"
    best = lowest(name, "eval_bbu_loss")
    yield f"lowest at step {best} ({series(name, 'eval_bbu_loss')[best]:.3f})"
    key = "eval_lang_chat_loss"
    yield f"was {at(name, key, 60)} at step 60 and ends at {last(name, key):.2f}"
    for channel in ("rru", "lvis"):
        key = f"eval_{channel}_loss"
        high = max(value for step, value in series(name, key).items() if step > 60)
        yield f"from {at(name, key, 60)} to {high:.2f}, and ends at {last(name, key):.2f}"
    of_channels = [series(name, f"eval_{one}_loss") for one in ("bbu", "rru", "lvis", "lang_chat")]
    losses = {step: [of[step] for of in of_channels] for step in of_channels[0]}
    yield f"`eval_macro_loss`, picks step {min(losses, key=lambda step: fmean(losses[step]))}:"
    yield f"`eval_worst_loss`, picks step {min(losses, key=lambda step: max(losses[step]))},"


CASES = (healthy, forgetting, imbalance, broken, starved, template, overfitting, drift)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_what_the_page_says(case: object) -> None:
    assert callable(case)
    for words in case():
        assert words in PAGE


def test_every_log_is_quoted() -> None:
    assert set(ENTRIES) == {case.__name__ for case in CASES}


def test_what_the_report_calls_it() -> None:
    unknown = "? unknown, because noise can explain a rise or hide one, or only the end rose: "
    starved = load_run(LOGS / "playbook_starved")
    assert f"{unknown}lvis in eval (" in told_in(starved)
    drifted = bad_in(load_run(LOGS / "playbook_drift.jsonl"))
    assert any(line.startswith("bbu in eval: overfitting") for line in drifted)
    assert bad_in(load_run(LOGS / "playbook_template.jsonl")) == []
