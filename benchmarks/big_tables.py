"""Tables larger than the memory that works on them: convert a checkpoint, then generate text from the mapped files.

    python benchmarks/big_tables.py --folder /scratch/big                 12 GiB of tables; needs 26 GiB of disk
    python benchmarks/big_tables.py --folder /scratch/big --gib 1         for a try

A synthetic export (random weights) is imported and exported again by tools/convert_checkpoint.py, each in a process of
its own whose peak resident memory is read from the kernel (what ``/usr/bin/time -v`` prints). Then two processes
continue the same prompt: one that may have no more address space than the files it maps and 4 GiB, with
``memory_tables="mmap"``; and one with the tables in memory, where the machine has room. Both must give the same tokens.
Everything written is removed at the end, but with --keep.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

GIB = 1 << 30
LAYERS, HIDDEN, WIDTH = 4, 256, 384
RSS_LIMIT = 3 * GIB
SPACE_BEYOND_FILES = 4 * GIB
PROMPT = "The table is larger than the memory of this machine: "
_BLOCK_ROWS = 1 << 14


def main(argv: list[str]) -> int:
    """Run all parts; 0 when everything stayed within its limits and the tokens agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write; must not exist yet")
    parser.add_argument("--gib", type=float, default=12.0, help="GiB of value tables, float32 (default: 12)")
    parser.add_argument("--max-shard-size", default="2GB", help="of the conversions (default: 2GB)")
    parser.add_argument("--tokens", type=int, default=24, help="tokens to generate (default: 24)")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--keep", action="store_true", help="leave the export there")
    parser.add_argument("--generate", nargs=2, metavar=("EXPORT", "PLACE"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.generate:
        return _generate(Path(options.generate[0]), options.generate[1], options.tokens)
    if options.folder is None or options.folder.exists():
        parser.error(f"--folder is {options.folder}; expected a directory that does not exist yet")
    options.folder.mkdir(parents=True)
    try:
        figures = _run(options.folder, options.gib, options.max_shard_size, options.tokens)
    finally:
        if not options.keep:
            shutil.rmtree(options.folder)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    good = all(part["good"] for part in figures.values())
    print("all within limits" if good else "a limit was missed")
    return 0 if good else 1


def _run(folder: Path, gib: float, max_shard_size: str, tokens: int) -> dict[str, Any]:
    start = time.monotonic()
    table_bytes = write_synthetic_export(folder / "synthetic", gib)
    print(f"synthetic export with {table_bytes / GIB:.2f} GiB of tables: {time.monotonic() - start:.0f} s", flush=True)
    figures: dict[str, Any] = {}
    tool = [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py")]
    sizes = ["--max-shard-size", max_shard_size]
    steps = (("from-hf", folder / "synthetic", folder / "run"), ("to-hf", folder / "run", folder / "export"))
    for command, load, save in steps:
        done = _measured([*tool, command, "--load", str(load), "--save", str(save), *sizes])
        done["good"] = done["peak_rss"] < RSS_LIMIT
        figures[command] = {**done, "table_bytes": table_bytes}
        print(f"{command}: peak RSS {done['peak_rss'] / GIB:.2f} GiB (limit 3), {done['seconds']:.0f} s", flush=True)
        shutil.rmtree(load)
    figures["mmap"] = _generated(folder / "export", "mmap", tokens, table_bytes)
    if _available() > table_bytes + 4 * GIB:
        figures["device"] = _generated(folder / "export", "device", tokens, table_bytes)
        same = figures["device"]["ids"] == figures["mmap"]["ids"]
        figures["device"]["good"] = same
        print("the same tokens" if same else "OTHER TOKENS")
    else:
        print(f"tables in memory: left out, {_available() / GIB:.1f} GiB are available")
    return figures


def _generated(export: Path, place: str, tokens: int, table_bytes: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--generate", str(export), place, "--tokens", str(tokens)]
    done = _measured(command)
    result = {**done, **json.loads(done.pop("output").splitlines()[-1])}
    result["good"] = len(result["ids"]) == tokens
    print(
        f"generation, tables {place}: own memory {result['own_memory'] / GIB:.2f} GiB, with file pages that the "
        f"kernel mapped {result['peak_rss'] / GIB:.2f}; address space {result['peak_space'] / GIB:.2f} GiB, of which "
        f"tables {table_bytes / GIB:.2f}; {result['generate_seconds']:.1f} s",
        flush=True,
    )
    return result


def _measured(command: list[str]) -> dict[str, Any]:
    """Run to the end; peak resident bytes as the kernel counted them, wall seconds, standard output."""
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}\n{output[-2000:]}")
    return {"peak_rss": usage.ru_maxrss * 1024, "seconds": time.monotonic() - start, "output": output}


def _available() -> int:
    """Bytes that a new process may take without swapping."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


# -- the model -----------------------------------------------------------------------------------------------------


def write_synthetic_export(directory: Path, gib: float) -> int:
    """Write an export with random weights and ``gib`` GiB of float32 tables; returns the bytes of its tables."""
    from umv2_megatron.parallel import cpu_platform

    cpu_platform.install()
    import torch

    from umv2_megatron.conversion.export_files import INDEX, write_config
    from umv2_megatron.conversion.plan import part_shape
    from umv2_megatron.conversion.safetensors_files import SafetensorsWriter, TensorInfo
    from umv2_megatron.conversion.settings import megatron_values, sizes_of
    from umv2_megatron.conversion.tokenizer_files import _byte_level
    from umv2_megatron.hf import UMv2Config
    from umv2_megatron.hf.name_table import pairings

    directory.mkdir(parents=True)
    side = max(16, round((gib * GIB / (LAYERS * 2 * WIDTH * 4)) ** 0.5))
    config = UMv2Config(
        vocab_size=257, hidden_size=HIDDEN, intermediate_size=512, num_hidden_layers=LAYERS, num_attention_heads=4,
        max_position_embeddings=128, memory_num_keys=side, memory_key_dim=64, memory_value_dim=WIDTH,
        memory_pre_value_dim=WIDTH, memory_topk=16, memory_table_chunk_rows=1 << 18, eos_token_id=256, dtype="float32",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(_BLOCK_ROWS, WIDTH, generator=generator)
    sizes = sizes_of(megatron_values(config), config.vocab_size, config.memory_table_chunk_rows)
    dtypes = {"weights": torch.float32, "float32": torch.float32, "index": torch.int32}
    tables, others = [], []
    for pairing in pairings(sizes):
        for part in pairing.parts:
            info = TensorInfo(dtypes[pairing.dtype], part_shape(pairing, part))
            (tables if ".table." in part.name else others).append((part.name, info))

    def block(name: str, first: int, rows: int) -> torch.Tensor:
        """No two rows of a table are alike: the block of noise is turned, and scaled by the row's number."""
        shift = (hash_of(name) + first) % _BLOCK_ROWS
        return noise.roll(shift, 0)[:rows] * torch.linspace(0.5, 1.5, rows).unsqueeze(1).mul(1 + first / 1e7)

    weight_map = {}
    for number, group in enumerate([others, *([table] for table in tables)]):
        file = f"model-{number:05d}.safetensors"
        with SafetensorsWriter(directory / file, group) as writer:
            for name, info in group:
                weight_map[name] = file
                if ".table." not in name:
                    writer.write(name, _random(name, info, generator))
                    continue
                for first in range(0, info.rows, _BLOCK_ROWS):
                    writer.write(name, block(name, first, min(_BLOCK_ROWS, info.rows - first)).contiguous())
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    write_config(directory, config)
    (directory / "tokenizer.json").write_text(_byte_level().to_str(), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return sum(info.num_bytes for _, info in tables)


def hash_of(name: str) -> int:
    """A number that belongs to a name, the same in every process."""
    return sum(ord(letter) * 31**place for place, letter in enumerate(name)) % 1_000_003


def _random(name: str, info: Any, generator: Any) -> Any:
    import torch

    if name.endswith(".perm"):
        return torch.randperm(info.rows, generator=generator).to(info.dtype)
    if len(info.shape) == 1:
        return torch.ones(info.shape)
    scale = 1.0 if ".retrieval." in name else info.shape[-1] ** -0.5
    return torch.randn(info.shape, generator=generator) * scale


def _generate(export: Path, place: str, tokens: int) -> int:
    """Continue the prompt greedily; prints one line of JSON. Sets the limit of its own address space first."""
    if place == "mmap":
        files = sum(path.stat().st_size for path in export.glob("*.safetensors"))
        resource.setrlimit(resource.RLIMIT_AS, (files + SPACE_BEYOND_FILES,) * 2)
    import torch
    from transformers import AutoTokenizer

    from umv2_megatron.hf import UMv2ForCausalLM

    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(export)
    model = UMv2ForCausalLM.from_pretrained(export, memory_tables=place, dtype=torch.float32).eval()
    if place == "device":
        # transformers leaves what it loads mapped to the files until it is written to: bring it into memory
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    start = time.monotonic()
    out = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :].tolist()
    spent = time.monotonic() - start
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    space, own = (int(lines[name].split()[0]) * 1024 for name in ("VmPeak", "RssAnon"))
    text = tokenizer.decode(out)
    print(json.dumps({"ids": out, "text": text, "peak_space": space, "own_memory": own, "generate_seconds": spent}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
