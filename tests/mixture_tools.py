"""The mixture of configs/one_mixture, and what each trainer must count in one epoch of it."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from paths import ROOT

SCRIPTS = ROOT / "configs" / "one_mixture"
FOLDER = "runs/one_mixture"


def prepare() -> Any:
    """The script prepare.py, as a module."""
    spec = importlib.util.spec_from_file_location("prepare_mixture", SCRIPTS / "prepare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_counts(
    logs: Iterable[Mapping[str, Any]], *, more_tokens: int, whole: bool = False
) -> None:
    """Every record once. A token is a byte, and a template adds a few to each record.

    Args:
        logs: the train windows.
        more_tokens: how many are added to each record.
        whole: whether the loss is on the whole conversation, not on the answer alone.
    """
    logs = list(logs)
    expected = {name: count for name, (count, *_) in prepare().SOURCES.items()}
    sizes: Counter[str] = Counter()
    for name, count in expected.items():
        path = ROOT / "configs" / "fused_data" / f"{name}.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines()[:count]:
            messages = json.loads(line)["messages"]
            said = messages if whole else messages[-1:]
            sizes[name] += sum(len(message["content"].encode()) for message in said)
    for name, count in expected.items():
        assert _sum(logs, f"{name}_samples") == count
        assert _sum(logs, f"{name}_tokens") == sizes[name] + more_tokens * count
    assert _sum(logs, "unlabeled_tokens") == 0
    for entry in logs:
        if "bbu_share" in entry:
            assert abs(sum(v for k, v in entry.items() if k.endswith("_share")) - 1) < 1e-5


def _sum(logs: Iterable[Mapping[str, Any]], key: str) -> int:
    return sum(int(entry.get(key, 0)) for entry in logs)
