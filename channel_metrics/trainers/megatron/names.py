"""Names for the datasets that Megatron's data options name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from channel_metrics.config import MetricsConfig
from channel_metrics.errors import ConfigError

__all__ = ["MOCK", "blend_paths", "dataset_name", "names_in_order", "refuse_axes_by_field"]

MOCK = "mock"
# Endings that the tools which prepare Megatron's data append to the name of a source.
_ENDINGS = (".jsonl", ".json", ".bin", ".idx", "_text_document", "_document", "_text")


def blend_paths(blend: Any, per_split: Any) -> list[list[str]]:
    """The paths of each blend of Megatron: one (paths, weights) for all splits, or one per split.

    Args:
        blend, per_split: as in the config of its datasets; None if they are not given.
    """
    return [list(found[0]) for found in (blend, *(per_split or ())) if found is not None]


def names_in_order(
    blends: Sequence[Sequence[str]], given: Sequence[str], setting: str = "--channels"
) -> dict[str | None, str]:
    """Give each dataset of the blends its name.

    Args:
        blends: the paths of each blend: one for all splits, or one per split.
        given: the names, in the order of the blend; none to take them from the paths.
        setting: what gives the names, for the message.

    Raises:
        ConfigError: there is not one name for each dataset.
    """
    paths = list(dict.fromkeys(path for blend in blends for path in blend))
    if not given:
        return dict(zip(paths, _short_names(paths), strict=True))
    if len(given) == len(paths):
        return dict(zip(paths, given, strict=True))
    if all(len(blend) == len(given) for blend in blends):
        # Each split has its own files, but from the same sources.
        return {path: name for blend in blends for path, name in zip(blend, given, strict=True)}
    listed = "\n".join(f"  {path}" for path in paths)
    raise ConfigError(
        f"{setting} got {len(given)} names ({', '.join(given)}), but the blend has "
        f"{len(paths)} data sets; give one name for each, in this order, or none to take "
        f"them from the paths:\n{listed}"
    )


def dataset_name(path: str | None) -> str:
    """Name the channel of a dataset that no data option names.

    Args:
        path: the path of the dataset; None for mock data.

    Returns:
        The name of its file, without the endings of Megatron's data files.
    """
    return MOCK if path is None else _without_ending(path)[-1]


def _short_names(paths: Sequence[str]) -> list[str]:
    """The last parts of each path: as few as are needed to make it unique."""
    parts = [_without_ending(path) for path in paths]
    chosen = [own[-1:] for own in parts]
    while True:
        counts = Counter(tuple(own) for own in chosen)
        longer = [
            full[-len(own) - 1 :] if counts[tuple(own)] > 1 else own
            for full, own in zip(parts, chosen, strict=True)
        ]
        if longer == chosen:
            return ["/".join(own) for own in chosen]
        chosen = longer


def _without_ending(path: str) -> list[str]:
    *folders, name = PurePath(path).parts
    for ending in _ENDINGS:
        short = name.removesuffix(ending)
        name = short or name
    return [*(folder for folder in folders if folder != "/"), name]


def refuse_axes_by_field(config: MetricsConfig) -> None:
    """Raise `ConfigError` if labels must be read from fields: tokenized data has none."""
    for axis, source in config.axes.items():
        if not isinstance(source, Mapping):
            raise ConfigError(
                f"the axis {axis!r} is read from a field, but tokenized data files have no fields; "
                f"map channels to labels instead: axes: {{{axis}: {{bbu: target}}}}."
            )
