"""`channel-metrics train`: the transformers Trainer on a mixture, with channel metrics."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from channel_metrics.analysis.run import RUN_FILE
from channel_metrics.analysis.summary import ChannelRow, summarize
from channel_metrics.core.labels import channels_of, field_roots
from channel_metrics.demo.config import ProbeSection, TrainConfig
from channel_metrics.demo.encoding import check_tokenizer, encode
from channel_metrics.demo.mixture import Mixture, build_mixture, checked_records
from channel_metrics.demo.tiny import load_tokenizer, tiny_model
from channel_metrics.errors import ConfigError
from channel_metrics.extras import need

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

__all__ = ["TrainSummary", "train"]


@dataclass(frozen=True, kw_only=True)
class TrainSummary:
    """The results of a run."""

    rows: list[ChannelRow]
    """One per channel."""

    output_dir: Path
    """The run folder: TensorBoard's files, `trainer_state.json`, the configured ratios (for the
    report), and checkpoints if any."""

    log_history: list[dict[str, Any]] = field(repr=False)
    """What the trainer logged."""

    is_main: bool
    """Whether this is the first process of the run."""

    num_skipped: int
    """Records left out because their answers begin after `max_length`."""


def train(
    config: TrainConfig, *, output_dir: Path, max_steps: int | None = None, quiet: bool = True
) -> TrainSummary:
    """Train with a config.

    Args:
        config: the config.
        output_dir, max_steps: replace those in `config.training`.
        quiet: whether there are no progress bars.

    Raises:
        ConfigError: before training, for a config that cannot run.
    """
    _check_fields(config)
    if quiet:
        need("datasets", extra="hf").disable_progress_bars()
    overrides = {} if max_steps is None else {"max_steps": max_steps}
    arguments = _arguments(replace(config, training=config.training | overrides), output_dir, quiet)
    tokenizer = load_tokenizer(config.tokenizer)
    mixture = build_mixture(config, tokenizer)
    if mixture.val is None and arguments.eval_strategy != "no":
        raise ConfigError(
            f"training sets eval_strategy {config.training['eval_strategy']!r}, but no source has "
            "val_path or val_samples; give one of them records for evaluation."
        )
    trainer = _trainer(config, arguments, tokenizer, mixture)
    channels = _channels(config, mixture)
    if not quiet and not arguments.disable_tqdm:
        _show_lines(trainer, channels, config.metrics.key_format)
    trainer.train()
    _finish(trainer)
    if trainer.is_world_process_zero():
        _write_plan(config, mixture, output_dir)
    logs: list[dict[str, Any]] = trainer.state.log_history
    return TrainSummary(
        rows=summarize(logs, channels, config.metrics.key_format),
        output_dir=output_dir,
        log_history=logs,
        is_main=trainer.is_world_process_zero(),
        num_skipped=mixture.num_skipped,
    )


def _check_fields(config: TrainConfig) -> None:
    if "metadata" not in field_roots(config.metrics.fields):
        raise ConfigError(
            "metrics.fields must name a field in metadata, because records keep nothing else, but "
            f"is {list(config.metrics.fields)}; metadata._fusion_source is the name of the source."
        )


def _arguments(config: TrainConfig, output_dir: Path, quiet: bool) -> TrainingArguments:
    transformers = need("transformers", extra="hf")
    torch = need("torch", extra="hf")
    # torch.accelerator came with torch 2.6.
    has_accelerator = getattr(torch, "accelerator", torch.cuda).is_available()
    defaults = {
        "seed": config.seed,
        "report_to": "tensorboard" if importlib.util.find_spec("tensorboard") else "none",
        "disable_tqdm": quiet,
        # Pinning warns if there is no accelerator.
        "dataloader_pin_memory": has_accelerator,
        # If it were False on CPUs, each of several processes would train a model of its own.
        "use_cpu": not has_accelerator,
    }
    values = defaults | config.training | {"output_dir": str(output_dir)}
    try:
        arguments: TrainingArguments = transformers.TrainingArguments(**values)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"transformers refuses the values in training: {error}") from error
    return arguments


def _model(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    if config.model.tiny is not None:
        return tiny_model(
            config.model.tiny, tokenizer, max_length=config.max_length, seed=config.seed
        )
    model: PreTrainedModel = need("transformers", extra="hf").AutoModelForCausalLM.from_pretrained(
        config.model.name
    )
    embeddings: Any = model.get_input_embeddings()
    held = embeddings.weight.shape[0]
    if held < len(tokenizer):
        raise ConfigError(
            f"model {config.model.name!r} has {held} embeddings, but tokenizer "
            f"{config.tokenizer!r} has {len(tokenizer)} tokens; take the model's own tokenizer."
        )
    return model


def _trainer(
    config: TrainConfig,
    arguments: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    mixture: Mixture,
) -> Trainer:
    from transformers import DataCollatorForSeq2Seq, Trainer

    from channel_metrics.trainers.hf import attach

    stream = _stream(config, arguments, mixture)
    trainer = Trainer(
        model=_model(config, tokenizer),
        args=arguments,
        train_dataset=mixture.train if stream is None else stream,
        eval_dataset=mixture.val,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    if config.probe is not None:
        _probe(trainer, config.probe, tokenizer, config.max_length)
    attach(trainer, config.metrics_of_run())
    return trainer


def _stream(config: TrainConfig, arguments: TrainingArguments, mixture: Mixture) -> Any:
    """A `MixedStream` of the sources, if the config has a sampler; else None."""
    if not config.metrics.sampler:
        return None
    from channel_metrics.data.mixed_stream import MixedStream

    if arguments.world_size > 1:
        raise ConfigError(
            "metrics.sampler works on one process in this command; docs/sampler.md shows a script "
            "for several."
        )
    rows = arguments.train_batch_size
    workers = arguments.dataloader_num_workers * (arguments.dataloader_prefetch_factor or 2)
    # The Trainer reads one batch more than its workers.
    lag = (workers + 1) * rows
    return MixedStream(mixture.sources, seed=config.seed, batch_size=rows, lag=lag, field="")


def _show_lines(trainer: Trainer, channels: Sequence[str], key_format: str) -> None:
    """Print one line per log instead of all its keys."""
    from transformers.trainer_callback import ProgressCallback

    from channel_metrics.demo.progress import LineProgress

    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LineProgress(channels, key_format))


def _probe(
    trainer: Trainer, section: ProbeSection, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> None:
    from channel_metrics.trainers.hf import attach_probe

    sources = {name: list(checked_records(path)) for name, path in section.sources.items()}
    every = (record for records in sources.values() for record in records)
    chat = any(record.get("messages") is not None for record in every)
    check_tokenizer(tokenizer, chat=chat)
    # The probe encodes only the records that it chooses.
    encoded = partial(encode, tokenizer=tokenizer, max_length=max_length)
    attach_probe(trainer, sources, section, encode=encoded)


def _finish(trainer: Trainer) -> None:
    """Evaluate the final weights, unless it was done, and complete the run folder."""
    step = trainer.state.global_step
    done = any("eval_loss" in log and log["step"] == step for log in trainer.state.log_history)
    if trainer.eval_dataset is not None and not done:
        trainer.evaluate()
    if trainer.args.save_strategy != "no":
        trainer.save_model()
    trainer.save_state()


def _write_plan(config: TrainConfig, mixture: Mixture, output_dir: Path) -> None:
    """Write the ratios and sizes of the sources for the report. The trainer's files lack them."""
    ratios = {source.name: source.ratio for source in config.sources}
    plan = {
        "ratios": ratios,
        "records": {name: len(rows) for name, rows in mixture.sources.items()},
    }
    (output_dir / RUN_FILE).write_text(json.dumps(plan) + "\n", encoding="utf-8")


def _channels(config: TrainConfig, mixture: Mixture) -> Sequence[str]:
    """The channels of the data: the sources first, in their order, then any other."""
    found = {
        name
        for metadata in mixture.train["metadata"]
        for name in channels_of({"metadata": metadata}, config.metrics.fields)
        if name is not None
    }
    sources = [source.name for source in config.sources if source.name in found]
    return [*sources, *sorted(found.difference(sources))]
