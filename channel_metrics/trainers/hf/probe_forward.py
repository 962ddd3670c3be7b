"""The forwards of one probe: they give the sums of this rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from channel_metrics.capture.reader import TokenLossReader
from channel_metrics.capture.transformers import is_causal
from channel_metrics.core.intervals import moments
from channel_metrics.core.sums import sequence_sums
from channel_metrics.errors import UnsupportedVersionError
from channel_metrics.probes.probe import PROBE_COLUMNS
from channel_metrics.probes.without_trace import forward_module
from channel_metrics.trainers.hf.parallel import RankLayout, layout_of
from channel_metrics.trainers.hf.probe_data import ProbeBatch

__all__ = ["ProbeReader", "layout_for_probes"]


def layout_for_probes(trainer: Any) -> RankLayout:
    """Find out how the ranks share the samples of a probe.

    Args:
        trainer: the trainer whose model is measured.

    Raises:
        UnsupportedVersionError: this run cuts rows along the sequence.
    """
    layout = layout_of(trainer.accelerator, tp_size=getattr(trainer, "get_tp_size", lambda: 1)())
    if layout.shards_rows:
        raise UnsupportedVersionError(
            "a probe runs whole rows, but this run cuts them along the sequence (cp_size = "
            f"{layout.cp_size}, sp_size = {layout.sp_size}); leave the probe out, or use the "
            "trainer's own evaluation."
        )
    return layout


class ProbeReader:
    """Runs batches through the model of a trainer, and adds up the sums of their tokens.

    Args:
        trainer: the trainer whose model is measured.
        layout: how the ranks share the samples.
    """

    def __init__(self, trainer: Any, layout: RankLayout) -> None:
        self.model = forward_module(trainer.model_wrapped)
        self.device: torch.device = trainer.args.device
        self._prepare = trainer._prepare_input
        self._counts = layout.counts(cut=False)
        self._causal = is_causal(trainer.accelerator.unwrap_model(trainer.model))
        self._reader = TokenLossReader()

    def measure(self, datasets: Sequence[Sequence[ProbeBatch]]) -> Tensor:
        """Run the batches. The model must be in evaluation mode, and gradients must be off.

        Args:
            datasets: the batches of each dataset.

        Returns:
            The sums [num_datasets, K] on the device, in the order of the K `PROBE_COLUMNS`.
        """
        return torch.stack([self._of_dataset(batches) for batches in datasets])

    def _of_dataset(self, batches: Sequence[ProbeBatch]) -> Tensor:
        # Some devices have no float64.
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        total = torch.zeros(len(PROBE_COLUMNS), dtype=dtype, device=self.device)
        for batch in batches:
            found = self._of_batch(batch, dtype)
            # Every rank runs the same number of forwards, even if it has nothing to add.
            if batch.counts and self._counts:
                total += found.to(total.device)
        return total

    def _of_batch(self, batch: ProbeBatch, dtype: torch.dtype) -> Tensor:
        inputs = self._prepare(dict(batch.inputs))
        labels = inputs["labels"]
        with self._reader.observe(self.model) as observation:
            self.model(**inputs)
        values, _ = self._reader.read(observation, labels, causal=self._causal)
        sums = sequence_sums(values, batch.cu_seqlens.to(values.losses.device), dtype)
        finite = sums["tokens"] - sums.get("nonfinite", 0)
        return torch.cat([moments(sums["nll"], finite), moments(sums["correct"], sums["tokens"])])
