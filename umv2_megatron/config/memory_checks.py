"""What the settings of memory layers must satisfy, with the layout of the ranks; called by ``checks.py``."""

from __future__ import annotations

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.config.option_table import option_table
from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.config.usage import refuse


def check_memory_layout(run: RunConfig) -> None:
    memory, pp = run.memory, run.pipeline_model_parallel_size
    if memory.parallel_size == 1 and memory.parallel_mode != option_table()["memory_parallel_mode"].default:
        refuse(
            "memory-parallel-mode", memory.parallel_mode, "no value with --memory-parallel-size 1: nothing is sharded"
        )
    if memory.exchange_parts > 1 and (memory.parallel_size == 1 or memory.parallel_mode != "row"):
        refuse(
            "memory-exchange-parts",
            memory.exchange_parts,
            "1 without tables shared out by row (--memory-parallel-size above 1, --memory-parallel-mode row)",
        )
    for key in ("memory_balance_loss_coeff", "memory_tucker_penalty_coeff"):
        if run.calculate_per_token_loss and run.values[key] > 0:
            refuse(
                key.replace("_", "-"),
                run.values[key],
                "0 with --calculate-per-token-loss, which would divide it by the number of tokens",
            )
    if run.hashing is not None:
        _check_ngrams(run)
    if memory.value_lr is not None:
        for key in ("memory_value_lr_mult", "memory_value_lr_decay_iters"):
            if run.values[key] != option_table()[key].default:
                refuse(key.replace("_", "-"), run.values[key], f"no value with --memory-value-lr {memory.value_lr:g}")
    if memory.parallel_size > 1:
        _check_table_shards(run)
    if memory.read_delay:
        _check_read_delay(run)
    if memory.sharing in ("ring", "noring") and pp > 1:
        refuse("memory-sharing", memory.sharing, "none or block with --pipeline-model-parallel-size above 1")
    if memory.sharing == "block" and pp > 1:
        if run.num_layers_in_first_pipeline_stage or run.num_layers_in_last_pipeline_stage:
            refuse("memory-sharing", memory.sharing, "none where pipeline stages have different numbers of layers")
        stages = pp * (run.virtual_pipeline_size or 1)
        per_stage = run.num_layers // stages
        owners = memory.memory_layers(run.num_layers)
        for stage in range(stages):
            seen = sum(owners[: (stage + 1) * per_stage])
            if seen % memory.sharing_size:
                refuse(
                    "memory-sharing-size",
                    memory.sharing_size,
                    f"a size whose blocks do not straddle the {stages} pipeline stages of {per_stage} layers",
                )


def check_engram(run: RunConfig) -> None:
    """Whether n-gram layers beside others (--engram-layer-freq) stand beside memory layers that they are not."""
    if run.ngrams is None:
        return
    variant, freq = run.model.ffn_variant, run.ngrams.layer_freq
    if not run.has_memory:
        refuse(
            "engram-layer-freq",
            freq,
            f"no value with --ffn-variant {variant}, which has no memory layers; --ffn-variant engram has n-gram "
            "layers alone",
        )
    if run.memory.hashes:
        refuse(
            "engram-layer-freq",
            freq,
            f"no value with --ffn-variant {variant}, whose memory layers are n-gram layers: --memory-layer-freq says "
            "where they are",
        )
    if run.training.trainable == "rows":
        refuse("trainable", "rows", "all or memory with --engram-layer-freq: rows are selected of one kind of tables")


def _check_ngrams(run: RunConfig) -> None:
    """Whether every token has those before it, and knows where its document begins."""
    told = "--memory-scoring ngram" if run.ngrams is None else "--engram-layer-freq"
    if run.context_parallel_size > 1:
        refuse(
            "context-parallel-size",
            run.context_parallel_size,
            f"1 with {told}: the tokens before a rank's chunk are on other ranks",
        )
    if run.data.reset_attention_mask and not run.data.packs_documents:
        refuse(
            "create-attention-mask-in-dataloader",
            "on",
            f"off with --reset-attention-mask and {told}: n-grams know documents by the places where they begin, not "
            "by masks",
        )


def _check_read_delay(run: RunConfig) -> None:
    """Whether an output that waits for a later block meets it on the same stage, and where it keeps its gradient."""
    delay, pp = run.memory.read_delay, run.pipeline_model_parallel_size
    if pp > 1 and (run.num_layers_in_first_pipeline_stage or run.num_layers_in_last_pipeline_stage):
        refuse("memory-read-delay", delay, "0 where pipeline stages have different numbers of layers")
    per_stage = run.num_layers // (pp * (run.virtual_pipeline_size or 1))
    granularity, modules = run.recompute_granularity, run.recompute_modules or ()
    for name in {"mlp", "layernorm"} & set(modules) if granularity == "selective" else ():
        refuse("memory-read-delay", delay, f"0 with --recompute-modules {name}")
    for block, here in enumerate(run.memory.memory_layers(run.num_layers)):
        if not here:
            continue
        first, last = block % per_stage, block % per_stage + delay
        if last >= per_stage:
            refuse(
                "memory-read-delay",
                delay,
                f"a delay with which the memory layer of block {block} adds its output on its own pipeline stage of "
                f"{per_stage} layers; change --memory-layer-freq or --pipeline-model-parallel-size",
            )
        together = run.recompute_num_layers or 1
        apart = first // together != last // together if run.recompute_method == "uniform" else first < together
        if granularity == "full" and apart:
            refuse(
                "memory-read-delay",
                delay,
                f"0, or a --recompute-num-layers with which block {block} and block {block + delay} are recomputed "
                f"together, with --recompute-granularity full",
            )


def check_split_tokens(run: RunConfig) -> None:
    """Whether tensor-parallel ranks that all have the same tokens can share the memory layers' work evenly.

    Padded tokens would count in the statistics and the auxiliary losses.
    """
    tp, samples = run.tensor_model_parallel_size, run.training.micro_batch_size
    tokens = samples * run.model.seq_length // run.context_parallel_size
    if tp > 1 and not run.sequence_parallel and tokens % tp:
        refuse(
            "seq-length",
            run.model.seq_length,
            f"a length of which --micro-batch-size ({samples}) samples divide over --tensor-model-parallel-size ({tp}) "
            "ranks, which share the memory layers' work",
        )


def check_trainable(run: RunConfig) -> None:
    """Whether every pipeline stage has something to learn where memory layers alone do, and selected rows can."""
    pp, trainable = run.pipeline_model_parallel_size, run.training.trainable
    if trainable == "rows":
        _check_rows(run)
    if trainable == "all" or pp == 1:
        return
    if run.num_layers_in_first_pipeline_stage or run.num_layers_in_last_pipeline_stage:
        refuse("trainable", trainable, "all where pipeline stages have different numbers of layers")
    here = [any(each) for each in zip(*(family.memory_layers(run.num_layers) for family in run.families))]
    size = run.num_layers // (pp * (run.virtual_pipeline_size or 1))
    for first in range(0, run.num_layers, size):
        if not any(here[first : first + size]):
            refuse(
                "trainable",
                trainable,
                f"a memory layer in every pipeline stage of {size} layers, and blocks {first} to {first + size - 1} "
                "have none; change --memory-layer-freq or --pipeline-model-parallel-size",
            )


def _check_rows(run: RunConfig) -> None:
    if run.training.trainable_rows is None:
        refuse("trainable", "rows", "--trainable-rows too, a file that tools/select_rows.py writes")
    if run.memory.value_optimizer_offload:
        expected = "off with --trainable rows, which has optimizer state of the selected rows alone"
        refuse("memory-value-optimizer-offload", "on", expected)
    if run.use_precision_aware_optimizer:
        expected = "off with --trainable rows: its state is inside Transformer Engine's FusedAdam, of whole tables"
        refuse("use-precision-aware-optimizer", "on", expected)


def _check_table_shards(run: RunConfig) -> None:
    """Whether every value table can be shared out over the memory-parallel group."""
    memory, size = run.memory, run.memory.parallel_size
    per_stage = run.world_size // run.pipeline_model_parallel_size
    if per_stage % size:
        refuse("memory-parallel-size", size, f"a divisor of the {per_stage} ranks of a pipeline stage")
    if memory.backend == "reference":
        refuse("memory-backend", memory.backend, "auto, scatter, cpu or triton with --memory-parallel-size above 1")
    for family in run.families:
        _check_shards_of(family, size)


def _check_shards_of(family: MemoryConfig, size: int) -> None:
    if family.parallel_mode == "row":
        rows = family.rows_per_layer
        if rows < size:
            refuse("memory-parallel-size", size, f"at most the {rows} rows (N*N) of a value table")
        return
    for name, columns in (("value", family.value_dim), ("pre-value", family.pre_value_dim)):
        if columns % size:
            refuse(
                f"{family.family}-{name}-dim",
                columns,
                f"a multiple of --memory-parallel-size ({size}) with --memory-parallel-mode dim; row has no such limit",
            )
