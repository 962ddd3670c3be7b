"""ms-swift's Megatron trainer on the CPU: what it needs beside `megatron_lm.cpu`. For tests only.

Stands in for: TransformerEngine (empty modules, so that ms-swift and mcore-bridge can be imported;
the model itself is built from megatron-core's `local` layers), attention under context parallelism
and of packs (`megatron_lm.cpu_layers`), and the weights of a checkpoint (`draw_weights`). The
trainer, its data, its batches, the cuts of context parallelism, the schedules, the optimizer and
the collectives (over gloo) are the real ones.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import types
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_lm import cpu  # first: it sets what torch reads at import

# isort: split
import torch
import torch.distributed as dist
from megatron_lm import cpu_layers

ENGINE = (
    "transformer_engine",
    "transformer_engine.pytorch",
    "transformer_engine.pytorch.attention",
    "transformer_engine.pytorch.attention.rope",
    "transformer_engine.pytorch.utils",
)
# Classes of megatron-core that exist only with TransformerEngine, and are imported by name.
ENGINE_LAYERS = (
    "SplitAlongDim", "TEColumnParallelGroupedLinear", "TEColumnParallelLinear",
    "TEDotProductAttention", "TEFusedMLP", "TEGroupedLinear", "TELayerNormColumnParallelLinear",
    "TELinear", "TENorm", "TERowParallelGroupedLinear", "TERowParallelLinear", "te_checkpoint",
)  # fmt: skip


class EmptyModule(types.ModuleType):
    """Any name in it is a layer that does nothing."""

    __path__: Any = ()
    __version__ = "2.3.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (torch.nn.Module,), {})


def install() -> None:
    """Make ms-swift's Megatron side importable and runnable; nothing may import it before."""
    cpu.install()
    init = dist.init_process_group

    def init_gloo(backend: Any = None, *args: Any, device_id: Any = None, **kwargs: Any) -> Any:
        return init("gloo", *args, **kwargs)

    dist.init_process_group = init_gloo
    # Before the stand-ins: megatron-core must find that there is no TransformerEngine.
    engine = importlib.import_module("megatron.core.extensions.transformer_engine")
    for name in ("optimizer", "models.gpt.gpt_layer_specs", "transformer.multi_token_prediction"):
        importlib.import_module(f"megatron.core.{name}")
    for name in ENGINE:
        module = EmptyModule(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    for name in ENGINE_LAYERS:
        if not is_layer(getattr(engine, name, None)):
            setattr(engine, name, type(name, (torch.nn.Module,), {}))
    cpu_layers.install()
    with triton_for_import():
        use_local_layers()


def is_layer(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, torch.nn.Module)


@contextmanager
def triton_for_import() -> Iterator[None]:
    """mcore-bridge decorates kernels at import, some of them without asking for triton."""
    if importlib.util.find_spec("triton") is not None:
        yield
        return
    triton: Any = types.ModuleType("triton")
    language = EmptyModule("triton.language")
    triton.jit = lambda kernel=None, **_: kernel or (lambda late: late)
    triton.language = language
    stand_ins = {"triton": triton, "triton.language": language}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]


def use_local_layers() -> None:
    from mcore_bridge.bridge import gpt_bridge
    from mcore_bridge.model import register

    spec = register.get_gpt_decoder_block_spec

    def local_spec(config: Any, *_: Any, **kwargs: Any) -> Any:
        kwargs["use_transformer_engine"] = False
        return spec(config, **kwargs)

    register.get_gpt_decoder_block_spec = local_spec
    # Checkpoints are read into the names of TransformerEngine's fused layers.
    gpt_bridge.GPTBridge.load_weights = lambda self, models, *_, **__: draw_weights(models)
    gpt_bridge.GPTBridge.save_weights = lambda *_, **__: None


def draw_weights(models: Any) -> None:
    """The same model in every layout: each weight is drawn whole, by its name, and then cut."""
    for model in models:
        first_layer = min((layer.layer_number for layer in model.decoder.layers), default=1)
        for module_name, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                whole_name = global_name(f"{module_name}.{name}", first_layer)
                with torch.no_grad():
                    parameter.copy_(drawn(whole_name, parameter, cut_dimension(module, name)))


def cut_dimension(module: torch.nn.Module, name: str) -> int | None:
    """The dimension that tensor parallelism cuts; None for what every rank holds."""
    kind = type(module).__name__
    if kind in ("ColumnParallelLinear", "VocabParallelEmbedding"):
        return 0
    return 1 if kind == "RowParallelLinear" and name == "weight" else None


def global_name(name: str, first_layer: int) -> str:
    """The name that a parameter has without pipeline parallelism."""
    parts = name.split(".")
    if "layers" in parts:
        at = parts.index("layers") + 1
        parts[at] = str(int(parts[at]) + first_layer - 1)
    return ".".join(parts)


def drawn(name: str, parameter: torch.Tensor, cut: int | None) -> torch.Tensor:
    from megatron.core import parallel_state

    if parameter.dim() == 1 and "norm" in name and name.endswith("weight"):
        return torch.ones_like(parameter)
    shape = list(parameter.shape)
    size = 1 if cut is None else parallel_state.get_tensor_model_parallel_world_size()
    rank: int = parallel_state.get_tensor_model_parallel_rank()
    if cut is not None:
        shape[cut] *= size
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    whole = torch.randn(shape, generator=generator) * 0.3
    if cut is None or size == 1:
        return whole
    if "linear_fc1" in name:  # gate and up projection, each of them cut
        halves = whole.view(2, shape[0] // 2, *shape[1:]).chunk(size, 1)
        return halves[rank].reshape(parameter.shape)
    return whole.chunk(size, cut)[rank]


def use_contiguous_parts() -> None:
    """Attention takes each context-parallel rank to have one part of the whole row.

    In ms-swift only models with an attention of their own (DeepSeek V4) are cut like this.
    """
    cpu_layers.token_positions = lambda num_tokens, *_: torch.arange(num_tokens)
