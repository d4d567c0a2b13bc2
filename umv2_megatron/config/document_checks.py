"""What goes together with documents that are kept apart (--reset-attention-mask, --reset-position-ids)."""

from __future__ import annotations

from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.config.usage import refuse


def check_documents(run: RunConfig) -> None:
    """Refuse what would look across documents without a word, count positions twice, or do nothing."""
    data = run.data
    learned = run.values["position_embedding_type"] == "learned_absolute"
    if data.reset_position_ids and not (learned or data.packs_documents):
        refuse(
            "reset-position-ids",
            "on",
            "off with --position-embedding-type other than learned_absolute, unless --reset-attention-mask is on and "
            "--create-attention-mask-in-dataloader is off: tokens of two documents would see each other at distances "
            "that are none",
        )
    if data.packs_documents:
        _check_packed(run)
    elif data.reset_attention_mask and run.transformer_impl == "transformer_engine":
        refuse(
            "create-attention-mask-in-dataloader",
            "on",
            "off with --reset-attention-mask and Transformer Engine, whose causal attention ignores masks (Megatron-LM "
            "issue 2357); leave it out: no mask is needed",
        )


def _check_packed(run: RunConfig) -> None:
    if run.context_parallel_size > 1:
        refuse(
            "context-parallel-size",
            run.context_parallel_size,
            "1 with --reset-attention-mask: documents of any length cannot be cut evenly for the ranks; with "
            "--transformer-impl local --create-attention-mask-in-dataloader allows it, at the cost of masks [s, s]",
        )
    if run.cuda_graph_impl != "none":
        refuse("cuda-graph-impl", run.cuda_graph_impl, "none with --reset-attention-mask: documents differ in number")
    balancing = run.values["moe_router_load_balancing_type"]
    if run.has_experts and "seq_aux_loss" in (balancing if isinstance(balancing, list) else [balancing]):
        refuse(
            "moe-router-load-balancing-type",
            balancing,
            "another with --reset-attention-mask, which joins the sequences of a micro-batch, whose loss this is",
        )
