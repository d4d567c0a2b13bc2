"""Draw the task scores of one or more models: score against context length, and against times a fact was seen.

python tools/plot_scores.py --report memory=umv2.json --report dense=dense.json --output scores
"""

import argparse
import json
from pathlib import Path
from typing import NoReturn

from umv2_megatron.evaluation.curves import labelled_paths
from umv2_megatron.evaluation.report import draw
from umv2_megatron.training.tool_entry import run_tool


def main(arguments: argparse.Namespace) -> None:
    """Read what tools/evaluate.py wrote and draw the pictures."""
    reports = {}
    for label, file in labelled_paths("--report", arguments.report, lambda path: path.stem).items():
        try:
            reports[label] = json.loads(Path(file).read_text(encoding="utf-8"))["tasks"]
        except (KeyError, TypeError, ValueError, OSError):
            raise ValueError(f"--report names {file}; expected JSON that tools/evaluate.py wrote") from None
    drawn = draw(reports, arguments.output)
    if not drawn:
        raise ValueError("--report: nothing to draw; evaluate several --context-lengths, or fact-recall")
    print("wrote " + ", ".join(map(str, drawn)))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--report", action="append", required=True, metavar="[LABEL=]FILE", help="JSON of tools/evaluate.py"
    )
    made.add_argument("--output", type=Path, required=True, metavar="PATH", help="pictures are PATH_context.png, ...")
    return made


def run() -> NoReturn:
    """The program."""
    run_tool(parser(), main)
