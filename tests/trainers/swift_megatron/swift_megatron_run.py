"""One `megatron_sft_main` with the arguments in argv[1] (JSON); started by the server, per rank."""

from __future__ import annotations

import json
import sys


def main() -> None:
    import datasets
    import swift_megatron_cpu
    import torch
    from swift.megatron import megatron_sft_main
    from swift.megatron.arguments import MegatronSftArguments

    datasets.disable_progress_bars()
    args = MegatronSftArguments(**json.loads(sys.argv[1]))
    # ms-swift trains in half precision only; in float32 layouts can be compared with each other.
    args.fp16 = args.bf16 = args.apply_query_key_layer_scaling = False
    args.torch_dtype = torch.float32
    if args.cp_partition_mode == "contiguous":
        swift_megatron_cpu.use_contiguous_parts()
    megatron_sft_main(args)


# Saving a checkpoint spawns a process, which reads this file too.
if __name__ == "__main__":
    main()
