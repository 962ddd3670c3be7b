"""Packs of one group each, in the form that GroupedPackingDataset gives to its collator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from swift.dataset import PackingDataset
from swift.trainers import Seq2SeqTrainer


@contextmanager
def with_grouped_packs() -> Iterator[list[list[tuple[str, int]]]]:
    """ms-swift packs within groups, and a batch names groups; yields (group, targets) by batch."""
    seen: list[list[tuple[str, int]]] = []
    get_item, get_collator = PackingDataset.__getitem__, Seq2SeqTrainer._get_data_collator
    create = PackingDataset.__init__

    def init(self: Any, template: Any, dataset: Any, **kwargs: Any) -> None:
        create(self, template, dataset, **kwargs)
        by_group: dict[str, list[int]] = {}
        for index, group in enumerate(dataset["channel"]):
            by_group.setdefault(group, []).append(index)
        self.packed_idx = [
            ids[i : i + 3] for ids in by_group.values() for i in range(0, len(ids), 3)
        ]

    def packed(self: Any, index: int) -> dict[str, Any]:
        items = get_item(self, index)
        return {
            "packed_items": items,
            "packed_group": items[0].pop("channel"),
            "packed_segments": [len(item["input_ids"]) for item in items],
        }

    def collator(self: Any, args: Any, template: Any) -> Any:
        collate = get_collator(self, args, template)

        def grouped(packs: list[dict[str, Any]]) -> dict[str, Any]:
            items = [{**item} for pack in packs for item in pack["packed_items"]]
            for item in items:
                item.pop("channel", None)
            seen.append(
                [
                    (pack["packed_group"], sum(t != -100 for t in item["labels"][1:]))
                    for pack in packs
                    for item in pack["packed_items"]
                ]
            )
            batch: dict[str, Any] = collate(items)
            batch["packed_group"] = [pack["packed_group"] for pack in packs]
            batch["packed_segments"] = [sum(pack["packed_segments"]) for pack in packs]
            return batch

        return grouped

    PackingDataset.__init__, PackingDataset.__getitem__ = init, packed
    Seq2SeqTrainer._get_data_collator = collator
    try:
        yield seen
    finally:
        PackingDataset.__init__, PackingDataset.__getitem__ = create, get_item
        Seq2SeqTrainer._get_data_collator = get_collator
