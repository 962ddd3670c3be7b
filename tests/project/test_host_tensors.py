"""No new tensor of ours goes to torch's default device by accident: each call names a device."""

from __future__ import annotations

import ast
from pathlib import Path

import channel_metrics

MAKERS = {
    "tensor", "as_tensor", "zeros", "ones", "full", "empty", "arange", "eye", "linspace", "rand",
    "randint", "randn", "randperm", "Generator",
}  # fmt: skip


def without_a_device(source: str) -> list[str]:
    """The calls of `torch.MAKER` without the argument `device`."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        ast.unparse(call)
        for call in calls
        if ast.unparse(call.func) in {f"torch.{name}" for name in MAKERS}
        and not any(keyword.arg == "device" for keyword in call.keywords)
    ]


def test_each_new_tensor_says_where_it_is() -> None:
    assert without_a_device("x = [torch.zeros(2), torch.ones(2, device='cpu')]") == [
        "torch.zeros(2)"
    ]
    folder = Path(channel_metrics.__file__).parent
    found = {
        str(path.relative_to(folder)): calls
        for path in folder.rglob("*.py")
        if (calls := without_a_device(path.read_text()))
    }
    assert found == {}
