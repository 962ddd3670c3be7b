"""Streams in a loop of one's own: accelerate reads them on one process, and cuts their batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import transformers
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration, broadcast_object_list
from datasets import Dataset
from hf_case_tools import HF, Stream, fixed_records
from hf_tools import CHANNELS, PaddingCollator, tiny_model
from loop_tools import RECORDS, check, model_loss, plain_oracle
from packaging.version import Version
from rank_cases import RanksOf, case
from test_loop_packs import packed
from torch.utils.data import DataLoader

from channel_metrics import ChannelError, ChannelMetrics, MetricsConfig, evaluate

two = case(HF, ranks=2)
STREAM = fixed_records(12)
# It joins also what is one batch only, and can join tensors only.
OLD = Version(accelerate.__version__) < Version("1.13")


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("declared", [False, True])
def test_packs_of_a_stream_that_accelerate_cuts(declared: bool) -> None:
    """By default it does, even on one process. The advice of the error works."""
    records, model = RECORDS[:7], tiny_model(attention_dropout=0.0, use_cache=False)

    def run(**config: Any) -> dict[str, float]:
        accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**config))
        metrics = ChannelMetrics()
        if declared:
            metrics.declare_names(sorted({record["channel"] for record in records}))
        collate = metrics.collator(lambda rows: packed(rows, "position_ids"))
        stream: Any = Dataset.from_list(records).to_iterable_dataset()
        loader = accelerator.prepare(DataLoader(stream, batch_size=3, collate_fn=collate))
        return evaluate(metrics, model, loader, step=1, accelerator=accelerator)

    told = r"cuts packed or flattened batches .*\(dispatch_batches=False\)"
    if OLD and not declared:
        told = "a batch holds names of channels, because they are not declared"
    with pytest.raises(ChannelError, match=told):
        run()
    logs = run(dispatch_batches=False)
    # Before transformers 5, a CPU does not separate the sequences.
    if Version(transformers.__version__) >= Version("5"):
        check(logs, plain_oracle(records, "eval_"))


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_rows_of_a_stream_whose_channels_are_not_declared(workers: int, on_error: Any) -> None:
    """An old accelerate cannot join their names; both remedies of the error work."""
    records, model = RECORDS[:8], tiny_model(attention_dropout=0.0)

    def run(channels: tuple[str, ...] = (), **config: Any) -> dict[str, float]:
        accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**config))
        metrics = ChannelMetrics(MetricsConfig(channels=channels, on_error=on_error))
        stream: Any = Dataset.from_list(records).to_iterable_dataset()
        made: Any = DataLoader(
            stream,
            batch_size=4,
            collate_fn=metrics.collator(PaddingCollator()),
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,
        )
        loader = accelerator.prepare(made)
        assert isinstance(loader, DataLoaderDispatcher) is (not config)
        return evaluate(metrics, model, loader, step=1, accelerator=accelerator)

    wanted = plain_oracle(records, "eval_")
    if OLD:
        with pytest.raises(ChannelError, match=r"works with ids.*dispatch_batches=False.*declare"):
            run()
    else:
        check(run(), wanted)
    check(run(dispatch_batches=False), wanted)
    check(run(tuple(sorted({record["channel"] for record in records}))), wanted)


@pytest.mark.usefixtures("fresh_accelerate")
def test_an_error_of_ours_cannot_travel_through_an_old_accelerate() -> None:
    accelerator, metrics = Accelerator(cpu=True), ChannelMetrics()
    # As many channels as no batch has sequences.
    records = [{**record, "channel": ["bbu", "rru", "bbu"]} for record in RECORDS[:2]]
    stream: Any = Dataset.from_list(records).to_iterable_dataset()
    collate: Any = metrics.collator(PaddingCollator())
    loader = accelerator.prepare(DataLoader(stream, batch_size=2, collate_fn=collate))
    with pytest.raises(ChannelError, match="6 channels but the batch holds 2 sequences"):
        evaluate(metrics, tiny_model(), loader, step=1, accelerator=accelerator)


@two
def accelerate_streams(folder: Path) -> Any:
    """One process reads a stream, and sends parts of its batches to the other."""
    config = DataLoaderConfiguration(dispatch_batches=True)
    accelerator = Accelerator(cpu=True, dataloader_config=config)
    model = accelerator.prepare(tiny_model(attention_dropout=0.0))
    metrics = ChannelMetrics(MetricsConfig(channels=CHANNELS))
    collate: Any = metrics.collator(PaddingCollator())

    def loader(count: int) -> Any:
        made = DataLoader(Stream(STREAM[:count]), batch_size=2, collate_fn=collate)
        return accelerator.prepare_data_loader(made)

    for batch in loader(12):
        model_loss(metrics, model, batch)
    evaluated = evaluate(metrics, model, loader(10), step=1, accelerator=accelerator)
    return {"train": metrics.close(1).logs, "eval": evaluated}


def test_streams_that_one_process_reads(ranks_of: RanksOf) -> None:
    for rank in ranks_of(accelerate_streams):
        check(rank["train"], plain_oracle(STREAM))
        check(rank["eval"], plain_oracle(STREAM[:10], prefix="eval_"))


@two
def names_of_a_stream(folder: Path) -> Any:
    """As above, but the channels are not declared."""
    accelerator = Accelerator(cpu=True)
    collate: Any = ChannelMetrics().collator(PaddingCollator())
    made = DataLoader(Stream(STREAM[:4]), batch_size=2, collate_fn=collate)
    try:
        next(iter(accelerator.prepare_data_loader(made)))
    except (ValueError, TypeError) as error:
        if accelerator.is_main_process:
            # The other process waits for a batch: there is none, and no rest either.
            broadcast_object_list([None, True])
            broadcast_object_list([None, True])
        return str(error)


def test_names_of_a_stream_that_one_process_reads(ranks_of: RanksOf) -> None:
    first, second = ranks_of(names_of_a_stream)
    assert "a batch holds names of channels, because they are not declared" in first
    assert "Unsupported types" in second or "does not contain any data" in second
