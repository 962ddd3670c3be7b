"""Runs Megatron-Bridge on the CPU and reads what it left, with the launcher of Megatron-LM."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fork_client import Preload
from megatron_lm.launch import RUN_SECONDS, Launcher, Run, has_module

needs_megatron_bridge = pytest.mark.skipif(
    not has_module("megatron.bridge"),
    reason="Megatron-Bridge is only in the latest environment, which `make test-latest` runs",
)

# {name: (ranks, fields of the model)}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp1": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2, "pipeline_dtype": "torch.float32"}),
    "cp2": (2, {"context_parallel_size": 2}),
}
SCRIPT = Path(__file__).with_name("pretrain_tiny.py")
ON = ("--patch", "megatron_bridge")


BRIDGE = Preload(("megatron_bridge.cpu:prepare",))


class BridgeLauncher(Launcher):
    """Runs in one folder."""

    preload = BRIDGE

    def train(
        self,
        layout: str,
        settings: dict[str, dict[str, Any]],
        *,
        on: bool = True,
        config: str = "",
        observe: tuple[Callable[[], Any], ...] = (),
        check: bool = True,
        script: Path = SCRIPT,
    ) -> Run:
        """Train with `settings` (see `pretrain_tiny`) and the layout's.

        on: start by `channel-metrics run --patch megatron_bridge`. config: the YAML of
        CHANNEL_METRICS_CONFIG. The other arguments, and the result, as in `Launcher.run`.
        """
        ranks, model = LAYOUTS[layout]
        settings = {**settings, "model": {**model, **settings.get("model", {})}}
        text = json.dumps(settings, sort_keys=True)
        paths = [self._file(part, end) for part, end in ((text, "json"), (config, "yaml"))]
        job = {
            "ranks": ranks,
            "script": str(script),
            "args": ["--settings", str(paths[0])],
            "channel_metrics": list(ON) if on else None,
            "observe": [f"{watch.__module__}:{watch.__qualname__}" for watch in observe],
            "environ": {"CHANNEL_METRICS_CONFIG": str(paths[1])} if config else {},
            "timeout": RUN_SECONDS,
        }
        return self._once(job, check)

    def _file(self, text: str, end: str) -> Path:
        """A file with this text; the same for the same text."""
        known: dict[str, Path] = self.__dict__.setdefault("files", {})
        if text not in known:
            known[text] = self.folder / f"settings{len(known)}.{end}"
            known[text].write_text(text)
        return known[text]
