"""`channel-metrics check`: shows which channels the data has, before a run.

Files are read line by line, so their size does not matter.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from channel_metrics.config import MetricsConfig
from channel_metrics.core.labels import UNLABELED, channels_of, winning_field
from channel_metrics.data.jsonl import read_jsonl, text_of
from channel_metrics.data.yaml import is_run, load_metrics_config, load_yaml
from channel_metrics.demo.config import TrainConfig, load_config
from channel_metrics.demo.mixture import source_records
from channel_metrics.demo.tiny import load_tokenizer
from channel_metrics.errors import ChannelError, ChannelMetricsError, ConfigError

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["CheckResult", "as_json_text", "check_data", "check_records", "find_problems", "render"]

_BYTES_PER_TOKEN = 4

Located = tuple[str, Mapping[str, Any]]
CountTokens = Callable[[Mapping[str, Any]], float]


@dataclass(kw_only=True)
class CheckResult:
    """What was found. Records without a channel are counted under None."""

    fields: tuple[str, ...]
    """The fields that may hold the channel, in order."""

    tokens_by: str
    """How tokens were counted."""

    found_in: Counter[str | None] = field(default_factory=Counter)
    """Records whose channel came from each field."""

    num_records: Counter[str | None] = field(default_factory=Counter)
    """Records of each channel. A record of several sequences counts once for each of them."""

    num_tokens: defaultdict[str | None, float] = field(default_factory=lambda: defaultdict(float))
    """Tokens of each channel, of all roles."""

    problems: list[str] = field(default_factory=list)
    """Names that a run would refuse, or that have another meaning."""

    @property
    def has_channel(self) -> bool:
        """Whether any record has a channel."""
        return any(name is not None for name in self.num_records)


def check_data(
    data: Sequence[Path], *, fields: Sequence[str] = (), config_path: Path | None = None
) -> CheckResult:
    """Check JSONL files, or the sources of a train config.

    Args:
        data: JSONL files, or the YAML of one run.
        fields: the fields that may hold the channel; by default those of the config.
        config_path: the YAML of a run, or of a `MetricsConfig`. Its fields are used; of a run also
            its tokenizer, and its sources if there is no `data`.

    Raises:
        ChannelMetricsError: for data that cannot be read.
    """
    runs = [path for path in data if path.suffix in (".yaml", ".yml")]
    if (runs and (len(data) > 1 or config_path)) or not (data or config_path):
        raise ConfigError(
            f"check takes JSONL files, or the YAML of one run, but got {len(data)} paths, "
            f"{len(runs)} of them YAML; see channel-metrics check --help."
        )
    run, metrics = _settings(runs[0] if runs else config_path)
    metrics = replace(metrics, fields=tuple(fields)) if fields else metrics
    whole_run = run is not None and (runs or not data)
    if not data and not whole_run:
        raise ConfigError(f"{config_path} names no sources; give JSONL files to check, too.")
    records = _train_records(run) if run is not None and whole_run else _file_records(data)
    count_tokens, tokens_by = _token_counter(run)
    return check_records(records, metrics, count_tokens=count_tokens, tokens_by=tokens_by)


def _settings(path: Path | None) -> tuple[TrainConfig | None, MetricsConfig]:
    if path is None:
        return None, MetricsConfig()
    values = load_yaml(path)
    if isinstance(values, Mapping) and not is_run(values):
        return None, load_metrics_config(path)
    run = load_config(path)
    return run, run.metrics


def check_records(
    records: Iterable[Located], metrics: MetricsConfig, *, count_tokens: CountTokens, tokens_by: str
) -> CheckResult:
    """Count records by channel.

    Args:
        records: pairs of (place for messages, record).
        metrics: the fields, and the channels that a run would refuse.
        count_tokens: gives the tokens of a record.
        tokens_by: says how they are counted.

    Raises:
        ChannelError: for a channel field that holds no name.
    """
    result = CheckResult(fields=metrics.fields, tokens_by=tokens_by)
    for where, record in records:
        try:
            names = channels_of(record, metrics.fields)
            result.found_in[winning_field(record, metrics.fields)] += 1
        except ChannelError as error:
            raise ChannelError(f"{where}: {error}") from None
        tokens = count_tokens(record)
        for name in names:
            result.num_records[name] += 1
            # A record does not say how long each of its sequences is: they share the tokens evenly.
            result.num_tokens[name] += tokens / len(names)
    result.problems += find_problems(result.num_records, metrics)
    return result


def find_problems(names: Iterable[str | None], metrics: MetricsConfig) -> list[str]:
    """Problems of the channels `names`: a run would refuse them, or they have another meaning."""
    problems = []
    table = metrics.new_table(_reserved_keys())
    for name in sorted(name for name in names if name is not None):
        if name == UNLABELED:
            problems.append(
                f"a channel is called {UNLABELED!r}, but records without a channel are counted "
                "under this name, too; rename it to tell them apart."
            )
            continue
        try:
            table.ids([name])
        except ChannelMetricsError as error:
            problems.append(str(error))
    return problems


def _bytes_as_tokens(record: Mapping[str, Any]) -> float:
    """One token for four bytes of the record's text, or of the whole record if it has no text."""
    text = text_of(record)
    whole = json.dumps(record, ensure_ascii=False) if text is None else text
    return len(whole.encode("utf-8", "replace")) / _BYTES_PER_TOKEN


def _file_records(paths: Iterable[Path]) -> Iterator[Located]:
    """The records of JSONL files, with file and line."""
    for path in paths:
        for number, record in read_jsonl(path):
            yield f"{path}:{number}", record


def _train_records(config: TrainConfig) -> Iterator[Located]:
    """The training records of a train config, annotated as in the run."""
    for source in config.sources:
        for number, record in enumerate(source_records(source), 1):
            yield f"source {source.name!r}, record {number}", record


def as_json_text(result: CheckResult) -> str:
    """The result as JSON, for scripts. Records without a channel are under `no_channel`."""
    names = sorted(name for name in result.num_records if name is not None)
    content = {
        "fields": {name: result.found_in[name] for name in result.fields},
        "tokens_by": result.tokens_by,
        "channels": {
            name: {"records": result.num_records[name], "tokens": round(result.num_tokens[name])}
            for name in names
        },
        "no_channel": {
            "records": result.num_records[None],
            "tokens": round(result.num_tokens.get(None, 0.0)),
        },
        "problems": result.problems,
    }
    return json.dumps(content, indent=2, ensure_ascii=False)


def render(result: CheckResult) -> Table:
    """A rich table of the channels."""
    from rich import box
    from rich.table import Table

    table = Table(title="channels found", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("channel", style="bold", no_wrap=True)
    for heading in ("records", "share", f"tokens ({result.tokens_by})", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    records, tokens = result.num_records.total(), sum(result.num_tokens.values())
    for name in sorted(result.num_records, key=lambda name: (name is None, name or "")):
        count, size = result.num_records[name], result.num_tokens[name]
        table.add_row(
            "(no channel)" if name is None else name,
            f"{count:,}",
            f"{count / records:.1%}",
            f"{round(size):,}",
            f"{size / tokens:.1%}" if tokens else "-",
        )
    return table


def _token_counter(run: TrainConfig | None) -> tuple[CountTokens, str]:
    if run is None:
        return _bytes_as_tokens, f"estimated, {_BYTES_PER_TOKEN} bytes each"
    tokenizer = load_tokenizer(run.tokenizer)

    def count(record: Mapping[str, Any]) -> float:
        text = text_of(record)
        return _bytes_as_tokens(record) if text is None else len(tokenizer(text)["input_ids"])

    return count, f"tokenizer {Path(run.tokenizer).name}"


def _reserved_keys() -> Collection[str]:
    try:
        from channel_metrics.trainers.hf.mixin import RESERVED_KEYS
    except ModuleNotFoundError:
        return ()  # Without transformers, there is no trainer with keys of its own.
    return RESERVED_KEYS
