"""From one form of log keys to another: which other name has the same key?"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["SAME", "Step", "step_between"]


class Step(NamedTuple):
    """Turns a channel's name into the name that has the same key under another form."""

    strip_left: str
    add_left: str
    strip_right: str
    add_right: str

    def __call__(self, name: str) -> str | None:
        whole = self.add_left + name + self.add_right
        end = len(whole) - len(self.strip_right)
        fits = whole.startswith(self.strip_left) and whole.endswith(self.strip_right)
        return whole[len(self.strip_left) : end] if fits and end > len(self.strip_left) else None


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
