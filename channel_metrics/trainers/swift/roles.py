"""The role of each token in `swift sft`, from ms-swift's template.

    axes: {role: {by: template}}

The template tells its `loss_scale` which parts of a conversation are answers. It keeps a number per
token from it, through truncation and the tokens of images. So each record is encoded once more with
a `loss_scale` whose numbers are roles. ms-swift trains on the first result. The roles of a record
are not known if the tokens of both differ, because tokens may merge over the border of two roles.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from swift.loss_scale.base import LossScale
from swift.template import ContextType

from channel_metrics.core.axis_settings import ROLES
from channel_metrics.core.checks import IGNORE_INDEX
from channel_metrics.data.carried import with_roles
from channel_metrics.probes.without_trace import keep_random_state

__all__ = ["encode_with_roles"]

logger = logging.getLogger("channel_metrics")

_SYSTEM, _USER, _ASSISTANT, _TOOL, _THINKING = (float(i + 1) for i in range(len(ROLES)))
_THOUGHT = re.compile(r".*?</think>[\r\n]*", re.DOTALL)
_NAME = "channel_metrics_roles"
_warned: set[type] = set()


class _RoleScale(LossScale):  # type: ignore[misc]  # ms-swift has no types
    """Gives the role of each context.

    Args:
        base_strategy: that of the real `loss_scale`, which also decides what is encoded.
        prompt, separator: of the template, how many contexts there are between two answers.
    """

    is_binary = False

    def __init__(self, base_strategy: Any, *, prompt: int, separator: int) -> None:
        super().__init__(base_strategy)
        self.prompt, self.separator = prompt, separator
        self.called = False

    def __call__(
        self, context_list: Any, context_types: Any, messages: Any, **_: Any
    ) -> tuple[list[Any], list[float]]:
        """The contexts, and the role of each."""
        self.called = True
        found: list[tuple[Any, float]] = []
        queries = iter(messages[::2])
        waiting: list[Any] = []
        for context, kind in zip(context_list, context_types, strict=True):
            if kind == ContextType.OTHER:
                waiting.append(context)
                continue
            if kind == ContextType.RESPONSE:
                found += self._before_answer(waiting, next(queries)["role"], first=not found)
                waiting = []
            found += _answer(context)
        found += [(context, _USER) for context in waiting]
        return [context for context, _ in found], [role for _, role in found]

    def _before_answer(
        self, contexts: Sequence[Any], role: str, *, first: bool
    ) -> Iterator[tuple[Any, float]]:
        asking = _TOOL if role == "tool" else _USER
        border, other = self.separator, _ASSISTANT
        if first:
            border, other = len(contexts) - self.prompt, _SYSTEM
        elif role == "tool":
            border = 0
        for place, context in enumerate(contexts):
            yield context, other if place < border else asking


def encode_with_roles(original: Any, template: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """What `template.encode` gives. The roles of its tokens travel with its `channel`."""
    if template.mode != "train" or template.task_type != "causal_lm":
        return original(template, inputs, *args, **kwargs)
    again = deepcopy(inputs)
    encoded = original(template, inputs, *args, **kwargs)
    rows = encoded if isinstance(encoded, list) else [encoded]
    try:
        with keep_random_state(), _roles_as_scale(template) as scale:
            others = original(template, again, *args, **kwargs)
        others = others if isinstance(others, list) else [others]
        known = scale.called and [_ids(row) for row in rows] == [_ids(row) for row in others]
    except Exception:  # an error here must not drop a record that ms-swift can train on
        logger.debug("the roles of a record are not known", exc_info=True)
        known = False
    for row, other in zip(rows, others, strict=True) if known else ():
        row["channel"] = with_roles(row.get("channel"), _roles(row, other, template.loss_scale))
    if not known and type(template) not in _warned:
        _warned.add(type(template))
        logger.warning(
            "the template %s does not tell the roles of the tokens of some records, which are "
            "counted as unlabeled on the axes {by: template}.",
            template.template_meta.template_type,
        )
    return encoded


@contextmanager
def _roles_as_scale(template: Any) -> Iterator[_RoleScale]:
    meta = template.template_meta
    name, is_binary = template._loss_scale, template.is_binary_loss_scale
    scale = _RoleScale(
        template.loss_scale.base_strategy,
        prompt=_count(meta.prompt),
        separator=_count(meta.chat_sep),
    )
    template.is_binary_loss_scale = None
    template._loss_scale, template._loss_scale_cache[_NAME] = _NAME, scale
    try:
        yield scale
    finally:
        template._loss_scale, template.is_binary_loss_scale = name, is_binary
        del template._loss_scale_cache[_NAME]


def _count(prompt: Any) -> int:
    """How many contexts a part of a template gives; empty ones are dropped."""
    return sum(1 for part in prompt or () if part)


def _answer(context: Any) -> list[tuple[Any, float]]:
    """The parts of an answer: what is thought, and what is said. Token ids are said."""
    if isinstance(context, str):
        thought = _THOUGHT.match(context)
        end = thought.end() if thought else 0
        parts = (context[:end], _THINKING), (context[end:], _ASSISTANT)
        return [(text, role) for text, role in parts if text]
    if isinstance(context, Mapping):
        return [(list(context["token_ids"]), _ASSISTANT)]
    if context and not isinstance(context[0], int):
        return [pair for part in context for pair in _answer(part)]
    return [(context, _ASSISTANT)]


def _ids(row: Mapping[str, Any]) -> list[int]:
    return list(row["input_ids"])


def _roles(row: Mapping[str, Any], other: Mapping[str, Any], scale: LossScale) -> list[int]:
    """The number of the role of each token, from 1 on; 0 where it is not supervised."""
    found = []
    for label, role in zip(row["labels"], other["loss_scale"], strict=True):
        if scale.base_strategy != "all" and role != _THINKING:
            # Then only answers are supervised; some end with a token of the next prompt.
            role = _ASSISTANT  # noqa: PLW2901
        found.append(0 if label == IGNORE_INDEX else int(role))
    return found
