"""The generated parts of the pages say what the code does, and the examples in them run."""

from __future__ import annotations

from pathlib import Path

import pytest
from schema_tools import EASY, registered

from channel_metrics.core.percentiles import BINS
from channel_metrics.core.schema import TOKENS
from channel_metrics.data.yaml import load_metrics_config
from channel_metrics.demo.config import load_config
from docs.generate import PAGES, ROOT, generated, schema_of, settings_of


@pytest.mark.parametrize("page", PAGES)
def test_the_generated_parts_are_up_to_date(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text == generated(text), "run: python docs/generate.py"


def test_every_metric_and_column_has_a_row_with_all_cells() -> None:
    with registered(*EASY):
        text = schema_of(TOKENS)
    assert "| `easy_share` | 0 to 1 | easy / tokens |" in text
    assert "| `easy` | tokens | tokens with a loss below 1 |" in text
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    # All bins have one line.
    columns = len(TOKENS.column_names) - len(BINS) + 1
    assert len(rows) == len(TOKENS.metric_names) + columns + len(EASY)
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 3 and all(cells), row


def test_settings_show_type_default_and_doc() -> None:
    from channel_metrics.config import MetricsConfig

    rows = settings_of(MetricsConfig).splitlines()
    (unknown,) = [row for row in rows if row.startswith("| `unknown`")]
    assert '| `"add" or "unlabeled" or "error"` | `add` | What happens to a channel' in unknown


@pytest.mark.parametrize("text", ["", "<!-- generated: metrics -->\nold\n", "old\n<!-- end -->\n"])
def test_a_page_without_markers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="one is missing"):
        generated(text)


def test_the_files_on_the_page_of_settings_are_valid(tmp_path: Path) -> None:
    text = (ROOT / "docs/config.md").read_text(encoding="utf-8")
    alone, targets, run = [part.split("```")[0] for part in text.split("```yaml\n")[1:]]
    path = tmp_path / "file.yaml"
    path.write_text(alone)
    assert load_metrics_config(path).metrics[-1] == "tokens_total"
    path.write_text(targets)
    assert load_metrics_config(path).eval_channels == ("bbu", "rru")
    path.write_text(run)
    settings = load_config(path)
    assert settings.metrics_of_run().eval_channels == ("bbu",)
    assert settings.probe is not None and list(settings.probe.sources) == ["canary"]
