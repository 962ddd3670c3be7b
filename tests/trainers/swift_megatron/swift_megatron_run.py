"""One `megatron_sft_main`, or with an `rlhf_type` one `megatron_rlhf_main`, with the arguments in
argv[1] (JSON); started by the server, per rank."""

from __future__ import annotations

import json
import sys


def main() -> None:
    import datasets
    import swift_megatron_cpu
    import torch
    from swift.megatron import megatron_rlhf_main, megatron_sft_main
    from swift.megatron.arguments import MegatronRLHFArguments, MegatronSftArguments

    datasets.disable_progress_bars()
    given = json.loads(sys.argv[1])
    rlhf = "rlhf_type" in given
    args = (MegatronRLHFArguments if rlhf else MegatronSftArguments)(**given)
    # ms-swift trains in half precision only; in float32 layouts can be compared with each other.
    args.fp16 = args.bf16 = args.apply_query_key_layer_scaling = False
    args.torch_dtype = torch.float32
    if args.cp_partition_mode == "contiguous":
        swift_megatron_cpu.use_contiguous_parts()
    (megatron_rlhf_main if rlhf else megatron_sft_main)(args)


# Saving a checkpoint spawns a process, which reads this file too.
if __name__ == "__main__":
    main()
