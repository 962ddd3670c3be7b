"""What a run may be asked for beside its log. An observer is a function without arguments, called
on each rank before the script starts; what it returns is called after the script ended, and gives
plain values for `Rank.seen`. Tests may bring their own.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from collectives import watched

Result = Callable[[], Any]


def steps() -> Result:
    """The bits of what Megatron hands to its log, per iteration: `{"1": {"lm loss": "0x1.6p+2"}}`.

    A printed number has seven digits; these tell whether two runs are the same.
    """
    from megatron.training import training

    log, found = training.training_log, {}
    signature = inspect.signature(log)

    @functools.wraps(log)
    def training_log(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        values = {**given["loss_dict"], "grad norm": given["grad_norm"]}
        found[str(given["iteration"])] = {
            name: float(value).hex() for name, value in values.items() if value is not None
        }
        return log(*args, **kwargs)

    training.training_log = training_log
    return lambda: found


def weights() -> Result:
    """A checksum of the bytes of each parameter of this rank at the end, by chunk and name."""
    from megatron.training import training

    setup, models = training.setup_model_and_optimizer, []

    @functools.wraps(setup)
    def setup_model_and_optimizer(*args: Any, **kwargs: Any) -> Any:
        result = setup(*args, **kwargs)
        models.extend(result[0])
        return result

    training.setup_model_and_optimizer = setup_model_and_optimizer
    return lambda: {
        f"{chunk}.{name}": checksum(parameter)
        for chunk, model in enumerate(models)
        for name, parameter in model.named_parameters()
    }


def checksum(tensor: torch.Tensor) -> str:
    raw = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(raw).hexdigest()


def random_state() -> Result:
    """A checksum of the random numbers to come."""
    return lambda: checksum(torch.get_rng_state())


def collectives() -> Result:
    """How often this rank called each collective, by name and size of the group: `all_reduce/2`."""
    counts: dict[str, int] = {}

    def count(name: str, *args: Any, **kwargs: Any) -> None:
        group = kwargs.get("group", next((a for a in args if is_group(a)), None))
        key = f"{name}/{dist.get_world_size(group)}"
        counts[key] = counts.get(key, 0) + 1

    for name, call in watched(count).items():
        setattr(dist, name, call)
    return lambda: counts


def is_group(value: Any) -> bool:
    return isinstance(value, dist.ProcessGroup)
