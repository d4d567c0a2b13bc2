"""Show what a checkpoint holds: keys, dtypes, shapes, bytes, shards, and the layout that saved it.

    python tools/inspect_checkpoint.py runs/demo/checkpoints
    python tools/inspect_checkpoint.py runs/demo/checkpoints --iteration 1000 --keys '*table*' --json
    python tools/inspect_checkpoint.py runs/demo/checkpoints --verify

Reads the metadata only, so that it is quick for a checkpoint of any size; --verify reads and hashes every file.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, NoReturn

from umv2_megatron.durable_files import CheckpointError
from umv2_megatron.training.tool_entry import program_name, run_tool

if TYPE_CHECKING:
    from umv2_megatron.checkpoint.contents import Contents, Entry


def main(arguments: argparse.Namespace) -> None:
    """Read, verify if asked to, print."""
    from umv2_megatron.parallel import cpu_platform

    cpu_platform.install()  # before megatron.core is imported
    from umv2_megatron.checkpoint.contents import locate, read_contents

    store, iteration = locate(arguments.directory, arguments.iteration)
    if arguments.verify:
        try:
            files = len(store.verify(iteration).files)
        except CheckpointError as error:
            if arguments.debug:
                raise
            print(f"{program_name()}: error: {error}", file=sys.stderr)
            sys.exit(1)
    contents = read_contents(store, iteration)
    if arguments.json:
        print(json.dumps(contents.as_json(arguments.keys) | ({"verified": True} if arguments.verify else {}), indent=1))
        return
    print_contents(contents, arguments.keys)
    if arguments.verify:
        print(f"verified: {files} files have the sizes and hashes of the manifest")


def print_contents(contents: Contents, pattern: str) -> None:
    """As tables for people."""
    print(f"{contents.directory}: iteration {contents.iteration}")
    print("saved by: " + ", ".join(f"{name} {_told(value)}" for name, value in contents.saved_by.items()))
    rows = [_row(entry) for entry in contents.matching(pattern)]
    if rows:
        print_table([("key", "dtype", "shape", "bytes", "shards"), *rows], right=(3, 4))
    else:
        print(f"no key fits {pattern!r}")
    totals = contents.totals()
    whole = ("in all", str(sum(keys for keys, _ in totals.values())), f"{sum(size for _, size in totals.values()):,}")
    kinds = [(kind, str(keys), f"{size:,}") for kind, (keys, size) in totals.items()]
    print_table([("kind", "keys", "bytes"), *kinds, whole], right=(1, 2))


def print_table(rows: list[tuple[str, ...]], right: tuple[int, ...]) -> None:
    """Print rows as aligned columns; the first row is the head, ``right`` the columns of numbers."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    print()
    for row in rows:
        pairs = enumerate(zip(row, widths))
        print("  ".join(cell.rjust(width) if i in right else cell.ljust(width) for i, (cell, width) in pairs).rstrip())


def _row(entry: Entry) -> tuple[str, ...]:
    shape = "x".join(map(str, entry.shape)) or "-"
    return entry.key, entry.dtype, shape, f"{entry.bytes:,}", str(entry.shards)


def _told(value: object) -> object:
    if value is None:
        return "unknown"
    return ("on" if value else "off") if isinstance(value, bool) else value


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("directory", metavar="DIR", help="directory of checkpoints, or one iter_* directory in it")
    made.add_argument("--iteration", type=int, help="which one (default: the newest)")
    made.add_argument("--keys", default="*", metavar="PATTERN", help="list only the keys that fit (default: *)")
    made.add_argument("--json", action="store_true", help="print JSON")
    made.add_argument("--verify", action="store_true", help="check every file against the manifest")
    return made


def run() -> NoReturn:
    """The program."""
    run_tool(parser(), main)
