"""Callbacks that know their trainer. transformers itself does not pass it to them."""

from __future__ import annotations

from typing import Any

import transformers

__all__ = ["TrainerKnowingCallback", "tell_callbacks"]


class TrainerKnowingCallback(transformers.TrainerCallback):
    """A callback that needs its trainer.

    A trainer with channel metrics calls `take_trainer` before it trains. For other trainers, set
    the attribute `trainer`.
    """

    trainer: Any = None
    _caller: Any = None

    def taken_trainer(self) -> Any:
        """The trainer that trains now; None if it is not known. Call it once per training."""
        # Forgotten at once, because the next trainer may be another, which does not call us.
        caller, self._caller = self._caller, None
        return caller if self.trainer is None else self.trainer

    def take_trainer(self, trainer: Any) -> None:
        """Remember a trainer.

        Args:
            trainer: the trainer that is about to train. If `self.trainer` is set, that one is used.
        """
        self._caller = trainer


def tell_callbacks(trainer: Any) -> None:
    """Make a trainer known to those of its callbacks that need it.

    Args:
        trainer: the trainer that is about to train.
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TrainerKnowingCallback):
            callback.take_trainer(trainer)
