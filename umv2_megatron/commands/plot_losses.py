"""Draw the loss curves of one or more runs into a PNG.

python tools/plot_losses.py --run memory=runs/on --run dense=runs/off --output losses.png
"""

import argparse
from pathlib import Path
from typing import NoReturn

from umv2_megatron.evaluation.curves import labelled_paths, plot_losses
from umv2_megatron.training.metrics import read_metrics
from umv2_megatron.training.tool_entry import run_tool


def main(arguments: argparse.Namespace) -> None:
    """Read each run's metrics.jsonl and draw them."""
    runs = {}
    for label, directory in labelled_paths("--run", arguments.run, lambda path: path.name).items():
        try:
            runs[label] = read_metrics(directory)
        except (OSError, UnicodeError):
            raise ValueError(
                f"--run names {directory}; expected the --save directory of a run, with its metrics.jsonl"
            ) from None
    plot_losses(runs, Path(arguments.output), title=arguments.title, baseline=arguments.baseline)
    print(f"wrote {arguments.output}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--run", action="append", required=True, metavar="[LABEL=]DIR", help="directory of a run (--save)"
    )
    made.add_argument("--output", required=True, help="PNG to write")
    made.add_argument("--baseline", metavar="LABEL", help="also draw validation losses minus those of this run")
    made.add_argument("--title", default="loss", help="title of the picture")
    return made


def run() -> NoReturn:
    """The program."""
    run_tool(parser(), main)
