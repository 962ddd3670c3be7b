"""Replacing an attribute of a class or module, and putting it back.

    swap.wrap(Trainer, "__init__", body, key="hf_trainer")    # body(original, self, ...) runs
    swap.unwrap("hf_trainer")

    with swap.wrapped(module, "loss", body):                  # for one block
        ...

`original` is what stands there at the time of wrapping, whoever put it there. If somebody else
wraps after us, putting back leaves theirs in its place: ours stays below it, and passes straight
through.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

__all__ = ["is_wrapped", "original_class", "unwrap", "with_mixin", "wrap", "wrapped"]

Body = Callable[..., Any]

_MARK = "_channel_metrics_swap"
_ORIGINAL_CLASS = "_channel_metrics_original"
_INHERITED = object()


def wrap(owner: Any, name: str, body: Body, *, key: str, everywhere_in: str | None = None) -> None:
    """Run `body(original, ...)` in place of `owner.name(...)`, until `unwrap(key)`.

    A second call with the same key does nothing, unless somebody has thrown the first away.

    Args:
        owner: a class or a module.
        name: a function or method of it, which may be inherited.
        body: is called with the original before the arguments.
        key: says whose replacement it is.
        everywhere_in: a package whose modules import the function from each other by name. It
            is replaced in all of them that are imported now.
    """
    if is_wrapped(owner, name, key=key):
        return
    # It may be called by something that does not show it: `body` must not run twice.
    thrown_away = _swaps.pop((key, owner, name), None)
    if thrown_away is not None:
        thrown_away.put_back()
    _swaps[key, owner, name] = _Swap(owner, name, body, key, everywhere_in)


def unwrap(key: str) -> None:
    """Put back everything that was wrapped with this key."""
    for place in [place for place in reversed(_swaps) if place[0] == key]:
        _swaps.pop(place).put_back()


def is_wrapped(owner: Any, name: str, *, key: str) -> bool:
    """Whether `owner.name` is wrapped with this key now, be it below wrappers of others."""

    def is_it(function: Any) -> bool:
        swap = _swap_of(function)
        return swap is not None and swap.active and swap.key == key

    return is_it(inspect.unwrap(vars(owner).get(name), stop=is_it))


@contextmanager
def wrapped(owner: Any, name: str, body: Body) -> Iterator[None]:
    """Run `body(original, ...)` in place of `owner.name(...)` inside the block.

    Blocks may be nested: the `original` of the inner one is what the outer one has put there.
    """
    swap = _Swap(owner, name, body)
    try:
        yield
    finally:
        swap.put_back()


class _Swap:
    """One replacement. `active` becomes False when it is put back."""

    def __init__(
        self, owner: Any, name: str, body: Body, key: str = "", everywhere_in: str | None = None
    ) -> None:
        self.owner, self.name, self.key, self.everywhere_in = owner, name, key, everywhere_in
        self.active = True
        self.own = vars(owner).get(name, _INHERITED)
        self.found = getattr(owner, name)
        self.is_inherited = self.own is _INHERITED and isinstance(owner, type)

        @functools.wraps(self.found)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            original = self.original()
            return body(original, *args, **kwargs) if self.active else original(*args, **kwargs)

        setattr(replacement, _MARK, self)
        self.replacement = replacement
        for place in self._places():
            if place is owner or vars(place).get(name) is self.found:
                setattr(place, name, replacement)

    def original(self) -> Any:
        """What is called; a method that is inherited may have been replaced in the meantime."""
        if self.is_inherited:
            return getattr(super(self.owner, self.owner), self.name)
        return self.found

    def put_back(self) -> None:
        self.active = False
        for place in self._places():
            # Modules of the package may have imported the replacement under another name.
            for name in list(vars(place)) if self.everywhere_in else [self.name]:
                _clear(place, name)

    def _places(self) -> list[Any]:
        if self.everywhere_in is None:
            return [self.owner]
        inside = f"{self.everywhere_in}."
        modules = [m for n, m in list(sys.modules.items()) if f"{n}.".startswith(inside)]
        return [module for module in modules if isinstance(module, ModuleType)]


# What is wrapped until `unwrap`, by key, owner and name.
_swaps: dict[tuple[str, Any, str], _Swap] = {}


def _swap_of(value: Any) -> _Swap | None:
    swap: _Swap | None = getattr(value, _MARK, None) if isinstance(value, FunctionType) else None
    # functools.wraps copies the mark to the wrappers of others.
    return swap if swap is not None and swap.replacement is value else None


def _clear(place: Any, name: str) -> None:
    """Take away replacements that are not active, from the top down to what is used."""
    while (swap := _swap_of(vars(place).get(name))) is not None and not swap.active:
        if swap.own is _INHERITED:
            delattr(place, name)
        else:
            setattr(place, name, swap.own)


def with_mixin(cls: type, mixin: type) -> type:
    """The class `(mixin, cls)`, under the name of `cls`, which logs and model cards show.

    Instances of it can be pickled if those of `cls` can. The same arguments give the same class.
    """
    made: type = _with_mixin(cls, mixin)
    return made


def original_class(cls: type) -> type:
    """What `with_mixin` has made `cls` from; any other class as it is."""
    found: type = vars(cls).get(_ORIGINAL_CLASS, cls)
    return found


@functools.cache
def _with_mixin(cls: Any, mixin: Any) -> Any:
    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        reduced: tuple[Any, ...] = super(made, self).__reduce_ex__(protocol)
        if type(self) is not made:
            return reduced
        # pickle finds a class by its name, which stands for the class without the mixin.
        make, args, *state = reduced
        return _remake, (mixin, make, *(cls if a is made else a for a in args)), *state

    body = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": reduce,
        _ORIGINAL_CLASS: cls,
    }
    made: Any = type(cls.__name__, (mixin, cls), body)
    return made


def _remake(mixin: type, make: Callable[..., Any], *args: Any) -> Any:
    made = make(*args)
    made.__class__ = with_mixin(type(made), mixin)
    return made
