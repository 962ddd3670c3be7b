"""The demo of `--channels`: four ranks, two by two tensor and pipeline parallel, on the CPU.

    make demo-megatron

The four sources of configs/fused_data/ become Megatron's datasets and are trained on as a blend, by
Megatron's own loop. It runs in the harness of the tests, so `cpu.py` says what it does not show.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from rank_cases import RanksOf
from rich.console import Console

from channel_metrics.analysis.report.command import report_of_training
from channel_metrics.analysis.run import RUN_FILE
from channel_metrics.analysis.summary import render, summarize
from channel_metrics.demo.config import Source, load_config
from channel_metrics.demo.encoding import encode
from channel_metrics.demo.mixture import source_records
from channel_metrics.demo.tiny import byte_tokenizer
from megatron_lm.data import write_indexed
from megatron_lm.launch import Launcher, Run

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "fused_data" / "debug.yaml"
TRAINING = (
    "--hidden-size 96 --seq-length 256 --max-position-embeddings 256 --vocab-size 260 "
    "--untie-embeddings-and-output-weights --micro-batch-size 4 --global-batch-size 8 "
    "--train-iters 100 --lr 4e-3 --min-lr 1e-4 --lr-decay-style cosine --log-interval 10 "
    "--eval-interval 50 --eval-iters 4 "
    "--channels-metrics loss token_acc tokens samples share"
)


def main(folder: Path) -> int:
    config = load_config(CONFIG)
    names = [source.name for source in config.sources]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    blends = [
        f"--{split}-data-path {_blend(config.sources, folder, split)}".split()
        for split in ("train", "valid")
    ]
    print(f"training on {' '.join(names)}: 4 ranks, TP 2 x PP 2, one minute or two", flush=True)
    ranks_of = RanksOf(folder)
    launcher = Launcher(folder, ranks_of)
    try:
        args = (*TRAINING.split(), *blends[0], *blends[1], "--channels", *names)
        run = launcher.run("tp2_pp2", *args, patch=True, timeout=500, check=False)
    finally:
        ranks_of.close()
    if run.failure:
        print(run.failure, file=sys.stderr)
        return 1
    _show(run, config.sources)
    return 0


def _blend(sources: Iterable[Source], folder: Path, split: str) -> str:
    """`weight prefix weight prefix ...`, after writing the datasets."""
    parts = []
    for source in sources:
        prefix = folder / f"{source.name}_{split}"
        records = source_records(source, val=split == "valid")
        write_indexed(prefix, [_document(record) for record in records])
        parts.append(f"{source.ratio} {prefix}")
    return " ".join(parts)


def _document(record: dict[str, object]) -> np.ndarray:
    tokenizer = byte_tokenizer()
    ids = encode(record, tokenizer=tokenizer, max_length=10_000)["input_ids"]
    return np.array([*ids, tokenizer.convert_tokens_to_ids("<|endoftext|>")], dtype=np.int32)


def _show(run: Run, sources: Iterable[Source]) -> None:
    sources = list(sources)
    # Iteration 1 is logged without ending its interval, and so without its tokens.
    logs = [line.values for line in run.lines if not line.head.startswith("iteration        1")]
    rows = summarize(logs, [source.name for source in sources])
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(
        render(
            rows,
            console.width,
            ratios={source.name: source.ratio for source in sources},
            domains={source.name: source.domain for source in sources},
        )
    )
    print(f"log:         {run.folder / 'rank3.out'}")
    print(f"TensorBoard: tensorboard --logdir {run.folder / 'tensorboard'}")
    ratios = {source.name: source.ratio for source in sources}
    (run.folder / RUN_FILE).write_text(json.dumps({"ratios": ratios}))
    print(report_of_training(run.folder, "text", list(ratios)))


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]).resolve()))
