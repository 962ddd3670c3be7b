"""Templates whose second encoding does not tell the roles: a record is trained on without them."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

from rank_cases import RanksOf, case
from said import warnings_of_ours
from swift_files import make_model
from swift_tools import SWIFT, needs_swift

from channel_metrics.data.carried import split_roles

pytestmark = needs_swift
MESSAGES = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}]


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


@case(SWIFT, ranks=1)
def encoded(folder: Path) -> Any:
    """{case: [roles of the tokens, whether the record is as without us, what was told]}."""
    from swift.model import get_processor
    from swift.template import get_template

    from channel_metrics.trainers.swift.roles import encode_with_roles

    model = make_model(folder / "model")
    template = get_template(get_processor(str(model), model_type="qwen2"), template_type="qwen2_5")
    template.set_mode("train")
    found = {}
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
