"""Stands in for torchaudio, whose releases need the CUDA build of an older torch.

LLaMA-Factory imports it, and uses it only for datasets with audio.
"""
