"""From the sums of all ranks to a `Window`: which values are logged, under which keys."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from channel_metrics.acting import StopWhen
from channel_metrics.config import MetricsConfig
from channel_metrics.core.axes import AxisBook, Moved, Projected
from channel_metrics.core.axis_settings import TREE, TREE_MEAN, token_source
from channel_metrics.core.excess import UNMATCHED
from channel_metrics.core.gradients import GRADIENTS, gradient_values
from channel_metrics.core.key_limit import KeyLimit
from channel_metrics.core.keys import KeyBook
from channel_metrics.core.labels import UNLABELED
from channel_metrics.core.objectives import WEIGHTED, objective, worst_channel
from channel_metrics.core.schema import Schema
from channel_metrics.core.slopes import SLOPES, Slopes, points_of
from channel_metrics.core.table import values_by_channel
from channel_metrics.core.top import Top
from channel_metrics.core.totals import RunTotals
from channel_metrics.core.tree_means import TreeMeans
from channel_metrics.errors import ConfigError, hint
from channel_metrics.ranks.exchange import MISMATCH_TOLERANCE, GlobalSums
from channel_metrics.run_marks import mark
from channel_metrics.windows import Window

__all__ = ["WindowMaker"]

Values = dict[str, dict[str, float]]
Totals = dict[str, dict[str, int]]


class WindowMaker:
    """Makes the windows of one run. Each problem is warned of once.

    Args:
        config: which metrics are logged, and which channels in evaluation.
        schema: the columns and metrics.
        keys: learns the channels and splits of the run.
        warn_once: that of the session.
    """

    def __init__(
        self, config: MetricsConfig, schema: Schema, keys: KeyBook, warn_once: Callable[..., None]
    ) -> None:
        self.config, self.schema, self.keys, self.warn_once = config, schema, keys, warn_once
        self.book = AxisBook(config.axes, config.cross, config.tree, config.axis_format)
        self.limit = KeyLimit(keys, config.max_keys, warn_once)
        self._top = Top(config.top, config.followed, self.book, keys, warn_once)
        self._metrics = schema.chosen(config.metrics)
        self._tree_means = TreeMeans(config.tree, schema, self._metrics)
        extra = {one.name for one in schema.extra}.intersection(config.metrics)
        self._slopes = Slopes([one.name for one in SLOPES if one.name in extra])
        self._gradients = [one.name for one in GRADIENTS if one.name in extra]
        self._of_sequences = schema.of_sequences
        stop_when = StopWhen.of(config.stop_when)
        # Where it names a channel, this one is always shown, see `MetricsConfig.followed`.
        if stop_when is not None and not stop_when.channel:
            keys.watched.add(stop_when.metric)
        mark("session")

    def make(
        self,
        found: GlobalSums,
        *,
        split: str,
        step: int,
        prefix: str,
        totals: RunTotals,
        final: bool,
    ) -> Window:
        """The window of these sums.

        Args:
            found: the sums of all ranks; beside them those of `GradientTable`, if it is logged.
            split, step, prefix, final: as in `Window`.
            totals: those of the run, up to the last closed train window.
        """
        rows = self.book.project(found.names, found.sums)
        so_far = totals.by_row(self.book.rows)
        moved = self._top.moved(rows, so_far, split, prefix)
        kept = rows if moved is None else self.book.project(found.names, found.sums, moved)
        names, sums, num_channels = kept
        values = values_by_channel(self.schema, names, sums, self._metrics, num_channels)
        of_axes = {name: values.pop(name) for name in names[num_channels:] if name in values}
        if set(values) - {UNLABELED}:
            mark("channel")
        if final:
            self._warn_of(split, found.mismatch, values)
            self._warn_of_unmatched(rows)
            for axis in sorted(self.book.overlaps):
                said = f"records have several labels on the axis {axis!r} and count in each of them"
                self.warn_once(f"{said}, so its shares add up to more than 1.")
        else:
            self._drop_counts(values, of_axes)
        if split != "train":
            self._choose(values, names[:num_channels])
        elif final:
            self._add_totals(so_far, values, of_axes)
            self._add_slopes(rows, so_far, totals, values, of_axes)
            if found.beside is not None:
                self._add_gradients(found.names, found.beside, moved, values, of_axes)
        self._drop_of_sequences(of_axes)
        means = self._means(rows, names[num_channels:], prefix)
        of_axes |= means
        self.learn([*names, *means], prefix)
        logs = self.limit.logs({**values, **of_axes}, prefix)
        losses = self._losses(rows, split) if self.config.objectives else {}
        logs.update(self._objectives(losses, prefix))
        return Window(
            split=split,
            step=step,
            prefix=prefix,
            values=values,
            axes=self.book.by_axis(of_axes),
            logs=logs,
            worst_channel=worst_channel(losses) if "worst_loss" in self.config.objectives else "",
            final=final,
            names=rows.names,
            num_channels=rows.num_channels,
            columns=self.schema.column_names,
            table=tuple(map(tuple, rows.sums.tolist())),
            totals=so_far,
            time=found.riders[0] if found.riders else 0.0,
        )

    def _losses(self, rows: Projected, split: str) -> dict[str, float]:
        """The loss of each channel that counts in the objectives."""
        loss = self.schema.metric("loss")
        if loss is None:
            self.warn_once(
                f"{', '.join(self.config.objectives)} need a loss, which {self.schema.unit} do "
                "not have here; they are left out."
            )
            return {}
        names, sums, num_channels = rows
        values = values_by_channel(
            self.schema, names[:num_channels], sums[: num_channels + 1], [loss]
        )
        chosen = () if split == "train" else self.config.eval_channels
        return {
            name: of_channel["loss"]
            for name, of_channel in values.items()
            if "loss" in of_channel and name != UNLABELED and (not chosen or name in chosen)
        }

    def _objectives(self, losses: dict[str, float], prefix: str) -> dict[str, float]:
        weights = self.config.channel_weights
        absent = sorted(set(weights) - set(losses)) if losses else []
        if absent:
            self.warn_once(
                f"{WEIGHTED} is left out of a window without a loss of {', '.join(absent)}, which "
                f"channel_weights names; {hint(absent[0], list(losses))}"
            )
        names = self.config.objectives if losses else ()
        found = {name: objective(name).formula(losses, weights) for name in names}
        return {prefix + name: value for name, value in found.items() if value is not None}

    def declare(self, names: Iterable[str]) -> None:
        """Learn names that are known beforehand.

        Raises:
            ConfigError, ChannelError: if two names would share a key, or if a key is the
                trainer's.
        """
        for error in self.keys.learn(self.book.names(names)):
            raise error

    def learn(self, names: Iterable[str], prefix: str) -> None:
        """Learn rows that came up during the run. Keys that two values share are not logged."""
        for error in [*self.keys.learn(names), *self.keys.learn(prefix=prefix)]:
            self.warn_once(f"{error} These keys are left out of the log.")

    def check_eval_channels(self, names: Sequence[str]) -> None:
        """Raise `ConfigError` for an entry of `eval_channels` that is not in `names`."""
        rows = [row for row in self.book.names(names) if row not in self.book.labels]
        for wrong in self._unknown_eval_channels(rows):
            raise ConfigError(wrong)

    def _means(self, rows: Projected, shown: Sequence[str], prefix: str) -> Values:
        """The rows of `tree_mean`, of groups that are shown."""
        means = {
            group: (self.book.row(TREE_MEAN, group), of_group)
            for group, of_group in self._tree_means.of(rows).items()
        }
        labels = [self.book.labels[row] for row in shown]
        groups = {label for axis, label in labels if axis == TREE}
        return {
            row: of_group
            for group, (row, of_group) in means.items()
            if group in groups or self._top.is_watched(row, prefix)
        }

    def _drop_counts(self, *groups: Values) -> None:
        """Leave counts out of an open window, or the sum of the logged counts would be wrong."""
        counts = {metric.name for metric in self._metrics if metric.adds_up}
        for values in groups:
            for of_row in values.values():
                for name in counts.intersection(of_row):
                    del of_row[name]

    def _drop_of_sequences(self, of_axes: Values) -> None:
        """Leave out what the labels of single tokens do not have, such as `samples`."""
        for row, of_row in of_axes.items():
            if token_source(self.config.axes.get(self.book.labels[row][0])):
                for name in self._of_sequences & of_row.keys():
                    del of_row[name]

    def _add_totals(self, totals: Totals, *groups: Values) -> None:
        chosen = [name for name in self.schema.run_metrics if name in self.config.metrics]
        for values in groups if chosen else ():
            for row, of_row in values.items():
                # The members of `others` change, so it has no totals.
                of_row.update({name: totals[row][name] for name in chosen if row in totals})

    def _add_slopes(self, rows: Projected, totals: Totals, run: RunTotals, *groups: Values) -> None:
        if not self._slopes.names:
            return
        of_rows = {row: of_row["tokens_total"] for row, of_row in totals.items()}
        self._slopes.add(points_of(rows, self.schema.column_names, of_rows), run)
        for values in groups:
            for row, of_row in values.items():
                of_row.update(self._slopes.values(row))

    def _add_gradients(
        self, joint: tuple[str, ...], exact: Tensor, moved: Moved | None, *groups: Values
    ) -> None:
        """Add what is logged of the sums of `GradientTable` under these joint names."""
        names, sums, _ = self.book.project(joint, exact, moved)
        total = exact[:, 2:].sum(0)
        found = gradient_values((UNLABELED, *names), sums, total, self._gradients)
        for values in groups:
            for row, of_row in values.items():
                of_row.update(found.get(row, {}))

    def _choose(self, values: Values, names: Sequence[str]) -> None:
        """Keep the channels that evaluation logs."""
        if not self.config.eval_channels:
            return
        for wrong in self._unknown_eval_channels(names):
            self.warn_once(wrong)
        always = {metric.name for metric in self._metrics if metric.every_channel}
        for channel in set(values).difference(self.config.eval_channels):
            values[channel] = {m: v for m, v in values[channel].items() if m in always}
            if not values[channel]:
                del values[channel]

    def _unknown_eval_channels(self, names: Sequence[str]) -> list[str]:
        return [
            f"eval_channels names {name!r}, which is no channel; {hint(name, names)}"
            for name in self.config.eval_channels
            if name not in names and name != UNLABELED
        ]

    def _warn_of_unmatched(self, rows: Projected) -> None:
        if UNMATCHED not in self.schema.column_names:
            return
        of_rows = rows.sums[: rows.num_channels + 1, self.schema.column_names.index(UNMATCHED)]
        names = (UNLABELED, *rows.names[: rows.num_channels])
        left = {n: int(c) for n, c in zip(names, of_rows.tolist(), strict=True) if c}
        if left:
            self.warn_once(
                "excess_loss leaves out sequences whose reference is not known, or counts other "
                "tokens (cut, or other labels): %s of a window.",
                ", ".join(f"{count} of {name}" for name, count in left.items()),
            )

    def _warn_of(self, split: str, mismatch: float, values: Values) -> None:
        if mismatch > MISMATCH_TOLERANCE:
            self.warn_once(
                "the channels of a window do not add up to the trainer's own loss: the relative "
                "difference is %.1e. The tokens or the loss mask that were counted are not those "
                "that were trained on; please report this with your model and trainer.",
                mismatch,
            )
        if set(values) == {UNLABELED}:
            self.warn_once(
                f"no record of this {split} window had a channel (looked for "
                f"{', '.join(self.config.fields)}); all {self.schema.unit} count as 'unlabeled'."
            )
