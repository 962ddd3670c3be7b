"""Channel metrics in LLaMA-Factory: the name of each dataset in `dataset: a,b` is a channel.

    channel-metrics run --patch llamafactory $(which llamafactory-cli) train config.yaml

See `channel_metrics.trainers.llamafactory.patch`.
"""
