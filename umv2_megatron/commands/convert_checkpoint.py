"""Checkpoints to Hugging Face exports and back, and dense models to checkpoints with memory layers.

    python tools/convert_checkpoint.py to-hf --load runs/demo/checkpoints --save exports/demo
    python tools/convert_checkpoint.py verify --load runs/demo/checkpoints --hf exports/demo
    python tools/convert_checkpoint.py from-hf --load exports/demo --save runs/from_hf
    python tools/convert_checkpoint.py upcycle --hf models/llama --save runs/upcycled --memory-num-keys 256
    python tools/convert_checkpoint.py verify --load runs/upcycled --hf models/llama

No flag describes the model: checkpoint and export each say what they hold. upcycle alone takes flags, of the memory
layers that it adds to a Llama, Mistral, Qwen2, Qwen3 or OLMo 2. Tensors pass through in blocks, so memory does not grow
with the model. A conversion that was killed goes on when the same command is given again. See docs/hugging-face.md and
docs/upcycling.md.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from umv2_megatron.config.flags import add_options, read_options
from umv2_megatron.config.upcycle_options import OPTIONS, STARTS
from umv2_megatron.training.tool_entry import program_name, read_text, run_tool
from umv2_megatron.user_paths import is_url, user_path

if TYPE_CHECKING:
    import torch

    from umv2_megatron.conversion.verify import Comparison


def main(arguments: argparse.Namespace) -> None:
    """Run the chosen command."""
    if arguments.command == "verify":
        check_verify_flags(arguments)
    from umv2_megatron.parallel import cpu_platform

    cpu_platform.install()  # before megatron.core is imported
    {"to-hf": to_hf, "from-hf": from_hf, "verify": verify, "upcycle": upcycle}[arguments.command](arguments)


def to_hf(arguments: argparse.Namespace) -> None:
    """Write an export."""
    from umv2_megatron.checkpoint.contents import locate
    from umv2_megatron.conversion.plan import parse_size
    from umv2_megatron.conversion.to_hf import ExportOptions, export_checkpoint

    store, iteration = locate(arguments.load, arguments.ckpt_step)
    if arguments.license is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", arguments.license):
        raise ValueError(
            f"--license is {arguments.license!r}; expected an identifier such as apache-2.0 or cc-by-4.0, as the Hub "
            "and SPDX have them"
        )
    options = ExportOptions(
        _dtype(arguments.dtype),
        parse_size(arguments.max_shard_size),
        arguments.tokenizer_model,
        arguments.tokenizer,
        arguments.license,
    )
    export_checkpoint(store, iteration, local_export("--save", arguments.save), options)
    print(f"exported iteration {iteration} of {store.root} to {arguments.save}")


def from_hf(arguments: argparse.Namespace) -> None:
    """Write a checkpoint."""
    from umv2_megatron.conversion.from_hf import import_export
    from umv2_megatron.conversion.plan import parse_size

    size = parse_size(arguments.max_shard_size)
    export, save = local_export("--load", arguments.load), user_path(arguments.save, "--save")
    made = import_export(export, save, _dtype(arguments.dtype), size)
    print(f"wrote {made}; train from it with pretrain_umv2.py --use-checkpoint-args --load {arguments.save} --finetune")


def upcycle(arguments: argparse.Namespace) -> None:
    """Write a checkpoint of a dense model with memory layers."""
    from umv2_megatron.conversion.plan import parse_size
    from umv2_megatron.conversion.upcycle import UpcycleOptions
    from umv2_megatron.conversion.upcycle import upcycle as write

    settings = read_options({key: value for key, value in vars(arguments).items() if key in OPTIONS})
    options = UpcycleOptions(
        arguments.model_preset,
        settings,
        arguments.start,
        _dtype(arguments.dtype),
        parse_size(arguments.max_shard_size),
        arguments.tokenizer,
    )
    made = write(local_export("--hf", arguments.hf), user_path(arguments.save, "--save"), options)
    print(f"wrote {made}; train from it with pretrain_umv2.py --use-checkpoint-args --load {arguments.save} --finetune")


def local_export(flag: str, where: str) -> Path:
    """The directory of an export. Raises ``ValueError`` for a URL."""
    if is_url(where):
        raise ValueError(
            f"{flag} is {where}; expected a local directory, as transformers reads and writes no other; copy exports "
            "to and from the store (aws s3 sync, or fsspec), only checkpoints may be behind a URL"
        )
    return Path(where)


def check_verify_flags(arguments: argparse.Namespace) -> None:
    """Raises ``ValueError`` naming a flag that cannot work."""
    if arguments.tokens < 1:
        raise ValueError(f"--tokens is {arguments.tokens}; expected 1 or more")
    if arguments.tolerance is not None and not 0 <= arguments.tolerance < math.inf:
        raise ValueError(f"--tolerance is {arguments.tolerance}; expected a number of 0 or more")


def verify(arguments: argparse.Namespace) -> None:
    """Compare weights and logits; exit code 1 where they differ."""
    from umv2_megatron.checkpoint.contents import locate
    from umv2_megatron.checkpoint.saved_config import read_config
    from umv2_megatron.config.variants import has_memory
    from umv2_megatron.conversion.dense_models import is_dense_source
    from umv2_megatron.conversion.verify import compare, compare_weights  # imports the models
    from umv2_megatron.conversion.verify_source import compare_source, compare_source_weights

    store, iteration = locate(arguments.load, arguments.ckpt_step)
    values = read_config(store, iteration)["values"]
    text = None if arguments.text is None else read_text("--text", arguments.text)
    if text == "":
        raise ValueError(f"--text is {arguments.text}; expected a file with text in it")
    if text is not None and values["tokenizer_type"] == "NullTokenizer":
        raise ValueError(
            f"--text is {arguments.text}, but the checkpoint has no tokenizer to read it; leave --text away"
        )
    load, export = str(store.root), local_export("--hf", arguments.hf)
    dense = is_dense_source(export, has_memory(values["ffn_variant"]))
    weights = (
        compare_source_weights(load, iteration, export) if dense else compare_weights(load, iteration, export)
    )
    failed = bool(weights.different)
    print(
        f"weights: {weights.numbers:,} numbers in {weights.tensors} tensors, "
        + (f"{len(weights.different)} tensors DIFFER" if failed else "the same bit for bit: good"),
        *weights.different[:8],
        sep="\n    ",
        flush=True,
    )
    if not arguments.weights_only:
        how = (load, iteration, export, text, arguments.tokens, arguments.tolerance, arguments.tokenizer_model)
        for result in [compare_source(*how)] if dense else compare(*how):
            failed |= not result.good
            print(_line(result), flush=True)
    if failed:
        what = "the model that was upcycled" if dense else "the export"
        print(f"{program_name()}: error: {what} does not compute what the checkpoint does", file=sys.stderr)
        sys.exit(1)


def _line(result: Comparison) -> str:
    """What is said of one comparison of logits."""
    far = not result.difference <= result.limit
    text = (
        f"{str(result.dtype).removeprefix('torch.')}: {result.what} {result.difference:.1e} of the largest logit, "
        f"limit {result.limit:.1e}; "
    )
    picks, first = result.picks, ""
    if picks is not None and picks.compared:
        text += f"of {picks.compared:,} picks {picks.ties:,} differ by a tie, {picks.wrong:,} otherwise; "
        if picks.wrong:
            first = f"\n    the first wrong pick: {picks.first}"
    verdict = "good" if result.good else " and ".join(["TOO FAR APART"] * far + ["WRONG PICKS"] * bool(first))
    return text + f"same likeliest token for {result.same_choice:.1%} of {result.tokens} tokens: {verdict}{first}"


def _dtype(name: str) -> torch.dtype | None:
    import torch

    return None if name == "auto" else getattr(torch, name)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(dest="command", required=True, metavar="to-hf | from-hf | verify | upcycle")
    out = commands.add_parser("to-hf", help="checkpoint to export")
    out.add_argument("--load", required=True, metavar="DIR", help="directory of checkpoints, or one iter_* in it")
    out.add_argument("--save", required=True, metavar="DIR", help="the export; must not exist yet")
    back = commands.add_parser("from-hf", help="export to checkpoint")
    back.add_argument("--load", required=True, metavar="DIR", help="the export")
    back.add_argument("--save", required=True, metavar="DIR", help="directory of checkpoints, without any yet")
    check = commands.add_parser("verify", help="compare the weights and the logits of a checkpoint and an export")
    check.add_argument("--load", required=True, metavar="DIR", help="directory of checkpoints, or one iter_* in it")
    check.add_argument("--hf", required=True, metavar="DIR", help="the export, or the model that was upcycled")
    check.add_argument("--weights-only", action="store_true", help="compare no logits: needs little memory")
    check.add_argument("--text", metavar="FILE", help="text to compare on (default: a paragraph of our own)")
    check.add_argument("--tokens", type=int, default=256, help="tokens of it to compare on, at most (default: 256)")
    check.add_argument(
        "--tolerance",
        type=float,
        help="largest difference of logits, as a share of the largest (default: 1e-6 in float64, 1e-5 in float32)",
    )
    for command in (out, check):
        command.add_argument("--ckpt-step", type=int, help="iteration to take (default: the newest)")
        command.add_argument(
            "--tokenizer-model", help="the tokenizer's file, where it is no longer where training had it"
        )
    out.add_argument("--no-tokenizer", dest="tokenizer", action="store_false", help="leave the tokenizer out")
    out.add_argument("--license", metavar="ID", help="licence of the weights, for the model card (default: not stated)")
    dense = _add_upcycle(commands)
    for command in (out, back, check, dense):
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
    trained = ["auto", "float32", "bfloat16"]
    choices = {out: [*trained, "float16"], back: trained, dense: trained}
    for command, dtypes in choices.items():
        command.add_argument("--dtype", choices=dtypes, default="auto", help="of the weights (default: as they are)")
        command.add_argument("--max-shard-size", default="4GB", metavar="SIZE", help="largest file (default: 4GB)")
    return made


def _add_upcycle(commands: Any) -> argparse.ArgumentParser:
    """The command that takes flags of the memory layers, too."""
    dense: argparse.ArgumentParser = commands.add_parser(
        "upcycle",
        help="dense model to checkpoint with memory layers",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    dense.add_argument("--hf", required=True, metavar="DIR", help="the model: config.json and safetensors")
    dense.add_argument("--save", required=True, metavar="DIR", help="directory of checkpoints, without any yet")
    dense.add_argument("--model-preset", default=None, metavar="NAME", help="take the memory layers of a known model")
    dense.add_argument(
        "--start",
        choices=STARTS,
        default="silent",
        help="how memory layers begin: without an effect, by zeros in the projection of their values (silent),\n"
        "or as --memory-init says, as in a run from scratch (default: silent)",
    )
    dense.add_argument(
        "--no-tokenizer", dest="tokenizer", action="store_false", default=True, help="leave the tokenizer where it is"
    )
    add_options(dense, OPTIONS)
    return dense


def run() -> NoReturn:
    """The program."""
    run_tool(parser(), main)
