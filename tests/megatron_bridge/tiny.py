"""What `pretrain_tiny.py` does: a training with Megatron-Bridge, as a user writes one.

The settings are {section of the `ConfigContainer`: {field: value}}, beside those below. `dataset`
may hold `blend` (paths and weights), or `dataset_root` for gpt_sft; `packs` is its pack size.
`positional` calls `pretrain` by position, with a callback.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from megatron.bridge.data.builders.gpt_sft import GPTSFTDatasetConfig
from megatron.bridge.data.packing.config import PackedSequenceSpecs
from megatron.bridge.data.sft_processing import PromptCompletionSFTPreprocessingConfig
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.config import (
    CheckpointConfig,
    ConfigContainer,
    DistributedDataParallelConfig,
    DistributedInitConfig,
    GPTDatasetConfig,
    LoggerConfig,
    OptimizerConfig,
    RerunStateMachineConfig,
    RNGConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainingConfig,
    ValidationConfig,
)
from megatron.bridge.training.finetune import finetune
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

SEQ_LENGTH = 64
# Fusions are kernels for a GPU.
FUSIONS = (
    "gradient_accumulation_fusion", "masked_softmax_fusion", "bias_dropout_fusion",
    "bias_activation_fusion", "apply_rope_fusion", "persist_layer_norm",
)  # fmt: skip


def model(**settings: Any) -> GPTModelProvider:
    """A model of 2 layers that trains in under a second."""
    shape = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, **settings}
    return GPTModelProvider(
        **shape,
        **dict.fromkeys(FUSIONS, False),
        seq_length=SEQ_LENGTH,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        make_vocab_size_divisible_by=33,
        use_cpu_initialization=True,
        transformer_impl="local",
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="LayerNorm"),
    )


def dataset(packs: int = 0, mult: int = 1, **settings: Any) -> Any:
    loader = {"num_workers": 0, "data_sharding": True}
    if "dataset_root" not in settings:
        shuffle = {"reset_position_ids": False, "reset_attention_mask": False}
        return GPTDatasetConfig(
            random_seed=1234,
            seq_length=SEQ_LENGTH,
            dataloader_type="single",
            eod_mask_loss=False,
            **shuffle,
            **loader,
            **settings,
        )
    if packs:
        settings["enable_offline_packing"] = True
        settings["offline_packing_specs"] = PackedSequenceSpecs(
            packed_sequence_size=packs, pad_seq_to_mult=mult
        )
    return GPTSFTDatasetConfig(
        seq_length=SEQ_LENGTH,
        preprocessing=PromptCompletionSFTPreprocessingConfig(
            prompt_column="input", completion_column="output", separator=" "
        ),
        **loader,
        **settings,
    )


def config(settings: dict[str, dict[str, Any]], tensorboard: str, cache: str) -> ConfigContainer:
    data = dict(settings.get("dataset", {}))
    if "blend" in data:
        data["path_to_cache"] = cache
    train = {"train_iters": 6, "global_batch_size": 8, "micro_batch_size": 2}
    decay = {"start_weight_decay": 0.01, "end_weight_decay": 0.01}
    zero = dict.fromkeys(
        ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather"), False
    )
    tokenizer = {"tokenizer_type": "NullTokenizer", "vocab_size": 255}
    return ConfigContainer(
        model=model(**settings.get("model", {})),
        train=TrainingConfig(**{**train, **settings.get("train", {})}),
        validation=ValidationConfig(
            **{"eval_interval": 3, "eval_iters": 2, **settings.get("validation", {})}
        ),
        optimizer=OptimizerConfig(
            optimizer="adam",
            lr=1e-3,
            min_lr=1e-4,
            use_distributed_optimizer=False,
            **settings.get("optimizer", {}),
        ),
        scheduler=SchedulerConfig(
            lr_decay_style="constant",
            lr_decay_iters=6,
            lr_warmup_iters=0,
            weight_decay_incr_style="constant",
            **decay,
        ),
        ddp=DistributedDataParallelConfig(**zero),
        dist=DistributedInitConfig(distributed_backend="gloo"),
        dataset=dataset(**data),
        logger=LoggerConfig(
            **{"log_interval": 1, "tensorboard_dir": tensorboard, **settings.get("logger", {})}
        ),
        tokenizer=TokenizerConfig(**{**tokenizer, **settings.get("tokenizer", {})}),
        checkpoint=CheckpointConfig(**{"save": None, **settings.get("checkpoint", {})}),
        rng=RNGConfig(seed=1234),
        rerun_state_machine=RerunStateMachineConfig(**settings.get("rerun_state_machine", {})),
    )


class Remembering(Callback):  # type: ignore[misc]  # Megatron-Bridge has no types
    """A callback of the user's own."""

    def on_eval_end(self, context: Any) -> None:
        print("the user's callback at", context.state.train_state.step)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("settings", "tensorboard-dir", "data-cache-path"):
        parser.add_argument(f"--{name}", required=True)
    args = parser.parse_args()
    chosen = json.loads(Path(args.settings).read_text())
    made = config(chosen, args.tensorboard_dir, args.data_cache_path)
    if chosen.get("positional"):
        pretrain(made, forward_step, [Remembering()])
    elif chosen.get("finetune"):
        finetune(made, forward_step)
    else:
        pretrain(config=made, forward_step_func=forward_step)
