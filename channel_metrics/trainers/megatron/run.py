"""The objects that the hooks need during one training run of Megatron's own loop.

The hooks are in `channel_metrics.trainers.megatron.hooks`. Every rank makes the same calls in the
same order. A rank without data or losses contributes zeros.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from channel_metrics.trainers.megatron.arguments import name_by_path, session_of
from channel_metrics.trainers.megatron.counting import MegatronChannelMetrics
from channel_metrics.trainers.megatron.data import ChannelDataset

__all__ = ["MegatronRun", "folder_of"]


class MegatronRun:
    """The session of one run, and the objects that count into it.

    Args:
        args: Megatron's parsed arguments.

    Raises:
        ConfigError: a metric needs the bytes of the tokens, which this tokenizer does not tell.
    """

    def __init__(self, args: Any) -> None:
        self.args = args
        self.session = session_of(args)
        if self.session.with_targets:
            self.session.read_tokenizer(_tokenizer())
        self.metrics = MegatronChannelMetrics(session=self.session)
        self._names = name_by_path(args)

    def dataset(self, dataset: Any) -> ChannelDataset:
        """Wrap a dataset so that each sample has its channel.

        Args:
            dataset: Megatron's dataset or blend.

        Raises:
            ConfigError: this is an SFT dataset without channels.
        """
        # Hybrid context parallelism spreads the tokens of a sequence over several ranks.
        per_token = bool(getattr(self.args, "hybrid_context_parallel", False))
        return ChannelDataset(dataset, self.session, self._names, per_token=per_token)


def _tokenizer() -> Any:
    """The tokenizer of transformers inside that of Megatron; Megatron's own if it holds none."""
    from megatron.training import get_tokenizer

    found = own = get_tokenizer()
    while found is not None and not hasattr(found, "backend_tokenizer"):
        # The text tokenizer holds a library's, which holds that of transformers.
        found = vars(found).get("_tokenizer") or vars(found).get("tokenizer")
    return own if found is None else found


def folder_of(root: str, iteration: int) -> Path:
    """The folder of the checkpoint of an iteration."""
    return Path(root) / f"iter_{iteration:07d}"
