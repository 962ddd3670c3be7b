"""A training script for Megatron-Bridge. It knows nothing of channels.

torchrun --nproc-per-node N pretrain_tiny.py --settings settings.json
"""

if __name__ == "__main__":
    # Not above: to save a checkpoint, megatron-core starts a process that imports this script.
    from megatron_bridge.tiny import main

    main()
