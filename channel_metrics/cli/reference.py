"""`channel-metrics reference`: the losses of a reference model, for the metric `excess_loss`.

Records are read, measured and written in blocks. A run that was stopped goes on after the last
block that it wrote.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from channel_metrics.core.names import look_up
from channel_metrics.data.jsonl import check_record, read_jsonl
from channel_metrics.demo.encoding import IGNORED, check_tokenizer, encode
from channel_metrics.demo.tiny import load_tokenizer
from channel_metrics.errors import ChannelMetricsError, ConfigError
from channel_metrics.extras import need
from channel_metrics.observers.line_file import drop_half_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ReferenceOptions", "measure", "write_reference"]

# Batches per block: sorted by length, they have less padding.
_BATCHES = 16
# What two batches with other padding may differ by, also in bfloat16.
_SAME = 1e-2

Encoded = Mapping[str, Sequence[int]]
Numbers = tuple[float, int]


@dataclass(frozen=True, kw_only=True)
class ReferenceOptions:
    """How the losses are measured.

    model: a name or a folder. tokenizer: for records without `input_ids`; that of the model if
    empty. max_length: longer records are cut, as in training; 0 cuts nothing. device, dtype: empty
    means a GPU if there is one, and the dtype of the model.
    """

    model: str
    tokenizer: str = ""
    batch_size: int = 8
    max_length: int = 0
    device: str = ""
    dtype: str = ""


def write_reference(
    data: Path,
    out: Path,
    options: ReferenceOptions,
    *,
    id_field: str = "",
    done: Callable[[int], object] = lambda count: None,
) -> int:
    """Write the records of a JSONL file with `ref_nll` and `ref_tokens`.

    Args:
        data: the records: `input_ids` and `labels`, or `messages`, or `text`.
        out: the file to write, or to go on with.
        options: how the losses are measured.
        id_field: if given, a line holds only this field and the numbers.
        done: is called with a number of records when so many more are done.

    Returns:
        The number of records that were there already.

    Raises:
        ChannelMetricsError: the data cannot be read, or `out` was made from other data or with
            another model.
    """
    if out.resolve() == data.resolve():
        raise ConfigError(f"the result must be another file than the data, but both are {data}.")
    records = read_jsonl(data)
    if out.exists():
        drop_half_line(out)
    before = _written(out)
    model = _model(options)
    embeddings: Any = model.get_input_embeddings()
    encoder = _encoder(options, len(embeddings.weight))
    first = None
    for line in before:
        number, record = next(records, (0, None))
        if record is None or _line(record, data, number, id_field, (0.0, 0)) != {
            **line,
            "ref_nll": 0.0,
            "ref_tokens": 0,
        }:
            raise ConfigError(
                f"{out} was made from other records than {data} has; delete it, or choose another "
                "result with --output."
            )
        first = first or (encoder(record, f"{data}:{number}"), line)
    if first is not None:
        _check_same_model(measure(model, [first[0]])[0], first[1], out)
    done(len(before))
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as file:
        while block := list(islice(records, options.batch_size * _BATCHES)):
            encoded = [encoder(record, f"{data}:{number}") for number, record in block]
            found = _in_order(model, encoded, options.batch_size)
            lines = (
                _line(record, data, number, id_field, numbers)
                for (number, record), numbers in zip(block, found, strict=True)
            )
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            file.flush()
            done(len(block))
    return len(before)


def measure(model: PreTrainedModel, encoded: Sequence[Encoded]) -> list[Numbers]:
    """(nll in nats, tokens) of each record, in one batch.

    Args:
        model: predicts the next token.
        encoded: `input_ids` and `labels` of each record; -100 is not supervised.
    """
    import torch

    from channel_metrics.losses.cross_entropy import token_losses_of_logits

    width = max(2, *(len(one["input_ids"]) for one in encoded))

    def padded(key: str, fill: int) -> torch.Tensor:
        rows = [[*one[key], *[fill] * (width - len(one[key]))] for one in encoded]
        return torch.tensor(rows, device=model.device)

    ids, labels = padded("input_ids", 0), padded("labels", IGNORED)
    lengths = torch.tensor([len(one["input_ids"]) for one in encoded], device=model.device)
    mask = torch.arange(width, device=model.device) < lengths[:, None]
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
    targets = labels[:, 1:]
    losses = token_losses_of_logits(
        logits[:, :-1].flatten(0, 1), targets.flatten(), with_correct=False
    )
    nll = losses.nll.view(targets.shape).cpu().double().sum(1)
    return list(zip(nll.tolist(), (targets != IGNORED).sum(1).tolist(), strict=True))


def _in_order(
    model: PreTrainedModel, encoded: Sequence[Encoded], batch_size: int
) -> Iterator[Numbers]:
    """The numbers of a block, whose batches have records of similar length."""
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]["input_ids"]))
    found: dict[int, Numbers] = {}
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        found.update(zip(places, measure(model, [encoded[i] for i in places]), strict=True))
    return (found[i] for i in range(len(encoded)))


def _encoder(
    options: ReferenceOptions, num_tokens: int
) -> Callable[[Mapping[str, Any], str], Encoded]:
    """A function that takes a record and its place in the file, for messages."""
    loaded: list[Any] = []

    def encoded(record: Mapping[str, Any], where: str) -> Encoded:
        found = unchecked(record, where)
        highest = max(found["input_ids"], default=0)
        if highest >= num_tokens:
            raise ChannelMetricsError(
                f"{where}: token {highest} is none of the {num_tokens} tokens of the model; take "
                "the tokenizer of the model."
            )
        return found

    def unchecked(record: Mapping[str, Any], where: str) -> Encoded:
        limit = options.max_length or None
        if "input_ids" in record:
            ids = record["input_ids"]
            labels = record.get("labels", ids)
            if len(ids) != len(labels):
                raise ChannelMetricsError(
                    f"{where}: expected one label per token, but there are {len(labels)} labels "
                    f"and {len(ids)} tokens."
                )
            return {"input_ids": ids[:limit], "labels": labels[:limit]}
        check_record(record, where)
        if not loaded:
            loaded.append(load_tokenizer(options.tokenizer or options.model))
            loaded[0].pad_token = loaded[0].pad_token or loaded[0].eos_token
        if record.get("messages") is not None:
            check_tokenizer(loaded[0], chat=True)
        found: Encoded = encode(record, tokenizer=loaded[0], max_length=limit or 2**62)
        return found

    return encoded


def _model(options: ReferenceOptions) -> PreTrainedModel:
    torch, transformers = need("torch", extra="hf"), need("transformers", extra="hf")
    try:
        model: PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(options.model)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no model could be loaded from {options.model!r}: {error}") from error
    dtype = getattr(torch, options.dtype, None) if options.dtype else model.dtype
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"dtype must be one of torch, such as bfloat16, but is {options.dtype}.")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    whole: Any = model
    moved: PreTrainedModel = whole.to(device=device, dtype=dtype).eval()
    return moved


def _line(
    record: Mapping[str, Any], data: Path, number: int, id_field: str, numbers: Numbers
) -> dict[str, Any]:
    of_reference = {"ref_nll": numbers[0], "ref_tokens": numbers[1]}
    if not id_field:
        return {**record, **of_reference}
    name = look_up(record, id_field)
    if name is None:
        raise ConfigError(f"{data}:{number}: expected the id in {id_field!r}, but there is none.")
    return {id_field: name, **of_reference}


def _written(out: Path) -> list[dict[str, Any]]:
    """The lines of an earlier run."""
    if not out.exists() or not out.stat().st_size:
        return []
    return [line for _, line in read_jsonl(out)]


def _check_same_model(again: Numbers, line: Mapping[str, Any], out: Path) -> None:
    nll, tokens = line["ref_nll"], line["ref_tokens"]
    if tokens != again[1] or not math.isclose(nll, again[0], rel_tol=_SAME, abs_tol=_SAME):
        raise ConfigError(
            f"the first record of {out} has an nll of {nll:.6g} over {tokens} tokens, but this "
            f"model has {again[0]:.6g} over {again[1]}: it was made with another model, tokenizer "
            "or length. Delete it, or choose another result with --output."
        )
