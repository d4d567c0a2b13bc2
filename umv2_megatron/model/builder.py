"""From a run's configuration to mcore's GPTModel, one per virtual pipeline stage, and to DDP around it."""

from __future__ import annotations

import contextlib

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import set_defaults_if_not_set_tensor_model_parallel_attributes
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.config.usage import UsageError
from umv2_megatron.memory.ngrams import check_contexts
from umv2_megatron.memory.value_table import TABLE_ATTRIBUTE
from umv2_megatron.model.ffn_with_memory import memory_layers
from umv2_megatron.model.layer_specs import umv2_layer_spec
from umv2_megatron.model.token_contexts import bring_contexts
from umv2_megatron.model.vocabulary import leave_padding_out
from umv2_megatron.parallel import cpu_platform


def build_model(
    run: RunConfig, vocab_size: int, config: TransformerConfig | None = None, vp_stage: int | None = None
) -> GPTModel:
    """The part of the model that belongs to this rank (and virtual stage).

    Args:
        run: the resolved configuration; process groups must exist.
        vocab_size: entries of the tokenizer; padded as --make-vocab-size-divisible-by says.
        config: mcore's configuration, when several stages are to share one object; made from ``run`` otherwise.
        vp_stage: index of the virtual pipeline stage, None without the interleaved schedule.

    Raises:
        UsageError: n-grams of this vocabulary are too long.
    """
    if run.hashing is not None:
        try:
            check_contexts(run.hashing, vocab_size)
        except ValueError as error:  # told here, because mcore would put words of its own around it
            raise UsageError(str(error)) from error
    config = config or run.transformer_config()
    wide_qk_norm = run.model.qk_norm_span == "projection"
    spec = umv2_layer_spec(
        config,
        run.memory,
        ngrams=run.ngrams,
        with_memory=run.has_memory,
        post_norm=run.model.norm_placement == "post",
        wide_qk_norm=wide_qk_norm,
        vocabulary=vocab_size,
    )
    # mcore 0.19 builds no norm of queries that the configuration does not tell of. Later it must not tell of ours:
    # mcore would sum their gradients over tensor-parallel ranks, over which they are split.
    config.qk_layernorm = config.qk_layernorm or wide_qk_norm
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=run.padded_vocab_size(vocab_size),
        max_sequence_length=run.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        parallel_output=True,
        share_embeddings_and_output_weights=not run.model.untie_embeddings_and_output_weights,
        position_embedding_type=run.model.position_embedding_type,
        rotary_percent=run.model.rotary_percent,
        rotary_base=run.model.rotary_base,
        rope_scaling=run.model.use_rope_scaling,
        rope_scaling_factor=run.model.rope_scaling_factor,
        seq_len_interpolation_factor=run.model.rotary_seq_len_interpolation_factor,
        vp_stage=vp_stage,
    )
    config.qk_layernorm = config.qk_layernorm and not wide_qk_norm
    leave_padding_out(model, vocab_size)
    if run.hashing is not None:
        bring_contexts(model, run.hashing, vocab_size)
    return model


def build_model_chunks(run: RunConfig, vocab_size: int, *, wrap_with_ddp: bool = True) -> list[torch.nn.Module]:
    """All virtual stages of this rank, on its device, in the run's precision, wrapped by mcore's DDP.

    Inside ``cpu_platform.shapes_only()`` there are no values, so nothing is derived from them or sent.
    """
    stages = run.virtual_pipeline_size
    config = run.transformer_config()
    chunks: list[torch.nn.Module] = [
        build_model(run, vocab_size, config, stage) for stage in (range(stages) if stages else [None])
    ]
    for index, chunk in enumerate(chunks):
        for parameter in chunk.parameters():
            set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        chunk.to(cpu_platform.device())
        if run.bf16:
            chunks[index] = Float16Module(config, chunk)
        if not cpu_platform.builds_shapes_only():
            for _, layer in memory_layers(chunk):
                layer.refresh_singular_vectors()
    if not wrap_with_ddp:
        return chunks
    if run.training.trainable != "all":
        for chunk in chunks:
            _leave_to_memory_layers(unwrap(chunk), tables_alone=run.training.trainable == "rows")
    ddp_config = run.ddp_config()
    wrapped: list[torch.nn.Module] = []
    for index, chunk in enumerate(chunks):
        wrapped.append(
            DistributedDataParallel(
                config=config,
                ddp_config=ddp_config,
                module=chunk,
                # as in mcore's own trainer: with several chunks only the first may split its gradients into buckets
                disable_bucketing=index > 0 or (run.overlap_param_gather and len(chunks) > 1),
            )
        )
    if not cpu_platform.builds_shapes_only():
        for chunk in wrapped:
            chunk.broadcast_params()
    return wrapped


def _leave_to_memory_layers(model: GPTModel, *, tables_alone: bool) -> None:
    """Let nothing but the memory layers of ``model`` learn, or their tables; mcore keeps neither gradients nor state of
    the rest."""
    learning = {
        id(parameter)
        for _, layer in memory_layers(model)
        for parameter in layer.parameters()
        if hasattr(parameter, TABLE_ATTRIBUTE) or not tables_alone
    }
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in learning)
    if model.pre_process:
        # Recomputed blocks have gradients only where their input has; those of other stages get such inputs.
        model.embedding.register_forward_hook(
            lambda module, given, output: output.requires_grad_() if torch.is_grad_enabled() else output
        )


def unwrap(chunk: torch.nn.Module) -> torch.nn.Module:
    """The GPTModel inside DDP and Float16Module."""
    while not isinstance(chunk, GPTModel):
        chunk = chunk.module
    return chunk


@contextlib.contextmanager
def evaluation_mode(chunks: list[torch.nn.Module]):
    """Dropout off and no autograd inside."""
    for chunk in chunks:
        chunk.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for chunk in chunks:
            chunk.train()
