"""Token accuracy where the loss of the model is not simply a method of its class.

Imported by the ranks alone, after `megatron_lm.cpu.install()`.
"""

from __future__ import annotations

import copy
from functools import partial
from types import MethodType
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLPSubmodules
from megatron_core_ranks import LENGTH, NAMES, ROWS, VOCABULARY, Model, batches, forward, loss_func
from megatron_core_ranks import model as new_model

from channel_metrics import ChannelMetricsError, MetricsConfig
from channel_metrics.trainers.megatron import MegatronChannelMetrics

METRICS = ("loss", "token_acc", "tokens")
# An image has a position per patch.
IMAGE, TILE, PATCH = -200, 28, 14
POSITIONS = (TILE // PATCH) ** 2


def everything() -> dict[str, Any]:
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    cases = (override, override_on_top, taken_back, class_replaced, unknown, llava)
    return {case.__name__: case() for case in cases}


def new_metrics() -> MegatronChannelMetrics:
    return MegatronChannelMetrics(NAMES, config=MetricsConfig(metrics=METRICS))


def gpt() -> Any:
    torch.manual_seed(1)
    made = new_model()
    made.logits = []
    made.remember = lambda logits: made.logits.append(logits.detach().clone())
    return made


def twice(model: Any) -> None:
    """What tools do to an instance: another loss, and back."""
    own = model.compute_language_model_loss
    model.compute_language_model_loss = MethodType(
        lambda self, labels, logits: 2 * own(labels, logits), model
    )


def counted(metrics: MegatronChannelMetrics, model: Any) -> dict[str, Any]:
    """One micro-batch: what is logged, and the losses and right tokens that the model computed."""
    batch = next(batches(0))
    metrics.watch(model)
    losses = forward(model, batch)
    loss = partial(loss_func, batch["loss_mask"])
    mask = batch["loss_mask"]
    metrics.count(loss, channels=["bbu"] * ROWS, loss_mask=mask)(losses)
    right = (model.logits.pop().argmax(-1).transpose(0, 1) == batch["labels"]).float()
    return {
        "values": metrics.compute(),
        "naive": {
            "bbu_loss": float((losses * mask).sum() / mask.sum()),
            "bbu_token_acc": float((right * mask).sum() / mask.sum()),
            "bbu_tokens": float(mask.sum()),
        },
    }


def override() -> Any:
    """An instance has another loss before it is watched."""
    model, metrics = gpt(), new_metrics()
    twice(model)
    return {"plain": counted(new_metrics(), gpt()), "found": counted(metrics, model)}


def override_on_top() -> Any:
    """It gets another loss after it was watched."""
    model, metrics = gpt(), new_metrics()
    plain = counted(metrics, model)
    twice(model)
    return {"plain": plain, "found": counted(metrics, model), "again": counted(metrics, model)}


def taken_back() -> Any:
    """The loss of before is put back; and other metrics watch the same model in between."""
    model, metrics = gpt(), new_metrics()
    plain = counted(metrics, model)
    before = model.compute_language_model_loss
    twice(model)
    counted(metrics, model)
    model.compute_language_model_loss = before
    for _ in range(3):
        counted(new_metrics(), model)
        found = counted(metrics, model)
    own = vars(model)["compute_language_model_loss"]
    return {"plain": plain, "found": found, "is_one_deep": own.own is None}


def class_replaced() -> Any:
    """The method of the class is replaced after the model was watched."""
    model, metrics = gpt(), new_metrics()
    plain = counted(metrics, model)
    own = Model.compute_language_model_loss
    Model.compute_language_model_loss = lambda *given: 2 * own(*given)
    try:
        return {"plain": plain, "found": counted(metrics, model)}
    finally:
        Model.compute_language_model_loss = own


class Unknown(torch.nn.Module):
    """No Megatron model."""


def unknown() -> str:
    metrics, mask = new_metrics(), torch.ones(1, 4)
    metrics.watch(Unknown())
    count = metrics.count(partial(loss_func, mask), channels=["bbu"], loss_mask=mask)
    try:
        count(torch.ones(1, 4))
    except ChannelMetricsError as error:
        return str(error)
    return ""


def llava() -> Any:
    """Images stand in the place of a token each; the model says what the labels became."""
    model, metrics = new_llava(), new_metrics()
    logits: list[torch.Tensor] = []
    # The only way to see them before the loss overwrites them.
    model.language_model.__class__ = Model
    model.language_model.remember = lambda found: logits.append(found.detach().clone())
    batch = next(batches(0))
    tokens = batch["tokens"].clone()
    tokens[:, 2] = IMAGE
    model.encoder_hidden_state = torch.randn(POSITIONS, ROWS, 32)
    metrics.watch(Wrapper(model))
    losses, mask = model(
        images=torch.randn(ROWS, 3, TILE, TILE),
        input_ids=tokens,
        position_ids=torch.arange(LENGTH).repeat(ROWS, 1),
        attention_mask=None,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    names = ["bbu", "rru", "bbu"]
    metrics.count(partial(loss_func, mask), channels=names, loss_mask=mask)(losses)
    predicted = logits.pop().argmax(-1).transpose(0, 1)
    return {
        "values": metrics.compute(),
        "naive": of_rows(names, losses, mask, predicted, batch),
        "positions": losses.shape[1],
    }


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
