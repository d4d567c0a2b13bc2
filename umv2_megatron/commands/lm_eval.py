"""lm-eval's own program with our models: a Megatron checkpoint (no export is needed), or a Hugging Face export.

    python tools/run_lm_eval.py --model umv2_megatron --model_args load=runs/demo/checkpoints --tasks NAME
    torchrun --nproc-per-node 4 tools/run_lm_eval.py --model umv2_megatron \\
        --model_args load=runs/big,tensor_model_parallel_size=2,memory_parallel_size=4 --tasks NAME
    python tools/run_lm_eval.py --model hf --model_args pretrained=exports/demo,dtype=float32 --tasks NAME

All flags are lm-eval's. docs/inference.md has the arguments of umv2_megatron.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import NoReturn

from umv2_megatron.config.usage import UsageError
from umv2_megatron.training.program import run_program
from umv2_megatron.training.tool_entry import program_name


def main(argv: list[str]) -> int:
    """lm-eval's program; returns the exit code. It reads ``sys.argv``, which is ``argv``."""
    if not argv or argv[0] in ("-h", "--help"):  # lm-eval's own help loads torch: lm_eval --help
        print(f"usage: {program_name()} [flags of lm_eval]\n\n{__doc__}")
        return 0
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("the package lm_eval is not installed; install requirements-lm-eval.txt")
    from lm_eval.__main__ import cli_evaluate

    import umv2_megatron.hf  # noqa: F401 (registers the classes of exports)
    from umv2_megatron.evaluation.lm_eval_model import Followed, end_following

    try:
        cli_evaluate()
    except Followed:
        return 0
    finally:
        end_following()
    return 0


def run() -> NoReturn:
    """The program."""
    run_program(main, sys.argv[1:], program_name())
