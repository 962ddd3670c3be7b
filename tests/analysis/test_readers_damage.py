"""Damaged logs of every form: a message or values, never another error."""

from __future__ import annotations

import gzip
import random
from contextlib import suppress
from pathlib import Path

import pytest

from analysis import test_readers_text as texts
from channel_metrics import ChannelMetricsError
from channel_metrics.analysis.run import load_run

BAR = "\r 33%|███      | 10/30 [00:00<00:00, 22.8it/s]"
WHOLE = {
    "megatron.log": texts.MEGATRON,
    "nemo.log": texts.NEMO,
    "titan.log": texts.TORCHTITAN,
    "olmo.log": texts.OLMO,
    "automodel.log": texts.AUTOMODEL,
    "diffusion.log": texts.DIFFUSION,
    "dicts.log": f"{BAR}\r   \r{{'loss': '3.9', 'epoch': '0.1'}}\n{BAR}\n" * 9,
    "a.jsonl": '{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}\n' * 9,
    "a.csv": "step,a_loss,b\n1,2,3\n2,3,4\n",
    "trainer_state.json": '{"log_history": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]}',
}
SIGNS = b"0123456789|:=,[]{}'\"\n\r\x1b\xff\0 eE.-%/"
NUMBERS = (str(2**70), "9" * 400, "-1", "1e308", "nan", "inf")


def damaged(rng: random.Random, content: bytes) -> bytes:
    """The content after up to 12 random changes."""
    text = bytearray(content)
    for _ in range(rng.randint(1, 12)):
        place, kind = rng.randrange(len(text) or 1), rng.randrange(4)
        if kind == 0:
            text[place : place + 1] = bytes([rng.choice(SIGNS)])
        elif kind == 1:
            del text[place : place + rng.randint(1, 40)]
        elif kind == 2:
            text[place:place] = text[place : place + rng.randint(1, 60)]
        else:
            text[place:place] = rng.choice(NUMBERS).encode()
    packed = gzip.compress(text)[: rng.randint(5, 2000)]
    return packed if rng.random() < 0.1 else bytes(text)


@pytest.mark.parametrize("name", WHOLE)
def test_damaged(tmp_path: Path, name: str) -> None:
    rng = random.Random(name)
    path = tmp_path / name
    read = 0
    for number in range(60):
        path.write_bytes(damaged(rng, WHOLE[name].encode()))
        with suppress(ChannelMetricsError):
            load_run(path if number % 2 else tmp_path)
            read += 1
    assert read
