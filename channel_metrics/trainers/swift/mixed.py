"""The stream from which `swift sft` and `swift pt` draw by the setting `sampler`."""

from __future__ import annotations

from typing import Any

from swift.dataset import LazyLLMDataset

from channel_metrics.core.labels import UNLABELED
from channel_metrics.core.names import split_name
from channel_metrics.data.carried import without_carried
from channel_metrics.data.mixed_stream import MixedStream
from channel_metrics.errors import ConfigError
from channel_metrics.trainers.swift.data import CHANNEL_COLUMN

__all__ = ["mixed"]


def mixed(prepared: Any, args: Any) -> MixedStream:
    """A `MixedStream` of the records that ms-swift has prepared; each channel is a source.

    ms-swift replaces a record that it cannot encode by a random one of the same dataset. So each
    source is a dataset of its own, and the other record has the same channel.

    Args:
        prepared: the training set of `SwiftSft._prepare_dataset`.
        args: the arguments of the run. Of them, `ignore_data_skip` is turned on, since a resumed
            stream begins behind the records that were trained on.

    Raises:
        ConfigError: the records are streamed, packed or split.
    """
    if not isinstance(prepared, LazyLLMDataset):
        raise ConfigError(
            "the setting `sampler` needs single records with an index, but ms-swift has made a "
            f"{type(prepared).__name__}; leave out streaming, packing and truncation_strategy "
            "split."
        )
    places: dict[str, list[int]] = {}
    for index, joint in enumerate(prepared.dataset[CHANNEL_COLUMN]):
        name = without_carried(joint)
        channel = split_name(name)[0] if name else None
        places.setdefault(channel or UNLABELED, []).append(index)
    sources = {
        channel: LazyLLMDataset(
            prepared.dataset.select(found),
            prepared.encode_func,
            strict=prepared.strict,
            random_state=args.data_seed,
        )
        for channel, found in places.items()
    }
    training = args.training_args
    training.ignore_data_skip = True
    rows = training.per_device_train_batch_size
    # For a stream, ms-swift takes one worker at most. The first rank reads for all.
    workers = min(training.dataloader_num_workers, 1)
    ahead = (training.dataloader_prefetch_factor or 0) * workers * rows * training.world_size
    # Records have their channels already, together with what travels with these.
    return MixedStream(sources, seed=args.data_seed, batch_size=rows, lag=ahead, field="")
