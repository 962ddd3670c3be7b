"""The keys that Megatron and Megatron-Bridge write are reserved: read off their own code."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from channel_metrics.trainers.megatron.reserved import megatron_keys
from megatron_lm.launch import needs_megatron_training

# Where they are written, and one that only this code writes.
WRITERS = {
    "training/training.py": "max_attention_logit",
    "bridge/training/utils/train_utils.py": "decoupled-learning-rate",
}


def keys_in(code: str) -> Iterator[str]:
    """The plain texts among the keys of `add_scalar(key, ...)` and `log({key: ...})`."""
    for node in ast.walk(ast.parse(code)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
            continue
        name, first = node.func.attr, node.args[0]
        given = [first] if name == "add_scalar" else []
        if name == "log" and isinstance(first, ast.Dict):
            given = [key for key in first.keys if key is not None]
        for key in given:
            if isinstance(key, ast.Constant):
                yield str(key.value)


@needs_megatron_training
@pytest.mark.parametrize("writer", WRITERS)
def test_what_is_written_is_reserved(writer: str) -> None:
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None and spec.origin is not None
    found = {*keys_in((Path(spec.origin).parents[1] / writer).read_text())}
    assert {"learning-rate", "grad-norm vs samples", WRITERS[writer]} <= found
    assert found <= megatron_keys()
