"""Small corpora and command lines that several data tests share."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[3]


def run_tool(name, *arguments, timeout=120):
    """Run ``python tools/<name>`` from another directory than the root, without the package on the path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, cwd="/")


def hashes(prefix):
    """SHA-256 of tokens, index and sidecar."""
    return [hashlib.sha256(Path(f"{prefix}{end}").read_bytes()).hexdigest() for end in (".bin", ".idx", ".meta.json")]


def sources(count=40):
    """Texts of the standard library: tabs, indentation, long lines, other scripts; the same on every call."""
    root = Path(os.__file__).parent
    texts = [path.read_text(encoding="utf-8") for path in sorted(root.glob("*.py"))[: 2 * count]]
    return [text for text in texts if text.strip()][:count]


def write_jsonl(path, texts, key="text"):
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def write_corpus(prefix, documents, vocab_size=257):
    """Token files of ``documents`` (lists of ids) by mcore's own builder, without a sidecar."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    for document in documents:
        builder.add_document(torch.tensor(np.array(document, dtype=np.int64)), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)
