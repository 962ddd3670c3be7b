"""Processes of torchrun that end by themselves; forked ranks never do (`fork_server`)."""

# Gloo's workers drop the tensors of a collective a moment after it. An interpreter (3.11) that ends
# in that moment ends the worker inside a destructor, which aborts the process: 23 of 84 torchruns
# of init_process_group and all_gather_object did, on two busy cores, and none of 62 that waited.
SECONDS_FOR_WORKERS = 0.1
