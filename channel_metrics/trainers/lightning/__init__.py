"""Channel metrics in Lightning.

    metrics = ChannelMetricsCallback()
    loader = DataLoader(mixture, batch_size=8, collate_fn=metrics.collator(collate))
    Trainer(callbacks=[metrics]).fit(module, loader)     # bbu_loss, bbu_token_acc, bbu_tokens, ...

Loss, gradients, random numbers and weights of the training are the same with and without the
metrics, to the last bit.
"""

from __future__ import annotations

from channel_metrics.trainers.lightning.callback import ChannelMetricsCallback

__all__ = ["ChannelMetricsCallback"]
