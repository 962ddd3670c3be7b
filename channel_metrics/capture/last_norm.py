"""The last normalisation layer of a model, and what it multiplies by its weight.

After this layer, nothing mixes tokens: the head and the loss look at one position at a time. The
layer itself gives y = b + w * x at each position, so the gradient of w is a sum over positions.

Letters: T positions, H is the hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from channel_metrics.errors import ConfigError

__all__ = ["find_last_norm", "normed_by"]


def find_last_norm(model: torch.nn.Module) -> torch.nn.Module:
    """Give the normalisation layer after the last block of a causal language model of transformers.

    Raises:
        ConfigError: the model has another form.
    """
    decoder: Any = _inside(model)
    if not hasattr(decoder, "get_decoder") or not _is_causal(decoder):
        raise _not_for(model, "it is no causal language model of transformers")
    decoder = decoder.get_decoder()
    children = list(decoder.children())
    blocks = [i for i, child in enumerate(children) if isinstance(child, torch.nn.ModuleList)]
    after = children[blocks[-1] + 1 :] if blocks else []
    norms: list[torch.nn.Module] = [child for child in after if _is_norm(child)]
    if len(norms) != 1:
        raise _not_for(
            model,
            f"{type(decoder).__name__} has {len(norms)} normalisation layers after its blocks",
        )
    return norms[0]


def normed_by(norm: torch.nn.Module, model: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    """A function that gives x [..., H] for the input of the layer [..., H].

    Raises:
        ConfigError: the layer does not compute b + w * x, as a check with random numbers shows.
    """
    try:
        plain = _without_hooks(norm)
        with torch.random.fork_rng(devices=[]):
            fits = _is_affine(plain)
    except Exception as error:  # whatever a layer of somebody else may raise
        raise _not_for(model, f"its {type(norm).__name__} cannot be run alone: {error}") from error
    if not fits:
        raise _not_for(model, f"its {type(norm).__name__} is not b + weight * x")

    def normed(inputs: Tensor) -> Tensor:
        weight: Any = plain.weight
        plain.to(inputs.device)
        with torch.no_grad():
            at_one = _with_weight(plain, torch.ones_like(weight), inputs)
            return at_one - _with_weight(plain, torch.zeros_like(weight), inputs)

    return normed


def _inside(model: torch.nn.Module) -> torch.nn.Module:
    """The model in an adapter of PEFT."""
    get: Any = getattr(model, "get_base_model", None)
    found: torch.nn.Module = model if get is None else get()
    return found


def _is_causal(model: Any) -> bool:
    from channel_metrics.capture.transformers import is_causal

    return is_causal(model) is True


def _is_norm(module: torch.nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    is_vector = isinstance(weight, Tensor) and weight.dim() == 1 and weight.numel() > 0
    return is_vector and "norm" in type(module).__name__.lower()


def _without_hooks(norm: torch.nn.Module) -> torch.nn.Module:
    """A copy of the layer with a bias of 0."""
    plain = copy.deepcopy(norm)
    for name in vars(plain):
        if name.endswith("_hooks"):
            vars(plain)[name].clear()
    for parameter in plain.parameters():
        parameter.requires_grad_(False)
        parameter.zero_()
    return plain


def _with_weight(plain: torch.nn.Module, weight: Tensor, inputs: Tensor) -> Tensor:
    found: Tensor = torch.func.functional_call(plain, {"weight": weight}, (inputs,))
    return found


def _is_affine(plain: torch.nn.Module) -> bool:
    """Whether autograd's gradient of the weight is sum(g * x)."""
    weight: Any = plain.weight
    inputs, slope = (torch.randn(5, weight.numel(), device="cpu").to(weight) for _ in range(2))
    given = torch.randn_like(weight).requires_grad_()
    with torch.enable_grad():
        outputs = _with_weight(plain, given, inputs)
        (exact,) = torch.autograd.grad(outputs, given, slope.to(outputs.dtype))
    at_one = _with_weight(plain, torch.ones_like(weight), inputs)
    normed = at_one - _with_weight(plain, torch.zeros_like(weight), inputs)
    found = (normed * slope).float().sum(0)
    scale = exact.float().abs().max() * 10 * torch.finfo(weight.dtype).eps
    return bool((exact.float() - found).abs().max() <= scale.clamp(min=1e-6))


def _not_for(model: torch.nn.Module, reason: str) -> ConfigError:
    return ConfigError(
        f"the gradient of the last normalisation layer cannot be measured for "
        f"{type(model).__name__}: {reason}. Take the metrics that begin with `grad_` out of "
        "`metrics`."
    )
