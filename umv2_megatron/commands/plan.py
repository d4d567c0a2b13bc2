"""What a model and a run of it cost before anything is built: parameters, FLOPs, bytes on every rank, time of a step.

    python tools/plan.py --model-preset umv2-227m-1.2b
    python tools/plan.py --model-preset umv2-1b-7b --world-size 16 --bf16 --use-distributed-optimizer \\
        --memory-parallel-size 8 --memory-parallel-mode row --gpu-memory-gib 80
    python tools/plan.py --model-preset umv2-2.5b-120b-top256 --world-size 1024 --gpu-memory-gib 80 --bf16 --search
    python tools/plan.py --config runs/mine/config.yaml --json
    python tools/plan.py --list

Takes every flag of pretrain_umv2.py, with the same checks, and those below. Arithmetic only: no device and no memory
for the model. With --search, layout flags that are given stay fixed. Exit code 2, with one line, for a usage error.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any, NoReturn

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.config.presets import PRESETS, Preset
from umv2_megatron.config.resolve import resolve
from umv2_megatron.config.usage import OneLineParser
from umv2_megatron.planning import bytes_touched_per_token, count_parameters, flops_per_token
from umv2_megatron.planning.device import Device
from umv2_megatron.planning.exchange import FORWARD
from umv2_megatron.planning.layout import Layout
from umv2_megatron.planning.machine_file import read_machine
from umv2_megatron.planning.model_shape import ModelShape
from umv2_megatron.planning.search import GIB, Evaluation, Model, RankBytes, evaluate, search
from umv2_megatron.planning.step_time import layer_exchange
from umv2_megatron.planning.tables import layout_tables, model_tables, search_table
from umv2_megatron.planning.traffic import traffic
from umv2_megatron.training.tool_entry import program_name, quiet_mcore

DECODE_BATCHES = (1, 16, 256)
COUNTS = ("embedding", "positions", "output", "attention", "ffn", "norms", "memory", "tables", "picked", "activated",
          "activated_without_embeddings", "total", "stored")
MODEL_KEYS = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "group_query_attention",
    "kv_channels", "seq_length", "max_position_embeddings", "vocab_size", "make_vocab_size_divisible_by", "swiglu",
    "normalization", "qk_layernorm", "add_bias_linear", "add_qkv_bias", "position_embedding_type",
    "untie_embeddings_and_output_weights", "ffn_variant",
)
# Layout flags that --search tries out unless they are given, and the fields of Layout that they set.
SEARCHED: dict[str, tuple[str, Any]] = {
    "tensor_model_parallel_size": ("tp", int), "pipeline_model_parallel_size": ("pp", int),
    "context_parallel_size": ("cp", int), "memory_parallel_size": ("memory_size", int),
    "memory_parallel_mode": ("memory_mode", ("dim", "row")), "memory_exchange_parts": ("exchange_parts", int),
    "micro_batch_size": ("micro_batch", int),
    "recompute_granularity": ("recompute", ("none", "selective", "full")),
    "num_layers_per_virtual_pipeline_stage": ("per_chunk", int),
}
# What a search starts from.
ALONE: dict[str, Any] = {key: 1 for key, (_, kind) in SEARCHED.items() if kind is int}
ALONE |= {"global_batch_size": None, "num_layers_per_virtual_pipeline_stage": None}
DEVICE_HELP = {
    "--peak-tflops": "dense bf16 TFLOP/s of a device; MFU is relative to it",
    "--flops-efficiency": "share of the peak that matrix products reach",
    "--attention-efficiency": "share of the peak that the products inside attention reach",
    "--search-rate": "1e9 keys and cells per second that the search for picks looks at, beside its passes over scores",
    "--memory-bandwidth": "GB/s of the device's memory, read and written, as reached",
    "--row-bandwidth": "GB/s of rows read at random places of a table, as reached",
    "--update-bandwidth": "GB/s of the optimizer's state, gradients and weights in an update, as reached",
    "--cache-bytes": "bytes that the device's shared cache (L2) keeps of data that all programs read",
    "--cache-bandwidth": "GB/s of rows read from that cache",
    "--intra-node-bandwidth": "GB/s from a device to others of its node, as reached",
    "--inter-node-bandwidth": "GB/s from a device to other nodes, as reached",
    "--all-reduce-gain": "bytes per second of an all-reduce over those of an all-gather (gloo: above 1)",
    "--gpus-per-node": "devices in a node",
    "--link-latency-us": "microseconds that a collective takes whatever its size",
    "--launch-us": "microseconds that the host takes to start an operation",
    "--starts-ahead": "1: the host starts operations while the device computes; 0: it computes itself",
    "--host-bandwidth": "GB/s between a device and the host's memory, in each direction, as reached",
    "--host-memory-bandwidth": "GB/s of the host's memory for each device, as reached",
}


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        build_parser(searching=True).print_help()
        return 0
    try:
        if "--list" in argv:
            print("\n".join(f"{each.name:<22} {each.description} ({each.source})" for each in PRESETS.values()))
            return 0
        figures = plan(argv)
    except ValueError as error:
        print(f"{program_name()}: error: {error}", file=sys.stderr)
        return 2
    if "--json" in argv:
        print(json.dumps(figures, indent=2))
        return 0
    parts = [model_tables(figures), layout_tables(figures) if "run" in figures else search_table(figures["search"])]
    print("\n\n".join(parts))
    return 0


def build_parser(searching: bool) -> OneLineParser:
    """The flags that are plan.py's own; with --search also those of pretrain_umv2.py that it tries out."""
    parser = OneLineParser(
        prog=program_name(),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--list", action="store_true", help="list the presets and stop")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--world-size", default=1, metavar="N", help="ranks (default: 1)")
    parser.add_argument("--gpu-memory-gib", metavar="GIB", help="memory of a device, to say what fits")
    parser.add_argument("--memory-reserve-gib", default=4.0, metavar="GIB",
                        help="of it kept free for the CUDA context, NCCL and fragmentation (default: 4)")
    parser.add_argument("--search", action="store_true", help="try TP x PP x virtual stages x CP x M x mode x "
                        "micro batch x recomputation x precision of gradients (default batch: a sequence per rank)")
    parser.add_argument("--top", default=10, metavar="N", help="layouts that --search prints (default: 10)")
    parser.add_argument("--transformer-impl", choices=("auto", "transformer_engine", "local"), default="auto",
                        help="whose activations to count: Transformer Engine's, as on a GPU (auto), or megatron-core's "
                        "own modules")
    parser.add_argument("--cross-entropy-fusion-impl", choices=("native", "te"), default="native",
                        help="as for pretrain_umv2.py; te, which a run on this machine may lack, can be planned for")
    device = parser.add_argument_group("device and links (defaults: H100 SXM, NVLink, 400 Gb/s per device)")
    device.add_argument("--machine", metavar="FILE", help="measured rates, from benchmarks/machine.py or "
                        "tools/gpu_check.sh; flags given beside it count before it")
    for flag, text in DEVICE_HELP.items():
        usual = getattr(Device, flag[2:].replace("-", "_"))
        device.add_argument(flag, metavar="X", help=f"{text} (default: {usual:g})")
    if searching:
        layout = parser.add_argument_group("layout, as for pretrain_umv2.py; --search keeps what is given")
        for key, (_, kind) in SEARCHED.items():
            metavar = "N" if kind is int else "{" + ",".join(kind) + "}"
            layout.add_argument("--" + key.replace("_", "-"), metavar=metavar)
    return parser


def plan(argv: list[str]) -> dict[str, Any]:
    """All figures for a command line, JSON-ready. Raises ``ValueError`` with one sentence for a user's mistake."""
    given, rest = build_parser("--search" in argv).parse_known_args(argv)
    world = _number("world-size", given.world_size, int)
    device = _device(given)
    reserve = _number("memory-reserve-gib", given.memory_reserve_gib, float, zero=True)
    capacity = None if given.gpu_memory_gib is None else _number("gpu-memory-gib", given.gpu_memory_gib, float)
    if given.search and capacity is None:
        raise ValueError("--gpu-memory-gib is missing; --search needs to know what fits")
    if capacity is not None and capacity <= reserve:
        raise ValueError(f"--gpu-memory-gib is {capacity:g}; expected more than --memory-reserve-gib ({reserve:g})")
    run = _resolve(rest, world)
    values = {**run.values, "transformer_impl": "local" if given.transformer_impl == "local" else "transformer_engine",
              "cross_entropy_fusion_impl": given.cross_entropy_fusion_impl}
    memory = run.memory if run.has_memory else None
    preset = _preset(rest)
    layout = Layout.from_values({**values, **({} if not given.search else ALONE)}, world)
    figures = _model_figures(preset, values, memory)
    available = None if capacity is None else (capacity - reserve) * GIB
    limits = {"gpu_memory_gib": capacity, "memory_reserve_gib": reserve}
    model = Model(values, memory)
    if given.search:
        assert available is not None
        figures["search"] = {"world_size": world, **limits, **_search(given, run, layout, model, device, available)}
        return figures
    found = evaluate(model, layout, device, available)
    figures["run"] = {**limits, **_run_figures(found, model, device, reserve)}
    return figures


def _device(given: argparse.Namespace) -> Device:
    """The device of the flags, of --machine where they say nothing, and of the defaults."""
    measured = {} if given.machine is None else read_machine(given.machine)[1]
    for field in dataclasses.fields(Device):
        text = getattr(given, field.name)
        if text is not None:
            zero = field.name == "starts_ahead"
            measured[field.name] = _number(field.name, text, type(field.default), zero=zero)
    return Device(**measured)


def _resolve(rest: list[str], world: int) -> Any:
    """The checked configuration of the remaining flags, whether or not this machine could run it."""
    return resolve(
        [*rest, "--transformer-impl", "local"], world, program=program_name(), for_training=False,
        before_mcore=quiet_mcore,
    )  # fmt: skip


def _preset(rest: list[str]) -> Preset | None:
    """The preset that is named, which ``resolve`` has checked."""
    names = [*rest[1:], ""]
    for flag, name in zip(rest, names):
        if flag == "--model-preset":
            return PRESETS[name]
        if flag.startswith("--model-preset="):
            return PRESETS[flag.split("=", 1)[1]]
    return None


def _number(flag: str, text: Any, kind: Any, zero: bool = False) -> Any:
    try:
        number = kind(text)
    except ValueError:
        number = -1
    if not (number > 0 or (zero and number == 0)) or number == float("inf"):
        expected = "a number of at least 0" if zero else "a number above 0"
        if kind is int:
            expected = "an integer of at least 1"
        raise ValueError(f"--{flag.replace('_', '-')} is {text!r}; expected {expected}")
    return number


# -- figures ---------------------------------------------------------------------------------------------------------


def _model_figures(preset: Preset | None, values: dict[str, Any], memory: Any) -> dict[str, Any]:
    count = count_parameters(values, memory)
    flops = flops_per_token(values, memory)
    ngrams = ModelShape.from_fields(values).ngrams
    touched = [bytes_touched_per_token(values, memory, batch) for batch in DECODE_BATCHES]
    derived = ("memory", "blocks", "memory_share", "forward", "training")
    return {
        "model_preset": preset.name if preset else None,
        "description": preset.description if preset else None,
        "source": preset.source if preset else None,
        "model": {key: values[key] for key in MODEL_KEYS if key in values},
        "memory": dataclasses.asdict(memory) if memory else None,
        "engram": dataclasses.asdict(ngrams) if ngrams else None,
        "parameters": {name: getattr(count, name) for name in COUNTS},
        "flops_per_token": {**dataclasses.asdict(flops), **{name: getattr(flops, name) for name in derived}},
        "bytes_touched_per_token": [{**dataclasses.asdict(item), "all": item.all} for item in touched],
        "stated": _stated(preset, count),
    }


def _stated(preset: Preset | None, count: Any) -> dict[str, Any] | None:
    """Figures somebody states for the preset, beside ours under the same convention; deviations are fractions."""
    if preset is None or preset.expected is None:
        return None
    expected = preset.expected
    ours = count.activated if expected.embeddings_in_activated else count.activated_without_embeddings
    result: dict[str, Any] = {"by": expected.stated_by, "activated": {
        "stated": expected.activated, "ours": ours, "deviation": ours / expected.activated - 1,
        "embeddings_counted": expected.embeddings_in_activated}}
    if expected.total is not None:
        result["total"] = {"stated": expected.total, "ours": count.total, "deviation": count.total / expected.total - 1}
    return result


def _layout(layout: Layout) -> dict[str, Any]:
    return {**dataclasses.asdict(layout), "dp": layout.dp}


def _rank(rank: RankBytes, reserve: float) -> dict[str, Any]:
    state, activations = rank.state, rank.activations
    kept = activations.peak - activations.working
    return {
        "stage": rank.stage, "parameters": state.parameters, "weights": state.weights, "gradients": state.gradients,
        "optimizer": state.optimizer, "host": state.host, "buffers": state.buffers, "activations_kept": kept,
        "activations_working": activations.working, "exchange_buffers": activations.exchange,
        "micro_batches_in_flight": activations.in_flight, "all": rank.all, "with_reserve": rank.all + reserve * GIB,
    }


def _run_figures(found: Evaluation, model: Model, device: Device, reserve: float) -> dict[str, Any]:
    layout = found.layout
    return {
        "layout": _layout(layout),
        "device": dataclasses.asdict(device),
        "fits": found.fits,
        "bytes_per_rank": [_rank(rank, reserve) for rank in found.ranks],
        "exchange_per_step": {mode: _exchange(model, layout, mode) for mode in ("dim", "row")} if model.memory else {},
        "collectives_per_step": _collectives(found, model),
        "step_time": dataclasses.asdict(found.time),
    }


def _memory_layers(family: MemoryConfig, model: Model, layout: Layout) -> list[int]:
    """Memory layers of one family on each pipeline stage."""
    present = family.memory_layers(model.shape(1).num_layers)
    return [sum(present[block] for chunk in range(layout.chunks)
                for block in layout.stage_blocks(len(present), stage, chunk)) for stage in range(layout.pp)]


def _exchange(model: Model, layout: Layout, mode: str) -> dict[str, Any] | None:
    """Bytes a rank sends per step with tables shared out by ``mode``; None where they cannot be."""
    assert model.memory is not None
    layout = dataclasses.replace(layout, memory_mode=mode)
    shape = model.shape(layout.tp)
    if layout.complaint(shape, model.memory) is not None:
        return None
    mlp = layout.recompute == "selective" and "mlp" in layout.recompute_modules
    families = shape.families(model.memory)
    layers = [_memory_layers(family, model, layout) for family in families]
    busiest = max(range(layout.pp), key=lambda stage: sum(each[stage] for each in layers))
    steps: dict[str, float] = {}
    sent = 0.0
    for family, each in zip(families, layers):
        for name, count in layer_exchange(shape, family, layout).items():
            again = 2 if (layout.recompute == "full" or mlp) and name in FORWARD else 1
            steps[name] = steps.get(name, 0) + count * again * layout.micro_batches * each[busiest]
            sent += count * each[busiest]
    tokens = layout.own_tokens(shape.seq_length) * sum(each[busiest] for each in layers)
    return {"steps": steps, "all": sum(steps.values()), "per_token_and_layer": sent / tokens}


def _collectives(found: Evaluation, model: Model) -> dict[str, float]:
    """Bytes a rank sends per step in all other collectives, on the stage that sends most."""
    layout = found.layout
    shape = model.shape(layout.tp)
    blocks = max(len(layout.stage_blocks(shape.num_layers, stage)) for stage in range(layout.pp)) * layout.chunks
    every = [traffic(shape, model.memory, layout, rank.state) for rank in found.ranks]
    again = 1 if layout.recompute == "full" else 0
    sent = every[0]
    per_step = blocks * layout.micro_batches
    return {
        "tensor_parallel": per_step * ((1 + again) * sent.tensor_forward + sent.tensor_backward),
        "context_parallel": per_step * (2 + again) * sent.context,
        "pipeline": layout.micro_batches * layout.chunks * 2 * sent.pipeline,
        "dense_gradients": max(each.dense_gradients for each in every),
        "table_gradients": max(each.table_gradients for each in every),
        "dense_weights": max(each.dense_weights for each in every),
        "table_weights": max(each.table_weights for each in every),
    }


# -- search ----------------------------------------------------------------------------------------------------------


def _search(given: Any, run: Any, start: Layout, model: Model, device: Device, available: float) -> dict[str, Any]:
    values = run.values
    fixed = {}
    for key, (name, kind) in SEARCHED.items():
        text = getattr(given, key)
        if text is not None:
            if kind is not int and text not in kind:
                raise ValueError(f"--{key.replace('_', '-')} is {text!r}; expected one of {', '.join(kind)}")
            fixed[name] = _number(key, text, int) if kind is int else text
    if fixed.get("recompute") == "selective":
        fixed["recompute_modules"] = tuple(values["recompute_modules"] or ("core_attn",))
    if "grad_reduce_in_fp32" in run.sources or not start.grads_in_fp32:
        fixed["grads_in_fp32"] = start.grads_in_fp32
    if "sequence_parallel" in run.sources:
        fixed["sequence_parallel"] = bool(values["sequence_parallel"])
    batch = values["global_batch_size"] if "global_batch_size" in run.sources else run.world_size
    sharded = start.distributed_optimizer or not (start.muon or "use_distributed_optimizer" in run.sources)
    reducing = start.overlap_grad_reduce or "overlap_grad_reduce" not in run.sources
    gathering = sharded and reducing and (start.overlap_param_gather or "overlap_param_gather" not in run.sources)
    stream = start.memory_stream or (run.has_memory and not start.graphs and "memory_stream" not in run.sources)
    start = dataclasses.replace(start, distributed_optimizer=sharded, overlap_grad_reduce=reducing,
                                overlap_param_gather=gathering, memory_stream=stream)
    found = search(model, start, batch, device, available, fixed)
    top = _number("top", given.top, int)
    smallest = found.smallest
    return {
        "global_batch_size": batch,
        "legal": found.legal,
        "fitting": len(found.fitting),
        "best": [{"layout": _layout(each.layout), "flags": each.layout.flags(values["num_layers"]),
                  "gib": each.worst.all / GIB,
                  "step": each.time.step, "mfu": each.time.mfu,
                  "tokens_per_second": each.time.tokens_per_second} for each in found.fitting[:top]],
        "smallest": None if smallest is None else {"layout": _layout(smallest.layout), "gib": smallest.worst.all / GIB},
    }


def run() -> NoReturn:
    """The program."""
    raise SystemExit(main())
