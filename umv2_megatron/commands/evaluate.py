"""Evaluate a model: loss and bits per byte on texts, and synthetic tasks of memory with exact scoring.

    python tools/evaluate.py --load runs/demo/checkpoints --data data/valid_text_document --output demo.json
    python tools/evaluate.py --load runs/demo/checkpoints --tasks key-value,needle --context-lengths 256,512
    python tools/evaluate.py --hf-model exported --memory-tables mmap --tasks all --output exported.json
    torchrun --nproc-per-node 4 tools/evaluate.py --load runs/big --tensor-model-parallel-size 2 --tasks all

Prints tables, writes the JSON of --output, and draws plots beside it. The numbers do not depend on the number of ranks
or on how the model is split over them. docs/evaluation.md describes the tasks and defines every number.
"""

import sys
from typing import NoReturn

from umv2_megatron.config.usage import UsageError
from umv2_megatron.evaluation.evaluate_flags import check_files, check_flags, parser
from umv2_megatron.training.program import run_program
from umv2_megatron.training.tool_entry import program_name


def main(argv: list[str]) -> int:
    """Parse, check, evaluate; returns the exit code."""
    arguments = parser(__doc__ or "").parse_args(argv)
    try:
        check_flags(arguments)
        check_files(arguments)
    except ValueError as error:
        raise UsageError(str(error)) from error
    from umv2_megatron.parallel import cpu_platform

    cpu_platform.install()  # before megatron.core is imported
    from umv2_megatron.evaluation.evaluate_model import evaluate

    evaluate(arguments)
    return 0


def run() -> NoReturn:
    """The program."""
    run_program(main, sys.argv[1:], program_name())
