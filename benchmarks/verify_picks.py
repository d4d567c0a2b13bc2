"""Right models must pass `verify`: logits of mcore's model and of the Hugging Face one with the same weights.

    python benchmarks/verify_picks.py                         both sizes, 8 seeds, float32 and float64: 8 minutes
    python benchmarks/verify_picks.py --size 8m --seeds 2     a quick look

Sizes: umv2-8m, 4,096 tokens in windows of 256; and the blocks of umv2-227m-1.2b with a table of 64 x 64 rows in each
and a vocabulary of 8,192, 512 tokens in one window. Weights are those that training starts with, the gains of the norms
moved by chance; they pass through the conversion's own table of names. For each model: picks compared, ties followed,
wrong picks, the widest tie in rounding units (2^-23, 2^-52) of the scale of the token's scores, and the largest
difference of logits with the picks followed and, for comparison, without.

Ends with exit code 1 where a model does not pass. The Makefile's AS_BASELINE, AS_AVX2 and AS_AVX512 in the environment
compute as on other CPUs.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from umv2_megatron.parallel import cpu_platform  # noqa: E402

cpu_platform.install()

import torch  # noqa: E402

from umv2_megatron.config.flags import read_mapping  # noqa: E402
from umv2_megatron.config.presets import PRESETS  # noqa: E402
from umv2_megatron.config.resolve import from_layers  # noqa: E402
from umv2_megatron.conversion.plan import assemble, copies_to_hf  # noqa: E402
from umv2_megatron.conversion.safetensors_files import TensorInfo  # noqa: E402
from umv2_megatron.conversion.settings import hf_config, sizes_of  # noqa: E402
from umv2_megatron.conversion.verify import LIMITS, followed_logits  # noqa: E402
from umv2_megatron.hf import UMv2ForCausalLM  # noqa: E402
from umv2_megatron.hf.name_table import pairings  # noqa: E402
from umv2_megatron.model.builder import build_model  # noqa: E402
from umv2_megatron.model.ffn_with_memory import memory_layers  # noqa: E402

SIZES: dict[str, dict[str, Any]] = {
    "8m": {"preset": "umv2-8m", "windows": 16, "length": 256, "changes": {}},
    "227m": {
        "preset": "umv2-227m-1.2b",
        "windows": 1,
        "length": 512,
        "changes": {"memory_num_keys": 64, "vocab_size": 8192},
    },
}


def start() -> None:
    """mcore's groups, for one process that is alone."""
    from megatron.core import parallel_state, tensor_parallel

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def pair(preset: str, changes: dict[str, Any], seed: int) -> tuple[torch.nn.Module, UMv2ForCausalLM]:
    """mcore's model and the Hugging Face one with the same weights, float32, in evaluation mode."""
    torch.manual_seed(seed)
    layers = [
        ("preset", read_mapping(PRESETS[preset].flags(), "preset")),
        ("flag", read_mapping({"transformer_impl": "local", **changes}, "flag")),
    ]
    run = from_layers(layers, 1, for_training=False)
    vocabulary = run.values["vocab_size"]
    trained = build_model(run, vocabulary).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    for _, layer in memory_layers(trained):
        layer.refresh_singular_vectors()
    state = {  # checkpoints have the input norm's name of Transformer Engine
        name.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_"): tensor
        for name, tensor in trained.state_dict().items()
        if isinstance(tensor, torch.Tensor)
    }
    held = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    copies = copies_to_hf(list(pairings(sizes_of(run.values, vocabulary, None))), held, torch.float32)

    def rows(name: str, first: int, last: int) -> torch.Tensor:
        return state[name][first:last]

    config = hf_config({"values": run.values, "tokenizer_vocab_size": vocabulary}, torch.float32, 1 << 40, None)
    model = UMv2ForCausalLM(config)
    weights = {
        copy.name: torch.cat([assemble(rows, block, copy.info.dtype) for block in copy.blocks()]) for copy in copies
    }
    missing = model.load_state_dict(weights, strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}, missing
    model.tie_weights()
    return trained, model.eval()


def measure(size: str, seed: int, dtypes: list[torch.dtype]) -> bool:
    """One line for each dtype; whether all of them pass."""
    sizes = SIZES[size]
    trained, model = pair(sizes["preset"], sizes["changes"], seed)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (sizes["windows"], sizes["length"]), generator=generator)
    passed = True
    for dtype in dtypes:
        begun = time.perf_counter()
        trained, model = trained.to(dtype), model.to(dtype)
        expected, found, picks = followed_logits(trained, lambda m=model: m, ids, model.config.vocab_size)
        with torch.no_grad():
            alone = model(ids, use_cache=False).logits
        largest = expected.abs().max()
        difference = float((expected - found).abs().max() / largest)
        good = difference <= LIMITS[dtype] and picks.wrong == 0
        passed &= good
        print(
            f"{size} seed {seed} {str(dtype).removeprefix('torch.')}: {picks.compared:,} picks, {picks.ties} ties, "
            f"{picks.wrong} wrong, widest tie {picks.widest:.3g} units, difference "
            f"{difference:.2e}, without following {float((expected - alone).abs().max() / largest):.2e}, "
            f"{time.perf_counter() - begun:.0f} s: {'good' if good else 'NOT GOOD'} {picks.first}",
            flush=True,
        )
    return passed


def main() -> int:
    """The program; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), action="append", help="default: both")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "float64"), action="append", help="default: both")
    options = parser.parse_args()
    start()
    dtypes = [getattr(torch, name) for name in options.dtype or ("float32", "float64")]
    results = [
        measure(size, seed, dtypes) for size in options.size or tuple(SIZES) for seed in range(1, options.seeds + 1)
    ]
    print(f"{sum(results)} of {len(results)} models pass")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
