"""Write a page about a run: losses, rates, throughput, memory layers, restarts and faults, checkpoints, settings.

python tools/report.py runs/227m

RUN is the --save directory or URL of a run, which may still be going on. The page is one file without links to others.
"""

import argparse
import os
from pathlib import Path
from typing import NoReturn

from umv2_megatron.durable_files import write_synced
from umv2_megatron.observation.page import page
from umv2_megatron.observation.run_files import read_run
from umv2_megatron.training.tool_entry import run_tool
from umv2_megatron.user_paths import is_remote, user_path


def main(arguments: argparse.Namespace) -> None:
    """Read the run and write its page."""
    directory = user_path(arguments.run, "RUN")
    if is_remote(directory) and not arguments.output:
        raise ValueError(f"RUN is {directory}; expected --output too, the file on this machine to write the page to")
    run = read_run(directory)
    output = Path(arguments.output) if arguments.output else directory / "report.html"
    if output.is_dir() or not output.parent.is_dir():
        raise ValueError(f"--output is {output}; expected a file to write, in a directory that exists")
    text = page(run, arguments.title or directory.resolve().name).encode("utf-8", errors="replace")
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        write_synced(temporary, text)
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"wrote {output} ({len(text) / 1e3:.0f} kB): {run.state()[0]}, iteration {run.iteration}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("run", metavar="RUN", help="directory of the run (--save)")
    made.add_argument("--output", help="HTML file to write (default: RUN/report.html)")
    made.add_argument("--title", help="title of the page (default: the directory's name)")
    return made


def run() -> NoReturn:
    """The program."""
    run_tool(parser(), main)
