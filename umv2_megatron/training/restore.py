"""A trained model back from its self-describing checkpoint, for evaluation and generation, on one rank or many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from umv2_megatron.checkpoint import save_load, saved_config
from umv2_megatron.checkpoint.contents import locate
from umv2_megatron.checkpoint.store import CheckpointStore
from umv2_megatron.checkpoint.torch_dist_io import METADATA_FILE
from umv2_megatron.config.resolve import from_layers, model_values
from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.data.tokenizers import tokenizer_of
from umv2_megatron.model.builder import build_model_chunks, unwrap
from umv2_megatron.parallel import cpu_platform
from umv2_megatron.parallel.launch import discover
from umv2_megatron.training.initialize import start_processes
from umv2_megatron.training.resume import ConfigStore
from umv2_megatron.training.step import refresh_singular_vectors

# What is taken beside the model itself; layout, schedule and the rest keep their defaults, those of one rank.
TAKEN = (
    "tokenizer_type", "tokenizer_model", "vocab_size", "tiktoken_pattern", "tiktoken_num_special_tokens",
    "tokenizer_special_tokens", "bf16",
)  # fmt: skip


@dataclass(frozen=True)
class RestoredModel:
    """This rank's part of a trained model, with its tokenizer, its configuration and the iteration it was saved at."""

    chunks: list[torch.nn.Module]
    tokenizer: Any
    run: RunConfig
    iteration: int


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode with its tokenizer, its configuration and the iteration it was saved at."""

    model: GPTModel
    tokenizer: Any
    run: RunConfig
    iteration: int


def restore_model(
    directory: str,
    ckpt_step: int | None = None,
    tokenizer_model: str | None = None,
    layout: dict[str, Any] | None = None,
) -> RestoredModel:
    """Load the newest valid checkpoint (or ``ckpt_step``) below ``directory`` onto the ranks of this program;
    ``directory`` may also be that of one checkpoint (iter_*).

    ``tokenizer_model`` replaces the path that the run was trained with, for checkpoints that have moved. ``layout``:
    settings by key that say how the model is split (``tensor_model_parallel_size``, ...), without which it is whole on
    every rank. Starts the process group. Raises ``CheckpointError`` or ``ValueError`` naming the file or flag at fault.
    """
    store = CheckpointStore(directory)
    if (store.root / METADATA_FILE).exists():  # one checkpoint's own directory
        store, ckpt_step = locate(directory, ckpt_step)
    saved = saved_config.read_config(store, ConfigStore(store.root).resolve(ckpt_step))
    values, layout = saved["values"], layout or {}
    known = {**model_values(values), **{key: values[key] for key in TAKEN if key in values}}
    if tokenizer_model is not None:
        known["tokenizer_model"] = tokenizer_model
    # the padded vocabulary is the checkpoint's, whatever tensor-parallel size made it
    padded, tensor_ranks = saved["padded_vocab_size"], layout.get("tensor_model_parallel_size", 1)
    if tensor_ranks < 1 or padded % tensor_ranks:
        raise ValueError(
            f"--tensor-model-parallel-size is {tensor_ranks}; expected a divisor of the checkpoint's padded vocabulary "
            f"of {padded}"
        )
    known["make_vocab_size_divisible_by"] = padded // tensor_ranks
    layers = [(f"checkpoint in {directory}", known), ("flag", layout)]
    run = from_layers(layers, discover().world_size, for_training=False)
    assert run.data.tokenizer_type is not None, "a checkpoint of a run without a tokenizer"
    tokenizer = tokenizer_of(vars(run.data))
    if saved.get("tokenizer_vocab_size", tokenizer.vocab_size) != tokenizer.vocab_size:
        raise ValueError(
            f"the checkpoint in {directory} has a vocabulary of {saved['tokenizer_vocab_size']} tokens, the tokenizer "
            f"{run.data.tokenizer_model} one of {tokenizer.vocab_size}; give the one that it was trained with"
        )
    start_processes(run)
    chunks = build_model_chunks(run, tokenizer.vocab_size, wrap_with_ddp=False)
    loaded = save_load.load_checkpoint(store, chunks, ckpt_step=ckpt_step, load_optim=False, load_rng=False)
    refresh_singular_vectors(chunks)
    return RestoredModel(chunks, tokenizer, run, loaded.iteration)


def load_trained_model(
    directory: str, ckpt_step: int | None = None, tokenizer_model: str | None = None
) -> TrainedModel:
    """``restore_model`` for one rank, as the model itself in evaluation mode."""
    restored = restore_model(directory, ckpt_step, tokenizer_model)
    chunk = restored.chunks[0]
    chunk.eval()
    model = unwrap(chunk)
    assert isinstance(model, GPTModel)
    return TrainedModel(model, restored.tokenizer, restored.run, restored.iteration)


@torch.no_grad()
def next_token_logits(model: GPTModel, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [b, padded vocabulary] of the token after ``tokens`` [b, s] int64."""
    tokens = tokens.to(cpu_platform.device())
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return model(tokens, positions, None)[:, -1]
