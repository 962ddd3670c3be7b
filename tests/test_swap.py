"""Replacing attributes: marks, nesting, putting back in any order, and what others put there."""

from __future__ import annotations

import copy
import functools
import pickle
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from channel_metrics import swap

KEY = "test"


class Base:
    def size(self) -> list[str]:
        return ["base"]


class Child(Base):
    """Inherits `size`."""


class Record:
    def __init__(self, value: int) -> None:
        self.value = value


class Mixin:
    value: int

    def doubled(self) -> int:
        return 2 * self.value


def saying(word: str) -> Callable[..., list[str]]:
    def body(original: Any, *args: Any) -> list[str]:
        return [word, *original(*args)]

    return body


@pytest.fixture(autouse=True)
def all_is_put_back() -> Iterator[None]:
    before = dict(vars(Base)), dict(vars(Child))
    yield
    swap.unwrap(KEY)
    assert (dict(vars(Base)), dict(vars(Child))) == before


def test_wrap_is_done_once_and_undone() -> None:
    swap.wrap(Base, "size", saying("ours"), key=KEY)
    wrapped = Base.size
    assert swap.is_wrapped(Base, "size", key=KEY)
    swap.wrap(Base, "size", saying("again"), key=KEY)
    assert Base.size is wrapped
    assert Base().size() == Child().size() == ["ours", "base"]
    assert wrapped.__name__ == "size"
    swap.unwrap(KEY)
    assert not swap.is_wrapped(Base, "size", key=KEY)
    assert Base().size() == ["base"]
    swap.unwrap(KEY)


def test_keys_are_apart() -> None:
    swap.wrap(Base, "size", saying("ours"), key=KEY)
    swap.wrap(Base, "size", saying("second"), key="second")
    assert Base().size() == ["second", "ours", "base"]
    assert swap.is_wrapped(Base, "size", key=KEY)
    swap.unwrap(KEY)  # below the other one
    assert Base().size() == ["second", "base"]
    assert not swap.is_wrapped(Base, "size", key=KEY)
    swap.unwrap("second")


def test_it_is_applied_while_all_of_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not swap.is_applied(KEY)
    plain = Record.__init__
    monkeypatch.setattr(Record, "__init__", plain)  # puts it back in the end
    swap.wrap(Base, "size", saying("ours"), key=KEY)
    swap.wrap(Record, "__init__", saying("ours"), key=KEY)
    assert swap.is_applied(KEY) and not swap.is_applied("other")
    monkeypatch.setattr(Record, "__init__", plain)
    assert not swap.is_applied(KEY)
    assert swap.is_wrapped(Base, "size", key=KEY)


def test_an_inherited_method_is_looked_up_at_the_call_and_left_to_be_inherited() -> None:
    swap.wrap(Child, "size", saying("child"), key=KEY)
    assert Child().size() == ["child", "base"]
    with swap.wrapped(Base, "size", saying("later")):
        assert Child().size() == ["child", "later", "base"]
    swap.unwrap(KEY)
    assert "size" not in vars(Child)


def test_what_somebody_put_there_before_us_is_called() -> None:
    with swap.wrapped(Base, "size", saying("theirs")):
        swap.wrap(Base, "size", saying("ours"), key=KEY)
        assert Base().size() == ["ours", "theirs", "base"]
        swap.unwrap(KEY)
        assert Base().size() == ["theirs", "base"]


@pytest.mark.parametrize("is_shown", [True, False])
def test_what_somebody_puts_there_after_us_stays(
    monkeypatch: pytest.MonkeyPatch, is_shown: bool
) -> None:
    """With functools.wraps, which copies our mark to theirs, and without."""
    monkeypatch.setattr(Base, "size", Base.size)  # puts it back in the end
    swap.wrap(Base, "size", saying("ours"), key=KEY)
    ours = Base.size

    def theirs(self: Base) -> list[str]:
        return ["theirs", *ours(self)]

    theirs = functools.wraps(ours)(theirs) if is_shown else theirs
    monkeypatch.setattr(Base, "size", theirs)
    assert Base().size() == ["theirs", "ours", "base"]
    assert swap.is_wrapped(Base, "size", key=KEY) == is_shown
    swap.unwrap(KEY)
    assert Base.size is theirs
    assert Base().size() == ["theirs", "base"]
    assert not swap.is_wrapped(Base, "size", key=KEY)
    swap.wrap(Base, "size", saying("again"), key=KEY)
    assert Base().size() == ["again", "theirs", "base"]
    swap.unwrap(KEY)
    assert Base.size is theirs


@pytest.mark.parametrize("is_called", [True, False])
def test_a_replacement_that_is_not_found_is_made_anew_and_runs_once(
    monkeypatch: pytest.MonkeyPatch, is_called: bool
) -> None:
    plain = Base.size
    monkeypatch.setattr(Base, "size", plain)  # puts it back in the end
    swap.wrap(Base, "size", saying("ours"), key=KEY)
    ours = Base.size

    def hidden(self: Base) -> list[str]:
        return ours(self) if is_called else plain(self)

    monkeypatch.setattr(Base, "size", hidden)
    swap.wrap(Base, "size", saying("ours"), key=KEY)
    assert Base().size() == ["ours", "base"]
    swap.unwrap(KEY)
    assert Base.size is hidden
    assert Base().size() == ["base"]


def test_blocks_are_nested() -> None:
    with swap.wrapped(Base, "size", saying("outer")):
        with swap.wrapped(Base, "size", saying("inner")):
            assert Base().size() == ["inner", "outer", "base"]
        assert Base().size() == ["outer", "base"]
    assert Base().size() == ["base"]


def test_blocks_end_in_any_order() -> None:
    outer = swap.wrapped(Base, "size", saying("outer"))
    inner = swap.wrapped(Base, "size", saying("inner"))
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert Base().size() == ["inner", "base"]
    inner.__exit__(None, None, None)
    assert Base().size() == ["base"]  # and the fixture finds nothing of ours


def test_after_an_error_the_original_is_back() -> None:
    def fails(original: Any, *args: Any) -> Any:
        raise RuntimeError("of the body")

    plain = Base.size
    with pytest.raises(RuntimeError, match="of the body"), swap.wrapped(Base, "size", fails):
        Base().size()
    assert Base.size is plain


def test_an_object_gets_the_method_of_its_class_back() -> None:
    one = Child()
    with swap.wrapped(one, "size", saying("one")):
        assert one.size() == ["one", "base"]
        assert Child().size() == ["base"]
    assert vars(one) == {}


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Modules of which `pack.a` defines `f`; some have imported it."""

    def f() -> list[str]:
        return ["f"]

    modules: dict[str, Any] = {
        n: ModuleType(n) for n in ("pack", "pack.a", "pack.b", "pack.c", "package")
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    modules["pack.c"].f = lambda: ["another"]
    for name in ("pack", "pack.a", "package"):
        modules[name].f = f
    return modules


def test_a_function_is_replaced_wherever_its_package_imported_it(package: dict[str, Any]) -> None:
    f = package["pack.a"].f
    swap.wrap(package["pack.a"], "f", saying("ours"), key=KEY, everywhere_in="pack")
    assert package["pack"].f() == package["pack.a"].f() == ["ours", "f"]
    assert package["package"].f() == ["f"]
    assert package["pack.c"].f() == ["another"]
    package["pack.b"].own_name = package["pack.a"].f  # imported later, under another name
    theirs = functools.wraps(package["pack"].f)(lambda: ["theirs"])
    package["pack"].f = theirs
    swap.unwrap(KEY)
    assert package["pack.a"].f is package["pack.b"].own_name is f
    assert package["pack"].f is theirs


def test_a_class_with_a_mixin_keeps_its_name_and_its_instances_can_be_pickled() -> None:
    record: Any = Record(3)
    record.__class__ = made = swap.with_mixin(Record, Mixin)
    assert made is not Record
    assert made is swap.with_mixin(Record, Mixin)
    assert (made.__name__, made.__qualname__, made.__module__) == ("Record", "Record", __name__)
    assert made.__doc__ == Record.__doc__
    assert made.__mro__[1:3] == (Mixin, Record)
    copies: list[Any] = [record, pickle.loads(pickle.dumps(record)), copy.deepcopy(record)]
    for same in copies:
        assert (same.value, same.doubled()) == (3, 6)
        assert type(same) is made


RecordOfOurs: Any = swap.with_mixin(Record, Mixin)


# Somebody's class on top of ours, which pickle finds by its name.
Derived: Any = type("Derived", (RecordOfOurs,), {})


def test_a_class_derived_from_ours_is_pickled_as_it_is() -> None:
    found = pickle.loads(pickle.dumps(Derived(3)))
    assert type(found) is Derived
    assert found.doubled() == 6


def test_the_original_class_is_only_that_of_our_own_class() -> None:
    made = swap.with_mixin(Record, Mixin)
    theirs = type("Theirs", (made,), {})
    assert swap.original_class(made) is Record
    assert swap.original_class(Record) is Record
    assert swap.original_class(theirs) is theirs
