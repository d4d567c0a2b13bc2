"""How a run is spread over ranks and what it keeps in which precision.

A ``Layout`` is read from the same flag values as the run itself (``Layout.from_values``) and is legal under the same
rules (``Layout.complaint``, which restates ``config/checks.py`` and ``parallel/groups.check_sizes`` in arithmetic
alone, because the search asks thousands of times).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.config.run_config import holds_scores
from umv2_megatron.config.table_shard import TableShard
from umv2_megatron.config.variants import has_memory
from umv2_megatron.planning.model_shape import FFN_VARIANTS, ModelShape

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
# Kinds of parameters that learn with --trainable, where not all do.
LEARNING = {"memory": ("memory", "tables"), "rows": ("tables",)}
# Flags of megatron-core that move layers between stages in ways that are not counted here.
UNKNOWN_SPLITS = ("pipeline_model_parallel_layout",)


@dataclass(frozen=True)
class Layout:
    """Parallel sizes, batch, precision and recomputation of one run.

    ``tp``, ``pp``, ``cp``: tensor-, pipeline- and context-parallel sizes; ``chunks``: virtual stages per rank;
    ``memory_size``: M; ``memory_mode``: "dim" or "row"; ``memory_stream``: --memory-stream; ``exchange_parts``: spans
    of --memory-exchange-parts; ``micro_batch`` in samples, ``micro_batches`` per rank and step; ``engine``: Transformer
    Engine's attention and norms instead of the local ones; ``holds_scores``: local attention that writes the scores of
    all pairs of tokens (model/fused_attention.py says when); ``masked``: it gets masks from the data loader;
    ``fused_activation``: bias-SwiGLU, on by default on a GPU; ``fused_accumulation``: --gradient-accumulation-fusion;
    ``fused_loss``: --cross-entropy-fusion-impl, None without --cross-entropy-loss-fusion; ``graphs``: blocks are
    captured (--cuda-graph-impl); ``backend``: --memory-backend; ``bucket_elements``: --ddp-bucket-size;
    ``average_in_collective``, ``gradients_all_to_all``: --ddp-average-in-collective and
    --ddp-reduce-scatter-with-fp32-accumulation; ``first_stage``, ``last_stage``: blocks there, None for an even split;
    ``row_moments``: second moments of value tables by row; ``tables_on_host``: --memory-value-optimizer-offload;
    ``learning``: kinds of parameters that learn (--trainable), None for all; ``muon``, ``dealt``: --optimizer muon or
    dist_muon, and dist_muon; ``muon_steps``, ``muon_tp_mode``: --muon-num-ns-steps, --muon-tp-mode;
    ``main_param_bytes``, ``exp_avg_bytes``, ``exp_avg_sq_bytes``: of an element of the optimizer's state.
    """

    world: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    chunks: int = 1
    memory_size: int = 1
    memory_mode: str = "dim"
    memory_stream: bool = False
    exchange_parts: int = 1
    sequence_parallel: bool = False
    micro_batch: int = 1
    micro_batches: int = 1
    bf16: bool = False
    grads_in_fp32: bool = True
    distributed_optimizer: bool = False
    optimizer_instances: int = 1
    average_in_collective: bool = False
    gradients_all_to_all: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    bucket_elements: int | None = None
    recompute: str = "none"
    recompute_method: str = "uniform"
    recompute_layers: int = 1
    recompute_modules: tuple[str, ...] = ()
    engine: bool = True
    holds_scores: bool = False
    masked: bool = False
    fused_activation: bool = False
    fused_accumulation: bool = False
    fused_loss: str | None = None
    graphs: bool = False
    backend: str = "auto"
    first_stage: int | None = None
    last_stage: int | None = None
    row_moments: bool = False
    tables_on_host: bool = False
    learning: tuple[str, ...] | None = None
    muon: bool = False
    dealt: bool = False
    muon_steps: int = 5
    muon_tp_mode: str = "blockwise"
    main_param_bytes: int = 4
    exp_avg_bytes: int = 4
    exp_avg_sq_bytes: int = 4

    @classmethod
    def from_values(cls, values: Mapping[str, Any], world_size: int) -> Layout:
        """The layout that flag values (by key, all of them) describe on ``world_size`` ranks.

        Raises ``ValueError`` naming a flag that planning cannot follow or a batch that does not divide.
        """
        variant = values.get("ffn_variant", "umv2")
        if variant not in FFN_VARIANTS:
            *others, last = FFN_VARIANTS
            raise ValueError(f"--ffn-variant is {variant!r}; planning knows {', '.join(others)} and {last} only")
        for key in UNKNOWN_SPLITS:
            if values.get(key):
                raise ValueError(f"--{key.replace('_', '-')} is given; planning knows even stages and "
                                 "--num-layers-in-first-pipeline-stage and -last-pipeline-stage only")
        tp, pp, cp = (values[f"{kind}_parallel_size"] for kind in ("tensor_model", "pipeline_model", "context"))
        per_chunk = values.get("num_layers_per_virtual_pipeline_stage")
        memory = has_memory(variant)
        micro = values["micro_batch_size"]
        replicas = max(1, world_size // (tp * pp * cp))
        batch = values.get("global_batch_size") or micro * replicas
        recompute = values.get("recompute_granularity") or "none"
        modules = values.get("recompute_modules") or ("core_attn",)
        engine = values.get("transformer_impl") != "local"
        if batch % (micro * replicas):
            raise ValueError(f"--global-batch-size is {batch}; expected a multiple of --micro-batch-size x "
                             f"data-parallel size = {micro} x {replicas} = {micro * replicas}")
        return cls(
            world=world_size, tp=tp, pp=pp, cp=cp,
            chunks=values["num_layers"] // pp // per_chunk if per_chunk else 1,
            memory_size=values["memory_parallel_size"] if memory else 1,
            memory_mode=values["memory_parallel_mode"],
            exchange_parts=values.get("memory_exchange_parts") or 1,
            memory_stream=memory and bool(values.get("memory_stream")),
            sequence_parallel=bool(values["sequence_parallel"]) and tp > 1,
            micro_batch=micro,
            micro_batches=batch // (micro * replicas),
            bf16=bool(values["bf16"]),
            grads_in_fp32=bool(values["grad_reduce_in_fp32"]),
            distributed_optimizer=bool(values["use_distributed_optimizer"]),
            optimizer_instances=values.get("num_distributed_optimizer_instances") or 1,
            average_in_collective=bool(values.get("average_in_collective")),
            gradients_all_to_all=bool(values.get("reduce_scatter_with_fp32_accumulation")),
            overlap_grad_reduce=bool(values["overlap_grad_reduce"]),
            overlap_param_gather=bool(values["overlap_param_gather"]),
            bucket_elements=values.get("bucket_size"),
            recompute=recompute,
            recompute_method=values.get("recompute_method") or "uniform",
            recompute_layers=values.get("recompute_num_layers") or 1,
            recompute_modules=tuple(modules) if recompute == "selective" else (),
            engine=engine,
            holds_scores=not engine and holds_scores(values),
            masked=bool(values.get("create_attention_mask_in_dataloader")),
            fused_activation=engine or bool(values.get("bias_activation_fusion")),
            fused_accumulation=bool(values.get("gradient_accumulation_fusion")),
            fused_loss=values["cross_entropy_fusion_impl"] if values.get("cross_entropy_loss_fusion") else None,
            graphs=(values.get("cuda_graph_impl") or "none") != "none",
            backend=values.get("memory_backend") or "auto",
            first_stage=values.get("num_layers_in_first_pipeline_stage"),
            last_stage=values.get("num_layers_in_last_pipeline_stage"),
            row_moments=memory and values.get("memory_value_second_moment") == "row",
            tables_on_host=memory and bool(values.get("memory_value_optimizer_offload")),
            learning=LEARNING.get(values.get("trainable") or "all") if memory else None,
            muon=(values.get("optimizer") or "adam") != "adam",
            dealt=values.get("optimizer") == "dist_muon",
            muon_steps=values.get("muon_num_ns_steps") or 5,
            muon_tp_mode=values.get("muon_tp_mode") or "blockwise",
            main_param_bytes=DTYPE_BYTES[values.get("main_params_dtype") or "fp32"],
            exp_avg_bytes=DTYPE_BYTES[values.get("exp_avg_dtype") or "fp32"],
            exp_avg_sq_bytes=DTYPE_BYTES[values.get("exp_avg_sq_dtype") or "fp32"],
        )

    # -- derived sizes -------------------------------------------------------------------------------------------

    @property
    def dp(self) -> int:
        """Data-parallel size: replicas of the dense model that see different samples."""
        return self.world // (self.tp * self.pp * self.cp)

    @property
    def dense_replicas(self) -> int:
        """Ranks over which a dense gradient is reduced: DP x CP."""
        return self.dp * self.cp

    @property
    def table_replicas(self) -> int:
        """Ranks that hold the same part of a value table: those of a pipeline stage over M."""
        return self.world // self.pp // self.memory_size

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight and of an activation in the run's precision."""
        return 2 if self.bf16 else 4

    @property
    def grad_bytes(self) -> int:
        """Bytes of an element of DDP's gradient buffer."""
        return 4 if self.grads_in_fp32 or not self.bf16 else 2

    @property
    def one_pass(self) -> bool:
        """Whether the compiled steps of CPUs (model/one_pass.py) stand between the products of a block."""
        return not self.engine

    @property
    def retrieves_in_one_piece(self) -> bool:
        """Whether the compiled retrieval of CPUs takes Tucker scores without a balance loss."""
        return self.lookup == "cpu" and self.weight_bytes == 4

    @property
    def lookup(self) -> str:
        """The lookup that ``auto`` takes: with Transformer Engine a GPU's, else the compiled one of CPUs."""
        return self.backend if self.backend != "auto" else "scatter" if self.engine else "cpu"

    def tokens(self, seq_length: int) -> int:
        """Tokens of a micro-batch that a tensor-parallel group works on: micro batch x sequence / CP."""
        return self.micro_batch * seq_length // self.cp

    def own_tokens(self, seq_length: int) -> int:
        """T: tokens that one rank looks up; tensor-parallel ranks have different ones, with padding when not even."""
        return -(-self.tokens(seq_length) // self.tp)

    def resident_tokens(self, seq_length: int) -> int:
        """Tokens whose hidden state a rank holds between layers: all of the group's without sequence parallelism."""
        tokens = self.tokens(seq_length)
        return tokens // self.tp if self.sequence_parallel else tokens

    def shard(self, rank: int = 0) -> TableShard:
        """The part of every value table that rank ``rank`` of a memory-parallel group holds."""
        return TableShard(self.memory_mode, self.memory_size, rank)

    def flags(self, num_layers: int) -> str:
        """The flags of pretrain_umv2.py that give this layout to a model of so many blocks."""
        sizes = {
            "tensor-model-parallel-size": self.tp, "pipeline-model-parallel-size": self.pp,
            "context-parallel-size": self.cp, "memory-parallel-size": self.memory_size,
            "micro-batch-size": self.micro_batch, "global-batch-size": self.micro_batch * self.micro_batches * self.dp,
        }
        found = [f"--{name} {size}" for name, size in sizes.items() if size > 1 or "batch" in name]
        if self.chunks > 1:
            found.append(f"--num-layers-per-virtual-pipeline-stage {num_layers // (self.pp * self.chunks)}")
        if self.memory_size > 1:
            found.append(f"--memory-parallel-mode {self.memory_mode}")
        if self.exchange_parts > 1:
            found.append(f"--memory-exchange-parts {self.exchange_parts}")
        switches = {
            "sequence-parallel": self.sequence_parallel, "bf16": self.bf16,
            "use-distributed-optimizer": self.distributed_optimizer, "overlap-grad-reduce": self.overlap_grad_reduce,
            "overlap-param-gather": self.overlap_param_gather, "memory-stream": self.memory_stream,
        }
        found += [f"--{name}" for name, on in switches.items() if on]
        if self.bf16 and not self.grads_in_fp32:
            found.append("--no-accumulate-allreduce-grads-in-fp32")
        if self.recompute == "full":
            found.append(f"--recompute-granularity full --recompute-method {self.recompute_method} "
                         f"--recompute-num-layers {self.recompute_layers}")
        elif self.recompute == "selective":
            found.append("--recompute-granularity selective --recompute-modules " + " ".join(self.recompute_modules))
        return " ".join(found)

    def stage_blocks(self, num_layers: int, stage: int, chunk: int = 0) -> range:
        """The blocks, 0-based in the whole model, of virtual stage ``chunk`` of pipeline stage ``stage``."""
        if self.first_stage is None and self.last_stage is None:
            per_chunk = num_layers // (self.pp * self.chunks)
            start = (chunk * self.pp + stage) * per_chunk
            return range(start, start + per_chunk)
        first, last = self.first_stage or 0, self.last_stage or 0
        between = self.pp - (self.first_stage is not None) - (self.last_stage is not None)
        each = (num_layers - first - last) // between if between else 0
        sizes = [each] * self.pp
        if self.first_stage is not None:
            sizes[0] = first
        if self.last_stage is not None:
            sizes[-1] = last
        start = sum(sizes[:stage])
        return range(start, start + sizes[stage])

    def is_first(self, stage: int, chunk: int = 0) -> bool:
        """Whether this virtual stage holds the embedding."""
        return stage == 0 and chunk == 0

    def is_last(self, stage: int, chunk: int | None = None) -> bool:
        """Whether this virtual stage (None: the last one of the rank) holds the output matrix."""
        return stage == self.pp - 1 and (chunk is None or chunk == self.chunks - 1)

    # -- legality ------------------------------------------------------------------------------------------------

    def complaint(self, shape: ModelShape, memory: MemoryConfig | None) -> str | None:
        """What makes this layout impossible for the model, in a few words; None when it can be trained."""
        tp, pp, cp = self.tp, self.pp, self.cp
        if self.world % (tp * pp * cp):
            return f"TP x PP x CP = {tp * pp * cp} does not divide {self.world} ranks"
        if self.first_stage is None and self.last_stage is None and shape.num_layers % (pp * self.chunks):
            return f"{shape.num_layers} blocks do not split over {pp * self.chunks} stages"
        if shape.num_attention_heads % tp or shape.ffn_hidden_size % tp:
            return f"heads or FFN do not split over TP {tp}"
        if shape.num_query_groups % tp and tp % shape.num_query_groups:
            return f"{shape.num_query_groups} query groups and TP {tp}: neither divides the other"
        if cp > 1 and shape.seq_length % (2 * cp):
            return f"sequence of {shape.seq_length} over CP {cp}"
        if cp > 1 and any(family.hashes for family in shape.families(memory)):
            return f"n-grams over CP {cp}"
        if self.sequence_parallel and shape.seq_length % (tp * cp):
            return f"sequence of {shape.seq_length} over TP {tp} x CP {cp}"
        return self._table_complaint(shape, memory) if memory is not None else None

    def _delay_complaint(self, shape: ModelShape, memory: MemoryConfig) -> str | None:
        """What config/checks.py says of --memory-read-delay, in this layout's words."""
        if self.pp > 1 and (self.first_stage or self.last_stage):
            return "outputs of memory layers that wait for a later block, and stages of different lengths"
        if {"mlp", "layernorm"} & set(self.recompute_modules) and self.recompute != "full":
            return "outputs of memory layers that wait for a later block, and their recomputation"
        present = memory.memory_layers(shape.num_layers)
        for stage in range(self.pp):
            for chunk in range(self.chunks):
                blocks = self.stage_blocks(shape.num_layers, stage, chunk)
                for place, block in enumerate(blocks):
                    if not present[block]:
                        continue
                    if block + memory.read_delay not in blocks:
                        return f"a read delay of {memory.read_delay} past the end of a stage"
                    together, last = self.recompute_layers, place + memory.read_delay
                    uniform = self.recompute_method == "uniform"
                    apart = place // together != last // together if uniform else place < together
                    if self.recompute == "full" and apart:
                        return f"a read delay of {memory.read_delay} out of what is recomputed together"
        return None

    def _table_complaint(self, shape: ModelShape, memory: MemoryConfig) -> str | None:
        size = self.memory_size
        if size > 1:
            if self.world // self.pp % size:
                return f"M {size} does not divide the {self.world // self.pp} ranks of a stage"
            for family in shape.families(memory):
                if self.memory_mode == "dim" and (family.value_dim % size or family.pre_value_dim % size):
                    return f"Dv {family.value_dim} and Dp {family.pre_value_dim} by dimension over M {size}"
                if self.memory_mode == "row" and family.rows_per_layer < size:
                    return f"{family.rows_per_layer} rows over M {size}"
        if memory.read_delay:
            complaint = self._delay_complaint(shape, memory)
            if complaint is not None:
                return complaint
        if self.pp == 1 or memory.sharing == "none":
            return None
        if memory.sharing != "block":
            return f"{memory.sharing} sharing over {self.pp} stages"
        owners = memory.memory_layers(shape.num_layers)
        per_chunk = shape.num_layers // (self.pp * self.chunks)
        ends = range(per_chunk, shape.num_layers + 1, per_chunk)
        if any(sum(owners[:end]) % memory.sharing_size for end in ends):
            return f"shared blocks of {memory.sharing_size} straddle the stages"
        return None
