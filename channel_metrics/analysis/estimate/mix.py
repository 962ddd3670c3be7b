"""The mix of each window of a run, and the channel losses that are estimated from it.

>>> run = with_estimates(load_run(Path("runs/old")), mix)         # doctest: +SKIP
>>> steps, values = run.series("bbu", "loss_estimate")            # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from channel_metrics.analysis.readers.keys import GLOBAL, Key
from channel_metrics.analysis.readers.readings import (
    MAX_EXAMPLES,
    Problems,
    Progress,
    Reading,
)
from channel_metrics.analysis.readers.samples import read_sample_log, read_sample_order
from channel_metrics.analysis.run import Run, run_from_readings
from channel_metrics.analysis.store import JoinedStore, store_of
from channel_metrics.errors import ChannelMetricsError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from channel_metrics.analysis.estimate.estimator import Estimate, Floats
    from channel_metrics.analysis.store import Steps

__all__ = ["Windows", "load_mix", "windows_of", "with_estimates", "with_mix"]

_MIX_METRICS = ("tokens", "samples", "share")


@dataclass(frozen=True, kw_only=True)
class Windows:
    """T windows whose loss is known, and the mix of C channels in them."""

    channels: list[str]
    """[C], names."""

    steps: Steps
    """[T], the last step of each."""

    losses: Floats
    """[T], of the whole window."""

    weights: Floats
    """[T, C], shares; rows sum to 1."""

    totals: Floats
    """[T], tokens (or what is counted instead) of the window."""

    num_left_out: int
    """Windows without a mix, or with a mix of only some of their steps."""

    metric: str
    """The metric of the mix: tokens, samples or share."""


def load_mix(
    path: Path,
    *,
    sample_data: Path | None = None,
    batch_size: int | None = None,
    progress: Progress = lambda _: None,
) -> Run:
    """The mix of each step, as a run with tokens and samples of each channel.

    Args:
        path: a per-sample log; or, with the next two, a list of ids in the order of the training.
        sample_data: JSONL with the id and the dataset of each sample.
        batch_size: samples per step, over all ranks.
        progress: is called with the number of bytes that were read.
    """
    if not path.is_file():
        raise ChannelMetricsError(f"expected a log of samples, but {path} is no file.")
    if (sample_data is None) != (batch_size is None):
        raise ChannelMetricsError(
            "a list of sample ids needs both its data and the batch size, but got sample_data "
            f"{sample_data} and batch_size {batch_size}; give both."
        )
    problems = Problems()
    if sample_data is not None and batch_size is not None:
        readings = read_sample_order(path, sample_data, batch_size, problems, progress)
    else:
        readings = read_sample_log(path, problems, progress)
    return run_from_readings(readings, name=path.stem, origin=str(path), problems=problems)


def with_mix(run: Run, mix: Run) -> Run:
    """`run` with the channels of `mix`. They have exact losses if the samples had losses."""
    has_loss = run.has(GLOBAL, "loss")
    shift = _shift(run, mix) if has_loss else 0

    def readings() -> Iterator[Reading]:
        for key, steps, values in mix.all_series():
            if key.channel or not has_loss:
                for step, value in zip((steps + shift).tolist(), values.tolist(), strict=True):
                    yield step, key, value

    problems = _sum(run.problems, mix.problems)
    if shift:
        problems.note(f"{mix.origin} counts steps from 0, the log from 1: moved by one")
    return _with_more(run, readings(), problems)


def with_estimates(run: Run, mix: Run | None = None) -> Run:
    """`run` with `loss_estimate` of each channel, and the ends of its 95 % band.

    Points that the mix does not determine are left out, and a note counts them. A run with
    measured losses of channels gets no estimates.

    Args:
        run: the run.
        mix: the mix of each step, if the log of the run does not have it.
    """
    if mix is not None:
        joined = with_mix(run, mix)
        windows = _windows(run, mix, _shift(run, mix), stride=None)
    else:
        joined, windows = run, windows_of(run)
    if windows is None or any(joined.has(name, "loss") for name in joined.channels("train")):
        return joined
    from channel_metrics.analysis.estimate.estimator import MIN_WINDOWS, estimate_curves

    problems = _sum(joined.problems)
    if len(windows.steps) < MIN_WINDOWS:
        problems.note(
            f"not estimated: {len(windows.steps)} windows have a loss and a mix, "
            f"{windows.num_left_out} have no mix; expected at least {MIN_WINDOWS}"
        )
        return replace(joined, problems=problems)
    sizes = windows.totals if windows.metric == "tokens" else None
    found = estimate_curves(windows.steps, windows.losses, windows.weights, sizes)
    _say(windows, found, problems)
    return _with_more(joined, _estimate_readings(windows, found), problems)


def windows_of(run: Run) -> Windows | None:
    """The windows of a run whose own log has their mix; None if it does not."""
    return _windows(run, run, shift=0, stride=1)


def _windows(run: Run, mix: Run, shift: int, stride: int | None) -> Windows | None:
    """stride: the number of steps in the mix of a window; None: the steps between two log lines."""
    import numpy as np

    channels = mix.channels("train")
    steps, losses = run.series(GLOBAL, "loss")
    metric = next((m for m in _MIX_METRICS if _in_all(mix, channels, m)), None)
    if metric is None or not len(steps):
        return None
    keep = np.isfinite(losses)
    steps, losses = np.asarray(steps[keep]), np.asarray(losses[keep])
    usual = stride or int(np.median(np.diff(steps))) if len(steps) > 1 else 1
    # If a log line is lost, the next window is no longer than the others.
    before = np.maximum(np.concatenate([steps[:1] - usual, steps[:-1]]), steps - usual)
    counts = [_counts(mix, name, metric, shift) for name in channels]
    mix_steps = np.unique(np.concatenate([own for own, _ in counts]))
    in_step = np.zeros(len(mix_steps))
    for own, values in counts:
        in_step[np.searchsorted(mix_steps, own)] += values
    places, inside = _places(mix_steps, steps, before)
    num_steps = np.bincount(places[inside], minlength=len(steps))
    totals = np.bincount(places[inside], weights=in_step[inside], minlength=len(steps))
    weights = np.zeros((len(steps), len(channels)))
    for column, (own, values) in enumerate(counts):
        shares = values / in_step[np.searchsorted(mix_steps, own)]
        places, inside = _places(own, steps, before)
        # A trainer logs the mean of the losses of its steps.
        weights[:, column] = np.bincount(
            places[inside], weights=shares[inside], minlength=len(steps)
        )
    known = num_steps == (1 if stride else steps - before)
    seen = weights[known].any(axis=0)
    return Windows(
        channels=[name for name, is_seen in zip(channels, seen, strict=True) if is_seen],
        steps=steps[known],
        losses=losses[known],
        weights=weights[known][:, seen] / num_steps[known, None],
        totals=totals[known],
        num_left_out=int((~known).sum()),
        metric=metric,
    )


def _places(own: Steps, steps: Steps, before: Steps) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """For each of the steps `own`: the index of its window, and whether it is in one."""
    import numpy as np

    places = np.searchsorted(steps, own)
    inside = places < len(steps)
    inside[inside] &= own[inside] > before[places[inside]]
    return places, inside


def _counts(mix: Run, name: str, metric: str, shift: int) -> tuple[Steps, Floats]:
    steps, values = mix.series(name, metric)
    keep = values > 0
    return steps[keep] + shift, values[keep]


def _in_all(run: Run, channels: list[str], metric: str) -> bool:
    return bool(channels) and all(run.has(name, metric) for name in channels)


def _shift(run: Run, mix: Run) -> int:
    """1 if the mix counts steps from 0 and the log does not."""
    steps, _ = run.series(GLOBAL, "loss")
    firsts = [int(own[0]) for _, own, _ in mix.all_series() if len(own)]
    return int(bool(len(steps)) and steps[0] > 0 and min(firsts, default=1) == 0)


def _estimate_readings(windows: Windows, found: Estimate) -> Iterator[Reading]:
    for column, name in enumerate(windows.channels):
        for row in found.identifiable[:, column].nonzero()[0]:
            step = int(found.steps[row])
            yield step, Key("train", name, "loss_estimate"), float(found.loss[row, column])
            yield step, Key("train", name, "loss_estimate_low"), float(found.low[row, column])
            yield step, Key("train", name, "loss_estimate_high"), float(found.high[row, column])


def _say(windows: Windows, found: Estimate, problems: Problems) -> None:
    problems.note(
        f"channel losses are estimated from {len(windows.steps)} windows, with 95 % bands; "
        f"a window scatters by {found.noise:.3g}"
    )
    if windows.num_left_out:
        problems.note(f"{windows.num_left_out} windows are left out: their mix is not known")
    if windows.metric != "tokens":
        problems.note(
            f"the mix is one of {windows.metric}, not of tokens: channels with long samples count "
            "too little, so estimates and bands are a little wrong"
        )
    for name, good in zip(windows.channels, found.identifiable.T, strict=True):
        if not good.all():
            problems.note(
                f"{name}: not identifiable at {int((~good).sum())} of {len(good)} points; there, "
                "the share of this channel varies too little, or is too small"
            )


def _with_more(run: Run, readings: Iterator[Reading], problems: Problems) -> Run:
    """The run with further series, whose keys are meanings. They take the place of its own."""
    more = store_of(readings)
    added: dict[str | Key, Key] = {key: key for key in more.keys if isinstance(key, Key)}
    own = {key: means for key, means in run.meanings.items() if means not in added}
    store = JoinedStore(run.store, more)
    return replace(run, problems=problems, store=store, meanings=own | added)


def _sum(*parts: Problems) -> Problems:
    whole = Problems()
    for part in parts:
        whole.count += part.count
        whole.examples += part.examples[: MAX_EXAMPLES - len(whole.examples)]
        for note in part.notes:
            whole.note(note)
    return whole
