"""Every flag, at a value that is not its default, changes a run, is read where its description says, or is refused.

A tiny model is trained for two steps with and without the flag, beside what the flag needs, and the hashes of the
weights are compared. Where they are equal, the option's ``read_by`` names the file that reads it, and for what.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from program_runs import ROOT, _free_port, tiny_run, train

import umv2_megatron
from umv2_megatron.config.option import Option
from umv2_megatron.config.option_table import option_table

sys.path.insert(0, str(ROOT / "tests" / "unit" / "data"))
from data_helpers import run_tool, write_jsonl  # noqa: E402

pytestmark = pytest.mark.slow

OPTIONS = option_table()
MOE: dict[str, Any] = {
    "ffn_variant": "moe", "num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 32,
    "moe_aux_loss_coeff": 0.01,
}  # fmt: skip

# What is given for a flag, where it is not one value that ``another`` finds: sizes have to fit each other.
GIVEN: dict[str, dict[str, Any]] = {
    key: {key: value}
    for key, value in {
        "ffn_variant": "dense", "seq_length": 16, "max_position_embeddings": 64, "num_layers": 3, "hidden_size": 128,
        "kv_channels": 32, "no_qk_layernorm": True, "window_size": "[5, 0]", "window_attn_skip_freq": 2,
        "no_rope_freq": 2, "rotary_seq_len_interpolation_factor": 2,
        "attention_backend": "unfused", "recompute_modules": "mlp", "num_experts": 8,
        "cp_comm_type": "all_gather", "moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.5,
        "moe_router_dtype": "fp64", "moe_expert_capacity_factor": 0.5,
        "memory_value_dim": 96, "memory_topk": 8, "memory_key_topk_cap": 2, "memory_layer_freq": "[1,0]",
        "memory_ngram_size": 2, "engram_layer_freq": "[1,0]", "engram_ngram_size": 2, "engram_value_dim": 8,
        "engram_num_heads": 8,
        "memory_read_delay": 1, "memory_parallel_mode": "row", "micro_batch_size": 4, "global_batch_size": 4,
        "lr_warmup_init": 1e-4, "lr_wsd_decay_iters": 1, "min_lr": 5e-4, "split": "50,40,10",
        "transformer_impl": "transformer_engine", "cross_entropy_fusion_impl": "te", "memory_backward": "atomic",
        "profile_ranks": "0,1", "microbatch_group_size_per_vp_stage": 4,
        "recompute_granularity": "selective", "vocab_size": 300, "num_distributed_optimizer_instances": 2,
    }.items()
}  # fmt: skip
SENTINELS = {f"fim_{part}_token": str(256 + i) for i, part in enumerate(("prefix", "middle", "suffix"), 1)}
GIVEN |= {
    "fim_rate": {"fim_rate": 0.9, **SENTINELS, "vocab_size": 270},
    **{key: {key: "265"} for key in SENTINELS},
    "loss_start_token": {"loss_start_token": str(ord("d"))},
    "loss_mask_key": {"loss_mask_key": "marks"},
    "loss_stop_token": {"loss_stop_token": str(ord("m"))},
    "qk_layernorm": GIVEN.pop("no_qk_layernorm"),
    "num_moe_experts": GIVEN.pop("num_experts"),
    "group_query_attention": {"group_query_attention": True, "num_query_groups": 2},
    "num_query_groups": {"group_query_attention": True, "num_query_groups": 2},
    "num_attention_heads": {"num_attention_heads": 2, "num_query_groups": 2},
    "num_layers_per_virtual_pipeline_stage": {"num_layers_per_virtual_pipeline_stage": 1},
    "memory_scoring": {
        "memory_scoring": "additive",
        "memory_tucker_rank": 1,
        "memory_num_cores": 1,
        "memory_query_mode": "shared",
    },
    "moe_router_num_groups": {"moe_router_num_groups": 2, "moe_router_group_topk": 1},
    "moe_router_group_topk": {"moe_router_num_groups": 2, "moe_router_group_topk": 1},
    "memory_sharing": {"memory_sharing": "block", "memory_sharing_size": 2},
    "train_samples": {"train_samples": 24, "train_iters": None},
    "lr_wsd_decay_samples": {"lr_wsd_decay_samples": 24},
    "rampup_batch_size": {"rampup_batch_size": [4, 4, 8]},
    "weight_decay_incr_style": {
        "weight_decay_incr_style": "linear", "start_weight_decay": 0.1, "end_weight_decay": 0.5
    },
    "end_weight_decay": {"end_weight_decay": 0.9},
    "metrics_port": {"metrics_port": _free_port()},
    "metrics_host": {"metrics_host": "localhost"},
    "eval_tasks": {"eval_tasks": ["umv2_documents"], "eval_tasks_path": [ROOT / "examples" / "lm_eval"],
                   "tokenizer_type": "ByteLevelTokenizer"},
    "eval_tasks_path": {"eval_tasks_path": [ROOT / "examples"]},
}
# What a flag wants beside what its option needs.
STAGES = {"num_layers": 4, "pipeline_model_parallel_size": 2}
INTERLEAVED = {**STAGES, "num_layers_per_virtual_pipeline_stage": 1}
RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
ADDITIVE = {"memory_scoring": "additive", "memory_tucker_rank": 1, "memory_num_cores": 1, "memory_query_mode": "shared"}
ENGRAM = {"ffn_variant": "engram", "memory_num_heads": 4, "memory_num_keys": 24}
BOTH = {"engram_layer_freq": "1", "engram_num_heads": 4, "engram_num_keys": 24}
OVERLAPPED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
BESIDE: dict[str, dict[str, Any]] = {
    "max_position_embeddings": {"position_embedding_type": "learned_absolute"},
    "num_layers_per_virtual_pipeline_stage": STAGES,
    "num_layers_in_first_pipeline_stage": STAGES,
    "num_layers_in_last_pipeline_stage": STAGES,
    "microbatch_group_size_per_vp_stage": INTERLEAVED,
    "overlap_p2p_comm_warmup_flush": INTERLEAVED,
    "align_param_gather": {**INTERLEAVED, **OVERLAPPED},
    "sequence_parallel": {"tensor_model_parallel_size": 2},
    "recompute_method": RECOMPUTED,
    "recompute_num_layers": RECOMPUTED,
    "distribute_saved_activations": RECOMPUTED,
    "moe_router_enable_expert_bias": {"moe_router_score_function": "sigmoid"},
    "moe_router_bias_update_rate": {"moe_router_score_function": "sigmoid"},
    "moe_router_group_topk": {"moe_router_num_groups": None, "moe_router_group_topk": None},
    "memory_key_topk_cap": {"memory_topk": 4},
    "attention_softmax_in_fp32": {"attention_backend": "unfused"},
    "memory_sharing_size": {"memory_sharing": "block", "memory_sharing_size": None},
    "memory_score_normalization": ADDITIVE,
    "memory_ngram_size": ENGRAM,
    "memory_ngram_tokens": {**ENGRAM, "corpus": True},
    "memory_conv_kernel": ENGRAM,
    **{key: BOTH for key in option_table() if key.startswith("engram_") and key != "engram_layer_freq"},
    "engram_ngram_tokens": {**BOTH, "corpus": True},
    "memory_qk_norm": ADDITIVE,
    "memory_pre_projection": {"memory_pre_value_dim": 64},
    "memory_pre_value_activation": {"memory_pre_value_dim": 16},
    "memory_value_expansion": {"memory_key_expansion": 2},
    "memory_read_delay": {"memory_layer_freq": "[1,0]"},
    "memory_parallel_mode": {"memory_parallel_size": 2},
    "memory_exchange_parts": {"memory_parallel_size": 2, "memory_parallel_mode": "row"},
    "lr_warmup_init": {"lr_warmup_iters": 1},
    "lr_warmup_init_fraction": {"lr_warmup_iters": 1},
    "lr_wsd_decay_style": {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 4, "train_iters": 5},
    "lr_wsd_decay_iters": {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 2, "train_iters": 3},
    "lr_wsd_decay_samples": {"lr_decay_style": "WSD", "lr_wsd_decay_samples": 1},
    "calculate_per_token_loss": {"eod_mask_loss": True, "corpus": True},
    "reset_attention_mask": {"corpus": True},
    "max_skipped_iterations": {"nan_policy": "skip"},
    "rampup_batch_size": {"global_batch_size": 8},
    "muon_tp_mode": {"tensor_model_parallel_size": 2},
}
for _key in ("eod_mask_loss", "split", "reset_position_ids", "data_path", "train_data_path", "mock_data", "vocab_size",
             "tokenizer_type", "num_dataset_builder_threads", "data_cache_path", "data_order",
             "allow_new_blend"):  # fmt: skip
    BESIDE[_key] = {"corpus": True}
BESIDE["full_validation"] = {"corpus": True, "eval_iters": 1}
BESIDE["reset_position_ids"]["position_embedding_type"] = "learned_absolute"
for _key in ("fim_rate", "fim_spm_rate", *SENTINELS):
    BESIDE[_key] = {"corpus": True, "fim_rate": 0.9, **SENTINELS, "vocab_size": 270}
BESIDE["fim_rate"] = {"corpus": True, "vocab_size": 270}
BESIDE["loss_start_token"] = BESIDE["loss_mask_key"] = {"corpus": True}
BESIDE["loss_stop_token"] = {"corpus": True, "loss_start_token": str(ord("d"))}
RANKS = {
    "expert_model_parallel_size": 2, "memory_parallel_size": 2, "memory_parallel_mode": 2, "memory_exchange_parts": 2,
    "profile_ranks": 2,
    "average_in_collective": 2, "reduce_scatter_with_fp32_accumulation": 2, "num_distributed_optimizer_instances": 2,
    "pad_buckets_for_high_nccl_busbw": 2, "overlap_param_gather": 2, "overlap_grad_reduce": 2, "bucket_size": 2,
    "use_distributed_optimizer": 2,
}  # fmt: skip
# Flags that this machine has to refuse, with a part of the sentence.
REFUSED = {
    "transformer_impl": "requirements-gpu.txt",
    "cross_entropy_fusion_impl": "without Transformer Engine",
    "memory_backward": "only triton has atomic additions",
    "perform_initialization": "expected --load too",
    "ckpt_format": "expected one of torch_dist",
    "gradient_accumulation_fusion": "fused_weight_gradient_mlp_cuda",
    "masked_softmax_fusion": "scaled_upper_triang_masked_softmax_cuda",
}
if importlib.util.find_spec("transformer_engine") is None:
    for _key in ("use_precision_aware_optimizer", "main_grads_dtype", "main_params_dtype", "exp_avg_dtype",
                 "exp_avg_sq_dtype"):  # fmt: skip
        REFUSED[_key] = "Transformer Engine (requirements-gpu.txt), whose FusedAdam it is"
if not torch.cuda.is_available():
    REFUSED |= dict.fromkeys(("cuda_graph_impl", "cuda_graph_warmup_steps"), "on a machine without a CUDA device")
    REFUSED["record_memory_history"] = "CUDA devices only"
if importlib.util.find_spec("einops") is None:
    REFUSED["num_distributed_optimizer_instances"] = "einops"
if importlib.util.find_spec("lm_eval") is None:
    REFUSED |= dict.fromkeys(
        ("eval_tasks", "eval_tasks_path", "eval_tasks_interval", "eval_tasks_limit"), "requirements-lm-eval.txt"
    )


def another(made: Option) -> dict[str, Any]:
    """The flag with a legal value that is not the default, as settings."""
    if made.key in GIVEN:
        return GIVEN[made.key]
    if made.switches:
        switch = next(flag for flag, on in made.switches.items() if on is not made.default)
        return {switch.replace("-", "_"): True}
    number = made.default if isinstance(made.default, (int, float)) else 0
    if made.choices:
        value: Any = next((choice for choice in made.choices if choice != made.default), "another")
    elif made.expected == "an integer":
        value = number + 1
    elif made.expected == "a number":
        value = next(each for each in (number * 2, number / 2, 0.5, 1.5) if each != number and made.within(each))
    else:
        raise AssertionError(f"give a value for {made.key}")
    return {made.key: value}


def needed_by(made: Option) -> dict[str, Any]:
    """Settings that let ``made`` take effect."""
    settings: dict[str, Any] = {}
    for needed in made.needs:
        if needed == "ffn_variant=moe":
            settings.update(MOE)
        elif "!=" in needed:
            key, value = needed.split("!=")
            settings.update(another(OPTIONS[key]) if OPTIONS[key].default == value else {})
        elif "=" in needed:
            key, settings[key] = needed.split("=")
        elif ">" in needed:
            key, value = needed.split(">")
            settings[key] = int(value) + 1
        elif OPTIONS[needed].switches:
            settings.update({**needed_by(OPTIONS[needed]), needed: True})
        else:
            settings.update({**needed_by(OPTIONS[needed]), **another(OPTIONS[needed])})
    return {**settings, **BESIDE.get(made.key, {})}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings that train on a few documents of different lengths."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [f"document {number} " * (1 + number % 5) for number in range(60)]
    marks = [" ".join(str(place % 2) for place in range(len(text))) for text in texts]
    for key, lines, *tokenizer in (("text", texts, "ByteLevelTokenizer"),
                                   ("marks", marks, "NullTokenizer", "--vocab-size", "2")):  # fmt: skip
        file = write_jsonl(folder / f"{key}.jsonl", lines, key)
        done = run_tool("preprocess_data.py", "--input", file, "--output-prefix", folder / "corpus", "--json-keys", key,
                        "--append-eod", "--tokenizer-type", *tokenizer)  # fmt: skip
        assert done.returncode == 0, done.stderr
    return {
        "mock_data": None, "tokenizer_type": "ByteLevelTokenizer", "data_path": folder / "corpus_text_document",
        "split": "80,10,10",
    }  # fmt: skip


WEIGHTS: dict[tuple[int, str], str] = {}


def weights(ranks: int, settings: dict[str, Any], folder: Path) -> str:
    """The hashes of all ranks' weights after two steps."""
    argv = tiny_run(**{"train_iters": 2, **settings})
    key = (ranks, " ".join(argv))
    if key not in WEIGHTS:
        finished = train(ranks, argv, folder)
        WEIGHTS[key] = finished.weights if "weights of rank 0" in finished.text else finished.text
    return WEIGHTS[key]


# Flags of files, services and resumption, whose effects other tests show; here only that something reads them.
ELSEWHERE = {
    "save", "load", "save_interval", "async_save", "save_retain_interval", "ckpt_step", "finetune",
    "use_checkpoint_args", "max_rewinds", "non_persistent_save_interval", "non_persistent_ckpt_type",
    "non_persistent_local_ckpt_dir", "non_persistent_global_ckpt_dir", "non_persistent_local_ckpt_algo",
    "tensorboard_dir", "wandb_project", "wandb_exp_name", "wandb_save_dir", "wandb_entity", "data_path",
    "train_data_path", "valid_data_path", "test_data_path", "data_cache_path", "tokenizer_type", "tokenizer_model",
    "tiktoken_pattern", "tiktoken_num_special_tokens", "tokenizer_special_tokens",
    "mock_data", "dry_run", "dry_run_world_size", "dry_run_rank", "profile_ranks", "trainable_rows",
}  # fmt: skip


@pytest.mark.parametrize("key", OPTIONS)
def test_a_flag_has_an_effect_or_is_refused(key: str, tmp_path: Path, corpus: dict[str, Any]) -> None:
    made = OPTIONS[key]
    if key in ELSEWHERE:
        check_reader(made)
        return
    beside = needed_by(made)
    if beside.pop("corpus", False):
        beside = {**corpus, **beside}
    both = {**beside, **another(made)}
    ranks = RANKS.get(key, 1)
    for size in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
        ranks *= both.get(size, 1)
    told = REFUSED.get(key)
    if beside.pop("transformer_impl", None) == "transformer_engine":
        both.pop("transformer_impl")
        told, ranks = "without Transformer Engine", 1
    if told is not None:
        done = train(ranks, tiny_run(**{"train_iters": 2, **both}), tmp_path / "refused", codes=2)
        assert told in done.text, done.text
        return
    if weights(ranks, both, tmp_path / "with") == weights(ranks, beside, tmp_path / "without"):
        check_reader(made)


def check_reader(made: Option) -> None:
    """Whether ``made.read_by`` begins with a file, of mcore or of this package, that names the setting."""
    assert made.read_by, f"--{made.flag} changes nothing: say what reads it (read_by), or refuse it"
    name = made.read_by.split(":")[0]
    core = importlib.util.find_spec("megatron.core")
    assert core is not None and core.submodule_search_locations is not None
    places = [Path(core.submodule_search_locations[0]), Path(umv2_megatron.__path__[0])]
    found = [place / name for place in places if (place / name).is_file()]
    assert found, f"{made.read_by} names no file of megatron.core or umv2_megatron"
    field = made.key.removeprefix("memory_") if made.section == "memory layers" else made.key
    assert any(re.search(rf"\b{field}\b", path.read_text(encoding="utf-8")) for path in found), made.read_by
