"""The planner's figures as text. Its input is the dictionary that ``tools/plan.py --json`` prints, and nothing else."""

from __future__ import annotations

from typing import Any

LABELS = {
    "embedding": "embedding (vocabulary x H)", "positions": "position embedding",
    "output": "output matrix (0: tied to the embedding)", "attention": "attention", "ffn": "FFN", "norms": "norms",
    "memory": "memory layers without tables", "tables": "value tables", "picked": "  of these read per token",
    "activated": "activated (vocabulary matrix once)", "activated_without_embeddings": "activated without embeddings",
    "total": "total without embeddings", "stored": "stored (everything)",
    "attention_projections": "attention projections", "attention_scores": "attention scores (causal)",
    "memory_projections": "memory projections", "memory_scoring": "memory key scores",
    "memory_grid": "memory K x K grid", "memory_lookup": "memory row lookup", "logits": "logits", "forward": "forward",
    "training": "training (3x)",
    "weights": "weights", "gradients": "main gradients", "optimizer": "optimizer state",
    "buffers": "buffers (shuffles)",
    "activations_kept": "activations kept", "activations_working": "activations worked on",
    "exchange_buffers": "  of these exchange buffers", "all": "sum", "with_reserve": "sum with reserve",
}
KINDS = ("weights", "gradients", "optimizer", "buffers", "activations_kept", "activations_working", "exchange_buffers",
         "all", "with_reserve")
TIMES = {
    "forward": "forward of a micro-batch", "backward": "backward of a micro-batch",
    "exchange": "  of both: exchanges not hidden", "collectives": "  of both: TP, CP, PP not hidden",
    "bubble": "pipeline bubble", "data_parallel": "data parallelism not hidden", "optimizer": "optimizer",
    "step": "step",
}


def model_tables(figures: dict[str, Any]) -> str:
    """Parameters, FLOPs, bytes per decoded token and stated figures."""
    preset = figures["model_preset"]
    lines = [f"{preset}: {figures['description']} ({figures['source']})"] if preset else ["model from flags"]
    lines += ["", "parameters"]
    lines += [_line(name, short(value)) + f"  {value:>18,}" for name, value in figures["parameters"].items()
              if value or name == "output"]
    flops = figures["flops_per_token"]
    lines += ["", f"FLOPs per token (sequences of {figures['model']['seq_length']})"]
    lines += [_line(name, short(value)) for name, value in flops.items() if name in LABELS and value
              and name not in ("memory", "blocks")]
    if flops["memory"]:
        lines += [f"  {'memory share of the blocks':<42} {100 * flops['memory_share']:>8.1f}%"]
    lines += ["", "weight bytes read per decoded token (bf16)",
              f"  {'tokens decoded together':<26} {'dense':>10} {'rows':>10} {'sum':>10}  MoE of this size"]
    for item in figures["bytes_touched_per_token"]:
        moe = "" if item["moe"] is None else f"{short(item['moe']):>10} ({item['moe'] / item['all']:.1f}x)"
        lines += [f"  {item['batch']:<26} {short(item['dense']):>10} {short(item['rows']):>10} "
                  f"{short(item['all']):>10} {moe}"]
    return "\n".join(lines + _stated(figures["stated"]))


def _stated(stated: dict[str, Any] | None) -> list[str]:
    if not stated:
        return []
    lines = ["", f"stated by {stated['by']}"]
    for name in ("activated", "total"):
        if name in stated:
            item = stated[name]
            without = name == "total" or not item["embeddings_counted"]
            label = f"{name}, embeddings {'left out' if without else 'once'}"
            deviation = round(100 * item["deviation"], 1) + 0.0  # + 0.0 makes 0.0 of -0.0
            lines += [f"  {label:<32} {short(item['stated']):>9}  here {short(item['ours']):>9}  "
                      f"deviation {deviation:+.1f}%"]
    return lines


def layout_tables(figures: dict[str, Any]) -> str:
    """Bytes per rank by kind and stage, exchanges of both modes, collectives, and the time of a step."""
    run = figures["run"]
    lines = [f"layout: {name_of(run['layout'])}"]
    ranks = run["bytes_per_rank"]
    lines += ["", f"{'bytes per rank (GiB)':<44}" + "".join(f"{'stage ' + str(each['stage']):>12}" for each in ranks)]
    lines += [f"  {'parameters held':<42}" + "".join(f"{short(each['parameters']):>12}" for each in ranks)]
    for kind in KINDS:
        lines += [f"  {LABELS[kind]:<42}" + "".join(f"{each[kind] / 2**30:>12.2f}" for each in ranks)]
    if any(each["host"] for each in ranks):
        label = "optimizer state in host memory, beside"
        lines += [f"  {label:<42}" + "".join(f"{each['host'] / 2**30:>12.2f}" for each in ranks)]
    if run["gpu_memory_gib"] is not None:
        verdict = "fits" if run["fits"] else "does not fit"
        lines += [f"  {verdict} in {run['gpu_memory_gib']:g} GiB of which {run['memory_reserve_gib']:g} are kept free"]
    lines += ["", "bytes that a rank sends per step"]
    for mode, sent in run["exchange_per_step"].items():
        lines += [f"  {'exchanges of the memory layers, ' + mode:<42} "
                  + (f"{size(sent['all']):>10}  {size(sent['per_token_and_layer'])} per token and layer"
                     if sent else "   not possible with this M")]
    lines += [f"  {name.replace('_', ' '):<42} {size(sent):>10}" for name, sent in run["collectives_per_step"].items()]
    lines += ["", "predicted time (milliseconds)"]
    time = run["step_time"]
    lines += [f"  {label:<42} {1000 * time[name]:>10.2f}" for name, label in TIMES.items()]
    lines += [f"  {'tokens per second':<42} {short(time['tokens_per_second']):>10}",
              f"  {'MFU':<42} {100 * time['mfu']:>9.1f}%"]
    return "\n".join(lines)


def search_table(found: dict[str, Any]) -> str:
    """The best layouts of a search."""
    lines = [f"search over {found['legal']:,} legal layouts of {found['world_size']} ranks, "
             f"{found['global_batch_size']} sequences per step: {found['fitting']:,} fit in "
             f"{found['gpu_memory_gib']:g} GiB with {found['memory_reserve_gib']:g} kept free"]
    if not found["best"]:
        smallest = found["smallest"]
        if smallest:
            lines += [f"nothing fits; the least is {smallest['gib']:.1f} GiB with {name_of(smallest['layout'])}"]
        else:
            lines += [f"no layout of {found['world_size']} ranks agrees with the sizes that were given; leave some of "
                      "the parallel sizes to the search, or change --world-size"]
        return "\n".join(lines)
    head = ("TP", "PP", "V", "CP", "DP", "M", "mode", "parts", "micro", "times", "recompute", "grads", "GiB", "step ms",
            "MFU")
    widths = (4, 4, 4, 4, 6, 5, 5, 6, 6, 6, 10, 6, 7, 10, 7)
    lines += ["", "".join(f"{text:>{width}}" for text, width in zip(head, widths))]
    for item in found["best"]:
        layout = item["layout"]
        mode = layout["memory_mode"] if layout["memory_size"] > 1 else "-"
        grads = "fp32" if layout["grads_in_fp32"] or not layout["bf16"] else "bf16"
        row = (layout["tp"], layout["pp"], layout["chunks"], layout["cp"], layout["dp"], layout["memory_size"], mode,
               layout["exchange_parts"], layout["micro_batch"], layout["micro_batches"], _recomputed(layout), grads,
               f"{item['gib']:.1f}", f"{1000 * item['step']:.1f}", f"{100 * item['mfu']:.1f}%")
        lines += ["".join(f"{value!s:>{width}}" for value, width in zip(row, widths))]
    return "\n".join([*lines, "", "flags of the first:", "  " + found["best"][0]["flags"]])


def name_of(layout: dict[str, Any]) -> str:
    """A layout in one line."""
    sizes = {"TP": "tp", "PP": "pp", "CP": "cp", "DP": "dp", "virtual stages": "chunks"}
    parts = [f"{label} {layout[key]}" for label, key in sizes.items() if layout[key] > 1]
    if layout["memory_size"] > 1:
        parts.append(f"M {layout['memory_size']} by {layout['memory_mode']}")
    count = layout["micro_batches"]
    parts.append(f"{count} micro-batch{'es' if count > 1 else ''} of {layout['micro_batch']}")
    parts.append("bf16" if layout["bf16"] else "fp32")
    if layout["recompute"] != "none":
        parts.append(f"recomputation: {_recomputed(layout)}")
    if layout["distributed_optimizer"]:
        parts.append("distributed optimizer")
    return f"{layout['world']} rank{'s' if layout['world'] > 1 else ''}: " + ", ".join(parts)


def _recomputed(layout: dict[str, Any]) -> str:
    return "+".join(layout["recompute_modules"]) if layout["recompute"] == "selective" else layout["recompute"]


def _line(name: str, text: str) -> str:
    return f"  {LABELS.get(name, name):<42} {text:>9}"


def size(value: float) -> str:
    """A number of bytes with its unit."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if value >= unit:
            return f"{value / unit:.4g} {name}"
    return f"{value:.4g} B"


def short(value: float) -> str:
    """A count with a letter for its power of 1000, about four digits."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"
