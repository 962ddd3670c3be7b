"""TRL's GRPOTrainer. A sequence of the script is one completion of a prompt of its own."""

from __future__ import annotations

from typing import Any

from torch.utils.data import SequentialSampler
from trl import GRPOConfig, GRPOTrainer

from contract.harness_hf import Records, generated_together, tiny_qwen2
from contract.harness_trl import PairHarness, stand_in
from contract.pairs import padding_tokenizer, reward_of, scores
from contract.script import ROWS, OneSequence

__all__ = ["GRPOHarness"]


class GRPOHarness(PairHarness):
    """The prompts of a batch are different ones, although TRL takes them for one group."""

    name = "trl_grpo"
    can = PairHarness.can | {"rewards"}

    def nll(self, sequence: OneSequence) -> float:
        return reward_of(sequence.number)

    def records(self, sequences: list[OneSequence], fails_at: int | None = None) -> Records:
        return Prompts(sequences, fails_at)

    def trainer(self, arguments: dict[str, Any], records: Records) -> Any:
        functions: list[Any] = [scores]
        return GRPOInOrder(
            model=tiny_qwen2(),
            args=GRPOConfig(**arguments, num_generations=ROWS, max_completion_length=2, beta=0.0),
            train_dataset=stand_in(records),
            processing_class=padding_tokenizer(),
            reward_funcs=functions,
        )


class GRPOInOrder(GRPOTrainer):
    """Takes the records as they come; those of a step are generated together."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return generated_together(self)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return SequentialSampler(eval_dataset)


class Prompts(Records):
    """Prompts in tokens that the model knows."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = self.sequences[index].number
        return {"prompt": str(number), "number": number, **self.labels(index)}
