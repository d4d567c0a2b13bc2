"""Pretrain an UltraMemV2 language model.

    torchrun --nproc-per-node 8 pretrain_umv2.py --model-preset umv2-227m-1.2b --bf16 \\
        --data-path corpus_text_document --tokenizer-type SentencePieceTokenizer --tokenizer-model sp.model \\
        --micro-batch-size 8 --global-batch-size 512 --train-iters 100000 --save runs/227m --save-interval 1000

torchrun, srun and mpirun may start it; alone it is a run of one rank. Typing the same command again continues the run.
"""

from __future__ import annotations

import sys
from typing import NoReturn

from umv2_megatron.config.help_cache import cached_help
from umv2_megatron.training.program import run_program
from umv2_megatron.training.tool_entry import program_name


def main(argv: list[str]) -> int:
    """Parse, check, train; returns the exit code."""
    description = __doc__ or ""
    if {"-h", "--help"} & set(argv):
        print(cached_help(program_name(), description, lambda: _help(description)), end="")
        return 0
    from umv2_megatron.parallel import cpu_platform

    # before megatron.core is imported; a dry run leaves a CUDA device alone
    cpu_platform.install(ignore_cuda="--dry-run" in argv)
    from umv2_megatron.config.resolve import resolve
    from umv2_megatron.parallel.launch import discover
    from umv2_megatron.training.dry_run import dry_run, virtual_world_size
    from umv2_megatron.training.pretrain import check_data, pretrain
    from umv2_megatron.training.resume import checkpoint_values

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


def _help(description: str) -> str:
    from umv2_megatron.parallel import cpu_platform

    cpu_platform.install(ignore_cuda=True)  # before megatron.core is imported
    from umv2_megatron.config.flags import build_parser

    return build_parser(program_name(), description).format_help()


def run() -> NoReturn:
    """The program."""
    run_program(main, sys.argv[1:], program_name())
