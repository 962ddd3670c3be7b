"""How a callback comes to know its trainer: transformers does not tell it who calls."""

from __future__ import annotations

from typing import Any

import transformers

__all__ = ["TrainerKnowingCallback", "tell_callbacks"]


class TrainerKnowingCallback(transformers.TrainerCallback):
    """A callback that needs its trainer.

    trainer: set by hand, or None. A trainer with channel metrics makes itself known before it
    trains.
    """

    trainer: Any = None
    _caller: Any = None

    def taken_trainer(self) -> Any:
        """The trainer that trains now, None if nobody has told; asked for when training begins."""
        # Forgotten at once: the next one to train may be another that tells nothing.
        caller, self._caller = self._caller, None
        return caller if self.trainer is None else self.trainer

    def take_trainer(self, trainer: Any) -> None:
        """Remember who is about to train; `self.trainer`, if set, is preferred."""
        self._caller = trainer


def tell_callbacks(trainer: Any) -> None:
    """Make `trainer` known to those of its callbacks that need it."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TrainerKnowingCallback):
            callback.take_trainer(trainer)
