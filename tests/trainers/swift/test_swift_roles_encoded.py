"""Roles of single records, encoded by a template; with a tool, and where it does not tell them."""

from __future__ import annotations

from copy import deepcopy
from itertools import groupby
from pathlib import Path
from typing import Any

from rank_cases import RanksOf, case
from said import warnings_of_ours
from swift_files import make_model
from swift_tools import SWIFT, needs_swift

from channel_metrics.core.axis_settings import ROLES
from channel_metrics.data.carried import split_roles

pytestmark = needs_swift
alone = case(SWIFT, ranks=1)

MESSAGES = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}]
WITH_TOOL = [
    MESSAGES[0],
    {"role": "tool_call", "content": '{"name": "look", "arguments": {}}'},
    {"role": "tool_response", "content": "seen"},
    *(MESSAGES[1], *MESSAGES),
]


class Encoding:
    """`template.encode`; `change` makes something else of the second result."""

    def __init__(self, change: Any) -> None:
        self.change, self.results = change, list[Any]()

    def __call__(self, template: Any, inputs: Any) -> Any:
        found = template.encode(inputs)
        self.results.append(deepcopy(found))
        return self.change(self.results) if len(self.results) == 2 else found


def other_tokens(results: Any) -> Any:
    return results[1] | {"input_ids": [*results[1]["input_ids"][:-1], 0]}


def fails(results: Any) -> Any:
    raise RuntimeError("a template of its own")


class Unasked(Encoding):
    """A template that asks its `loss_scale` for nothing."""

    def __call__(self, template: Any, inputs: Any) -> Any:
        first = self.results[0] if self.results else super().__call__(template, inputs)
        return deepcopy(first)


def template_of(folder: Path, **options: Any) -> Any:
    from swift.model import get_processor
    from swift.template import get_template

    processor = get_processor(str(make_model(folder / "model")), model_type="qwen2")
    template = get_template(processor, template_type="qwen2_5", **options)
    template.set_mode("train")
    return template


@alone
def parts(folder: Path) -> list[tuple[str | None, str]]:
    """The texts between which the role changes, where all tokens are trained on."""
    from channel_metrics.trainers.swift.roles import encode_with_roles

    template = template_of(folder, loss_scale="all")
    row = encode_with_roles(type(template).encode, template, {"messages": WITH_TOOL})
    _, roles = split_roles(row["channel"])
    texts = [template.tokenizer.decode([token]) for token in row["input_ids"]]
    pairs = zip(roles or (), texts, strict=True)
    return [
        (ROLES[role - 1] if role else None, "".join(text for _, text in part))
        for role, part in groupby(pairs, key=lambda pair: pair[0])
    ]


def test_the_parts_of_a_record_with_a_tool(ranks_of: RanksOf) -> None:
    ((first, (system, _), *rest),) = ranks_of(parts)
    assert first == (None, "<|im_start|>") and system == "system"
    start, end = "<|im_start|>", "<|im_end|>\n"
    query = f"{start}user\nask{end}{start}assistant\n"
    response = f"{start}user\n<tool_response>\nseen\n</tool_response>{end}{start}assistant\n"
    call = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'
    assert rest == [
        ("user", query),
        ("assistant", call),
        ("tool", end + response),
        ("assistant", "say" + end),
        ("user", query),
        ("assistant", "say" + end),
    ]


@alone
def encoded(folder: Path) -> Any:
    """{case: [roles of the tokens, whether the record is as without us, what was told]}."""
    from channel_metrics.trainers.swift.roles import encode_with_roles

    template, found = template_of(folder), {}
    for name, encoding in {
        "same": Encoding(lambda results: results[1]),
        "other tokens": Encoding(other_tokens),
        "fails": Encoding(fails),
        "unasked": Unasked(None),
    }.items():
        with warnings_of_ours() as told:
            row = encode_with_roles(encoding, template, {"messages": MESSAGES})
        _, roles = split_roles(row.pop("channel", None))
        found[name] = [roles, row == encoding.results[0], told]
    return found


def test_a_record_has_roles_only_if_both_encodings_agree(ranks_of: RanksOf) -> None:
    (found,) = ranks_of(encoded)
    roles, is_same, told = found.pop("same")
    assert roles and any(roles) and is_same and not told
    assert [of[:2] for of in found.values()] == [[None, True]] * 3
    ((said,), *later) = (of[2] for of in found.values())
    assert "the template qwen2_5 does not tell the roles" in said and later == [[], []]
