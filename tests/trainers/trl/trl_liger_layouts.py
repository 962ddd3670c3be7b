"""The layouts in which SFTTrainer is run with use_liger_kernel=True."""

from __future__ import annotations

from typing import Any

from trl_sft_tools import SPLIT

__all__ = ["LAYOUTS"]

LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {},
    "padding_free": {"padding_free": True, "max_length": None},
    "bfd": {"packing": True, "packing_strategy": "bfd"},
    "split": {"packing": True, "packing_strategy": SPLIT, "max_length": 7},
    "wrapped": {"packing": True, "packing_strategy": "wrapped"},
    "labels": {},
    "dft": {"loss_type": "dft"},
}
