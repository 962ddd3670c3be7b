"""Cross entropies that also return the loss of each token."""

from channel_metrics.losses.linear import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
