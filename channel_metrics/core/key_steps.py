"""From one form of log keys to another: which other name has the same key?"""

from __future__ import annotations

from functools import lru_cache
from itertools import permutations
from typing import NamedTuple

__all__ = ["SAME", "Form", "Step", "step_between", "steps_between"]

Form = tuple[str, str]
"""(metric, prefix): together with the name of a channel, they give a key."""


class Step(NamedTuple):
    """Turns a channel's name into the name that has the same key under another form."""

    strip_left: str
    add_left: str
    strip_right: str
    add_right: str

    def __call__(self, name: str) -> str | None:
        # A run with many channels comes here millions of times.
        left, add_left, right, add_right = self
        whole = add_left + name + add_right
        if (left and not whole.startswith(left)) or (right and not whole.endswith(right)):
            return None
        return whole[len(left) : len(whole) - len(right)] or None


SAME = Step("", "", "", "")


def step_between(ends: tuple[str, str], other: tuple[str, str]) -> Step | None:
    """Turns a name under `ends` into the name with the same key under `other`, if there is one."""
    (head, tail), (other_head, other_tail) = ends, other
    add_left = strip_left = add_right = strip_right = ""
    if head.startswith(other_head):
        add_left = head[len(other_head) :]
    elif other_head.startswith(head):
        strip_left = other_head[len(head) :]
    else:
        return None
    if tail.endswith(other_tail):
        add_right = tail[: len(tail) - len(other_tail)]
    elif other_tail.endswith(tail):
        strip_right = other_tail[: len(other_tail) - len(tail)]
    else:
        return None
    return Step(strip_left, add_left, strip_right, add_right)


@lru_cache(maxsize=64)
def steps_between(
    forms: tuple[tuple[Form, tuple[str, str]], ...],
) -> dict[Step, list[tuple[Form, Form]]]:
    """{step: pairs (form of a name, form of the other name) that give one key}.

    forms: each with the parts of its keys before and after the channel. The result is shared by
    all that ask for the same forms.
    """
    steps: dict[Step, list[tuple[Form, Form]]] = {}
    for (mine, ends), (other, other_ends) in permutations(forms, 2):
        step = step_between(ends, other_ends)
        if step is not None:
            steps.setdefault(step, []).append((mine, other))
    return steps
