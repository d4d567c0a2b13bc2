"""Attention over a sequence that context-parallel ranks share, for ``--transformer-impl local``.

mcore's ``get_batch_on_this_cp_rank`` cuts a sequence of s tokens into 2*CP chunks and gives rank r chunks r and
2*CP-1-r, so that every rank has an early chunk, with little to look back at, and a late one. Norms, linear layers,
rotary embedding and memory layers treat each token alone; only attention has to know of the other ranks:

1. keys and values of all ranks are gathered, in one all-gather, and put in the order of the sequence;
2. each of this rank's two chunks of queries attends to the keys from the start of the sequence to the chunk's own end,
   through ``FusedAttention`` with the mask of a chunk that lies at the end of its keys.

Chunk a needs a+1 chunks of keys, so each rank computes (r+1) + (2*CP-r) = 2*CP+1 blocks of (s/(2*CP))^2 scores.

Communication per layer and micro-batch: each rank receives (CP-1)/CP * s * b * 2 * ng/TP * hn elements in the
all-gather of the forward and as many in the reduce-scatter of the backward (ng key-value heads of width hn, b samples).
Recomputation (full, or selective of ``core_attn``) gathers once more.

Memory for the backward: keys and values of the whole sequence, 2 * s * b * ng/TP * hn elements, not split over CP.
Where megatron-core's module computes (``FusedAttention`` says when) also b * np/TP * (2*CP+1) * (s/(2*CP))^2 scores
(np query heads), a bit over half of an equal share of the s^2 that one rank alone would hold. Selective recomputation
keeps neither.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from umv2_megatron.model.fused_attention import FusedAttention


class ContextParallelAttention(FusedAttention):
    """``FusedAttention`` of this rank's two chunks of queries with the whole sequence's keys and values.

    Takes the arguments of mcore's ``DotProductAttention``; goes into the ``core_attention`` slot of the local layer
    spec when ``config.context_parallel_size`` is above 1. Scale, grouped queries, softmax, dropout and windows are as
    there. Only causal self-attention: ``attn_mask_type`` must be causal.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        *args: Any,
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs: Any,
    ):
        assert attn_mask_type == AttnMaskType.causal, (
            f"context parallelism is for causal attention, not {attn_mask_type}"
        )
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        per_chunk = copy.copy(config)
        per_chunk.context_parallel_size = 1  # what mcore's module insists on; it is true of each call below
        # "arbitrary": the mask comes with every call. mcore's fused causal softmax wants as many keys as queries.
        super().__init__(per_chunk, layer_number, AttnMaskType.arbitrary, *args, pg_collection=pg_collection, **kwargs)
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attention of this rank's tokens.

        Args:
            query: [s/CP, b, np/TP, hn], the tokens of chunks r and 2*CP-1-r one after the other.
            key, value: [s/CP, b, ng/TP, hn], of the same tokens.
            attention_mask: None for causal, or bool [b, 1, s/CP, s], True where not to look; the keys after a chunk's
                end are left out whatever it says.

        Returns:
            [s/CP, b, np/TP * hn], in the order of ``query``.
        """
        size, rank = self.cp_group.size(), self.cp_group.rank()
        chunk = query.shape[0] // 2
        assert query.shape[0] == 2 * chunk, "--seq-length is a multiple of 2 x --context-parallel-size"
        key, value = self._whole_sequence(key, value)
        outputs = []
        for part, index in enumerate((rank, 2 * size - 1 - rank)):
            keys = (index + 1) * chunk
            rows = slice(part * chunk, (part + 1) * chunk)
            if attention_mask is None:
                mask = torch.ones(1, 1, chunk, keys, dtype=torch.bool, device=query.device).triu(keys - chunk + 1)
            else:
                mask = attention_mask[:, :, rows, :keys]
            outputs.append(
                super().forward(query[rows], key[:keys], value[:keys], mask, None, attention_bias, packed_seq_params)
            )
        return torch.cat(outputs)

    def _whole_sequence(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [s/CP, b, ng/TP, hn] of this rank -> [s, b, ng/TP, hn] of all, in the order of the sequence.

        One all-gather for both; in the backward one reduce-scatter, which sums what the ranks found for each token.
        """
        size = self.cp_group.size()
        local = torch.stack((key, value), dim=1)
        gathered: Tensor = gather_from_sequence_parallel_region(local, group=self.cp_group)
        chunks = gathered.view(2 * size, -1, *gathered.shape[1:])
        # rank r's chunks, r and 2*size-1-r, are at places 2r and 2r+1
        places = [2 * index if index < size else 2 * (2 * size - 1 - index) + 1 for index in range(2 * size)]
        ordered = torch.cat([chunks[place] for place in places])
        return ordered[:, 0].contiguous(), ordered[:, 1].contiguous()
