"""Pretrain an UltraMemV2 language model.

    torchrun --nproc-per-node 8 pretrain_umv2.py --model-preset umv2-227m-1.2b --bf16 \\
        --data-path corpus_text_document --tokenizer-type SentencePieceTokenizer --tokenizer-model sp.model \\
        --micro-batch-size 8 --global-batch-size 512 --train-iters 100000 --save runs/227m --save-interval 1000

torchrun, srun and mpirun may start it; alone it is a run of one rank. Typing the same command again continues the run.
"""

from __future__ import annotations

import sys
from typing import NoReturn

from umv2_megatron.parallel import cpu_platform

# before megatron.core is imported; does nothing where there is a CUDA device, which a dry run leaves alone
cpu_platform.install(ignore_cuda="--dry-run" in sys.argv)

from umv2_megatron.config.resolve import resolve  # noqa: E402
from umv2_megatron.parallel.launch import discover  # noqa: E402
from umv2_megatron.training.dry_run import dry_run, virtual_world_size  # noqa: E402
from umv2_megatron.training.pretrain import check_data, pretrain  # noqa: E402
from umv2_megatron.training.program import run_program  # noqa: E402
from umv2_megatron.training.resume import checkpoint_values  # noqa: E402
from umv2_megatron.training.tool_entry import program_name  # noqa: E402


def main(argv: list[str]) -> int:
    """Parse, check, train; returns the exit code."""
    description = __doc__ or ""
    virtual = virtual_world_size(argv, program_name(), description)
    run = resolve(argv, virtual or discover().world_size, description=description, program=program_name(),
                  checkpoint_values=checkpoint_values)
    if virtual is not None or run.training.dry_run_world_size is not None:
        return dry_run(run)
    check_data(run)
    if run.training.dry_run:
        print(run.describe())
        return 0
    return pretrain(run)


def run() -> NoReturn:
    """The program."""
    run_program(main, sys.argv[1:], program_name())
