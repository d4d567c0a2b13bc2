"""Write text with a trained model, streaming it to the terminal.

    python tools/generate.py --load runs/demo --prompt "def main(" --max-new-tokens 100

The checkpoint says what the model and its tokenizer are; no other flag is needed. Every token is a full forward pass
over the context (no key-value cache), which is meant for looking at a model, not for serving it.
"""

import argparse
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from umv2_megatron.parallel import cpu_platform

cpu_platform.install()  # before megatron.core is imported

from umv2_megatron.evaluation.generation import Sampling, generate  # noqa: E402
from umv2_megatron.training.restore import load_trained_model, next_token_logits  # noqa: E402
from umv2_megatron.training.tool_entry import run_tool  # noqa: E402


def main(arguments: argparse.Namespace) -> None:
    """Load, then print each prompt with its continuation as it comes."""
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    if arguments.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {arguments.max_new_tokens}; expected 1 or more")
    trained = load_trained_model(arguments.load, arguments.ckpt_step, arguments.tokenizer_model)
    tokenizer = trained.tokenizer
    print(f"iteration {trained.iteration} of {arguments.load}", file=sys.stderr)
    for number, prompt in enumerate(arguments.prompt):
        ids = tokenizer.tokenize(prompt) or [tokenizer.eod]
        stream = generate(
            functools.partial(next_token_logits, trained.model),
            ids,
            arguments.max_new_tokens,
            trained.run.model.seq_length,
            tokenizer.num_tokens,
            tokenizer.eod,
            sampling,
            arguments.seed + number,
        )
        # the whole text is decoded each time: one token may be a part of a character
        shown = 0
        print(prompt, end="", flush=True)
        start = len(tokenizer.detokenize(ids))
        for token in stream:
            ids.append(token)
            text = tokenizer.detokenize(ids)[start:]
            if not text.endswith("\ufffd"):
                print(text[shown:], end="", flush=True)
                shown = len(text)
        print()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--load", required=True, help="directory of checkpoints")
    made.add_argument("--ckpt-step", type=int, help="iteration to load (default: the newest valid one)")
    made.add_argument("--tokenizer-model", help="the tokenizer's file, where it is no longer where training found it")
    made.add_argument("--prompt", action="append", required=True, help="text to continue; may be given several times")
    made.add_argument("--max-new-tokens", type=int, default=100, help="tokens to write (default: 100)")
    made.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    made.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest tokens; 0: all (default: 0)")
    made.add_argument(
        "--top-p", type=float, default=0.95, help="draw from the likeliest tokens of this mass (default: 0.95)"
    )
    made.add_argument("--seed", type=int, default=1234, help="seed of the draws (default: 1234)")
    return made


if __name__ == "__main__":
    run_tool(parser(), main)
