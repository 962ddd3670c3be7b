"""ms-swift keeps encoded records in a cache of files. Those with roles are not those without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rank_cases import RanksOf, case
from swift_files import arguments, make_model
from swift_tools import SWIFT, needs_swift, run
from test_swift_roles import CONFIG

from channel_metrics import MetricsConfig

pytestmark = needs_swift
# Otherwise ms-swift only keeps how long the records are.
KEPT: dict[str, Any] = {
    "load_from_cache_file": True,
    "lazy_tokenize": False,
    "truncation_strategy": "split",
    "use_chat_template": False,
}


@case(SWIFT, ranks=1)
def cached(folder: Path) -> Any:
    folder.mkdir()
    model, data = make_model(folder / "model", attention_dropout=0.0), folder / "train.jsonl"
    texts = [{"role": "assistant", "content": f"say {number} " * 9} for number in range(6)]
    found = [{"messages": [text], "channel": "bbu"} for text in texts]
    data.write_text("".join(json.dumps(record) + "\n" for record in found))
    options = arguments(model, data, folder, max_steps=1, max_length=20, **KEPT)
    plain = MetricsConfig(metrics=("loss", "tokens"), live_table=False)
    return [run(options, config)["log"][0] for config in (plain, CONFIG, plain, CONFIG)]


def test_a_run_takes_no_records_with_the_roles_of_another(ranks_of: RanksOf) -> None:
    ((plain, roles, plain_again, roles_again),) = ranks_of(cached)
    assert plain == plain_again
    assert roles == roles_again
    assert {key: value for key, value in roles.items() if "role/" not in key} == plain
    assert roles["role/assistant_tokens"] > 0
    assert plain["bbu_loss"] == pytest.approx(roles["bbu_loss"])
