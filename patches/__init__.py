"""Patches: importing a module of this package applies it to unmodified training scripts.

    import channel_metrics.patches.hf_trainer     # after: pip install channel_metrics
    import patches.hf_trainer                     # in the root of a checkout

Each module has `apply`, `revert` and `is_applied` of `channel_metrics.trainers.*.patch`. A second
import does nothing, even under the other name. A version that a patch does not know raises
`UnsupportedVersionError`.
"""
