"""The tables of the pages in docs/ that are made from the results: `<!-- benchmarks: NAME -->`.

Each part ends with `<!-- end -->`. tests/project/test_benchmarks.py compares the pages with the
results.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import cluster

__all__ = ["PAGES", "filled", "write_pages"]

Results = dict[str, Any]
Row = dict[str, Any]

PAGES = ("acting.md", "benchmarks.md", "fused_losses.md", "report.md", "scale.md")
_PART = re.compile(r"(<!-- benchmarks: (.+?) -->\n).*?(<!-- end -->\n)", re.DOTALL)
LARGE, SMALL = 65_536, 8_192
SWIFT, MEGATRON = "ms-swift, HF", "ms-swift, Megatron"


def write_pages(found: Results, docs: Path) -> None:
    """Write the parts of all pages."""
    for name in PAGES:
        page = docs / name
        page.write_text(filled(page.read_text(encoding="utf-8"), found), encoding="utf-8")


def filled(text: str, found: Results) -> str:
    """A page with its parts as the results say."""
    return _PART.sub(lambda part: f"{part[1]}\n{PARTS[part[2]](found)}\n\n{part[3]}", text)


def summary(found: Results) -> str:
    """What this library costs, beside a goal and others."""
    step, peak = _by_variant(found, "step"), _by_variant(found, "step", "memory")
    head, head_peak = _by_variant(found, "head"), _by_variant(found, "head", "memory")
    axes, further = (_by_variant(found, "step", part) for part in ("axes", "further"))
    growth = {row["num_channels"]: _r(row) for row in found["update"]["growth"]}
    others = f"ms-swift {_r(step[SWIFT])}, VeOmni in each step {_r(step['VeOmni, each step'])}"
    rows = [
        ("a whole Trainer step with channel losses, compared with none", "1.01", step["loss"], ""),
        ("the same with token accuracy", "1.02", step["loss and accuracy"], f"loss only: {others}"),
        (
            "the same with 3 axes, error bars and bits per byte",
            "1.01",
            _rounds(axes["3 axes, error bars, bytes"]),
            "",
        ),
        (
            "the same with these and token accuracy, with its error bars",
            "1.02",
            _rounds(axes["3 axes, error bars, bytes, accuracy"]),
            "",
        ),
        ("the same with the loss and entropy", "none", _rounds(further["loss and entropy"]), ""),
        (
            "the same with the loss and gradient shares",
            "none",
            _rounds(further["loss and gradients"]),
            "",
        ),
        ("peak memory of the step with token accuracy", "1.00", peak["loss and accuracy"], ""),
        ("peak memory with entropy", "none", peak["loss and entropy"], ""),
        ("peak memory with gradient shares", "none", peak["loss and gradients"], ""),
        (
            "head and loss in chunks, with channels and accuracy, compared with transformers' "
            "default without: time",
            "1",
            head["chunked, channels"],
            "",
        ),
        ("the same: peak memory", "below 1", head_peak["chunked, channels"], ""),
        *_counted_rows(_by_variant(found, "counts")),
        (
            "growth of `update` to 4,096 channels; to 100,000",
            "1.3; 3",
            "; ".join((growth[4096], growth[100_000])),
            "",
        ),
        (
            "`from channel_metrics import *` after `import torch`",
            "1.02",
            found["imports"]["rows"][0],
            "",
        ),
        *_update_rows(found["update"]["rows"]),
    ]
    lines = [(w, g, v if isinstance(v, str) else _r(v), o) for w, g, v, o in rows]
    return _table(("what", "goal", "this library", "others"), lines)


def _rounds(row: Row) -> str:
    """A ratio; with few rounds, how many."""
    few = f" ({row['num_rounds']} rounds on a busy machine)" if row["num_rounds"] < 5 else ""
    return f"{_r(row)}{few}"


def _counted_rows(counts: dict[str, Row]) -> Iterable[tuple[str, str, str, str]]:
    def of(what: str, *variants: str) -> list[str]:
        return [f"{counts[variant][what]:,}" for variant in variants]

    variants = ("ours", "ours, accuracy", "ours, accuracy, 3 axes, error bars, bytes")
    few = "; ".join(of("operators_per_micro_batch", *variants))
    swift, megatron, veomni = of("operators_per_micro_batch", SWIFT, MEGATRON, "VeOmni")
    others = f"ms-swift {swift}, its Megatron {megatron}; VeOmni {veomni}"
    what = "operators per micro-batch: loss; with accuracy; with 3 axes, error bars and bytes, too"
    yield what, "none", few, others
    ours, swift, megatron, veomni = of("syncs_per_micro_batch", "ours", SWIFT, MEGATRON, "VeOmni")
    others = f"ms-swift {swift}, its Megatron {megatron}; VeOmni {veomni}"
    yield "host syncs per micro-batch of 256 sequences", "0", ours, others
    ours, swift, veomni = of("collectives_per_log", "ours", SWIFT, "VeOmni")
    (megatron,) = of("collectives_per_micro_batch", MEGATRON)
    others = f"ms-swift {swift}, its Megatron {megatron} per micro-batch; VeOmni {veomni}"
    yield "collectives per log", "1", ours, others


def _update_rows(rows: Iterable[Row]) -> Iterable[tuple[str, str, str, str]]:
    ratios = {(row["num_tokens"], row["variant"]): _r(row, 2) for row in rows}
    for size, sequences, goal in ((LARGE, "2,048", "8"), (SMALL, "256", "none")):

        def both(layout: str, size: int = size) -> str:
            name = f"update, {layout}"
            return f"{ratios[size, name]}; {ratios[size, f'{name}, accuracy']}"

        title = f"`update`, {size:,} tokens in {sequences} sequences, padded; with accuracy"
        yield title, goal, both("padded"), ""
        others = (
            f"ms-swift {ratios[size, SWIFT]}, its Megatron {ratios[size, MEGATRON]}, "
            f"VeOmni {ratios[size, 'VeOmni']}"
        )
        yield "the same, packed; with accuracy", goal, both("packed"), others


def head_table(found: Results) -> str:
    """Time and memory of head and loss, by backend."""
    times, peaks = _by_variant(found, "head"), _by_variant(found, "head", "memory")
    default = peaks["HF default, no metrics"]
    rows = [
        ("transformers' default, without metrics", "1", f"1 ({default['peak_mib']:,.0f} MiB)"),
        *(
            (f"`{backend}`", _r(times[variant]), _r(peaks[variant], 2))
            for backend, variant in (
                ("logits", "logits, channels"),
                ("chunked", "chunked, channels"),
                ("torch", "torch chunked, channels"),
            )
        ),
    ]
    return _table(("", "time", "peak memory"), rows)


def log_bytes(_: Results) -> str:
    """How many bytes a log sends; by the protocol, not measured."""
    few, more = (cluster.vectors(64, channels)["log"][0] for channels in (0, 1))
    return f"    {more - few} bytes x (channels + 1) + {few - (more - few)} bytes"


def log_table(found: Results) -> str:
    """Time of one log, by channels and ranks."""
    rows = found["scale"]["rows"]
    times = {(row["num_channels"], row["num_ranks"]): row["milliseconds"] for row in rows}
    channels, ranks = (sorted(set(numbers)) for numbers in zip(*times, strict=True))
    heads = ("channels", "bytes per log", "1 rank", *(f"{n} ranks" for n in ranks[1:]))
    sent = {c: cluster.vectors(ranks[-1], c)["log"][0] for c in channels}
    lines = [(f"{c:,}", f"{sent[c]:,}", *(_ms(times[c, n]) for n in ranks)) for c in channels]
    then = rows[0]["bytes_per_log"]
    changed: str = f"\n\nThe times were measured when the first line had {then:,} bytes."
    return _table(heads, lines) + (changed if then != sent[channels[0]] else "")


def event_table(found: Results) -> str:
    """What new names cost, on 64 ranks with 10 channels."""
    (row,) = [r for r in found["scale"]["rows"] if (r["num_ranks"], r["num_channels"]) == (64, 10)]
    width, name = cluster.ROW_BYTES, cluster.NAME_BYTES
    declared = "M names, new and equal on all ranks (declared names, first log)"
    events = (
        ("no new name", "", "0"),
        (declared, "first_log_", f"{width} M"),
        ("a new name on one rank", "one_new_name_", f"24 N + {name} + {width}"),
        ("another new name on each rank", "new_name_per_rank_", f"24 N + {name} N + {width} N"),
    )
    lines = []
    for event, key, size in events:
        count = row[f"{key}collectives" if key else "collectives_per_log"]
        lines.append((event, str(count), size, _ms(row[f"{key}milliseconds"])))
    heads = ("event, N ranks", "all-reduces", "additional bytes", "measured, 64 ranks, 10 channels")
    return _table(heads, lines)


def latency_table(_: Results) -> str:
    """Computed, not measured: see `cluster`."""
    events = {"log": "log", "new": "another new name on each rank"}
    lines: dict[tuple[str, str], list[str]] = {}
    for row in cluster.rows():
        if row["event"] in events.values():
            line = lines.setdefault((f"{row['num_ranks']:,}", f"{row['num_channels']:,}"), [])
            line += [_ms(row["ring_milliseconds"]), _ms(row["tree_milliseconds"])]
    heads = ("ranks", "channels", "log: ring", "log: tree", f"{events['new']}: ring", "tree")
    return _table(heads, [(*key, *line) for key, line in lines.items()])


def alerts_table(found: Results) -> str:
    """CPU time of alerts per window."""
    rows = [(f"{r['channels']:,}", *_more(r)) for r in found["acting"]["alerts"]]
    return _table(("channels", "a window without", "more with alerts"), rows)


def outliers_table(found: Results) -> str:
    """CPU time of outliers, per micro-batch and at a log point."""
    rows = [
        (f"{r['channels']:,}", *_more(r), f"{r['lines']:,}", *_more(r, "close_")[1:])
        for r in found["acting"]["outliers"]
    ]
    heads = ("channels", "a micro-batch without", "more with outliers", "lines of a window")
    return _table((*heads, "more at its end"), rows)


def missed_table(found: Results) -> str:
    """How many rises the findings miss, by the number of values."""
    runs, rows = found["missed"]["runs"], found["missed"]["rows"]
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        of_case = cells.setdefault((f"last {row['where']}", str(row["rise"])), {})
        of_case[row["values"]] = f"{100 - 100 * row['states'].get('worse', 0) / runs:g} %"
    first, *others = next(iter(cells.values()))
    heads = ("where the rise begins", "rise", f"{first} values", *map(str, others))
    return _table(heads, [(*case, *line.values()) for case, line in cells.items()])


def _more(row: Row, key: str = "") -> tuple[str, str]:
    off, on = row[f"{key}off_us"], row[f"{key}on_us"]
    return _ms(off / 1000), _ms((on - off) / 1000)


PARTS: dict[str, Callable[[Results], str]] = {
    "summary": summary,
    "head": head_table,
    "log bytes": log_bytes,
    "log": log_table,
    "events": event_table,
    "latency": latency_table,
    "alerts": alerts_table,
    "outliers": outliers_table,
    "missed rises": missed_table,
}


def _by_variant(found: Results, name: str, table: str = "rows") -> dict[str, Row]:
    return {row["variant"]: row for row in found[name][table]}


def _r(row: Row, digits: int = 3) -> str:
    """The ratio of a row; below ten with two decimals, else with so many digits."""
    ratio: float = row["ratio"]
    return f"{ratio:.2f}" if ratio < 10 else f"{float(f'{ratio:.{digits}g}'):.0f}"


def _ms(milliseconds: Any) -> str:
    return f"{milliseconds:.2g} ms" if milliseconds < 10 else f"{milliseconds:,.0f} ms"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)
