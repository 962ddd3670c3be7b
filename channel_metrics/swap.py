"""Replacing an attribute of a class or module, and putting it back.

    swap.wrap(Trainer, "__init__", body, key="hf_trainer")    # body(original, self, ...) runs
    swap.unwrap("hf_trainer")

    with swap.wrapped(module, "loss", body):                  # for one block
        ...

`original` is the attribute as it was when we wrapped it, even if somebody else had wrapped it
before. If somebody else wraps it after us, `unwrap` leaves their wrapper in place. Our replacement
stays below it, and then only calls the original.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

__all__ = ["is_applied", "is_wrapped", "original_class", "unwrap", "with_mixin", "wrap", "wrapped"]

Body = Callable[..., Any]

_MARK = "_channel_metrics_swap"
_ORIGINAL_CLASS = "_channel_metrics_original"
_INHERITED = object()


def wrap(owner: Any, name: str, body: Body, *, key: str, everywhere_in: str | None = None) -> None:
    """Run `body(original, ...)` in place of `owner.name(...)`, until `unwrap(key)`.

    A second call with the same key does nothing, unless somebody has removed our replacement.

    Args:
        owner: a class or a module.
        name: a function or method of it, which may be inherited.
        body: is called with the original, then with the arguments.
        key: names the replacement for `unwrap` and `is_wrapped`.
        everywhere_in: a package whose modules import the function from each other by name. The
            function is replaced in all modules of the package that are imported now.
    """
    if is_wrapped(owner, name, key=key):
        return
    # Something may still call a replacement that was removed. `body` must not run twice.
    removed = _swaps.pop((key, owner, name), None)
    if removed is not None:
        removed.put_back()
    _swaps[key, owner, name] = _Swap(owner, name, body, key, everywhere_in)


def unwrap(key: str) -> None:
    """Put back everything that was wrapped with this key."""
    for place in [place for place in reversed(_swaps) if place[0] == key]:
        _swaps.pop(place).put_back()


def is_applied(key: str) -> bool:
    """Whether something is wrapped with this key, and nobody has removed any of it."""
    places = [(owner, name) for own, owner, name in _swaps if own == key]
    return bool(places) and all(is_wrapped(owner, name, key=key) for owner, name in places)


def is_wrapped(owner: Any, name: str, *, key: str) -> bool:
    """Whether `owner.name` is wrapped with this key now. Others may have wrapped it after us."""

    def is_it(function: Any) -> bool:
        swap = _swap_of(function)
        return swap is not None and swap.active and swap.key == key

    return is_it(inspect.unwrap(vars(owner).get(name), stop=is_it))


@contextmanager
def wrapped(owner: Any, name: str, body: Body) -> Iterator[None]:
    """Run `body(original, ...)` in place of `owner.name(...)` inside the block.

    Blocks may be nested: the `original` of the inner block is the replacement of the outer one.
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
        """The function to call. An inherited one is looked up anew, as it may have changed."""
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
    """Remove replacements that are not active, from the outermost to the first active one."""
    while (swap := _swap_of(vars(place).get(name))) is not None and not swap.active:
        if swap.own is _INHERITED:
            delattr(place, name)
        else:
            setattr(place, name, swap.own)


def original_class(cls: type) -> type:
    """The class that `with_mixin` made `cls` from; any other class is returned as it is."""
    found: type = vars(cls).get(_ORIGINAL_CLASS, cls)
    return found


def with_mixin(cls: type, mixin: type) -> type:
    """A class with the bases `(mixin, cls)` and the name of `cls`.

    Logs and model cards show that name. Instances can be pickled if those of `cls` can. The same
    arguments give the same class.
    """
    made: type = _with_mixin(cls, mixin)
    return made


@functools.cache
def _with_mixin(cls: Any, mixin: Any) -> Any:
    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        reduced: tuple[Any, ...] = super(made, self).__reduce_ex__(protocol)
        if type(self) is not made:
            return reduced
        # pickle looks a class up by its name, and finds the class without the mixin.
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
