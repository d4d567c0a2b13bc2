"""Make a corpus of real text without downloading anything: the Python standard library of the running interpreter.

    python tools/demo_corpus.py --output demo/corpus.jsonl

writes one JSON object a line, {"text": ..., "source": ...}: the library's source files (with its tests, where they are
installed: about 29 MB, else about 12 MB), its text files and the topics of Python's online help. Left out are exact
duplicates, tables (encodings, pydoc_data, the data files of tests), lib2to3 (an old copy of the parser), and files that
are not clean UTF-8.

Files are shuffled with a seed, so that any stretch of the corpus, such as the validation split, is a fair sample. A
file longer than 64 KB becomes several documents, which stay neighbours: at most one file then straddles the boundary
of a split. Cuts are made before a top-level definition, at a blank line, or at a line end, whichever comes first.
"""

import argparse
import hashlib
import json
import os
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from umv2_megatron.training.tool_entry import run_tool

_SUFFIXES = (".py", ".txt", ".rst", ".md")
_TABLES = ("test", "tests")  # directories in which only .py files are text for people
_LEFT_OUT = ("__pycache__", "site-packages", "dist-packages", "lib2to3", "encodings", "pydoc_data")
_DOCUMENT_CHARACTERS = 64 << 10
_SHORTEST = 64


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    group = parser.add_argument_group("output")
    group.add_argument("--output", required=True, metavar="FILE", help="JSONL file to write")
    group.add_argument("--max-mb", type=float, metavar="MB", help="stop after this much text (default: all there is)")
    group = parser.add_argument_group("selection")
    group.add_argument(
        "--include-site-packages", action="store_true", help="also take the packages installed beside the interpreter"
    )
    group.add_argument("--seed", type=int, default=1234, help="seed of the shuffle (default: 1234)")
    return parser


def text_files(root: Path, left_out: tuple[str, ...]) -> Iterator[Path]:
    """Text files below ``root`` in sorted order, without the directories named in ``left_out``."""
    for directory, names, files in os.walk(root):
        names[:] = sorted(name for name in names if name not in left_out)
        in_tests = not set(_TABLES).isdisjoint(Path(directory).relative_to(root).parts)
        for name in sorted(files):
            if name.endswith(".py" if in_tests else _SUFFIXES):
                yield Path(directory, name)


def clean_text(path: Path) -> str:
    """The text of a file with LF line ends, or "" when it is not clean UTF-8, is nearly empty or cannot be read."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return ""
    text = text.replace("\r\n", "\n")
    return "" if "\x00" in text or len(text.strip()) < _SHORTEST else text


def help_topics() -> Iterator[tuple[str, str]]:
    """Name and text of the topics of Python's online help, the same documentation as on the web."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name in sorted(topics):
        if len(topics[name].strip()) >= _SHORTEST:
            yield f"help({name!r})", topics[name]


def cut(text: str, limit: int = _DOCUMENT_CHARACTERS) -> Iterator[str]:
    """Pieces of at most ``limit`` characters that join to ``text``; cut at a boundary in their last three quarters."""
    while len(text) > limit:
        end = limit
        for mark in ("\n\n\n", "\n\n", "\n"):
            found = text.rfind(mark, limit // 4, limit)
            if found >= 0:
                end = found + len(mark)
                break
        yield text[:end]
        text = text[end:]
    if text:
        yield text


def collect(include_site_packages: bool, seed: int) -> list[tuple[str, str]]:
    """(source, text) of every file and help topic once, shuffled by ``seed``; the same on every call."""
    roots: list[tuple[Path, tuple[str, ...]]] = [(Path(sysconfig.get_path("stdlib")), _LEFT_OUT)]
    if include_site_packages:
        roots.append((Path(sysconfig.get_path("purelib")), ("__pycache__",)))
    seen: set[bytes] = set()
    found: list[tuple[str, str]] = []
    for root, left_out in roots:
        sources = ((path.relative_to(root).as_posix(), clean_text(path)) for path in text_files(root, left_out))
        for source, text in sources:
            digest = hashlib.sha256(text.encode("utf-8")).digest()
            if text and digest not in seen:
                seen.add(digest)
                found.append((source, text))
    found += help_topics()
    random.Random(seed).shuffle(found)
    return found


def main(arguments: argparse.Namespace) -> None:
    if arguments.max_mb is not None and not arguments.max_mb > 0:
        raise ValueError(f"--max-mb is {arguments.max_mb}: expected a number above 0")
    output = Path(arguments.output)
    if not output.parent.is_dir():
        raise ValueError(f"--output {output} is in {output.parent}, which does not exist: create it")
    limit = float("inf") if arguments.max_mb is None else arguments.max_mb * 1e6
    files = documents = size = 0
    temporary = output.with_name(output.name + ".incomplete")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            for source, text in collect(arguments.include_site_packages, arguments.seed):
                if size >= limit:
                    break
                files += 1
                for piece in cut(text):
                    documents += 1
                    size += len(piece.encode("utf-8"))
                    file.write(json.dumps({"text": piece, "source": source}, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if not documents:
            raise ValueError("the interpreter has no standard library sources to read: give a corpus of your own")
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"wrote {output}: {files} files and help topics, {documents} documents, {size / 1e6:.2f} MB of text")


if __name__ == "__main__":
    run_tool(build_parser(), main)
