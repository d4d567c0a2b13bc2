"""Draw the task scores of one or more models against context length, number of items, and times a fact was seen.

python tools/plot_scores.py --report memory=umv2.json --report dense=dense.json --output scores
python tools/plot_scores.py --report dense=seed1.json,seed2.json --output scores

Several files of one model are its seeds: their mean is drawn, with bars from the lowest to the highest. Bars of one
file are standard errors over its questions.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from umv2_megatron.evaluation.curves import labelled_paths
from umv2_megatron.evaluation.report import draw, over_seeds
from umv2_megatron.training.tool_entry import run_tool


def main(arguments: argparse.Namespace) -> None:
    """Read what tools/evaluate.py wrote and draw the pictures."""
    reports: dict[str, Sequence[dict[str, Any]]] = {}
    for label, files in labelled_paths("--report", arguments.report, lambda path: path.stem).items():
        reports[label] = over_seeds([_tasks(file) for file in files.split(",")])
    drawn = draw(reports, arguments.output)
    if not drawn:
        raise ValueError("--report: nothing to draw; evaluate several --context-lengths, --num-pairs or fact-recall")
    print("wrote " + ", ".join(map(str, drawn)))


def _tasks(file: str) -> list[dict[str, Any]]:
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))["tasks"]
    except (KeyError, TypeError, ValueError, OSError):
        raise ValueError(f"--report names {file}; expected JSON that tools/evaluate.py wrote") from None


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--report",
        action="append",
        required=True,
        metavar="[LABEL=]FILE,FILE",
        help="JSON of tools/evaluate.py; several files: seeds of one model",
    )
    made.add_argument("--output", type=Path, required=True, metavar="PATH", help="pictures are PATH_context.png, ...")
    return made


def run() -> NoReturn:
    """The program."""
    run_tool(parser(), main)
