"""Gives ms-swift's trainers channel metrics.

Patched are
- `Seq2SeqTrainer.__init__`: each trainer that is made afterwards gets `attach(self, config)`;
- `RowPreprocessor.__call__`: fills the column `channel` of a dataset from the fields of the
  config, because ms-swift drops all columns that it does not know;
- `Template.encode`, for an axis by template: the roles of its tokens travel with `channel`;
- `SwiftSft._prepare_dataset`: it patches `__init__` of the trainer of `swift rlhf`, which few runs
  import, and runs without channel metrics say so; with the setting `sampler`, its training set
  becomes a `MixedStream`;
- `MegatronTrainer.__init__`, in runs that use it.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import replace
from importlib import import_module
from typing import Any

import swift
from swift.arguments import RLHFArguments, SftArguments
from swift.dataset import RowPreprocessor
from swift.pipelines import SwiftSft
from swift.template import Template
from swift.trainers import Seq2SeqTrainer, TrainerFactory

from channel_metrics import swap
from channel_metrics.config import MetricsConfig
from channel_metrics.core.axis_settings import ROLES_FIELD, token_fields
from channel_metrics.core.faults import FaultGuard
from channel_metrics.data.carried import Carried, carried_of
from channel_metrics.errors import ConfigError
from channel_metrics.trainers.hf import check_trainer
from channel_metrics.trainers.hf.columns import with_channel_column
from channel_metrics.trainers.hf.patch import attaching
from channel_metrics.trainers.patching import announce, config_of_environment
from channel_metrics.trainers.swift.data import CHANNEL_COLUMN
from channel_metrics.trainers.swift.loss import check_loss_functions
from channel_metrics.trainers.swift.mixed import mixed
from channel_metrics.trainers.swift.roles import encode_with_roles
from channel_metrics.trainers.swift.tasks import RLHF_TASKS, why_without_metrics

__all__ = ["KEY", "apply", "is_applied", "revert"]

KEY = "ms_swift"
# ms-swift imports its Megatron side only in runs that use it, and so do we.
_MEGATRON = "swift.megatron.trainers.trainer"
_MEGATRON_PATCH = "channel_metrics.trainers.swift_megatron.patch"

logger = logging.getLogger("channel_metrics")


def apply(config: MetricsConfig | None = None) -> None:
    """Patch ms-swift; a second call does nothing.

    Args:
        config: None takes that of the file in CHANNEL_METRICS_CONFIG, or the defaults.

    Raises:
        UnsupportedVersionError: this ms-swift lacks what is needed; nothing is patched.
    """
    if is_applied():
        return
    check_trainer(Seq2SeqTrainer)
    check_loss_functions()
    chosen = config or config_of_environment()
    _reach_megatron(chosen)
    preparing = _Preparing(chosen)
    for owner, name, body in (
        (Seq2SeqTrainer, "__init__", attaching(chosen)),
        (SwiftSft, "_prepare_dataset", preparing.prepare_dataset),
        (RowPreprocessor, "__call__", preparing.preprocess),
        (Template, "encode", preparing.encode),
    ):
        swap.wrap(owner, name, body, key=KEY)
    announce(f"channel metrics: patched ms-swift {swift.__version__} (Seq2SeqTrainer)")


def revert() -> None:
    """Put the originals back; trainers made before keep their metrics."""
    swap.unwrap(KEY)


def is_applied() -> bool:
    """Whether ms-swift is patched now."""
    return swap.is_wrapped(Seq2SeqTrainer, "__init__", key=KEY)


def _reach_megatron(config: MetricsConfig) -> None:
    if hasattr(sys.modules.get(_MEGATRON), "MegatronTrainer"):
        import_module(_MEGATRON_PATCH).apply(config)


class _Preparing:
    """What runs in place of the functions of ms-swift that prepare the data of a run."""

    def __init__(self, config: MetricsConfig) -> None:
        self.config = config
        self.carried: Carried | None = None
        self.with_roles = False

    def prepare_dataset(self, original: Any, pipeline: Any, *args: Any, **kwargs: Any) -> Any:
        # `megatron sft` prepares its data as `swift sft` does; by then its trainer is imported.
        _reach_megatron(self.config)
        reason = why_without_metrics(pipeline.args)
        if reason is not None and self.config.sampler:
            raise ConfigError(
                "the setting `sampler` follows channel metrics, which this run does not have: "
                f"{reason}; leave it out."
            )
        if reason is not None:
            _say(pipeline.args, reason)
        elif getattr(pipeline.args, "rlhf_type", None) is not None:
            _reach_rlhf(pipeline.args, self.config)
        takes = isinstance(pipeline.args, SftArguments) and reason is None
        takes = takes and not isinstance(pipeline.args, RLHFArguments)
        with FaultGuard(self.config.on_error).guarded():
            # Only the collator of `swift sft` and `swift pt` takes them off the names.
            self.carried = carried_of(self.config) if takes else None
            self.with_roles = takes and ROLES_FIELD in token_fields(self.config.axes)
            if self.with_roles:
                # datasets caches what the template has encoded, by the template's own values.
                pipeline.template.channel_roles = True
        prepared = original(pipeline, *args, **kwargs)
        if takes and self.config.sampler:
            # An error here always ends the run, since it decides what is trained on.
            train, *others = prepared
            return [mixed(train, pipeline.args), *others]
        return prepared

    def encode(self, original: Any, template: Any, *args: Any, **kwargs: Any) -> Any:
        if self.with_roles:
            return encode_with_roles(original, template, *args, **kwargs)
        return original(template, *args, **kwargs)

    def preprocess(
        self, original: Any, preprocessor: Any, dataset: Any, *args: Any, **kw: Any
    ) -> Any:
        # With --columns, the user has named the column of the channel.
        given = [c for c, name in preprocessor.origin_columns.items() if name == CHANNEL_COLUMN]
        with FaultGuard(self.config.on_error).guarded():
            for column in given or [CHANNEL_COLUMN]:
                config = replace(self.config, fields=(column,)) if given else self.config
                dataset = with_channel_column(
                    dataset, config.label_fields, column, carried=self.carried
                )
        return original(preprocessor, dataset, *args, **kw)


def _reach_rlhf(args: Any, config: MetricsConfig) -> None:
    trainer = TrainerFactory.get_trainer_cls(args)
    if not swap.is_wrapped(trainer, "__init__", key=KEY):
        check_trainer(trainer)
        swap.wrap(trainer, "__init__", attaching(config), key=KEY)


def _say(args: Any, reason: str) -> None:
    """Warn, on one rank, that a run has no channel metrics."""
    if os.environ.get("RANK", "0") != "0":
        return
    no_effect = "; --enable_channel_loss has no effect" if args.enable_channel_loss else ""
    logger.warning(
        "no channel metrics in this run: they are for sft and pt (task_type causal_lm), and for "
        "rlhf with rlhf_type %s, and %s%s.",
        ", ".join(RLHF_TASKS),
        reason,
        no_effect,
    )
