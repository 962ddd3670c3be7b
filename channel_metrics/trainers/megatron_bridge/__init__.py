"""Channel metrics in Megatron-Bridge, see `channel_metrics.patches.megatron_bridge`."""
