"""Options of Megatron, in the spellings of its versions, with which nothing could be counted."""

from __future__ import annotations

from enum import Enum, auto
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from channel_metrics import ConfigError
from channel_metrics.trainers.megatron.arguments import validate


class CudaGraphScope(Enum):
    """As in core 0.16 and 0.17."""

    full_iteration = auto()
    full_iteration_inference = auto()
    attn = auto()


def arguments(**graphs: Any) -> Any:
    ours = {"channels_config": None, "channels_metrics": None}
    return SimpleNamespace(channels=["a"], dataloader_type="external", **ours, **graphs)


FULL_ITERATION = {
    "0.18": {"cuda_graph_impl": "full_iteration"},
    "0.16": {"cuda_graph_impl": "local", "cuda_graph_scope": [CudaGraphScope.full_iteration]},
    "0.16 names": {"cuda_graph_impl": "local", "cuda_graph_scope": ["attn", "full_iteration"]},
    "0.15": {"cuda_graph_impl": "local", "cuda_graph_scope": "full_iteration"},
    "0.14": {"enable_cuda_graph": True, "cuda_graph_scope": "full_iteration"},
}
OTHERS = {
    "none": {},
    "0.18": {"cuda_graph_impl": "local", "cuda_graph_modules": [CudaGraphScope.attn]},
    "inference": {
        "cuda_graph_impl": "local",
        "cuda_graph_scope": [CudaGraphScope.full_iteration_inference],
    },
    "0.15": {"cuda_graph_impl": "transformer_engine", "cuda_graph_scope": "attn"},
    "0.14": {"enable_cuda_graph": True, "cuda_graph_scope": "full"},
    "no graphs": {"cuda_graph_impl": "none", "cuda_graph_scope": "full_iteration"},
    "0.13": {"enable_cuda_graph": True},
}


@pytest.mark.parametrize("graphs", FULL_ITERATION.values(), ids=FULL_ITERATION.keys())
def test_graphs_of_whole_iterations_are_refused(graphs: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="leave full_iteration out, so that only layers"):
        validate(arguments(**graphs))


@pytest.mark.parametrize("graphs", OTHERS.values(), ids=OTHERS.keys())
def test_graphs_of_layers_are_not(graphs: dict[str, Any]) -> None:
    validate(arguments(**graphs))


def test_an_axis_by_field_needs_a_file_with_fields(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("axes: {domain: domain}\n")
    given = arguments()
    given.channels_config = config
    with pytest.raises(
        ConfigError, match="tokenized data files have no fields; map channels to labels"
    ):
        validate(given)
    config.write_text("axes: {domain: {a: target}}\n")
    validate(given)
