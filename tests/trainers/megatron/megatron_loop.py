"""A loop of one's own over megatron-core, and the same sums by loops over tokens.

Imported on ranks alone, after `megatron_lm.cpu.install()`: Megatron asks for CUDA when it is
imported.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig

from channel_metrics import MetricsConfig
from channel_metrics.trainers.megatron import MegatronChannelMetrics

NAMES = ("bbu", "rru", "lvis")
METRICS = ("loss", "token_acc", "tokens", "samples", "share")
TOTALS = ("tokens_total", "samples_total")
LENGTH, ROWS, VOCABULARY = 16, 3, 64
MICRO_BATCHES, STEPS = 2, 2


def start(**sizes: int) -> None:
    """Megatron's groups, of these sizes, and its seeds; what was there before goes."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(**sizes)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)


class Loop:
    """A model, its data, and what the naive loop will need."""

    def __init__(self) -> None:
        self.metrics = MegatronChannelMetrics(NAMES, config=MetricsConfig(metrics=METRICS))
        self.model = model()
        self.seen: list[tuple[Any, torch.Tensor, torch.Tensor]] = []
        self.logits: list[torch.Tensor] = []
        self.model.remember = lambda logits: self.logits.append(gathered(logits))

    def run(self, forward_step: Any, *, discard: bool = False) -> None:
        for step in range(STEPS):
            self.metrics.begin_step()
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=batches(step),
                model=[self.model],
                num_microbatches=MICRO_BATCHES,
                seq_length=LENGTH,
                micro_batch_size=ROWS,
                forward_only=False,
            )
            self.metrics.end_step(discard=discard)

    def recorded(self, batch: Any, loss: Any) -> Any:
        """`loss`, whose losses are kept for the naive loop. Keeps a `partial` a `partial`."""

        def record(loss_mask: torch.Tensor, losses: torch.Tensor) -> Any:
            right = self.logits.pop().argmax(-1).transpose(0, 1) == batch["labels"]
            self.seen.append((batch, losses.detach().clone(), right))
            return loss(losses)

        return partial(record, batch["loss_mask"])

    def naive(self, samples: list[int] | None = None) -> dict[str, float]:
        """The metrics over all data-parallel ranks, by loops over tokens."""
        sums: dict[int, list[float]] = {}
        for batch, losses, right in self.seen:
            ids = batch.get("token_ids")
            for row in range(ROWS):
                for t in range(LENGTH):
                    if batch["loss_mask"][row, t]:
                        channel = int(batch["channels"][row] if ids is None else ids[row, t])
                        entry = sums.setdefault(channel, [0.0, 0.0, 0.0, 0.0])
                        entry[0] += float(losses[row, t])
                        entry[1] += float(right[row, t])
                        entry[2] += 1
            for channel in samples or batch["channels"].tolist():
                sums.setdefault(channel, [0.0, 0.0, 0.0, 0.0])[3] += 1
        self.seen.clear()
        is_counting = parallel_state.get_tensor_model_parallel_rank() == 0
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, sums if is_counting else {})
        return ratios(everyone)


def ratios(everyone: list[dict[int, list[float]]]) -> dict[str, float]:
    sums: dict[int, list[float]] = {}
    for found in everyone:
        for channel, values in found.items():
            before = sums.get(channel, [0.0] * 4)
            sums[channel] = [a + b for a, b in zip(before, values, strict=True)]
    total = sum(values[2] for values in sums.values())
    logged: dict[str, float] = {}
    for channel, (nll, right, tokens, samples) in sums.items():
        name = "unlabeled" if channel < 0 else NAMES[channel]
        logged |= {f"{name}_loss": nll / tokens, f"{name}_token_acc": right / tokens}
        logged |= {f"{name}_tokens": tokens, f"{name}_samples": samples}
        logged |= {f"{name}_share": tokens / total}
    return logged


class Model(GPTModel):  # type: ignore[misc]  # Megatron has no types
    """Keeps the logits, which the cross entropy overwrites."""

    def compute_language_model_loss(
        self, labels: torch.Tensor, logits: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        self.remember(logits)
        losses: torch.Tensor = super().compute_language_model_loss(labels, logits, **kwargs)
        return losses


def model() -> Model:
    sizes = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        use_cpu_initialization=True,
        tensor_model_parallel_size=sizes[0],
        pipeline_model_parallel_size=sizes[1],
        pipeline_dtype=torch.float32,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        gradient_accumulation_fusion=False,
    )

    return Model(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )


def batches(step: int) -> Any:
    """The micro-batches of this data-parallel rank; rru is only on the first, lvis on the last."""
    rank = parallel_state.get_data_parallel_rank()
    size = parallel_state.get_data_parallel_world_size()
    for number in range(MICRO_BATCHES):
        generator = torch.Generator().manual_seed(100 * step + 10 * number + rank)
        rows = torch.randint(0, VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
        channels = [0, 1 if rank == 0 else -1, 2 if rank == size - 1 else 0]
        yield {
            "tokens": rows[:, :-1].contiguous(),
            "labels": rows[:, 1:].contiguous(),
            "loss_mask": (torch.rand(ROWS, LENGTH, generator=generator) < 0.7).float(),
            "channels": torch.tensor(channels),
        }


def forward(model: Any, batch: Any) -> torch.Tensor:
    positions = torch.arange(LENGTH).repeat(ROWS, 1)
    mask = torch.ones(1, 1, LENGTH, LENGTH).tril() < 0.5
    output: torch.Tensor = model(batch["tokens"], positions, mask, labels=batch["labels"])
    return output


def loss_func(loss_mask: torch.Tensor, losses: torch.Tensor) -> Any:
    total = (losses * loss_mask).sum()
    tokens = loss_mask.sum().int()
    report = torch.stack([total.detach(), tokens.float()])
    return total, tokens, {"lm loss": report}


def gathered(logits: torch.Tensor) -> torch.Tensor:
    """The whole vocabulary, a copy."""
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(logits) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, logits.detach().contiguous(), group=group)
    return torch.cat(parts, dim=-1)


class EvaluationDied(RuntimeError):
    """What the loop catches."""


class RoughLoop(Loop):
    """`lie`: what the reported sum is multiplied with. `dies_at`: the micro-batch that raises.
    `channels`: in place of those of the batches."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics = new_metrics()
        self.lie, self.dies_at = 1.0, -1
        self.channels: Callable[[Any], Any] | None = None

    def forward_step(self, data_iterator: Any, model: Any) -> Any:
        batch = next(data_iterator)
        if self.channels is not None:
            batch["channels"] = self.channels(batch["channels"])
        self.metrics.watch(model)
        counted = self.metrics.count(
            partial(self.loss_func, batch),
            channels=batch["channels"],
            loss_mask=batch["loss_mask"],
        )
        return forward(model, batch), counted

    def loss_func(
        self, batch: dict[str, Any], losses: torch.Tensor, non_loss_data: bool = False
    ) -> Any:
        right = self.logits.pop().argmax(-1).transpose(0, 1) == batch["labels"]
        if non_loss_data:
            return right
        if len(self.seen) == self.dies_at:
            raise EvaluationDied
        self.seen.append((batch, losses.detach().clone(), right))
        total, tokens = (losses * batch["loss_mask"]).sum(), batch["loss_mask"].sum().int()
        report = torch.stack([self.lie * total.detach(), tokens.float()])
        return total, tokens, {"lm loss": report}

    def pass_over(self, step: int, **options: Any) -> Any:
        """The micro-batches of `step` through the real schedule."""
        return get_forward_backward_func()(
            forward_step_func=self.forward_step,
            data_iterator=batches(step),
            model=[self.model],
            num_microbatches=MICRO_BATCHES,
            seq_length=LENGTH,
            micro_batch_size=ROWS,
            **{"forward_only": False, **options},
        )

    def window(self) -> tuple[dict[str, float], dict[str, float]]:
        """One step: what is logged, and what a loop over its tokens says."""
        self.run(self.forward_step)
        return self.metrics.compute(), self.naive()


def new_metrics() -> MegatronChannelMetrics:
    return MegatronChannelMetrics(NAMES, config=MetricsConfig(metrics=(*METRICS, *TOTALS)))
