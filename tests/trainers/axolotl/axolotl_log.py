"""A second plugin: it writes down what the trainer logged, with all digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin

__all__ = ["LogPlugin"]


class LogPlugin(BasePlugin):
    """Writes `log.json` into the folder of the run, on rank 0."""

    trainer: Any

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        self.trainer = trainer

    def post_train(self, cfg: Any, model: Any) -> None:
        if self.trainer.is_world_process_zero():
            path = Path(cfg.output_dir).with_name("log.json")
            path.write_text(json.dumps(self.trainer.state.log_history, default=float))
