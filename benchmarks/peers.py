"""Other ways to get channel losses, and how the source of other projects is run.

What they do is a part of larger modules, which need a GPU stack to be imported. Their source is
taken out of the installed package by its syntax tree, and run as it is.
"""

from __future__ import annotations

import ast
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import CodeType

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "Call",
    "compiled",
    "definition",
    "found_package",
    "segment_reduction",
    "source_tree",
    "start_one_rank",
]

Call = Callable[[], object]


def start_one_rank() -> None:
    """A process group of one rank: some peers cannot do without."""
    if not dist.is_initialized():
        store = Path(tempfile.mkdtemp()) / "store"
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)


def segment_reduction(losses: Tensor, mask: Tensor, bounds: Tensor, ids: Tensor) -> Call:
    """The least that plain PyTorch needs for [sum, count] per channel of a packed batch."""
    num_channels = int(ids.max()) + 1

    def call() -> Tensor:
        lengths = bounds.diff().long()
        columns = torch.stack([losses * mask, mask.to(losses)])
        sums = [
            torch.segment_reduce(column, "sum", lengths=lengths, unsafe=True) for column in columns
        ]
        return losses.new_zeros(2, num_channels).index_add_(1, ids, torch.stack(sums))

    return call


def source_tree(package: str, path: str) -> ast.Module:
    """The syntax tree of a file of a package, installed or among the sources (`make env`)."""
    file = Path(str(found_package(package).locate_file(path)))
    return ast.parse(file.read_text())


def found_package(name: str) -> metadata.Distribution:
    """What is known of a package, installed or among the sources."""
    places = [*sys.path, str(Path(sys.prefix) / "sources")]
    return next(iter(metadata.distributions(name=name, path=places)))


def definition(tree: ast.Module, name: str) -> CodeType:
    """The function `name`, a method too, as code that defines it by itself."""
    node = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name)
    node.decorator_list = []
    return compiled([node])


def compiled(nodes: list[ast.stmt]) -> CodeType:
    """The statements as a module."""
    module = ast.Module(body=nodes, type_ignores=[])
    return compile(ast.fix_missing_locations(module), "peer", "exec")
