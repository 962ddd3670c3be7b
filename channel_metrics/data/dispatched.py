"""Batches that accelerate reads on one process and sends to all, its default for streams.

It does so also if there is no other process.
"""

from __future__ import annotations

import sys
from typing import Any

from channel_metrics.errors import ChannelError

__all__ = ["REMEDY", "current_dispatcher", "names_cannot_be_sent", "sends_only_tensors"]

REMEDY = (
    "Let each process read its own part: "
    "Accelerator(dataloader_config=DataLoaderConfiguration(dispatch_batches=False))"
)


def current_dispatcher() -> Any:
    """The data loader of accelerate that sends the batches of now; None if none does."""
    if "accelerate" not in sys.modules:
        return None
    from accelerate.data_loader import DataLoaderDispatcher
    from accelerate.state import GradientState

    loader = GradientState().active_dataloader
    return loader if isinstance(loader, DataLoaderDispatcher) else None


def sends_only_tensors(collate: Any) -> bool:
    """Whether accelerate will join or send the batches of `collate`, which needs tensors.

    It is seen in the main process and in forked workers of the data loader.
    """
    loader = current_dispatcher()
    if loader is None or loader.base_dataloader.collate_fn is not collate:
        return False
    import accelerate
    from packaging.version import Version

    # Before 1.13, it joins also what is one batch only.
    joins = not loader.split_batches and Version(accelerate.__version__) < Version("1.13")
    return joins or loader.state.num_processes > 1


def names_cannot_be_sent() -> ChannelError:
    """The error for names of channels in such a batch."""
    return ChannelError(
        "accelerate reads the data on one process and sends it to all, which works with ids, but "
        f"a batch holds names of channels, because they are not declared. {REMEDY}; or, if all "
        "batches are padded to one length, declare them: MetricsConfig(channels=...)."
    )
