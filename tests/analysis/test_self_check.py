"""The badge of the self-check says no more than its numbers do."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.analysis_tools import run_of
from channel_metrics.analysis.report.html import write_report
from channel_metrics.analysis.report.views import views_of


@pytest.mark.parametrize(
    ("errors", "verdict", "badge"),
    [
        ([0.0] * 10, "exact", "fine"),
        ([0.002] * 10, "close", "close"),
        ([0.002] * 9 + [0.1655], "uneven", "unknown"),
        ([0.2] * 10, "differs", "differs"),
    ],
)
def test_badge(tmp_path: Path, errors: list[float], verdict: str, badge: str) -> None:
    history = [
        {"step": step, "loss": 2.0, "a_loss": 2.0 * (1 + error), "a_tokens": 10.0}
        for step, error in enumerate(errors, 1)
    ]
    run = run_of(history)
    (view,) = views_of([run])
    assert view.verdict == verdict
    assert view.check is not None
    assert view.check.largest == pytest.approx(max(errors))
    write_report([run], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert f'<span class="badge">{badge}</span><p>self-check' in page
    assert ("mostly come close" in page) == (verdict == "uneven")
    assert ("Whether that explains so much is not known" in page) == (verdict == "differs")
