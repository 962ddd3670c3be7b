"""Channel metrics in TRL's GRPOTrainer: rewards of the completions, by the prompt's channel."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import trl
from torch import Tensor

from channel_metrics.config import MetricsConfig
from channel_metrics.core.labels import channel_of
from channel_metrics.core.schema import Column, Metric, Schema, Sums, ratio_of
from channel_metrics.errors import ChannelError, ConfigError, UnsupportedVersionError
from channel_metrics.session import ChannelMetrics
from channel_metrics.swap import wrapped
from channel_metrics.trainers.hf.batch import Scratch
from channel_metrics.trainers.hf.mixin import ChannelMetricsMixin
from channel_metrics.trainers.trl.records import not_called
from channel_metrics.trainers.trl.samples import reserved_keys, sample_schema

__all__ = ["GRPOChannelMetricsMixin"]

_TOTAL = "reward"
# The columns of each series of rewards.
_PARTS = ("count", "sum", "square")


def _schema(functions: Iterable[str]) -> Schema:
    """`reward`, `reward_std`, and TRL's `rewards/<function>/mean` and `/std`."""
    schema = sample_schema("completions")
    for name in dict.fromkeys((_TOTAL, *map(_series, functions))):
        mean, std = (name, f"{name}_std") if name == _TOTAL else (f"{name}/mean", f"{name}/std")
        columns = tuple(f"{part} {name}" for part in _PARTS)
        of_sum = ratio_of(f"sum {name}", f"count {name}")
        schema.register(
            *(Column(column, "rewards", f"{column} of the completions") for column in columns),
            Metric(mean, columns, of_sum, unit="rewards", doc="sum / count", always=True),
            Metric(
                std,
                columns,
                partial(_std, name),
                unit="rewards",
                doc="unbiased spread",
                always=True,
            ),
        )
    return schema


def _series(function: str) -> str:
    return f"rewards/{function}"


def _std(name: str, sums: Sums) -> float | None:
    """The unbiased standard deviation, as in torch and TRL."""
    count, total, square = (sums[f"{part} {name}"] for part in _PARTS)
    if count < 2:
        return None
    mean = total / count
    return math.sqrt(max(square - count * mean * mean, 0.0) / (count - 1))


@dataclass
class _GRPOScratch(Scratch):
    """formulas: how rewards may be added up, as far as the values that TRL logs show it."""

    formulas: tuple[str, ...] = ("weighted", "plain")


class GRPOChannelMetricsMixin(ChannelMetricsMixin):
    """Put before GRPOTrainer: `class MyGRPO(GRPOChannelMetricsMixin, GRPOTrainer)`."""

    channel_scratch: _GRPOScratch
    # What GRPOTrainer has.
    args: Any
    reward_func_names: list[str]
    reward_weights: Tensor
    _metrics: dict[str, dict[str, list[float]]]

    def _new_session(self, config: MetricsConfig) -> ChannelMetrics:
        schema = _schema(self.reward_func_names)
        reserved = reserved_keys(schema)
        return ChannelMetrics(config, reserved=reserved, ranks=self._ranks(), schema=schema)

    def _new_scratch(self, session: ChannelMetrics) -> _GRPOScratch:
        return _GRPOScratch(super()._new_scratch(session).reader)

    def _observed_loss(self, compute: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's own loss. The rewards were counted when the completions were generated."""
        return compute(*args, **kwargs)

    def _prepare_context_parallel_inputs(self, model: Any, inputs: Any) -> Any:
        # The inputs are still a list of prompts here.
        return super(ChannelMetricsMixin, self)._prepare_context_parallel_inputs(model, inputs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Any:
        theirs: Any = super()
        generate = theirs._generate_and_score_completions
        return self._shielded(generate, self._observed_completions, inputs)

    def _observed_completions(self, generate: Any, inputs: list[dict[str, Any]]) -> Any:
        """TRL's own completions, whose rewards are counted."""
        session = self.channel_metrics
        assert session is not None
        fields, classes = session.config.label_fields, session.classes
        channels = [channel_of(record, fields, classes) for record in inputs]
        kept: list[Tensor] = []

        def keep(original: Any, *args: Any, **kwargs: Any) -> Any:
            kept.append(original(*args, **kwargs))
            return kept[-1]

        with wrapped(self, "_calculate_rewards", keep):
            output = generate(inputs)
        if not kept:
            raise not_called(self, "_calculate_rewards")
        rewards = kept[-1]
        session.add(channels, self._values(rewards, self._total_rewards(rewards), len(channels)))
        return output

    def _values(self, rewards: Tensor, total: Tensor, mine: int) -> dict[str, Tensor]:
        """{column: values [mine]} of the completions of this rank.

        rewards: [completions of all ranks, functions]; `mine` of the completions are this rank's.
        total: the reward of each completion of all ranks.
        """
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        if rewards.shape != (ranks * mine, len(self.reward_func_names)):
            raise ChannelError(
                f"expected rewards of {ranks} x {mine} completions by "
                f"{len(self.reward_func_names)} functions, but they have shape "
                f"{list(rewards.shape)}; completions and channels are out of step."
            )
        values = {"samples": torch.ones_like(total)}
        series = (_TOTAL, *map(_series, self.reward_func_names))
        for name, reward in zip(series, (total, *rewards.unbind(dim=1)), strict=True):
            given = ~torch.isnan(reward)
            known = reward.double().where(given, 0.0)
            for part, added in zip(_PARTS, (given.double(), known, known**2), strict=True):
                # Functions of the same name are one series, as in TRL.
                key = f"{part} {name}"
                values[key] = values[key] + added if key in values else added
        own = slice(rank * mine, (rank + 1) * mine)
        return {name: value[own] for name, value in values.items()}

    def _total_rewards(self, rewards: Tensor) -> Tensor:
        """The reward of each completion, added up as in the `reward` that TRL logs.

        Some versions use the weights of the functions, and leave out completions that no function
        scored. Others do neither. The value that TRL has just logged shows which.
        """
        weighted = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        weighted[torch.isnan(rewards).all(dim=1)] = torch.nan
        candidates: dict[str, Tensor] = {"weighted": weighted, "plain": rewards.nansum(dim=1)}
        assert self.model is not None
        mode = "train" if self.model.training else "eval"
        logged = float(self._metrics[mode][_TOTAL][-1])
        means = {name: float(candidates[name].nanmean()) for name in self.channel_scratch.formulas}
        fitting = [name for name, mean in means.items() if _same(mean, logged)]
        if not fitting:
            raise UnsupportedVersionError(
                f"trl {trl.__version__} logs a reward of {logged}, but the completions have "
                f"{means}, so it adds up rewards in another way; use a tested version (see "
                "docs/trl.md)."
            )
        self.channel_scratch.formulas = tuple(fitting)
        return candidates[fitting[0]]

    def _with_channels(self, session: ChannelMetrics, dataset: Any, description: str) -> Any:
        if self.args.remove_unused_columns:
            raise ConfigError(
                "GRPOTrainer with remove_unused_columns=True drops the channel of a prompt "
                "before it is scored; set remove_unused_columns=False, TRL's default."
            )
        self._declare(session, dataset, description)
        # The trainer gets the records themselves, so the collator need not add channels.
        return self.data_collator


def _same(ours: float, theirs: float) -> bool:
    if math.isnan(ours) or math.isnan(theirs):
        return math.isnan(ours) and math.isnan(theirs)
    return math.isclose(ours, theirs, rel_tol=1e-4, abs_tol=1e-6)
