"""How token ids reach n-gram layers: as contexts in the place of mcore's padding mask.

mcore gives ids to the embedding alone. Of what its model takes besides, one tensor [b, s] goes to the FFN slot of every
layer: the padding mask of experts, which a model with memory layers has no use for. It travels with its micro-batch
through pipeline schedules, and is an argument of recomputed blocks, so that a block that is computed again, while other
micro-batches are under way, sees its own tokens. Every stage has the ids, because every stage reads the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import nn

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.memory.engram import EngramLayer
from umv2_megatron.memory.ngrams import contexts


def bring_contexts(model: GPTModel, config: MemoryConfig, vocabulary: int) -> None:
    """Have every forward of ``model`` make contexts of its ``input_ids`` [b, s], whole sequences or documents joined in
    one row (``packed_seq_params``). Call it once, on a model that is just built.

    ``model.needs_whole_sequences`` then says that a token is to be given with all that come before it, whatever mcore
    keeps of them.
    """

    def bring(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        tokens = args[0] if args else kwargs["input_ids"]
        documents = kwargs.get("packed_seq_params")
        starts = None if documents is None else documents.cu_seqlens_q
        return args, {**kwargs, "padding_mask": contexts(tokens, config, vocabulary, starts)}

    model.register_forward_pre_hook(bring, with_kwargs=True)
    model.needs_whole_sequences = True


def set_canonical_ids(chunks: Sequence[nn.Module], ids: Sequence[int]) -> None:
    """Tell all n-gram layers below ``chunks`` the canonical ids [vocabulary] of the tokenizer."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, EngramLayer):
                module.set_canonical(torch.tensor(ids, dtype=torch.int32))
