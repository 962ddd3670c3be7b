"""A plugin of a user: lets ms-swift pack with transformers' sdpa, for there is no flash attention
for a CPU. transformers' own sdpa keeps packed sequences apart too."""

from __future__ import annotations

from typing import Any

from swift.arguments.sft_args import SftArguments


def _allow(args: Any) -> None:
    args.padding_free = args.padding_free or args.packing


SftArguments._check_padding_free = _allow
