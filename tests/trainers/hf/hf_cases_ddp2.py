"""Cases on two ranks of DistributedDataParallel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from hf_case_tools import MapStyle, Stream, cases_of, counted_collectives, fixed_records, run, told
from hf_tools import PaddingCollator, make_records
from transformers import DataCollatorWithFlattening

from channel_metrics import ChannelLossAccumulator, ConfigError, MetricsConfig, sync

WORLD_SIZE = 2
ENVIRON: dict[str, str] = {}

DECLARED = MetricsConfig(channels=("bbu", "rru", "lvis", "lang_chat"), unknown="error")
COUNTS = MetricsConfig(
    channels=DECLARED.channels, unknown="error", metrics=("loss", "tokens", "samples")
)
DISPATCH = {"dispatch_batches": True}
NO_DISPATCH = {"dispatch_batches": False}
SPLIT = {"split_batches": True}

# ---- windows and the trainer's loss ---------------------------------------------------------


def average_on(folder: Path) -> Any:
    return told(run(folder, records=make_records(64), gradient_accumulation_steps=2))


def average_off(folder: Path) -> Any:
    arguments = {"average_tokens_across_devices": False, "gradient_accumulation_steps": 2}
    return told(run(folder, records=make_records(64), **arguments))


def _bits(folder: Path, metrics_on: bool, **more: Any) -> Any:
    held_out = Dataset.from_list(make_records(10, seed=1))
    trainer = run(
        folder,
        metrics_on=metrics_on,
        dropout=0.1,
        learning_rate=1e-2,
        max_steps=8,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=3,
        trainer_arguments={"eval_dataset": held_out},
        **more,
    )
    off = metrics_on and trainer.channel_metrics.guard.off
    return told(trainer, random=torch.get_rng_state().sum().item(), off=off)


def bits_off(folder: Path) -> Any:
    return _bits(folder, False)


def bits_on(folder: Path) -> Any:
    return _bits(folder, True)


def _faulty(folder: Path, name: str) -> Any:
    """In the second window, rank 1 has an error in one function of its state."""

    def prepare(trainer: Any) -> None:
        state = trainer.channel_metrics
        owner = state if name == "record" else state.train
        original = getattr(owner, name)
        batches = trainer.data_collator.batches

        def failing(*args: Any, **kwargs: Any) -> Any:
            # Batches are made ahead of time, one or two of them.
            if len(batches) > 6:
                raise ZeroDivisionError("a fault of ours")
            return original(*args, **kwargs)

        if dist.get_rank() == 1:
            setattr(owner, name, failing)

    return _bits(folder, True, prepare=prepare, config=MetricsConfig(on_error="warn"))


def fault_in_a_batch(folder: Path) -> Any:
    return _faulty(folder, "record")


def fault_in_a_sync(folder: Path) -> Any:
    return _faulty(folder, "sums")


# Per step: the channels of the batches of rank 0 and of rank 1.
PLAN = [
    ("bbu", "rru"),
    ("bbu", "bbu"),
    ("rru", "bbu"),
    ("bbu", "late"),
    ("bbu", "rru"),
    ("late", "rru"),
]


def tables(folder: Path) -> Any:
    """Ranks meet names on the way, each its own; windows of one step."""
    channels = [channel for step in PLAN for channel in step for _ in range(4)]
    records = [
        {**record, "channel": channel}
        for record, channel in zip(make_records(len(channels)), channels, strict=True)
    ]
    with counted_collectives() as windows:
        trainer = run(
            folder,
            records=MapStyle(records),
            max_steps=len(PLAN),
            logging_steps=1,
            train_sampling_strategy="sequential",
        )
    table = list(trainer.channel_metrics.table.names)
    return told(trainer, windows=windows, table=table)


def nothing_supervised(folder: Path) -> Any:
    """Rank 1 never has a token that is supervised."""
    records = make_records(32)
    for index, record in enumerate(records):
        if index // 4 % 2 == 1:
            record["labels"] = [-100] * len(record["labels"])
    return told(run(folder, records=records, train_sampling_strategy="sequential"))


def no_batch(folder: Path) -> Any:
    """Rank 1 has no batch at all, and does not even know a channel."""
    window = ChannelLossAccumulator()
    if dist.get_rank() == 0:
        window.update(torch.tensor([[1.0, 3.0]]), channels=["bbu"])
    return [sync(window).compute(), sync(window).compute()]


# ---- uneven last batches --------------------------------------------------------------------


def uneven_training(folder: Path) -> Any:
    """Ten records in batches of four on two ranks: sixteen are trained."""
    arguments = {"max_steps": -1, "num_train_epochs": 1, "logging_steps": 1}
    return told(run(folder, config=COUNTS, records=make_records(10), **arguments))


EVAL_SIZES = (3, 8, 9, 10, 13)


def _evaluated(folder: Path, make: Any, accelerator: Any = None, **more: Any) -> Any:
    trainer = run(
        folder,
        config=COUNTS,
        records=fixed_records(8),
        max_steps=1,
        accelerator_config=accelerator or {},
        **more,
    )
    results = {}
    for size in EVAL_SIZES:
        try:
            results[size] = trainer.evaluate(make(fixed_records(size, seed=size)))
        except RuntimeError as error:
            results[size] = {"error": str(error)}
    return told(trainer, evaluated=results)


def eval_map(folder: Path) -> Any:
    return _evaluated(folder, Dataset.from_list)


def eval_split(folder: Path) -> Any:
    return _evaluated(folder, Dataset.from_list, SPLIT)


def eval_dispatch(folder: Path) -> Any:
    return _evaluated(folder, Dataset.from_list, DISPATCH)


def eval_dispatch_split(folder: Path) -> Any:
    return _evaluated(folder, Dataset.from_list, DISPATCH | SPLIT)


def eval_stream(folder: Path) -> Any:
    return _evaluated(folder, Stream)


def eval_stream_by_all(folder: Path) -> Any:
    return _evaluated(folder, Stream, NO_DISPATCH)


def eval_flattened(folder: Path) -> Any:
    """Without padding, the rows of a rank are one, and its records are sequences."""
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=False)
    return _evaluated(folder, Dataset.from_list, collator=collator)


class PairCollator(PaddingCollator):
    """Each row is two sequences, told by position ids that start again."""

    def __call__(self, features: list[Any]) -> dict[str, torch.Tensor]:
        batch = super().__call__(features)
        half = batch["input_ids"].shape[1] // 2
        batch["position_ids"] = torch.arange(half).repeat(len(features), 2)
        batch["labels"][:, [0, half]] = -100
        del batch["attention_mask"]
        return batch


def eval_packed(folder: Path) -> Any:
    """Rows of two sequences each, whose channels differ."""

    def pairs(records: list[Any]) -> Dataset:
        return Dataset.from_list([{**r, "channel": [r["channel"], "bbu"]} for r in records])

    trainer = run(
        folder,
        config=COUNTS,
        records=pairs(fixed_records(8)),
        max_steps=1,
        collator=PairCollator(),
        trainer_arguments={},
    )
    sizes = {size: trainer.evaluate(pairs(fixed_records(size, seed=size))) for size in EVAL_SIZES}
    return told(trainer, evaluated=sizes)


def eval_sets(folder: Path) -> Any:
    """A dict of evaluation sets, in training."""
    sets = {name: Dataset.from_list(make_records(7, seed=s)) for name, s in (("a", 1), ("b", 2))}
    trainer = run(
        folder,
        eval_strategy="steps",
        eval_steps=2,
        trainer_arguments={"eval_dataset": sets},
    )
    return told(trainer)


# ---- how batches come to the ranks ----------------------------------------------------------


def _fed(folder: Path, make: Any, accelerator: Any = None, **more: Any) -> Any:
    """One epoch of 32 records of one width."""
    return told(
        run(
            folder,
            config=more.pop("config", COUNTS),
            records=make(fixed_records(32)),
            accelerator_config=accelerator or {},
            **{"max_steps": 4, "logging_steps": 4} | more,
        )
    )


def feed_dispatch(folder: Path) -> Any:
    return _fed(folder, Dataset.from_list, DISPATCH)


def feed_split(folder: Path) -> Any:
    return _fed(folder, Dataset.from_list, SPLIT, max_steps=8)


def feed_stream(folder: Path) -> Any:
    return _fed(folder, Stream)


def feed_stream_by_all(folder: Path) -> Any:
    """Each rank reads the stream itself; the table is open."""
    config = MetricsConfig(metrics=COUNTS.metrics)
    return _fed(folder, Stream, NO_DISPATCH, config=config)


def feed_stream_workers(folder: Path) -> Any:
    return _fed(folder, Stream, NO_DISPATCH, dataloader_num_workers=2)


def feed_arrow_stream(folder: Path) -> Any:
    def make(records: list[Any]) -> Any:
        return Dataset.from_list(records).to_iterable_dataset(num_shards=4)

    return _fed(folder, make, NO_DISPATCH, dataloader_num_workers=2)


def feed_by_length(folder: Path) -> Any:
    return _fed(folder, Dataset.from_list, train_sampling_strategy="group_by_length")


def feed_persistent(folder: Path) -> Any:
    """Two epochs, with workers that stay."""
    arguments = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    return _fed(folder, Dataset.from_list, max_steps=8, logging_steps=8, **arguments)


def _refused(folder: Path, **arguments: Any) -> str:
    try:
        run(folder, **arguments)
    except ConfigError as error:
        return str(error)
    return "nothing was refused"


def refuse_open_stream(folder: Path) -> Any:
    return _refused(folder, records=Stream(fixed_records(16)))


def refuse_flattened(folder: Path) -> Any:
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=False)
    return _refused(
        folder, records=make_records(16), accelerator_config=DISPATCH, collator=collator
    )


# ---- resume: the cases on four ranks go on from here ----------------------------------------


def resume_first(folder: Path) -> Any:
    config = MetricsConfig(metrics=("tokens", "tokens_total", "samples_total"))
    arguments = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 2}
    return told(run(folder, config=config, records=make_records(64), **arguments))


CASES = cases_of(globals())
