"""One training run of Megatron's own loop: what its hooks do with the channels.

The hooks are in `channel_metrics.patches.megatron`; here is no patching. Every rank makes the
same calls in the same order: what a rank does not know (it has no data, no loss, no writer)
it takes part in with zeros.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from channel_metrics.channels import ChannelTable
from channel_metrics.errors import ChannelError, UnsupportedVersionError
from channel_metrics.totals import RunTotals
from channel_metrics.trainers.megatron import MegatronChannelMetrics
from channel_metrics.trainers.megatron_arguments import config_of, dataset_name, name_by_path
from channel_metrics.trainers.megatron_data import ChannelDataset
from channel_metrics.trainers.megatron_ids import MicroBatch, Tap

__all__ = ["TOTALS_FILE", "MegatronRun", "loss_mask_of"]

# Beside Megatron's own files in the folder of a checkpoint.
TOTALS_FILE = "channel_metrics_totals.json"


class MegatronRun:
    """The channels of one run: train and evaluation windows over one table."""

    def __init__(self, args: Any) -> None:
        self.args = args
        self.config = config_of(args)
        self._names = name_by_path(args)
        # The names of conversations come from their files, where those have any.
        declared = args.channels if getattr(args, "sft", False) else self._names.values()
        self.table = ChannelTable(
            dict.fromkeys((*declared, *self.config.channels)),
            unknown=self.config.unknown,
            key_format=self.config.key_format,
        )
        self.train = MegatronChannelMetrics(self.table, config=self.config)
        self.evaluation = MegatronChannelMetrics(self.table, config=self.config)
        self._warned_of_crossings = False

    def dataset(self, dataset: Any) -> ChannelDataset:
        """The data set with the channel of each sample."""
        return ChannelDataset(
            dataset,
            self.table,
            self._id_of,
            fields=self.config.fields,
            # Hybrid context parallelism sends the tokens of each sequence to other ranks.
            per_token=bool(getattr(self.args, "hybrid_context_parallel", False)),
        )

    def forward_step(
        self, step: Callable[..., Any], metrics: MegatronChannelMetrics
    ) -> Callable[..., Any]:
        """A forward step function of Megatron's, whose loss function counts into `metrics`."""

        def counting_forward_step(data_iterator: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
            cut_expected = self.args.context_parallel_size > 1
            micro_batch = MicroBatch(self.table, drop_dataset_id=cut_expected)
            metrics.watch(model)
            tapped = None if data_iterator is None else Tap(data_iterator, micro_batch)
            with micro_batch.active():
                output, loss_func = step(tapped, model, *args, **kwargs)
            if loss_func is None:
                return output, loss_func
            return output, self._counting(loss_func, micro_batch, metrics)

        return counting_forward_step

    def log_values(self, *, reset: bool) -> dict[str, float]:
        """The train metrics of the interval; a collective."""
        return self.train.compute(reset=reset)

    def save(self, folder: Path, *, is_writer: bool) -> None:
        """Write the totals into the folder of a checkpoint; a collective."""
        totals = self.train.totals_now()
        if is_writer:
            totals.save(folder / TOTALS_FILE)

    def load(self, folder: Path) -> None:
        """Go on with the totals of a checkpoint; warn and start at zero if it has none."""
        path = folder / TOTALS_FILE
        if path.exists():
            self.train.totals = RunTotals.load(path)
            return
        warnings.warn(
            f"the checkpoint {folder} has no {TOTALS_FILE}: it was written without --channels. "
            "tokens_total and samples_total start at zero.",
            stacklevel=2,
        )

    def _id_of(self, path: str | None) -> int:
        if path not in self._names:
            self._names[path] = dataset_name(path)
        return self.table.ids([self._names[path]])[0]

    def _counting(
        self,
        loss_func: Callable[..., Any],
        micro_batch: MicroBatch,
        metrics: MegatronChannelMetrics,
    ) -> Callable[..., Any]:
        def counting_loss_func(losses: Tensor, *args: Any, **kwargs: Any) -> Any:
            if micro_batch.num_batches == 0:
                # A tensor-parallel rank without data: it holds a copy of what another counts.
                return loss_func(losses, *args, **kwargs)
            self._warn_of_crossings(micro_batch)
            counted = metrics.count(
                loss_func, channels=self._ids(micro_batch), loss_mask=loss_mask_of(loss_func)
            )
            return counted(losses, *args, **kwargs)

        return counting_loss_func

    def _ids(self, micro_batch: MicroBatch) -> Tensor:
        if micro_batch.ids is None:
            raise ChannelError(
                "--channels was given, but the batch has neither channel_ids, channels nor "
                "dataset_id; a data loader of your own (--dataloader-type external) must give "
                "int64 `channels`, one per row, in every batch."
            )
        if micro_batch.num_batches != 1:
            raise ChannelError(
                f"the forward step took {micro_batch.num_batches} batches from its data iterator; "
                "which one the losses are of cannot be told. Take one batch per forward step."
            )
        if self.args.context_parallel_size > 1 and not micro_batch.is_cut:
            raise ChannelError(
                "the labels were cut for context parallelism, but not by megatron.core.utils."
                "get_batch_on_this_cp_rank (or its THD variants), so the channel ids could not "
                "follow; cut the batch with Megatron's function, or use "
                "channel_metrics.trainers.megatron in the script."
            )
        return micro_batch.ids

    def _warn_of_crossings(self, micro_batch: MicroBatch) -> None:
        if micro_batch.num_crossings and not self._warned_of_crossings:
            self._warned_of_crossings = True
            warnings.warn(
                f"{micro_batch.num_crossings} supervised targets of this micro-batch are the first "
                "token of the next conversation of their pack; they count for the channel of "
                "that conversation. A prompt format that masks them avoids it.",
                stacklevel=2,
            )


def loss_mask_of(loss_func: Any) -> Tensor:
    """The loss mask that Megatron's forward steps bind to their loss function.

    `partial(loss_func, loss_mask, ...)`, by position or by name; raises
    `UnsupportedVersionError` for anything else.
    """
    bound: Mapping[str, Any] = getattr(loss_func, "keywords", None) or {}
    positional = getattr(loss_func, "args", ())
    mask = bound.get("loss_mask", positional[0] if positional else None)
    if isinstance(mask, Tensor):
        return mask
    raise UnsupportedVersionError(
        "the forward step must return (output, partial(loss_func, loss_mask)), as Megatron's own "
        f"scripts do, but returned {loss_func!r}; use channel_metrics.trainers.megatron in the "
        "script."
    )
