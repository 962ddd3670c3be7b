"""Patches: importing a module of this package applies it to unmodified training scripts.

    import channel_metrics.patches.hf_trainer     # after: pip install channel_metrics
    import patches.hf_trainer                     # in the root of a checkout

Each module offers `apply`, `revert` and `is_applied` of `channel_metrics.trainers.*.patch`.
Applying twice patches once, under whichever name it is imported. A version that lacks what a
patch needs is refused with `UnsupportedVersionError`.
"""
