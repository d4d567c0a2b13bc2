"""Build presets, with changed flags, on the meta device and print their parameter counts beside the planned ones.

    python build_and_count.py '[["umv2-8m", {"memory_sharing": "block", "memory_sharing_size": 2}]]'

Run by test_counts_match_model.py in a process of its own, because megatron-core's groups are global.
"""

import json
import sys
import tempfile

import torch

from umv2_megatron.config.flags import read_mapping
from umv2_megatron.config.presets import PRESETS
from umv2_megatron.config.resolve import from_layers
from umv2_megatron.parallel import cpu_platform
from umv2_megatron.planning import count_parameters


def main() -> None:
    """Print a JSON list with ``{"built": ..., "planned": ...}`` for each case."""
    cpu_platform.install()
    from megatron.core import parallel_state, tensor_parallel

    with tempfile.NamedTemporaryFile() as store:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store.name}", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        results = [count(preset, changes) for preset, changes in json.loads(sys.argv[1])]
        torch.distributed.destroy_process_group()
    print(json.dumps(results))


def count(preset: str, changes: dict) -> dict:
    """Counts by kind of the built model and of the plan."""
    from umv2_megatron.model.builder import build_model

    changes = {**changes, "perform_initialization": False, "use_cpu_initialization": True}
    layers = [("preset", read_mapping(PRESETS[preset].flags(), "preset")), ("flag", read_mapping(changes, "flag"))]
    run = from_layers(layers, 1, for_training=False)
    with torch.device("meta"):
        model = build_model(run, run.values["vocab_size"])
    built = dict.fromkeys(("all", "tables", "memory", "attention", "norms", "ffn", "embedding"), 0)
    for name, parameter in model.named_parameters():
        assert parameter.is_meta, name
        built["all"] += parameter.numel()
        built[kind_of(name)] += parameter.numel()
    planned = count_parameters(run.values, run.memory)
    return {"built": built, "planned": {
        "all": planned.stored, "tables": planned.tables, "memory": planned.memory, "attention": planned.attention,
        "norms": planned.norms, "ffn": planned.ffn,
        "embedding": planned.embedding + planned.positions + planned.output}}


def kind_of(name: str) -> str:
    """The kind of a parameter of mcore's GPTModel by its name."""
    for part, kind in ((".table.", "tables"), (".memory.", "memory"), (".engram.", "memory"),
                       (".self_attention.", "attention"), ("layernorm", "norms"), (".mlp.", "ffn"),
                       ("embedding", "embedding"), ("output_layer", "embedding")):
        if part in name:
            return kind
    raise AssertionError(f"no kind for {name}")


if __name__ == "__main__":
    main()
