"""Windows: what is counted between two log points."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, NoReturn

from channel_metrics.core.key_limit import KeyLimit
from channel_metrics.core.labels import UNLABELED
from channel_metrics.core.table import SumTable

__all__ = ["Evaluation", "OpenWindow", "Window", "tell", "with_added"]


@dataclass(frozen=True, kw_only=True)
class Window:
    """What was counted between two log points, over all ranks; the same on each of them.

    Nothing in it can be changed. `dataclasses.replace` makes another one."""

    version: ClassVar[int] = 1
    """The version of this form. Within a version, fields are only added."""

    split: str
    """`train`, or the name of the evaluation set."""

    step: int
    """The optimizer step at which the window was closed."""

    prefix: str = ""
    """The first part of the keys of `logs`, such as `eval_`."""

    values: dict[str, dict[str, float]] = field(default_factory=dict)
    """{channel: {metric: value}} for the channels that are logged, `unlabeled` last."""

    axes: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """{axis: {label: {metric: value}}} for the further axes of the config."""

    logs: dict[str, float] = field(default_factory=dict)
    """The same values under their log keys, and the objectives over all channels."""

    worst_channel: str = ""
    """The channel of `worst_loss`, if this objective is logged."""

    final: bool = True
    """Whether the window has ended; a window of `peek` is still open."""

    names: tuple[str, ...] = ()
    """The channels that the ranks know, in the order of `table`, and then rows of the axes, such
    as `domain/target`."""

    num_channels: int = 0
    """How many of `names` are channels; the rows after these hold the same tokens once more."""

    columns: tuple[str, ...] = ()
    """The columns of `table`."""

    table: tuple[tuple[float, ...], ...] = field(default=(), repr=False)
    """Sums, one row for `unlabeled` and then one per name, with one value per column."""

    totals: dict[str, dict[str, int]] = field(default_factory=dict, repr=False)
    """{channel, or label of an axis: {"tokens_total": ..., "samples_total": ...}}: the counts of
    training since the run began, this window included."""

    time: float = 0.0
    """The clock of the first rank when the window was closed, in seconds since 1970.

    0 unless a setting needs it (`budget`, `stop_at`)."""

    def __post_init__(self) -> None:
        for name in ("values", "axes", "logs", "totals"):
            object.__setattr__(self, name, _frozen(getattr(self, name)))

    @property
    def has_counts(self) -> bool:
        """Whether anything was counted."""
        return any(map(any, self.table))

    def sums(self, channel: str) -> dict[str, float]:
        """{column: sum} of one channel; zeros for a channel that is not in the window."""
        row = self._rows.get(channel)
        if row is None:
            return dict.fromkeys(self.columns, 0.0)
        return dict(zip(self.columns, self.table[row], strict=True))

    @cached_property
    def _rows(self) -> dict[str, int]:
        """{channel: its row in `table`}."""
        names = (*self.names, UNLABELED) if self.table else ()
        return {name: (place + 1) % len(names) for place, name in enumerate(names)}


class _Frozen(dict[Any, Any]):
    """A dict that cannot be changed. JSON and pickle take it for a dict."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("a window cannot be changed; copy what you want to change.")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> Any:
        return _Frozen, (dict(self),)


def _frozen(values: Any) -> Any:
    """Mappings in mappings, frozen; a window of a window is frozen already."""
    if isinstance(values, _Frozen) or not isinstance(values, Mapping):
        return values
    return _Frozen({key: _frozen(value) for key, value in values.items()})


class OpenWindow:
    """What is being counted.

    table: the sums of the window. step: those of its open step; None if no step is open.
    """

    def __init__(self, table: SumTable) -> None:
        self.table = table
        self.step: SumTable | None = None


class Evaluation(OpenWindow):
    """An evaluation that is open, or has just ended.

    Attributes:
        window: its values, after it has ended. None if an exception ended it, or if it was
            discarded.
        discarded: whether `discard` was called.
    """

    def __init__(self, table: SumTable) -> None:
        super().__init__(table)
        self.window: Window | None = None
        self.discarded = False

    def discard(self) -> None:
        """Drop what was counted, without a collective. All ranks must do so, or none."""
        self.discarded = True

    @property
    def logs(self) -> dict[str, float]:
        """The values under their log keys; empty if there is no window."""
        return {} if self.window is None else self.window.logs


def tell(
    window: Window,
    observers: list[Callable[[Window], Any]],
    warn_once: Callable[..., None],
    stop: Callable[[str], None],
) -> None:
    """Call the observers. A display that fails is removed from them, with a warning.

    If another one returns a text, the run should end, and the text is the reason.
    """
    for observer in list(observers):
        try:
            reason = observer(window)
        except Exception as error:  # only a display may fail: others steer the training
            if not getattr(observer, "is_display", False):
                raise
            observers.remove(observer)
            warn_once(f"{observer!r} failed, and shows nothing from now on: {error!r}")
            continue
        # A display may be on one rank only.
        if isinstance(reason, str) and reason and not getattr(observer, "is_display", False):
            stop(reason)


def with_added(
    window: Window,
    adding: Iterable[Callable[[Window], Mapping[str, float]]],
    limit: KeyLimit,
    warn_once: Callable[..., None],
) -> Window:
    """The window with the values that observers add to its log, as far as `limit` allows.

    No key is logged twice.
    """
    for add in adding:
        taken, more = limit.taken | window.logs.keys(), add(window)
        for key in sorted(taken.intersection(more)):
            warn_once(f"{key!r} is the key of another value, so this one is left out.")
        new = {key: value for key, value in more.items() if key not in taken}
        window = replace(window, logs={**window.logs, **limit.added(new)})
    return window
