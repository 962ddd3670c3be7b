"""Channel metrics in TRL's SFTTrainer, with its packing and its fused losses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import trl
from packaging.version import Version
from torch import Tensor

from channel_metrics.capture.logits import shifted_labels
from channel_metrics.capture.reader import TokenLossReader
from channel_metrics.config import MetricsConfig
from channel_metrics.core.labels import field_columns
from channel_metrics.core.sums import TokenValues
from channel_metrics.data.batch_channels import BatchChannels
from channel_metrics.data.collator import ChannelCollator
from channel_metrics.errors import ChannelError, ConfigError, UnsupportedVersionError
from channel_metrics.losses.cross_entropy import TokenLosses
from channel_metrics.session import ChannelMetrics
from channel_metrics.trainers.hf.batch import Scratch
from channel_metrics.trainers.hf.mixin import ChannelMetricsMixin
from channel_metrics.trainers.trl.chunked import CHUNKED_LOSS
from channel_metrics.trainers.trl.collator import PACK_BOUNDS_KEY, TOKEN_FIELD, PackCollator
from channel_metrics.trainers.trl.columns import column_names, prepare_for_liger
from channel_metrics.trainers.trl.packing import pack_with_channels

__all__ = ["SFTChannelMetricsMixin", "prepare_dataset"]

# The names that the indices in a trainer's packs stand for; empty if there are no packs. It is an
# attribute of the trainer, because data are prepared before the trainer has a session.
_NAMES_ATTRIBUTE = "_channel_metrics_packed_names"


class _SFTReader(TokenLossReader):
    """Reads the fused LM head of newer TRL, whose forward returns log probs and no logits."""

    # The outputs of the model for this micro-batch, if it has a fused head.
    fused: Any = None

    def trainer_losses(self, labels: Tensor, *, per_token: bool) -> TokenLosses | None:
        """Token losses from the log probs of the fused head, if the model has one."""
        fused, self.fused = self.fused, None
        if fused is None:
            return None
        targets = labels if per_token else shifted_labels(labels)
        if fused.log_probs.shape != targets[..., 1:].shape:
            raise UnsupportedVersionError(
                f"the log probs of the model must have shape {list(targets[..., 1:].shape)}, one "
                f"less than the labels, but have {list(fused.log_probs.shape)} (prompt tuning, or "
                "a sharded sequence); detach the metrics for this model."
            )
        pad = torch.nn.functional.pad
        nll = pad(-fused.log_probs.detach().float(), (0, 1))
        correct = fused.is_top1 if self.with_correct else None
        return TokenLosses(
            nll=nll.flatten(),
            correct=None if correct is None else pad(correct, (0, 1)).flatten(),
            target=targets.to(nll.device).flatten(),
            reported_sum=nll.sum(),
        )


@dataclass
class _SFTScratch(Scratch):
    """pack_bounds: int64 [packs + 1], the bounds of the packs in this micro-batch; else None."""

    reader: _SFTReader
    pack_bounds: Tensor | None = None


class SFTChannelMetricsMixin(ChannelMetricsMixin):
    """Put before SFTTrainer: `class MySFT(SFTChannelMetricsMixin, SFTTrainer)`.

    With packing, and in trl 0.29 with Liger, only this or the patch works, because the constructor
    drops the channels.
    """

    channel_scratch: _SFTScratch
    args: Any

    def __init__(
        self, *args: Any, channel_metrics: MetricsConfig | None = None, **kwargs: Any
    ) -> None:
        self._packing_config = channel_metrics or MetricsConfig()
        super().__init__(*args, channel_metrics=channel_metrics, **kwargs)

    def start_channel_metrics(self, config: MetricsConfig) -> None:
        """Open a session.

        Raises `ChannelError` if TRL has dropped the channels, for packing or for Liger.
        """
        late = not hasattr(self, _NAMES_ATTRIBUTE)
        for description, dataset, packing in self._datasets():
            fused = late and self.args.use_liger_kernel and description == "train"
            if packing or fused:
                _check_channels_left(dataset, config, description, packing)
        super().start_channel_metrics(config)

    def _new_scratch(self, session: ChannelMetrics) -> _SFTScratch:
        reader = _SFTReader(with_correct=session.with_correct, guard=session.guard)
        return _SFTScratch(reader)

    def _prepare_inputs(self, inputs: Any) -> Any:
        prepared = super()._prepare_inputs(inputs)
        bounds = prepared.pop(PACK_BOUNDS_KEY, None)
        if self.channel_metrics is not None:
            self.channel_scratch.pack_bounds = bounds
        return prepared

    def _first_records(
        self, batch: BatchChannels, values: TokenValues, count: int, per_rank: int
    ) -> tuple[BatchChannels, TokenValues] | None:
        """As in the base class; if the batch holds packs, a record is a pack."""
        bounds = self.channel_scratch.pack_bounds
        if bounds is None or bounds.numel() != per_rank + 1:
            return super()._first_records(batch, values, count, per_rank)
        end: Any = bounds[count]
        positions = torch.arange(values.mask.numel(), device=values.mask.device)
        inside = (positions < end).view(values.mask.shape)
        cu_seqlens = None if batch.cu_seqlens is None else batch.cu_seqlens.clamp(max=end)
        return (
            replace(batch, cu_seqlens=cu_seqlens),
            values._replace(mask=values.mask & inside),
        )

    def _observed_loss(
        self, compute: Any, model: torch.nn.Module, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """TRL's own loss. It comes from the first outputs that have log probs."""
        reader = self.channel_scratch.reader

        def keep_fused(_model: Any, _args: Any, outputs: Any) -> None:
            if reader.fused is None and getattr(outputs, "log_probs", None) is not None:
                reader.fused = outputs

        handle = model.register_forward_hook(keep_fused)
        try:
            with CHUNKED_LOSS.placed():
                return super()._observed_loss(compute, model, inputs, *args, **kwargs)
        finally:
            handle.remove()
            reader.fused = None

    def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
        session = self.channel_metrics
        config = self._packing_config if session is None else session.config
        theirs: Any = super()
        prepare = theirs._prepare_dataset
        return prepare_dataset(self, prepare, config, *args, **kwargs)

    def _datasets(self) -> Iterator[tuple[str, Any, bool]]:
        """(name, dataset, whether TRL has packed it)"""
        if (self.args.dataset_kwargs or {}).get("skip_prepare_dataset"):
            return
        packing = self.args.packing
        yield "train", self.train_dataset, packing
        eval_packing = packing if self.args.eval_packing is None else self.args.eval_packing
        held = self.eval_dataset
        for name, dataset in (held if isinstance(held, dict) else {"eval": held}).items():
            yield name, dataset, eval_packing

    def _names_of_packs(self, dataset: Any) -> tuple[str, ...]:
        """The names that the indices in a dataset's packs stand for; none without indices."""
        names: tuple[str, ...] = getattr(self, _NAMES_ATTRIBUTE, ())
        return names if names and TOKEN_FIELD in column_names(dataset) else ()

    def _declare(self, session: ChannelMetrics, dataset: Any, split: str) -> bool:
        names = self._names_of_packs(dataset)
        session.declare_names(names)
        return bool(names) or super()._declare(session, dataset, split)

    def channel_names(self, session: ChannelMetrics, dataset: Any) -> set[str] | None:
        """The channels of a dataset; None for packs, which share the names of all datasets."""
        return None if self._names_of_packs(dataset) else super().channel_names(session, dataset)

    def _with_channels(self, session: ChannelMetrics, dataset: Any, description: str) -> Any:
        names = self._names_of_packs(dataset)
        if not names:
            _check_position_ids(self.data_collator)
            return super()._with_channels(session, dataset, description)
        self._declare(session, dataset, description)
        if self._collator_kind(dataset, description, True) is not ChannelCollator:
            raise ConfigError(
                "packs are cut along the sequence (cp_size, sp_size), or sent by one process to "
                "the others (dispatch_batches), so their channels would be lost; set both off, or "
                "packing=False."
            )
        return PackCollator(
            self.data_collator,
            names=names,
            table=session.labels,
            with_marks=bool(session.token_axes.columns),
        )


def prepare_dataset(
    trainer: Any, prepare: Callable[..., Any], config: MetricsConfig, *args: Any, **kwargs: Any
) -> Any:
    """TRL's `_prepare_dataset`, which also keeps the channels, with packing and with Liger.

    Args:
        trainer: the SFTTrainer.
        prepare: TRL's own method, bound.
        config: the fields, and the declared channels.
        args, kwargs: the arguments of the method.
    """
    arguments = dict(inspect.signature(prepare).bind(*args, **kwargs).arguments)
    names = getattr(trainer, _NAMES_ATTRIBUTE, ())
    if arguments.get("packing"):
        prepared, names = pack_with_channels(trainer, prepare, arguments, config, names)
    elif arguments["args"].use_liger_kernel:
        prepared = prepare_for_liger(prepare, arguments, config.record_fields)
    else:
        return prepare(*args, **kwargs)
    setattr(trainer, _NAMES_ATTRIBUTE, names)
    return prepared


def _check_position_ids(collator: Any) -> None:
    """Refuse padding-free rows of trl below 0.24 that have no position ids."""
    # Newer trl always returns them in such rows; the option has another meaning there.
    if Version(trl.__version__) >= Version("0.24") or not getattr(collator, "padding_free", False):
        return
    if not getattr(collator, "return_position_ids", True):
        raise UnsupportedVersionError(
            f"trl {trl.__version__} puts no position ids into padding-free rows unless the model "
            "has attn_implementation='flash_attention_2', so nobody can tell where a sequence "
            "begins, and sequences attend to each other; use that attention, padding_free=False, "
            "or a newer trl."
        )


def _check_channels_left(
    dataset: Any, config: MetricsConfig, description: str, packing: bool
) -> None:
    if dataset is None:
        return
    columns = column_names(dataset)
    if TOKEN_FIELD in columns or set(columns) & field_columns(config.label_fields):
        return
    done, why = ("packed", "packing=True") if packing else ("prepared", "use_liger_kernel=True")
    raise ChannelError(
        f"the {description} set was {done} by SFTTrainer's constructor and has no channels left "
        f"(columns {', '.join(columns)}); attach comes too late with {why}. Use `class "
        "MySFT(SFTChannelMetricsMixin, SFTTrainer)` from channel_metrics.trainers.trl, or "
        "`import channel_metrics.patches.trl` before you make the trainer."
    )
