"""The parallel layouts of the tests, and the arguments that every run shares."""

from __future__ import annotations

from dataclasses import dataclass

SEQ_LENGTH = 64
GLOBAL_BATCH = 8
ITERATIONS = 6

# A model of 2 layers that trains in under a second.
BASE = (
    "--distributed-backend gloo --transformer-impl local --use-cpu-initialization "
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 "
    f"--seq-length {SEQ_LENGTH} --max-position-embeddings {SEQ_LENGTH} "
    f"--micro-batch-size 2 --global-batch-size {GLOBAL_BATCH} --train-iters {ITERATIONS} "
    "--lr 1e-3 --min-lr 1e-4 --lr-decay-style constant --seed 1234 "
    "--eval-interval 1000 --eval-iters 0 --log-interval 1 "
    "--tokenizer-type NullTokenizer --vocab-size 256 --make-vocab-size-divisible-by 32 "
    "--attention-dropout 0 --hidden-dropout 0 --num-workers 0 --attention-backend unfused "
    # Fusions are kernels for a GPU.
    "--no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-dropout-fusion "
    "--no-bias-gelu-fusion --no-rope-fusion --no-persist-layer-norm"
).split()


@dataclass(frozen=True)
class Layout:
    """How a run is spread over processes."""

    ranks: int
    args: tuple[str, ...] = ()


def _layout(ranks: int, args: str = "") -> Layout:
    return Layout(ranks, tuple(args.split()))


_TP2, _PP2, _CP2 = (
    f"--{kind}-parallel-size 2 " for kind in ("tensor-model", "pipeline-model", "context")
)

LAYOUTS = {
    "dp1": _layout(1),
    "dp2": _layout(2),
    "dp2_zero": _layout(
        2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
    ),
    "tp2": _layout(2, _TP2),
    "tp2_sp": _layout(2, _TP2 + "--sequence-parallel"),
    "pp2": _layout(2, _PP2),
    "pp2_vpp2": _layout(2, _PP2 + "--num-layers 4 --num-layers-per-virtual-pipeline-stage 1"),
    "cp2": _layout(2, _CP2),
    "tp2_pp2": _layout(4, _TP2 + _PP2),
    "tp2_cp2": _layout(4, _TP2 + _CP2),
}
