"""Channel metrics in TRL's GRPOTrainer: rewards of the completions, by the prompt's channel."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import trl
from torch import Tensor

from channel_metrics.core.labels import channel_of
from channel_metrics.errors import ChannelError, ConfigError, UnsupportedVersionError
from channel_metrics.trainers.hf.data import declare_channels
from channel_metrics.trainers.hf.mixin import ChannelMetricsMixin
from channel_metrics.trainers.hf.state import ChannelState
from channel_metrics.trainers.trl.state import SampleState
from channel_metrics.trainers.trl.sums import ratio

__all__ = ["GRPOChannelMetricsMixin"]

_TOTAL = "reward"


class _GRPOState(SampleState):
    """Sums over completions: count, sum and sum of squares of each series of rewards."""

    series: tuple[str, ...] = (_TOTAL,)
    # The ways of summing up a completion's rewards that TRL's own values do not contradict.
    formulas: tuple[str, ...] = ("weighted", "plain")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.set_series(())

    def set_series(self, functions: tuple[str, ...]) -> None:
        """Open windows for the total and for each reward function."""
        self.series = (_TOTAL, *(f"rewards/{name}" for name in functions))
        sums = (f"{part} {name}" for name in self.series for part in ("count", "sum", "square"))
        self.set_columns(("samples", *sums))

    def values(self, sums: Mapping[str, float]) -> dict[str, float | None]:
        """`reward`, `reward_std`, and TRL's `rewards/<function>/mean` and `/std`."""
        found: dict[str, float | None] = {}
        for name in self.series:
            mean_key, std_key = f"{name}/mean", f"{name}/std"
            if name == _TOTAL:
                mean_key, std_key = _TOTAL, f"{_TOTAL}_std"
            count, total, square = (sums[f"{part} {name}"] for part in ("count", "sum", "square"))
            mean = ratio(total, count)
            found[mean_key] = mean
            found[std_key] = None if mean is None else _std(count, mean, square)
        return found


class GRPOChannelMetricsMixin(ChannelMetricsMixin):
    """Put before GRPOTrainer: `class MyGRPO(GRPOChannelMetricsMixin, GRPOTrainer)`."""

    state_class = _GRPOState
    # What GRPOTrainer has.
    args: Any
    reward_func_names: list[str]
    reward_weights: Tensor
    _metrics: dict[str, dict[str, list[float]]]

    def _observed_loss(self, compute: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's own: the rewards have been seen when the completions were made."""
        return compute(*args, **kwargs)

    def _prepare_context_parallel_inputs(self, model: Any, inputs: Any) -> Any:
        # Here the inputs are still a list of prompts.
        return super(ChannelMetricsMixin, self)._prepare_context_parallel_inputs(model, inputs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Any:
        generate = super()._generate_and_score_completions  # type: ignore[misc]
        return self._shielded(generate, self._observed_completions, inputs)

    def _observed_completions(self, generate: Any, inputs: list[dict[str, Any]]) -> Any:
        """What TRL's own generates, with the rewards of the completions recorded."""
        state: Any = self.channel_metrics
        channels = [channel_of(record, state.config.fields) for record in inputs]
        state.scored = None
        output = generate(inputs)
        if state.scored is None:
            raise UnsupportedVersionError(
                f"GRPOTrainer must score completions in _calculate_rewards, but trl "
                f"{trl.__version__} did not call it; use a tested version (see docs/trl.md)."
            )
        self._record(state, channels, state.scored)
        state.scored = None
        return output

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        rewards = super()._calculate_rewards(*args, **kwargs)  # type: ignore[misc]
        if self.channel_metrics is not None:
            state: Any = self.channel_metrics
            state.scored = rewards
        return rewards

    def _record(self, state: _GRPOState, channels: list[str | None], rewards: Tensor) -> None:
        """rewards: [completions of all ranks, functions]; each rank counts its own rows."""
        ranks, rank, mine = (
            self.accelerator.num_processes,
            self.accelerator.process_index,
            len(channels),
        )
        if rewards.shape != (ranks * mine, len(self.reward_func_names)):
            raise ChannelError(
                f"expected rewards of {ranks} x {mine} completions by "
                f"{len(self.reward_func_names)} functions, but they have shape "
                f"{list(rewards.shape)}; completions and channels are out of step."
            )
        if len(state.series) != 1 + len(self.reward_func_names):
            state.set_series(tuple(self.reward_func_names))
        total = self._total_rewards(state, rewards)
        values = {"samples": torch.ones_like(total)}
        for name, column in zip(state.series, (total, *rewards.unbind(dim=1)), strict=True):
            given = ~torch.isnan(column)
            known = column.double().nan_to_num(nan=0.0)
            values |= {f"count {name}": given, f"sum {name}": known, f"square {name}": known**2}
        own = slice(rank * mine, (rank + 1) * mine)
        state.window.add(channels, {name: value[own] for name, value in values.items()})

    def _total_rewards(self, state: _GRPOState, rewards: Tensor) -> Tensor:
        """The reward of each completion, summed up as TRL did for the `reward` that it logs.

        Versions differ: with the weights of the functions, and without completions that no
        function scored; or neither. What TRL has just logged decides.
        """
        weighted = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        weighted[torch.isnan(rewards).all(dim=1)] = torch.nan
        candidates: dict[str, Tensor] = {"weighted": weighted, "plain": rewards.nansum(dim=1)}
        assert self.model is not None
        mode = "train" if self.model.training else "eval"
        logged = float(self._metrics[mode][_TOTAL][-1])
        means = {name: float(candidates[name].nanmean()) for name in state.formulas}
        fitting = [name for name, mean in means.items() if _same(mean, logged)]
        if not fitting:
            raise UnsupportedVersionError(
                f"trl {trl.__version__} logs a reward of {logged}, but the completions have "
                f"{means}; it sums up rewards in another way. Use a tested version."
            )
        state.formulas = tuple(fitting)
        return candidates[fitting[0]]

    def _with_channels(self, state: ChannelState, dataset: Any, description: str) -> Any:
        if self.args.remove_unused_columns:
            raise ConfigError(
                "GRPOTrainer with remove_unused_columns=True drops the channel of a prompt "
                "before it is scored; set remove_unused_columns=False, TRL's default."
            )
        declare_channels(
            dataset, fields=state.config.fields, table=state.table, description=description
        )
        # The records themselves reach the trainer: no collator has to carry the channels.
        return self.data_collator


def _same(ours: float, theirs: float) -> bool:
    if math.isnan(ours) or math.isnan(theirs):
        return math.isnan(ours) and math.isnan(theirs)
    return math.isclose(ours, theirs, rel_tol=1e-4, abs_tol=1e-6)


def _std(count: float, mean: float, square: float) -> float | None:
    """The unbiased one, as torch's and TRL's."""
    if count < 2:
        return None
    return math.sqrt(max(square - count * mean * mean, 0.0) / (count - 1))
