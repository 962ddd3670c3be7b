"""A second plugin: it writes down what the trainer logged, and the sequences that it trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from axolotl.integrations.base import BasePlugin
from axolotl.utils import trainer as axolotl_trainer

__all__ = ["LogPlugin"]


class LogPlugin(BasePlugin):  # type: ignore[misc]  # Axolotl has no types
    """Writes `log.json` into the folder of the run, and with packing `seen<rank>.json`."""

    trainer: Any
    seen: list[list[int]]

    def register(self, cfg: Any) -> None:
        # With several ranks, it asks torch about GPUs, and expects another error if there are none.
        axolotl_trainer.check_cuda_p2p_ib_support = lambda: True

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        """Change the config before the model is loaded. Axolotl loads the datasets itself."""
        # With several ranks, it puts each on a GPU of its own.
        if cfg.device == "cpu":
            cfg.device_map = {"": "cpu"}

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        self.trainer, self.seen = trainer, []
        if cfg.sample_packing:
            trainer.model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, model: torch.nn.Module, args: Any, batch: dict[str, Any]) -> None:
        if model.training:
            ids, places = (batch[key].flatten() for key in ("input_ids", "position_ids"))
            starts = (places == 0).nonzero().flatten().tolist()
            self.seen += [part.tolist() for part in ids.tensor_split(starts[1:])]

    def post_train(self, cfg: Any, model: Any) -> None:
        folder = Path(cfg.output_dir).parent
        (folder / f"seen{self.trainer.args.process_index}.json").write_text(json.dumps(self.seen))
        if self.trainer.is_world_process_zero():
            log = json.dumps(self.trainer.state.log_history, default=float)
            (folder / "log.json").write_text(log)
