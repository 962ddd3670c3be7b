"""The report as a file: complete in itself, bounded, and nothing in a name becomes markup."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from operator import mul
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.analysis_tools import make_history, run_of
from analysis.report_page import page_of
from analysis.report_runs import HOSTILE_NAMES, run_with, troubled_run
from channel_metrics.analysis.report import html
from channel_metrics.analysis.report.page_data import dump_json
from channel_metrics.analysis.report.pictures import PALETTE
from channel_metrics.analysis.report.views import rank_channels, shown, views_of

PAGE = Path(html.__file__).parent / "page"


def test_hostile_names_give_the_same_elements_as_plain_ones(tmp_path: Path) -> None:
    plain = [f"channel {i}" for i in range(len(HOSTILE_NAMES))]
    pages = [
        page_of([run_with(names), run_with(names, name=name)], tmp_path, title=title)
        for names, name, title in (
            (plain, "other", "title"),
            (list(HOSTILE_NAMES), HOSTILE_NAMES[0], HOSTILE_NAMES[1]),
        )
    ]
    assert pages[0].elements == pages[1].elements
    assert not any(tag == "img" for tag, _ in pages[1].elements)
    assert set(pages[1].data["channels"]) == {shown(name) for name in HOSTILE_NAMES}
    for name in HOSTILE_NAMES:
        assert shown(name) in pages[1].text


def test_hostile_logs_give_text(tmp_path: Path) -> None:
    run = troubled_run()
    run.problems.note("</dd><script>alert(1)</script>")
    run.problems.add("<b>log</b>.jsonl", 7, "is no JSON (<i>)")
    page = page_of([run], tmp_path)
    assert "</dd><script>alert(1)</script>" in page.text
    assert "<b>log</b>.jsonl:7: is no JSON (<i>)" in page.text
    assert [tag for tag, _ in page.elements].count("script") == 2


@given(st.recursive(st.text() | st.floats(allow_nan=False, allow_infinity=False), st.lists))
def test_json_for_the_page_is_plain_ascii_without_markup(value: Any) -> None:
    text = dump_json(value)
    assert text.isascii() and not set("<>&\n") & set(text)
    assert json.loads(text) == value


@given(st.text())
def test_a_shown_name_is_one_line_of_characters_that_reorder_nothing(name: str) -> None:
    text = shown(name)
    assert text and len(text.splitlines()) == 1
    assert not set("\u202a\u202b\u202d\u202e\u2066\u2067\u2068\u2069\x00\x1b") & set(text)
    text.encode("utf-8")


def test_the_page_allows_its_own_script_and_style_and_nothing_else(tmp_path: Path) -> None:
    page = page_of([troubled_run()], tmp_path)
    policy = next(v for tag, name, v in page.attributes if name == "content" and "default" in v)
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))

    def hash_of(text: str) -> str:
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    assert rules == {
        "default-src": "'none'",
        "script-src": hash_of(page.inside["script"][1]),
        "style-src": hash_of("".join(page.inside["style"])),
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    # A handler or a style in an attribute would be refused by the policy, and not work.
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name == "style"]
    links = [v for _, name, v in page.attributes if name in ("src", "href", "action", "srcset")]
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "http" not in "".join(page.inside["style"])


def test_tables_have_captions_and_heads_have_scopes(tmp_path: Path) -> None:
    page = page_of([troubled_run()], tmp_path)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("caption") == tags.count("table") == 2
    assert all("scope" in names for tag, names in page.elements if tag == "th")
    assert tags.count("h1") == 1 and tags.count("main") == 1


def test_findings_are_told(tmp_path: Path) -> None:
    page = page_of([troubled_run()], tmp_path)
    kinds = [value for _, name, value in page.attributes if name == "data-kind"]
    assert kinds == ["worse", "gap", "mix", "mix", "mix", "nonfinite", "check", "trend"]
    text = " ".join(page.text.split())
    assert "worse: worse since step 30 (+1.43), from 0.5340 to 1.9593" in text
    assert "no tokens in 20 logged windows, between steps 18 and 39" in text
    assert "fine: 81.8% of the records, but configured as 50.0%" in text
    assert "worse: 6 tokens have no finite loss" in text
    assert "give the trainer\u2019s loss: over 60 windows" in text
    assert "ruled out: the whole run, fine, starved." in text


def test_a_check_that_fails_is_told(tmp_path: Path) -> None:
    history = make_history(20)
    for entry in history:
        if "bbu_loss" in entry:
            entry["loss"] *= 1.5
    text = page_of([run_of(history)], tmp_path).text
    assert "do not give the trainer\u2019s loss" in text


def test_the_numbers_of_the_table_are_those_of_the_log(tmp_path: Path) -> None:
    history = make_history(40)
    page = page_of([run_of(history)], tmp_path)
    trained = [entry for entry in history if "bbu_loss" in entry]
    tokens = sum(int(entry["bbu_tokens"]) for entry in trained)
    first, last = trained[0]["bbu_loss"], trained[-1]["bbu_loss"]
    for text in (f"{tokens:,}", f"{first:.4f}", f"{last:.4f}", f"{last / first - 1:.1%}"[1:]):
        assert text in page.text
    row = next(r for r in page.data["rows"] if page.data["channels"][r["channel"]] == "bbu")
    assert row["tokens"] == tokens
    assert row["loss"] == pytest.approx(last, rel=1e-4)


def test_the_curves_of_the_page_are_those_of_the_log(tmp_path: Path) -> None:
    history = make_history(40)
    data = page_of([run_of(history)], tmp_path).data
    for number, name in enumerate(data["channels"]):
        (curve,) = (
            c
            for c in data["curves"]
            if (c["channel"], c["metric"], c["split"]) == (number, "loss", "train")
        )
        logged = {e["step"]: e[f"{name}_loss"] for e in history if f"{name}_loss" in e}
        steps = [sum(curve["steps"][: i + 1]) for i in range(len(curve["steps"]))]
        assert steps == list(logged)
        assert curve["values"] == pytest.approx(list(logged.values()), rel=1e-4)
        assert sum(curve["tokens"]) == sum(e.get(f"{name}_tokens", 0) for e in history)


def test_channels_with_most_tokens_come_first_and_unlabeled_last() -> None:
    entry = {"step": 1, "a_loss": 1, "a_tokens": 5, "b_loss": 1, "b_tokens": 9}
    run = run_of([entry | {"unlabeled_loss": 1, "unlabeled_tokens": 99}])
    assert rank_channels([run]) == ["b", "a", "unlabeled"]


def test_chance_is_no_finding_and_a_wrong_mix_is() -> None:
    def off(samples: tuple[int, int]) -> list[str]:
        entry = {"step": 1}
        for name, count in zip("ab", samples, strict=True):
            entry |= {f"{name}_loss": 1, f"{name}_tokens": 10, f"{name}_samples": count}
        (view,) = views_of([run_of([entry], ratios={"a": 1, "b": 1})])
        return [row.name for row in view.off]

    assert off((54, 46)) == []
    assert off((5400, 4600)) == ["a", "b"]
    assert off((50_100, 49_900)) == []


def test_a_log_without_channels_is_a_report_of_the_run(tmp_path: Path) -> None:
    page = page_of([run_of([{"step": s, "loss": 1 / s} for s in range(1, 9)])], tmp_path)
    assert page.data["channels"] == []
    assert [curve["metric"] for curve in page.data["curves"]] == ["loss"]
    assert "self-check: unknown, because the log lacks tokens" in page.text


def test_values_that_are_not_finite_break_lines(tmp_path: Path) -> None:
    history = [{"step": s, "a_loss": v, "a_tokens": 2} for s, v in enumerate((1, math.nan, 2), 1)]
    (curve, *_) = page_of([run_of(history)], tmp_path).data["curves"]
    assert curve["values"] == [1, None, 2]


def style_colors(theme: int) -> list[str]:
    pairs = re.findall(r"--s\d: light-dark\((#\w+), (#\w+)\)", (PAGE / "page.css").read_text())
    return [pair[theme] for pair in pairs]


def test_pictures_have_the_colors_of_the_light_page() -> None:
    assert tuple(style_colors(0)) == PALETTE


@pytest.mark.parametrize(("theme", "ground"), [(0, "#ffffff"), (1, "#17191c")])
def test_colors_are_told_apart_with_every_kind_of_color_blindness(theme: int, ground: str) -> None:
    colors = style_colors(theme)
    assert len(colors) == 8
    for color in colors:
        assert contrast(color, ground) >= 3, color
    # Okabe and Ito's palette has 0.076 by this measure; matplotlib's default one has 0.007.
    for matrix in COLOR_BLINDNESS.values():
        seen = [oklab([sum(map(mul, row, linear(c))) for row in matrix]) for c in colors]
        nearest = min(math.dist(a, b) for i, a in enumerate(seen) for b in seen[:i])
        assert nearest > 0.07


def linear(color: str) -> list[float]:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]


def contrast(a: str, b: str) -> float:
    """WCAG 2."""
    weights = (0.2126, 0.7152, 0.0722)
    low, high = sorted(sum(w * p for w, p in zip(weights, linear(c), strict=True)) for c in (a, b))
    return (high + 0.05) / (low + 0.05)


def oklab(rgb: list[float]) -> list[float]:
    """Ottosson 2020: distances in it are near to those that are seen."""
    clipped = [min(1.0, max(0.0, part)) for part in rgb]
    rows = ((0.4122, 0.5363, 0.0514), (0.2119, 0.6807, 0.1074), (0.0883, 0.2817, 0.6300))
    cones = [sum(map(mul, row, clipped)) ** (1 / 3) for row in rows]
    rows = ((0.2105, 0.7936, -0.0041), (1.9780, -2.4286, 0.4506), (0.0259, 0.7828, -0.8087))
    return [sum(map(mul, row, cones)) for row in rows]


# Machado, Oliveira and Fernandes 2009, full severity.
COLOR_BLINDNESS = {
    "none": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protan": ((0.1523, 1.0526, -0.2049), (0.1145, 0.7863, 0.0992), (-0.0039, -0.0481, 1.0520)),
    "deutan": ((0.3673, 0.8606, -0.2280), (0.2801, 0.6725, 0.0474), (-0.0118, 0.0429, 0.9689)),
    "tritan": ((1.2555, -0.0767, -0.1788), (-0.0784, 0.9308, 0.1476), (0.0047, 0.6914, 0.3039)),
}
