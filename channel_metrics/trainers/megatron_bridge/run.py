"""The session of one call of Megatron-Bridge's `pretrain`, and what its events do.

The events are those of Bridge's own `CallbackManager`. All ranks get them in the same order.
"""

from __future__ import annotations

from typing import Any

from channel_metrics.config import MetricsConfig
from channel_metrics.errors import ConfigError
from channel_metrics.session import ChannelMetrics
from channel_metrics.trainers.event_evaluations import EventEvaluations
from channel_metrics.trainers.megatron.arguments import refuse_captures
from channel_metrics.trainers.megatron.counting import MegatronChannelMetrics
from channel_metrics.trainers.megatron.log import write
from channel_metrics.trainers.megatron.reserved import megatron_keys
from channel_metrics.trainers.megatron.run import folder_of
from channel_metrics.windows import Window

__all__ = ["BridgeRun"]


class BridgeRun:
    """The metrics of one training.

    Args:
        bridge: the `ConfigContainer` of the training.
        config: what is measured and logged.

    Raises:
        ConfigError: the training has settings that do not work with the metrics.
    """

    def __init__(self, bridge: Any, config: MetricsConfig) -> None:
        refuse_captures(bridge.model, "cuda_graph_impl or cuda_graph_scope of the model")
        if getattr(getattr(bridge.model, "dist_train", None), "use_dist_train", False):
            # It has a schedule of its own.
            raise ConfigError("channel metrics do not work with dist_train; leave one of them out.")
        self.bridge = bridge
        self.session = ChannelMetrics(config, reserved=megatron_keys())
        self.metrics = MegatronChannelMetrics(session=self.session)
        self._evaluations = EventEvaluations(self.session)

    def on_train_start(self, context: Any) -> None:
        """Begin with an empty window, and with the totals of the checkpoint that was loaded."""
        step, loaded = context.state.train_state.step, self.bridge.checkpoint.load
        self.session.start(folder_of(loaded, step) if step and loaded else None)

    def on_train_step_end(self, context: Any) -> None:
        """End the step; at the end of a log interval, close the window and write its values."""
        # A skipped iteration changes neither the weights nor Bridge's own averages.
        self.metrics.end_step(discard=bool(context.skipped_iter))
        iteration = context.state.train_state.step + 1
        if iteration % self.bridge.logger.log_interval == 0:
            self._write(f"iteration {iteration:8d}", self.session.close(iteration), context.state)

    def on_eval_start(self, context: Any, kind: str = "eval") -> None:
        """Open the window of an evaluation. Bridge has no event for its limit of time."""
        self._evaluations.begin([kind], context.state.train_state.step)

    def on_eval_end(self, context: Any) -> None:
        """Close the window of the evaluation, and write its values."""
        for window in self._evaluations.end():
            self._write(f"validation at iteration {window.step}", window, context.state)

    def on_test_start(self, context: Any) -> None:
        """Open the window of the test set."""
        self.on_eval_start(context, "test")

    on_test_end = on_eval_end

    def save(self, state: Any) -> None:
        """Write the totals into the folder of the checkpoint of this iteration."""
        self.session.save(folder_of(self.bridge.checkpoint.save, state.train_state.step))

    def _write(self, title: str, window: Window, state: Any) -> None:
        from megatron.bridge.training.utils.mlflow_utils import _sanitize_mlflow_metrics
        from megatron.bridge.utils.common_utils import print_rank_last

        others = [one for one in (state.comet_logger, state.mlflow_logger) if one is not None]
        with self.session.guard.guarded():
            write(title, window, print_rank_last, state.tensorboard_logger, state.wandb_logger)
            for logger in others if window.logs else ():
                logger.log_metrics(_sanitize_mlflow_metrics(window.logs), step=window.step)
