"""Keys that a trainer is told to watch, such as `eval_bbu_loss`, checked before the training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from channel_metrics.acting import StopWhen
from channel_metrics.core.names import split_name
from channel_metrics.core.objectives import OBJECTIVES
from channel_metrics.data.scan import count_channels
from channel_metrics.errors import ConfigError, hint
from channel_metrics.session import ChannelMetrics

__all__ = ["check_sets", "check_stop_when", "check_wanted", "rows_of"]


def _channels_in(session: ChannelMetrics, dataset: Any) -> set[str] | None:
    """What is logged of a dataset: its channels, which the session learns, and labels of axes.

    None if it cannot be scanned, see `count_channels`.
    """
    counts = count_channels(dataset, session.config.label_fields)
    if counts is not None:
        session.declare_names(sorted(name for name in counts if name is not None))
    return rows_of(session, counts)


def rows_of(session: ChannelMetrics, counts: Mapping[str | None, int] | None) -> set[str] | None:
    """What is logged of a dataset: its channels, `unlabeled` included, and labels of axes.

    Args:
        session: the metrics.
        counts: of `count_channels`.

    Returns:
        None if it is not known: the dataset cannot be scanned, or its records have no channel
        while the config declares some, which the script's own collator may then give.
    """
    if counts is None:
        return None
    if session.config.channels and not any(split_name(name)[0] for name in counts if name):
        return None
    return session.rows(counts)


def check_sets(
    session: ChannelMetrics,
    train: Iterable[Any],
    held: Mapping[str, Any],
    watched: Iterable[tuple[str, str]] = (),
) -> None:
    """Check the settings that name channels or log keys, as far as they can be known now.

    Args:
        session: the metrics.
        train: the training sets.
        held: {name, such as `val`: data set} of the evaluations to come. Their keys begin with it.
        watched: (what watches a key, the key). The script itself may log a key that is none of
            ours, so this only warns.

    Raises:
        ConfigError, ChannelError: two values would share a key, or a setting names a channel that
            no set has.
    """
    of_train = [_channels_in(session, dataset) for dataset in train]
    sets = {"": None if None in of_train else set[str]().union(*filter(None, of_train))}
    sets |= {f"{name}_": _channels_in(session, dataset) for name, dataset in held.items()}
    for error in [error for name in held for error in session.keys.learn(prefix=f"{name}_")]:
        raise error
    if held and None not in sets.values():
        session.check_eval_channels()
    for setting, key in watched:
        try:
            check_wanted(session, key, sets, setting)
        except ConfigError as error:
            session.warn_once(f"{error} (Ignore this if the script itself logs the key.)")
    check_stop_when(session, sets)


def check_wanted(
    session: ChannelMetrics, wanted: str, sets: Mapping[str, set[str] | None], setting: str
) -> set[str]:
    """Refuse a key of a channel that will not be logged, and keep it in the log if it will be.

    Other keys may be the script's own.

    Args:
        session: the metrics.
        wanted: the key.
        sets: {prefix of the keys: channels of the set, or None if they are not known}. The prefix
            of the training set is empty.
        setting: what names the key, for the message.

    Returns:
        The keys of these sets that will be logged.

    Raises:
        ConfigError: nothing will be logged under this key.
    """
    known = session.rows([*session.labels.names, *session.config.eval_channels, None])
    for names in sets.values():
        known |= names or set()
    logged, refused = set(), ""
    for prefix, names in sets.items():
        metrics = {metric.name for metric in session.schema.chosen(session.config.metrics)}
        if not prefix:
            of_run = {*session.schema.run_metrics, *session.schema.extra_metrics}
            metrics |= of_run & {*session.config.metrics}
        for channel in sorted(known):
            for metric in session.schema.metric_names:
                key = session.keys.key(channel, metric, prefix)
                why = _why_not(session, channel, metric, metrics, names, of_train=not prefix)
                if why is None:
                    logged.add(key)
                elif key == wanted:
                    refused = why
    for prefix in sets:
        logged |= {prefix + name for name in session.config.objectives}
        if wanted in {prefix + one.name for one in OBJECTIVES} - logged:
            name = wanted.removeprefix(prefix)
            refused = f"{name!r} is not among `metrics` of the config; add it there."
    if refused and wanted not in logged:
        raise ConfigError(f"{setting} is {wanted!r}, but {refused}")
    session.keys.watched.add(wanted)
    return logged


def check_stop_when(session: ChannelMetrics, sets: Mapping[str, set[str] | None]) -> None:
    """Refuse a `stop_when` of the config that no window will have, as far as this is known.

    Args:
        session: the metrics.
        sets: as for `check_wanted`, the training set among them.

    Raises:
        ConfigError: no window will have the value.
    """
    settings = StopWhen.of(session.config.stop_when)
    if settings is None:
        return
    key, channel = settings.metric, session.config.row_of(settings.channel)
    if channel:
        prefix = max((p for p in sets if key.startswith(p)), key=len)
        key, names = session.keys.key(channel, key.removeprefix(prefix), prefix), sets[prefix]
        if names is not None and channel not in names:
            raise ConfigError(
                f"stop_when names the channel {channel!r}, which no record of this set has; "
                f"{hint(channel, sorted(names))}"
            )
    logged = check_wanted(session, key, sets, "stop_when")
    if key not in logged and (not channel or channel in session.labels):
        session.warn_once(f"stop_when waits for {key!r}, which nothing is known to log.")


def _why_not(
    session: ChannelMetrics,
    channel: str,
    metric: str,
    logged: set[str],
    names: set[str] | None,
    *,
    of_train: bool,
) -> str | None:
    """Why a metric of a channel is not among those `logged` for a set; None if it is."""
    where = "the training" if of_train else "an evaluation"
    # Evaluations log all labels of further axes.
    chosen = () if of_train or session.is_label(channel) else session.config.eval_channels
    if metric not in logged:
        return (
            f"{where} logs only {', '.join(sorted(logged))} of a channel; add {metric!r} to "
            "`metrics`, or choose another metric."
        )
    if chosen and channel not in chosen:
        return (
            f"eval_channels leaves out {channel!r}: it names {', '.join(chosen)}. Add it there, or "
            "choose another metric."
        )
    if names is not None and channel not in names:
        of_set = "the training" if of_train else "this evaluation"
        return (
            f"no record of {of_set} set has the channel {channel!r}: it holds "
            f"{', '.join(sorted(names))}; choose another metric."
        )
    return None
