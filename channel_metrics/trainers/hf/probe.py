"""Probes in a transformers Trainer: every N steps, a few samples of each dataset are measured.

    attach_probe(trainer, {"canary": "canary.jsonl", "mmlu": mmlu}, every=100, batches=4)
    trainer.train()      # the logs hold dataset_canary_loss, dataset_canary_token_acc, ...

A probe changes no bit of the training, see `channel_metrics.probes.without_trace`. docs/probe.md
describes what is logged.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
import transformers

from channel_metrics.config import refuse_unknown_keys
from channel_metrics.core.faults import FaultGuard
from channel_metrics.core.intervals import MOMENTS, Interval, ratio_interval
from channel_metrics.core.labels import LabelTable
from channel_metrics.core.table import SumTable
from channel_metrics.errors import ConfigError
from channel_metrics.probes.probe import PROBE_COLUMNS, ProbeBudget, ProbeConfig, probe_keys
from channel_metrics.probes.without_trace import keep_random_state, undisturbed
from channel_metrics.ranks.agreed_names import Agreement
from channel_metrics.ranks.ranks import Ranks
from channel_metrics.ranks.sync import sum_over_ranks
from channel_metrics.trainers.hf.callbacks import TrainerKnowingCallback
from channel_metrics.trainers.hf.mixin import check_trainer
from channel_metrics.trainers.hf.probe_data import (
    Collate,
    ProbeBatch,
    collator_of,
    draw_batches,
    read_sources,
)
from channel_metrics.trainers.hf.probe_forward import ProbeReader, layout_for_probes

__all__ = ["DatasetMetricsCallback", "attach_probe"]

logger = logging.getLogger("channel_metrics")

_WIDTH = len(MOMENTS)


def attach_probe(
    trainer: transformers.Trainer,
    sources: Mapping[str, Any],
    config: ProbeConfig | None = None,
    **options: Any,
) -> DatasetMetricsCallback:
    """Let `trainer` measure each dataset of `sources` every N optimizer steps.

    Args:
        trainer: any transformers Trainer; it needs no channel metrics.
        sources: {name: dataset or path of a JSONL file}.
        config: see `ProbeConfig`.
        options: fields of `ProbeConfig` (`every=50`), and what `DatasetMetricsCallback` takes.

    Returns:
        The callback that was added. `trainer.remove_callback(probe)` removes it.

    Raises:
        ConfigError: a source or an option is not allowed.
    """
    probe = DatasetMetricsCallback(sources, config, **options)
    probe.trainer = trainer
    trainer.add_callback(probe)
    return probe


class DatasetMetricsCallback(TrainerKnowingCallback):
    """Measures each dataset of `sources` every N optimizer steps, on separate batches.

    `attach_probe` makes one and adds it to a trainer. A trainer with channel metrics also takes it
    in `callbacks=[...]` or `add_callback`. For others, set the attribute `trainer` before training.

    Args:
        sources: {name: dataset or path of a JSONL file}, with records that the collator takes. The
            name is a part of the log keys.
        config: see `ProbeConfig`; its fields can also be given as keywords (`every=50`).
        encode: turns a chosen record into what the collator takes; None passes records unchanged.
        collator: None means a copy of the trainer's collator.

    Raises:
        ConfigError: a source or an option is not allowed.
    """

    def __init__(
        self,
        sources: Mapping[str, Any],
        config: ProbeConfig | None = None,
        *,
        encode: Callable[[Any], Any] | None = None,
        collator: Collate | None = None,
        **options: Any,
    ) -> None:
        refuse_unknown_keys(options, [field.name for field in fields(ProbeConfig)], "the probe")
        self.config = replace(config or ProbeConfig(), **options)
        self.records = read_sources(sources)
        self.keys = probe_keys(list(self.records))
        self._encode, self._collator = encode, collator
        self._guard = FaultGuard(self.config.on_error)
        self._logging = False
        self._clock = time.perf_counter

    # ---- events ---------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the samples.

        Raises `ConfigError` if no trainer is known, a log key is taken, or the data is wrong.
        """
        self._trainer = self.taken_trainer()
        if self._trainer is None:
            raise ConfigError(
                "a probe must know its trainer, but none was given; write `attach_probe(trainer, "
                "...)` from channel_metrics.trainers.hf in place of `trainer.add_callback(...)`, "
                "or set `callback.trainer = trainer` before training."
            )
        check_trainer(type(self._trainer))
        self._guard = FaultGuard(self.config.on_error)
        self._reserve_keys()
        self._agreement = Agreement(self.records, PROBE_COLUMNS)
        self._ranks = Ranks(alone=self._trainer.accelerator.num_processes == 1)
        self._layout = layout_for_probes(self._trainer)
        self._reader = ProbeReader(self._trainer, self._layout)
        self._budget = ProbeBudget(
            self.config.every, self.config.max_overhead, step=state.global_step
        )
        with keep_random_state():
            self._collate = collator_of(self._trainer, self._collator)
        self._batches = self._draw(0)
        self._probed_step: int | None = None
        self._train_seconds = self._rest_seconds = 0.0
        self._step_began: float | None = None
        self._warned = False

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Probe before the first step, if `at_start` is set."""
        # Loggers of other callbacks are not ready yet in `on_train_begin`.
        if self.config.at_start and state.global_step == 0 and self._probed_step is None:
            self._probe(state.global_step, control)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock of a training step."""
        self._step_began = self._clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Probe if a probe is due."""
        if self._step_began is not None:
            self._train_seconds += self._clock() - self._step_began
            self._step_began = None
        ends = self.config.at_end and state.global_step >= state.max_steps
        if ends or state.global_step >= self._budget.next_step:
            self._probe(state.global_step, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Probe after the last step of a run that is stopped early, if `at_end` is set."""
        stops = control.should_training_stop and self._probed_step != state.global_step
        if stops and self.config.at_end:
            self._probe(state.global_step, control)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Raise `ConfigError` if another part of the run logs a key of this probe."""
        taken = {key for of_name in self.keys.values() for key in of_name.values()}
        taken &= set(logs or ())
        if taken and not self._logging:
            raise ConfigError(
                f"the key {min(taken)!r} of a probe is also logged by another part of this run "
                "(the trainer, its channel metrics, or a second probe); rename the dataset."
            )

    # ---- one probe ------------------------------------------------------------------------

    def _probe(self, step: int, control: Any) -> None:
        if self._guard.off:
            return
        asked = self._clock()
        self._wait_for_device()
        began = self._told = self._clock()
        # Work that the device still had to finish belongs to the training time.
        train_seconds = self._train_seconds + began - asked if step else 0.0
        with self._guard.guarded(), undisturbed(self._reader.model):
            sums = self._measure(step, began, train_seconds)
            self._log(sums, step, control)
            self._guard.proven = True
        # Only this rank knows this time yet. The next all-reduce adds it.
        self._rest_seconds = self._clock() - self._told

    def _measure(self, step: int, began: float, train_seconds: float) -> dict[str, list[float]]:
        """Return {dataset: moments} of all ranks, and add the cost of the probe to the budget."""
        table = SumTable(LabelTable(self.records), PROBE_COLUMNS, device=self._reader.device)
        with self._guard.guarded():
            rows = self._reader.measure(self._batches_of(step))
            table.add(list(self.records), dict(zip(PROBE_COLUMNS, rows.unbind(1), strict=True)))
            # The time of the device counts as time of the probe.
            self._wait_for_device()
        self._told = self._clock()
        clock = (1.0, train_seconds, self._rest_seconds + self._told - began)
        found = sum_over_ranks(table, self._agreement, self._ranks, self._guard, riders=clock)
        # With means over the ranks, all ranks choose the same next step.
        num_ranks, train_seconds, probe_seconds = found.riders
        self._budget.add(
            step, train_seconds=train_seconds / num_ranks, probe_seconds=probe_seconds / num_ranks
        )
        self._probed_step, self._train_seconds = step, 0.0
        return dict(zip(found.names, found.sums[1:].tolist(), strict=True))

    def _log(self, sums: Mapping[str, list[float]], step: int, control: Any) -> None:
        values: dict[str, float] = {}
        for name in self.records:
            values.update(_values(sums[name], self.keys[name]))
        if self._budget.overhead is not None:
            values["probe_overhead"] = self._budget.overhead
        values["probe_every"] = self._budget.distance
        self._tell_if_stretched()
        # `log` clears should_log, but the trainer's own log of this step must still be made.
        should_log, self._logging = control.should_log, True
        try:
            # The model is in evaluation mode, so TRL does not end its training window here.
            self._trainer.log(values)
        finally:
            self._logging = False
            control.should_log |= should_log
            self._trainer.control.should_log |= should_log

    def _tell_if_stretched(self) -> None:
        if self._budget.distance > self.config.every and not self._warned:
            self._warned = True
            logger.warning(
                "a probe every %d steps would take more than max_overhead = %g of the training "
                "time: the next one comes after %d (probe_every in the log). Measure fewer "
                "batches, or allow more overhead.",
                self.config.every,
                self.config.max_overhead,
                self._budget.distance,
            )

    def _batches_of(self, step: int) -> list[list[ProbeBatch]]:
        return self._draw(step) if self.config.resample else self._batches

    def _draw(self, draw: int) -> list[list[ProbeBatch]]:
        return [
            draw_batches(
                name,
                records,
                config=self.config,
                batch_size=self.config.batch_size or self._trainer.args.per_device_eval_batch_size,
                collate=self._collate,
                encode=self._encode,
                layout=self._layout,
                draw=draw,
            )
            for name, records in self.records.items()
        ]

    def _wait_for_device(self) -> None:
        device = self._reader.device
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()

    def _reserve_keys(self) -> None:
        """Reserve our keys in the channel metrics. Raises `ConfigError` if a channel has one."""
        metrics = getattr(self._trainer, "channel_metrics", None)
        if metrics is None:
            return
        keys = [key for of_name in self.keys.values() for key in of_name.values()]
        for error in metrics.keys.reserve(keys):
            raise ConfigError(
                f"a probe would log a key of a channel; rename the dataset of the probe: {error}"
            )


def _values(sums: list[float], keys: Mapping[str, str]) -> dict[str, float]:
    """Log values of a dataset, from its moments. Empty if no token was counted."""
    of_loss, of_correct = sums[:_WIDTH], sums[_WIDTH:]
    found: dict[str, Interval | None] = {
        "loss": ratio_interval(of_loss, lowest=0.0),
        "token_acc": ratio_interval(of_correct, lowest=0.0, highest=1.0),
    }
    values = {}
    for metric, interval in found.items():
        if interval is not None:
            named = {"": interval.value, "_low": interval.low, "_high": interval.high}
            values.update({keys[metric + end]: v for end, v in named.items() if v is not None})
    nonfinite = of_correct[MOMENTS.index("n")] - of_loss[MOMENTS.index("n")]
    if nonfinite:
        values[keys["nonfinite"]] = nonfinite
    return values
