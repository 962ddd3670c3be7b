"""The YAML of `channel-metrics train`: sources, model, training arguments, metrics.

    sources:
      bbu: {path: bbu.jsonl, ratio: 2, domain: target, val_path: bbu_val.jsonl}
      lvis: {path: lvis.jsonl}
    model: {tiny: {hidden_size: 64}}
    tokenizer: byte
    training: {max_steps: 100, logging_steps: 10}
    probe: {every: 20, sources: {canary: canary.jsonl}}   # optional, see docs/probe.md

Paths of data are relative to this file. The run folder is relative to the working directory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from channel_metrics.config import MetricsConfig, refuse_unknown_keys
from channel_metrics.data.yaml import load_yaml, mapping
from channel_metrics.demo.tiny import TinyModel
from channel_metrics.errors import ConfigError
from channel_metrics.extras import need
from channel_metrics.probes.probe import ProbeConfig, probe_keys

__all__ = ["ModelConfig", "ProbeSection", "Source", "TrainConfig", "load_config"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """One dataset of the mixture. Its name is the channel."""

    name: str
    """The channel: `metadata._fusion_source` of every record."""

    kind: Literal["jsonl", "python_corpus"] = "jsonl"
    """A JSONL file, or texts that every machine with Python has."""

    path: Path | None = None
    """The JSONL file (kind jsonl)."""

    part: str = ""
    """Which texts (kind python_corpus): see `channel_metrics.demo.python_corpus.PARTS`."""

    max_bytes: int = 400_000
    """How much text is read (kind python_corpus)."""

    ratio: float = 1.0
    """Share of the training records, relative to the ratios of the other sources."""

    domain: Literal["target", "source"] = "source"
    """`metadata._fusion_domain`: whether the run is for this data, or only mixes it in."""

    template: str = "default"
    """`metadata._fusion_template`."""

    val_path: Path | None = None
    """A JSONL file of records for evaluation."""

    val_samples: int = 0
    """How many records are held out for evaluation, if there is no val_path."""

    def __post_init__(self) -> None:
        where = f"source {self.name!r}"
        if not self.name.strip():
            raise ConfigError("a source needs a non-empty name; it is the channel in the logs.")
        if (self.path is None) == (self.kind == "jsonl"):
            raise ConfigError(
                f"{where}: path belongs to kind jsonl, and only to it; is {self.path}."
            )
        if bool(self.part) == (self.kind == "jsonl"):
            raise ConfigError(f"{where}: part belongs to kind python_corpus, and only to it.")
        if not 0 < self.ratio < float("inf"):
            raise ConfigError(f"{where}: ratio must be above 0, but is {self.ratio}; remove it?")
        if self.val_samples < 0 or self.max_bytes < 1:
            raise ConfigError(f"{where}: val_samples and max_bytes must not be negative.")
        if self.val_path and self.val_samples:
            raise ConfigError(f"{where}: set val_path or val_samples, not both.")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A model by name or path, or a tiny one with random weights."""

    name: str = ""
    """A name on the hub, or a folder."""

    tiny: TinyModel | None = None
    """The size of a randomly initialised Qwen2 model."""

    def __post_init__(self) -> None:
        if bool(self.name) == (self.tiny is not None):
            raise ConfigError("model must be a name or path, or tiny: {...}; exactly one of them.")


@dataclass(frozen=True, kw_only=True)
class ProbeSection(ProbeConfig):
    """`ProbeConfig`, and the datasets that the probe measures."""

    sources: dict[str, Path]
    """{name: JSONL file}, with records like those of the mixture."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sources:
            raise ConfigError("sources of the probe must name at least one JSONL file.")
        probe_keys(list(self.sources))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything one run needs."""

    sources: tuple[Source, ...]
    """The datasets to mix: a list, or a mapping from name to the rest."""

    model: ModelConfig
    """A name or path, or `tiny: {...}`."""

    tokenizer: str = "byte"
    """A name or path, or `byte` for one token per byte, without a download."""

    max_length: int = 512
    """Tokens per record; longer records are cut."""

    num_samples: int | None = None
    """Records per epoch; None takes as many as all sources hold."""

    seed: int = 42
    """The seed of the mixture, the tiny model and, unless `training` sets one, the trainer."""

    training: dict[str, Any] = field(default_factory=dict)
    """Passed to `transformers.TrainingArguments`."""

    eval_domain: Literal["all", "target"] = "all"
    """`target` sets `metrics.eval_channels` to the target sources and those with a val_path."""

    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    """See `channel_metrics.MetricsConfig`."""

    probe: ProbeSection | None = None
    """Datasets to measure during the training."""

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        if not names:
            raise ConfigError("sources must hold at least one source, but is empty.")
        if len(set(names)) < len(names):
            raise ConfigError(f"every source needs a name of its own, but they are {names}.")
        if self.max_length < 2 or (self.num_samples is not None and self.num_samples < 1):
            raise ConfigError("max_length must be at least 2 and num_samples at least 1.")
        if self.eval_domain == "target" and self.metrics.eval_channels:
            raise ConfigError(
                "eval_domain is 'target' and metrics.eval_channels lists "
                f"{list(self.metrics.eval_channels)}; set one of them."
            )

    def metrics_of_run(self) -> MetricsConfig:
        """`metrics`, with the `eval_channels` of `eval_domain`."""
        if self.eval_domain == "all":
            return self.metrics
        logged = [s.name for s in self.sources if s.domain == "target" or s.val_path]
        if not logged:
            raise ConfigError(
                "eval_domain is 'target', but no source has domain target or a val_path; "
                "evaluation would log nothing."
            )
        return replace(self.metrics, eval_channels=tuple(logged))


def load_config(path: Path) -> TrainConfig:
    """The config in the YAML file `path`, with absolute paths of data.

    Raises `ConfigError` if the file is missing or no plain YAML, or has unknown keys or wrong
    values.
    """
    raw = mapping(load_yaml(path), str(path))
    _refuse(raw, TrainConfig, path)
    raw["sources"] = [_source(item, path) for item in _source_items(raw.get("sources"), path)]
    raw["model"] = _model(raw.get("model"), path)
    raw["metrics"] = mapping(raw.get("metrics") or {}, f"{path}, metrics")
    _refuse(raw["metrics"], MetricsConfig, path, "metrics")
    if raw.get("probe") is not None:
        raw["probe"] = mapping(raw["probe"], f"{path}, probe")
        _refuse(raw["probe"], ProbeSection, path, "probe")
    raw["training"] = mapping(raw.get("training") or {}, f"{path}, training")
    _refuse_training_keys(raw["training"], f"{path}, training")
    return _absolute(_validate(raw, path), path.parent)


def _validate(raw: dict[str, Any], path: Path) -> TrainConfig:
    pydantic = need("pydantic", extra="cli")
    validate: Callable[[Any], TrainConfig] = pydantic.TypeAdapter(TrainConfig).validate_python
    try:
        return validate(raw)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{path}{', ' if where else ''}{where}: {message}") from None


def _source_items(raw: Any, path: Path) -> list[Any]:
    if isinstance(raw, Mapping):
        items = {name: mapping(item, f"{path}, sources.{name}") for name, item in raw.items()}
        return [{"name": str(name)} | item for name, item in items.items()]
    if isinstance(raw, list):
        return raw
    raise ConfigError(f"{path}: sources must be a list or a mapping, but is {raw!r}.")


def _source(raw: Any, path: Path) -> dict[str, Any]:
    item = mapping(raw, f"{path}, sources")
    _refuse(item, Source, path, f"source {item.get('name', '?')!r}")
    return item


def _model(raw: Any, path: Path) -> dict[str, Any]:
    model: dict[str, Any] = (
        {"name": raw} if isinstance(raw, str) else mapping(raw, f"{path}, model")
    )
    _refuse(model, ModelConfig, path, "model")
    if "tiny" in model:
        tiny = mapping(model["tiny"] or {}, f"{path}, model.tiny")
        _refuse(tiny, TinyModel, path, "model.tiny")
        model["tiny"] = tiny
    return model


def _refuse(raw: dict[str, Any], cls: type, path: Path, section: str = "") -> None:
    where = f"{path}, {section}" if section else str(path)
    refuse_unknown_keys(raw, [item.name for item in fields(cls)], where)


def _refuse_training_keys(raw: dict[str, Any], where: str) -> None:
    if raw:
        arguments = need("transformers", extra="hf").TrainingArguments
        refuse_unknown_keys(raw, [item.name for item in fields(arguments)], where)


def _absolute(config: TrainConfig, folder: Path) -> TrainConfig:
    sources = (
        replace(
            source,
            path=source.path and (folder / source.path).resolve(),
            val_path=source.val_path and (folder / source.val_path).resolve(),
        )
        for source in config.sources
    )
    probe = config.probe
    if probe is not None:
        files = {name: (folder / file).resolve() for name, file in probe.sources.items()}
        probe = replace(probe, sources=files)
    return replace(
        config,
        probe=probe,
        sources=tuple(sources),
        model=replace(config.model, name=_local(config.model.name, folder)),
        tokenizer=_local(config.tokenizer, folder),
    )


def _local(name: str, folder: Path) -> str:
    """The path of `name` if it is a folder beside the config; else `name`, as on the hub."""
    local = folder / name
    return str(local.resolve()) if name not in ("", "byte") and local.is_dir() else name
