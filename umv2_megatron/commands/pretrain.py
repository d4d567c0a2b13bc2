"""Pretrain an UltraMemV2 language model.

    torchrun --nproc-per-node 8 pretrain_umv2.py --model-preset umv2-227m-1.2b --bf16 \\
        --data-path corpus_text_document --tokenizer-type SentencePieceTokenizer --tokenizer-model sp.model \\
        --micro-batch-size 8 --global-batch-size 512 --train-iters 100000 --save runs/227m --save-interval 1000

torchrun, srun and mpirun may start it; alone it is a run of one rank. Typing the same command again continues the run.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NoReturn

from umv2_megatron.config.checks import check_data
from umv2_megatron.config.flags import build_parser
from umv2_megatron.config.resolve import resolve, virtual_world_size
from umv2_megatron.parallel.launch import discover
from umv2_megatron.training.program import run_program
from umv2_megatron.training.tool_entry import program_name

if TYPE_CHECKING:
    from umv2_megatron.config.run_config import RunConfig
    from umv2_megatron.config.training_config import TrainingConfig
    from umv2_megatron.training.task_evaluation import TaskEvaluation


def main(argv: list[str]) -> int:
    """Parse, check, train; returns the exit code. What takes seconds to load is loaded once the flags are right."""
    description = __doc__ or ""
    if {"-h", "--help"} & set(argv):
        build_parser(program_name(), description).print_help()
        return 0
    virtual = virtual_world_size(argv, program_name(), description)

    def before_mcore(run: RunConfig) -> None:
        if run.training.dry_run_world_size is None:
            check_data(run)
        _install(argv)
        if run.observation.record_memory_history and run.training.dry_run_world_size is None:
            from umv2_megatron.observation.memory_history import check_can_record

            check_can_record()

    run = resolve(argv, virtual or discover().world_size, description=description, program=program_name(),
                  checkpoint_values=lambda training: _checkpoint_values(training, argv), before_mcore=before_mcore)
    from umv2_megatron.training.dry_run import dry_run
    from umv2_megatron.training.pretrain import pretrain

    if virtual is not None or run.training.dry_run_world_size is not None:
        return dry_run(run)
    if run.training.dry_run:
        print(run.describe())
        return 0
    return pretrain(run, _load_tasks)


def _install(argv: list[str]) -> None:
    from umv2_megatron.parallel import cpu_platform

    # before megatron.core is imported; a dry run leaves a CUDA device alone
    cpu_platform.install(ignore_cuda="--dry-run" in argv)


def _load_tasks(run: RunConfig) -> TaskEvaluation:
    from umv2_megatron.evaluation.lm_eval_tasks import LmEvalTasks

    return LmEvalTasks(run)


def _checkpoint_values(training: TrainingConfig, argv: list[str]) -> tuple[str, dict[str, Any]] | None:
    _install(argv)
    from umv2_megatron.training.resume import checkpoint_values

    return checkpoint_values(training)


def run() -> NoReturn:
    """The program."""
    run_program(main, sys.argv[1:], program_name())
