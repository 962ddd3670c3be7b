"""Finds the model that a LightningModule trains."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from channel_metrics.errors import ConfigError, hint

__all__ = ["trained_model"]

# Wrappers that call the forward of the model inside them without its hooks.
_WRAPPERS = frozenset({"OptimizedModule", "PeftModel"})


def trained_model(module: Any, name: str | None) -> torch.nn.Module:
    """The model whose losses are counted.

    Args:
        module: the LightningModule.
        name: the name of the model in it, such as `student`; None looks for a transformers model.

    Returns:
        The model as the module calls it. If it holds no transformers model, or if the whole module
        is compiled, so that hooks would be a part of its graph: a model that nobody calls.

    Raises:
        ConfigError: the module has no model of that name, or holds several that may be meant.
    """
    known: dict[str, torch.nn.Module] = dict(module.named_modules())
    if name is not None and name not in known:
        children = [child for child, _ in module.named_children()]
        raise ConfigError(f"{type(module).__name__} has no module {name!r}; {hint(name, children)}")
    if module._compiler_ctx is not None:
        return torch.nn.Module()
    if name is not None:
        return known[name]
    models = {path: one for path, one in known.items() if path and _is_model(one)}
    found = [path for path in models if not any(path.startswith(f"{one}.") for one in models)]
    # A teacher is usually frozen.
    trained = [path for path in found if any(p.requires_grad for p in models[path].parameters())]
    found = trained if len(trained) == 1 else found
    if len(found) > 1:
        raise ConfigError(
            f"{type(module).__name__} holds {len(found)} models ({', '.join(found)}), so it is "
            f"not clear whose losses count; name one: ChannelMetricsCallback(model={found[0]!r})."
        )
    return models[found[0]] if found else torch.nn.Module()


def _is_model(module: torch.nn.Module) -> bool:
    kinds = {parent.__name__ for parent in type(module).__mro__}
    return isinstance(module, PreTrainedModel) or bool(kinds & _WRAPPERS)
