"""Megatron's own training loop on the CPU, over gloo: the harness of the Megatron tests.

Not named `megatron`: this folder's parent is on `sys.path` in tests, and would hide the real one.

| module | what |
|---|---|
| `launch` | starts runs and reads what they left; `layouts` has the parallel layouts by name |
| `data` | tiny datasets: blends, blends per split, SFT packs |
| `pretrain_tiny` | a training script as a user writes it; it knows nothing of channels |
| `observe` | what a test may ask of each rank: exact losses, weights, collectives |
| `script` | what each rank does, and what the `fork_server` imports once for all runs |
| `cpu`, `cpu_layers` | what makes Megatron's CUDA code run on the CPU, and what that cannot show |
"""
