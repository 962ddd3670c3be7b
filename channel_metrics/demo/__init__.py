"""The trainer application behind `channel-metrics train`."""
