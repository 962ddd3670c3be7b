"""A loop of one's own over megatron-core, on real ranks: what it logs and what a naive loop says.

Imported by the ranks alone, after `megatron_lm.cpu.install()`: Megatron asks for CUDA when it is
imported.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel, utils
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig

from channel_metrics import MetricsConfig
from channel_metrics.losses.vocab_parallel import vocab_parallel_correct
from channel_metrics.trainers.megatron import MegatronChannelMetrics
from channel_metrics.trainers.megatron.cuts import follow_cuts
from channel_metrics.trainers.megatron.step import counting_forward_step

NAMES = ("bbu", "rru", "lvis")
METRICS = ("loss", "token_acc", "tokens", "samples", "share")
LENGTH, ROWS, VOCABULARY = 16, 3, 64
MICRO_BATCHES, STEPS = 2, 2
BOUNDS = [0, 5, 16, 30, 33, 48]


LAYOUTS: dict[str, dict[str, int]] = {
    "dp2": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "cp2": {"context_parallel_size": 2},
}


def everything() -> dict[str, Any]:
    """What each layout found."""
    found: dict[str, Any] = {}
    for name, sizes in LAYOUTS.items():
        parallel_state.initialize_model_parallel(**sizes)
        found[name] = context_parallel() if name == "cp2" else layout()
        if name == "tp2":
            found["correctness"] = correctness()
        parallel_state.destroy_model_parallel()
    return found


def layout() -> dict[str, Any]:
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)
    cases = {"rows": rows_case, "packs": packs_case, "wrapped": wrapped_case}
    return {name: case() for name, case in cases.items()}


def rows_case() -> dict[str, Any]:
    """One channel per row; then again, with an optimizer that skips each step."""
    loop = Loop()

    def forward_step(data_iterator: Any, model: Any) -> Any:
        batch = next(data_iterator)
        loop.metrics.watch(model)
        loss = partial(loss_func, batch["loss_mask"])
        counted = loop.metrics.count(loss, channels=batch["channels"], loss_mask=batch["loss_mask"])
        return forward(model, batch), loop.recorded(batch, counted)

    loop.run(forward_step)
    values = loop.metrics.compute()
    wanted = loop.naive()
    loop.run(forward_step, discard=True)
    return {"values": values, "naive": wanted, "skipped": loop.metrics.compute()}


def packs_case() -> dict[str, Any]:
    """Rows flattened into one, with the padded bounds of `PackedSeqParams`."""
    loop = Loop()
    # Where the tokens sit; what attention sees of each sequence is one token shorter.
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    packed = PackedSeqParams(cu_seqlens_q=bounds - torch.arange(6), cu_seqlens_q_padded=bounds)

    def forward_step(data_iterator: Any, model: Any) -> Any:
        batch = next(data_iterator)
        loop.metrics.watch(model)
        loss = partial(loss_func, batch["loss_mask"])
        counted = loop.metrics.count(
            loss,
            channels=["bbu", "lvis", "bbu", None, "rru"],
            loss_mask=batch["loss_mask"],
            packed_seq_params=packed,
        )
        ids = [[0, 2, 0, -1, 1][sum(b <= t for b in BOUNDS[1:])] for t in range(BOUNDS[-1])]
        batch["token_ids"] = torch.tensor(ids).reshape(ROWS, LENGTH)
        return forward(model, batch), loop.recorded(batch, counted)

    loop.run(forward_step)
    return {"values": loop.metrics.compute(), "naive": loop.naive(samples=[0, 2, 0, -1, 1])}


def wrapped_case() -> dict[str, Any]:
    """A forward step that knows no channels; with a state in front, as in Megatron-Bridge."""
    loop = Loop()

    def forward_step(state: Any, data_iterator: Any, model: Any) -> Any:
        assert state == "state"
        batch = next(data_iterator)
        assert "channel_ids" not in batch
        return forward(model, batch), loop.recorded(batch, partial(loss_func, batch["loss_mask"]))

    step = counting_forward_step(partial(forward_step, "state"), loop.metrics)
    loop.run(step)
    return {"values": loop.metrics.compute(), "naive": loop.naive()}


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
    logged = {}
    for channel, (nll, right, tokens, samples) in sums.items():
        name = "unlabeled" if channel < 0 else NAMES[channel]
        logged |= {f"{name}_loss": nll / tokens, f"{name}_token_acc": right / tokens}
        logged |= {f"{name}_tokens": tokens, f"{name}_samples": samples}
        logged |= {f"{name}_share": tokens / total}
    return logged


class Model(GPTModel):
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


def context_parallel() -> dict[str, Any]:
    """Ids per token, cut by megatron-core's own function with the labels: values and naive."""
    follow_cuts()
    metrics = MegatronChannelMetrics(NAMES, config=MetricsConfig(metrics=("loss", "tokens")))
    labels = torch.arange(2 * LENGTH, dtype=torch.int64).reshape(2, LENGTH)
    whole = {
        "tokens": labels.clone(),
        "labels": labels.clone(),
        "loss_mask": (labels % 5 > 0).float(),
        "position_ids": labels.clone(),
        "attention_mask": None,
        "channels": torch.tensor([2, 0]),
    }

    def forward_step(data_iterator: Any, model: Any) -> Any:
        batch = next(data_iterator)
        batch.pop("channels")
        batch = cut_batch(batch)
        return batch["labels"].float(), partial(loss_func, batch["loss_mask"])

    output, loss = counting_forward_step(forward_step, metrics)(iter([whole]), torch.nn.Module())
    loss(output)
    naive = {}
    for row, name in ((0, "lvis"), (1, "bbu")):
        kept = [int(label) for label in labels[row] if label % 5]
        naive |= {f"{name}_loss": sum(kept) / len(kept), f"{name}_tokens": len(kept)}
    return {"values": metrics.compute(), "naive": naive, "mine": output.numel()}


def cut_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """By megatron-core's function, which since 0.17 wants to be told how."""
    cut = utils.get_batch_on_this_cp_rank
    needs = inspect.signature(cut).parameters
    options = {
        "is_hybrid_cp": False,
        "cp_group": parallel_state.get_context_parallel_group(),
        "use_per_sequence_balancing": True,
    }
    return cut(batch, **{name: value for name, value in options.items() if name in needs})


def correctness() -> list[bool]:
    """Whether `vocab_parallel_correct` on two parts is that on the whole, with ties and without."""
    group, rank = parallel_state.get_tensor_model_parallel_group(), dist.get_rank()
    same = []
    for highest in (3, 1000):
        generator = torch.Generator().manual_seed(highest)
        logits = torch.randint(0, highest, (LENGTH, ROWS, 8), generator=generator).float()
        labels = torch.randint(0, 8, (ROWS, LENGTH), generator=generator)
        labels[0, :3] = -100
        found = vocab_parallel_correct(logits[..., 4 * rank : 4 * rank + 4], labels, group)
        for row in range(ROWS):
            for t in range(LENGTH):
                label = int(labels[row, t])
                values = logits[t, row].tolist()
                same.append(bool(found[row, t]) == (label >= 0 and values[label] == max(values)))
    return same
