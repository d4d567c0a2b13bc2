"""Write text with a trained model, streaming it to the terminal.

    python tools/generate.py --load runs/demo/checkpoints --prompt "def main(" --max-new-tokens 100
    python tools/generate.py --load exports/demo --memory-tables mmap --prompt-file question.txt --temperature 0
    echo "def main(" | python tools/generate.py --load runs/demo/checkpoints

--load is a directory of checkpoints of ours, one iter_* in it, or a Hugging Face export; each says what the model and
its tokenizer are. The same tokens are drawn from both, for the same seed. Keys and values of earlier tokens are kept: a
token costs a forward pass over one token until the context is full; from then on the oldest token drops out with every
new one, and each costs a pass over the whole context. No code of an export is run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from umv2_megatron.checkpoint.store import METADATA_FILE
from umv2_megatron.evaluation.local_export import MEMORY_TABLES
from umv2_megatron.training.tool_entry import read_text, run_tool
from umv2_megatron.user_paths import user_path

if TYPE_CHECKING:
    from umv2_megatron.evaluation.generation import CachedModel


class Loaded(NamedTuple):
    """A model with what generation needs of its tokenizer. ``end`` is None where no token ends a document."""

    logits_of: CachedModel
    context: int
    tokenize: Callable[[str], list[int]]
    detokenize: Callable[[Iterable[int]], str]
    vocab_size: int
    end: int | None


def load_checkpoint(arguments: argparse.Namespace) -> Loaded:
    """From a directory of our checkpoints."""
    from umv2_megatron.durable_files import NoCheckpointError
    from umv2_megatron.evaluation.generation import CachedMegatronModel
    from umv2_megatron.training.restore import load_trained_model

    if arguments.memory_tables is not None:
        raise ValueError(
            f"--memory-tables is {arguments.memory_tables} and {arguments.load} holds checkpoints: leave it out, or "
            "give a Hugging Face export (tools/convert_checkpoint.py to-hf)"
        )
    try:
        trained = load_trained_model(arguments.load, arguments.ckpt_step, arguments.tokenizer_model)
    except NoCheckpointError:
        raise ValueError(
            f"--load is {arguments.load!r}; expected a directory of checkpoints, or an export with a config.json"
        ) from None
    print(f"iteration {trained.iteration} of {arguments.load}", file=sys.stderr)
    tokenizer, context = trained.tokenizer, trained.run.model.seq_length
    return Loaded(
        CachedMegatronModel(trained.model, context),
        context,
        tokenizer.tokenize,
        tokenizer.detokenize,
        tokenizer.num_tokens,
        tokenizer.eod,
    )


def load_export(arguments: argparse.Namespace) -> Loaded:
    """From a directory in Hugging Face form; models other than ours work, too, if transformers knows them."""
    from umv2_megatron.evaluation.generation import CachedTransformersModel
    from umv2_megatron.evaluation.local_export import open_export
    from umv2_megatron.parallel import cpu_platform

    for name in ("ckpt_step", "tokenizer_model"):
        if getattr(arguments, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} is {getattr(arguments, name)} and {arguments.load} is an export: leave it out")
    export = open_export(arguments.load, "--load", memory_tables=arguments.memory_tables, device=cpu_platform.device())
    tokenizer = export.tokenizer
    return Loaded(
        CachedTransformersModel(export.model),
        export.context,
        lambda text: tokenizer.encode(text, add_special_tokens=False),
        lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False),
        export.vocab_size,
        tokenizer.eos_token_id,
    )


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    """The texts of --prompt and --prompt-file, else that of stdin. A file's last line end is not part of its text."""
    prompts = list(arguments.prompt or [])
    for path in arguments.prompt_file or []:
        text = read_stdin() if path == "-" else read_text("--prompt-file", path)
        prompts.append(text.removesuffix("\n"))
    if not prompts:
        if sys.stdin is None or sys.stdin.isatty():
            raise ValueError("there is no text to continue: give --prompt or --prompt-file, or pipe it to stdin")
        prompts.append(read_stdin().removesuffix("\n"))
    for prompt in prompts:
        try:
            prompt.encode("utf-8")  # bytes of a command line that are not UTF-8 come as lone surrogates
        except UnicodeEncodeError as error:
            raise ValueError(f"--prompt is {prompt!a}; expected UTF-8 text") from error
    return prompts


def read_stdin() -> str:
    """All of stdin. Raises ``ValueError`` where that is not UTF-8; Python may read such bytes as lone surrogates."""
    try:
        text = sys.stdin.read()
        text.encode("utf-8")
    except UnicodeError as error:
        raise ValueError(f"stdin is not UTF-8 text; pipe text to it, or give --prompt: {error}") from error
    return text


def main(arguments: argparse.Namespace) -> None:
    """Load, then print each prompt with its continuation as it comes."""
    if arguments.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {arguments.max_new_tokens}; expected 1 or more")
    if not 0 <= arguments.seed < 2**63:
        raise ValueError(f"--seed is {arguments.seed}; expected an integer of at least 0 and below 2**63")
    prompts = read_prompts(arguments)
    from umv2_megatron.parallel import cpu_platform

    cpu_platform.install()  # before megatron.core is imported
    from umv2_megatron.evaluation.generation import Sampling, TextStream, generate

    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    path = user_path(arguments.load, "--load")
    # a checkpoint's own directory, iter_*, has a config.json, too
    is_export = (path / "config.json").is_file() and not (path / METADATA_FILE).exists()
    model = load_export(arguments) if is_export else load_checkpoint(arguments)
    for number, prompt in enumerate(prompts):
        ids = model.tokenize(prompt)
        if not ids:
            if model.end is None:
                raise ValueError("--prompt is empty and the tokenizer has no end-of-document token to begin with")
            ids = [model.end]
        text = TextStream(model.detokenize, ids)
        print(prompt, end="", flush=True)
        stream = generate(
            model.logits_of,
            ids,
            arguments.max_new_tokens,
            model.context,
            model.vocab_size,
            model.end,
            sampling,
            arguments.seed + number,
        )
        for token in stream:
            print(text.add(token), end="", flush=True)
        print(text.end())


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--load", required=True, help="directory of checkpoints, one iter_* in it, or an export")
    made.add_argument("--ckpt-step", type=int, help="iteration to load (default: the newest valid one)")
    made.add_argument("--tokenizer-model", help="the tokenizer's file, where it is no longer where training found it")
    made.add_argument(
        "--memory-tables",
        choices=MEMORY_TABLES,
        help="of an export: where value tables stay; mmap reads the picked rows from the files (default: device)",
    )
    made.add_argument("--prompt", action="append", help="text to continue; may be given several times")
    made.add_argument("--prompt-file", action="append", metavar="FILE", help="the same from a file; - is stdin")
    made.add_argument("--max-new-tokens", type=int, default=100, help="tokens to write (default: 100)")
    made.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    made.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest tokens; 0: all (default: 0)")
    made.add_argument(
        "--top-p", type=float, default=0.95, help="draw from the likeliest tokens of this mass (default: 0.95)"
    )
    made.add_argument("--seed", type=int, default=1234, help="seed of the draws (default: 1234)")
    return made


def run() -> NoReturn:
    """The program."""
    run_tool(parser(), main)
