"""What `channel-metrics run` puts on PYTHONPATH for the processes below it."""
