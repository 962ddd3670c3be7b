"""A language model with images: each stands in the place of a token, with several positions.

Imported on ranks alone, as `megatron_loop` is.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLPSubmodules
from megatron_loop import LENGTH, VOCABULARY

# An image has a position per patch.
IMAGE, TILE, PATCH = -200, 28, 14
POSITIONS = (TILE // PATCH) ** 2


def of_rows(
    names: list[str], losses: Any, mask: Any, predicted: Any, batch: dict[str, Any]
) -> dict[str, float]:
    """By loops over the tokens of the text; those of an image predict nothing."""
    more = losses.shape[1] - LENGTH
    found: dict[str, float] = {}
    for name in set(names):
        chosen = []
        for row in (r for r, n in enumerate(names) if n == name):
            for t in range(LENGTH):
                # The last position of the image predicts what follows it.
                at = t if t < 2 else t + more
                if mask[row, at]:
                    right = int(predicted[row, at]) == int(batch["labels"][row, t])
                    chosen.append((float(losses[row, at]), right))
        count = len(chosen)
        found[f"{name}_loss"] = sum(loss for loss, _ in chosen) / count
        found[f"{name}_token_acc"] = sum(right for _, right in chosen) / count
        found[f"{name}_tokens"] = count
    return found


class Wrapper(torch.nn.Module):
    """As Float16Module and DistributedDataParallel are."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module


def new_llava() -> Any:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=4,
        use_cpu_initialization=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        gradient_accumulation_fusion=False,
    )
    vision = copy.deepcopy(config)
    # Megatron's scripts put these into the configs.
    vision.vision_model_type, config.language_model_type = "clip", "gpt"
    return LLaVAModel(
        language_transformer_config=config,
        language_transformer_layer_spec=get_gpt_layer_local_spec(),
        language_vocab_size=VOCABULARY,
        language_max_sequence_length=2 * LENGTH,
        vision_transformer_config=vision,
        vision_transformer_layer_spec=get_vit_layer_with_local_spec(),
        drop_vision_class_token=True,
        vision_projection_config=copy.deepcopy(vision),
        vision_projection_layer_spec=MLPSubmodules(ColumnParallelLinear, RowParallelLinear),
        img_h=TILE,
        img_w=TILE,
        patch_dim=PATCH,
        # It needs a kernel for a GPU; its output comes from another stage of the pipeline.
        add_encoder=False,
    )
