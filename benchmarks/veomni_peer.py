"""The channel losses of VeOmni, from its own installed source, see `peers`.

Its trainer measures one step of ten (`interval`), because each measured step computes the cross
entropy a second time. Here every step is measured, as the others do.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import Call, compiled, source_tree, start_one_rank

__all__ = ["VeOmni"]

_PATH = "veomni/trainer/callbacks/channel_loss_callback.py"


class VeOmni:
    """One `ChannelLossComputer`.

    ids: source ids, one per sequence. positions: [B, S], counted from 0 in each sequence.
    """

    def __init__(self, ids: list[int], positions: Tensor) -> None:
        self._module = _module()
        self.computer = self._module["ChannelLossComputer"](SimpleNamespace(sp_enabled=False))
        # Else a micro-batch that does not fit is skipped.
        self.computer.strict = True
        self._ids, self._positions = ids, positions

    @classmethod
    def of_packed(cls, ids: list[int], bounds: Tensor) -> VeOmni:
        """For one row of sequences between `bounds` [N + 1]."""
        lengths = bounds.diff().long()
        starts = bounds[:-1].long().repeat_interleave(lengths)
        return cls(ids, (torch.arange(int(bounds[-1])) - starts)[None])

    def aggregation(self, losses: Tensor, mask: Tensor) -> Call:
        """One micro-batch whose token losses are known."""
        labels = torch.where(mask, 1, -100)

        def call() -> None:
            self._begin()
            with torch.no_grad():
                self.computer._result = self.computer._aggregate_by_source(
                    per_token_loss=losses,
                    labels_flat=labels,
                    attention_mask_flat=None,
                    source_ids=self._ids,
                    position_ids=self._positions,
                    ignore_index=-100,
                    strict=True,
                )
            self._end()

        return call

    @contextmanager
    def observing(self) -> Iterator[None]:
        """One micro-batch of a model on which `computer.install` was called."""
        self._begin()
        with self.computer.capture():
            yield
        self._end()

    def projected_again(self, hidden: Tensor, weight: Tensor, target: Tensor) -> None:
        """One micro-batch beside a fused loss: hidden [T, H], weight [V, H], shifted target [T]."""
        with torch.no_grad():
            losses = self.computer._per_token_ce(None, target, None, hidden, weight, -100)
        self.aggregation(losses, target != -100)()

    def log(self) -> dict[int, Any]:
        """The sums of a step over all ranks; of one rank here, told that there are two."""
        start_one_rank()
        callback = object.__new__(self._module["ChannelLossCallback"])
        callback.__dict__.update(
            computer=self.computer,
            parallel_state=SimpleNamespace(dp_size=2, dp_group=None),
            trainer=SimpleNamespace(),
            config=SimpleNamespace(strict=True),
            _source_registry={},
        )
        totals: dict[int, Any] = callback._reduce_step_totals(self.computer.step_totals)[0]
        return totals

    def _begin(self) -> None:
        self.computer.begin_step([self._ids], [self._positions], [None])
        self.computer.before_micro_step()

    def _end(self) -> None:
        self.computer.after_micro_step()
        if not self.computer.step_totals:
            raise RuntimeError("VeOmni measured nothing")


def _module() -> dict[str, Any]:
    """The names of its module; what it imports from VeOmni itself is replaced."""
    tree = source_tree("veomni", _PATH)
    own = [node for node in tree.body if not (isinstance(node, ast.ImportFrom) and node.level)]
    quiet = SimpleNamespace(info_rank0=lambda *_: None, warning_rank0=_refuse)
    names: dict[str, Any] = {
        "__name__": "veomni_channel_loss",
        "Callback": object,
        "TrainerState": object,
        "IGNORE_INDEX": -100,
        "get_logger": lambda _: quiet,
        "get_parallel_state": None,
    }
    exec(compiled(own), names)
    return names


def _refuse(message: str, **_: Any) -> None:
    raise RuntimeError(message)
