"""Stand-ins for what Megatron leaves to TransformerEngine: packed and context-parallel attention,
norms under sequence parallelism, and the indices of a context-parallel rank in packed documents.

Written for these tests, in the plainest form. They compute what the layers are meant to compute,
so that layouts can be compared with each other; they are no evidence for TransformerEngine.
Attention that Megatron itself can do (rows, no context parallelism) stays Megatron's.

Shapes: s positions on this rank, t = s * context-parallel size, b rows, n heads, d head size.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist


def install() -> None:
    """Replace the layers of the `local` layer spec that refuse these features."""
    import megatron.core.utils
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    indices = types.SimpleNamespace(thd_get_partitioned_indices=thd_get_partitioned_indices)
    megatron.core.utils.tex = indices
    allow_context_parallel(DotProductAttention)
    allow_sequence_parallel(WrappedTorchNorm)


def thd_get_partitioned_indices(
    cu_seqlens: torch.Tensor, num_tokens: int, size: int, rank: int
) -> torch.Tensor:
    """Positions of `rank`: each document is cut into 2 * size chunks, and the rank has its own
    chunk from the front and one from the back, so that all ranks have the same work.

    cu_seqlens: int [documents + 1]. Returns int64 [num_tokens / size].
    """
    chunks = []
    for start, end in pairwise(cu_seqlens.tolist()):
        length = (end - start) // (2 * size)
        for chunk in (rank, 2 * size - 1 - rank):
            chunks.append(torch.arange(start + chunk * length, start + (chunk + 1) * length))
    return torch.cat(chunks)


class GatherTokens(torch.autograd.Function):
    """The concatenation over the ranks of a group; its gradient is the sum over them."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        parts = [torch.empty_like(part) for _ in range(group.size())]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient.chunk(ctx.group.size())[ctx.group.rank()], None


def allow_context_parallel(attention: Any) -> None:
    init, forward = attention.__init__, attention.forward

    def init_any(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        alone = copy.copy(config)
        alone.context_parallel_size = 1
        init(self, alone, *args, **kwargs)
        self.config = config

    def forward_any(  # noqa: PLR0917 - the signature of the layer
        self: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Any = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        group = context_group(packed_seq_params)
        if packed_seq_params is None and group.size() == 1:
            rest = {"attn_mask_type": attn_mask_type, "attention_bias": attention_bias}
            result: torch.Tensor = forward(self, query, key, value, attention_mask, **rest)
            return result
        return attend(self, (query, key, value), packed_seq_params, group)

    attention.__init__, attention.forward = init_any, forward_any


def context_group(packed: Any) -> dist.ProcessGroup:
    from megatron.core import parallel_state

    group: dist.ProcessGroup | None
    group = getattr(packed, "cp_group", None)  # hybrid context parallelism: one per micro-batch
    own: Callable[[], dist.ProcessGroup] = parallel_state.get_context_parallel_group
    return own() if group is None else group


def attend(
    layer: Any, inputs: tuple[torch.Tensor, ...], packed: Any, group: dist.ProcessGroup
) -> torch.Tensor:
    """Causal attention within documents.

    inputs: query, key and value, each [s, b, n, d] or packed [s, n, d]; key and value may have
    fewer heads. Returns [s, b, n * d].
    """
    from megatron.core import tensor_parallel

    query, key, value = (x.unsqueeze(1) if x.dim() == 3 else x for x in inputs)
    num_local, num_rows, num_heads, head_size = query.shape
    num_tokens = num_local * group.size()
    positions = token_positions(num_tokens, packed, group)
    own = positions[group.rank() * num_local :][:num_local]
    if group.size() > 1:
        gather: Any = GatherTokens.apply
        key, value = (gather(x, group) for x in (key, value))
    key, value = (x.repeat_interleave(num_heads // x.shape[2], 2) for x in (key, value))

    documents = document_of_each(num_tokens, packed)
    allowed = own[:, None] >= positions
    allowed &= documents[own][:, None] == documents[positions]
    scores = torch.einsum("qbnd,kbnd->bnqk", query.float(), key.float()) * layer.softmax_scale
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    with tensor_parallel.get_cuda_rng_tracker().fork():
        weights = layer.attention_dropout(weights)
    mixed = torch.einsum("bnqk,kbnd->qbnd", weights, value.float())
    return mixed.to(query.dtype).reshape(num_local, num_rows, num_heads * head_size)


def bounds_of(packed: Any) -> torch.Tensor:
    padded = packed.cu_seqlens_q_padded
    bounds: torch.Tensor = packed.cu_seqlens_q if padded is None else padded
    return bounds


def token_positions(num_tokens: int, packed: Any, group: dist.ProcessGroup) -> torch.Tensor:
    """Where in the whole stream each gathered token is, rank after rank: int64 [t]."""
    bounds = torch.tensor([0, num_tokens])
    if packed is not None and not cut_as_one_row(packed):
        bounds = bounds_of(packed)
    size = group.size()
    parts = [thd_get_partitioned_indices(bounds, num_tokens, size, r) for r in range(size)]
    return torch.cat(parts) if size > 1 else torch.arange(num_tokens)


def cut_as_one_row(packed: Any) -> bool:
    """Whether `get_batch` cut the stream regardless of documents, as it does for these options."""
    if getattr(packed, "cp_group", None) is not None:
        return True
    try:
        from megatron.training.global_vars import _GLOBAL_ARGS as args
    except ImportError:  # megatron-core alone
        return False
    # Other loops than Megatron-LM's have no arguments.
    return args is not None and bool(args.dataloader_inter_document_masking and not args.sft)


def document_of_each(num_tokens: int, packed: Any) -> torch.Tensor:
    """The document of each position of the whole stream: int64 [t]."""
    if packed is None:
        return torch.zeros(num_tokens, dtype=torch.long)
    inner = bounds_of(packed)[1:].long().contiguous()
    return torch.bucketize(torch.arange(num_tokens), inner, right=True)


def allow_sequence_parallel(norm: Any) -> None:
    """Norms work on their own positions; only their gradients need the mark that makes Megatron
    sum them over the ranks."""
    new = norm.__new__

    def new_any(cls: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        alone = copy.copy(config)
        alone.sequence_parallel = alone.persist_layer_norm = False
        module = new(cls, alone, *args, **kwargs)
        for parameter in module.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return module

    norm.__new__ = new_any
