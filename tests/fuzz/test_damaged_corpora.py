"""Damaged token files, and drawn corpora of text: what training and preprocessing say about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import ODD_VALUES, as_text, damaged_bytes, damaged_json
from hypothesis import example, given
from hypothesis import strategies as st
from rule import cases, drawing, run_tool_with

from umv2_megatron.commands import preprocess_data
from umv2_megatron.data.indexing import IndexWriter, check_corpus, fingerprint


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The three files of a small corpus by suffix."""
    prefix = str(tmp_path_factory.mktemp("good") / "corpus")
    writer = IndexWriter(prefix, np.uint16)
    lengths = np.array([3, 1, 5, 2], np.int32)
    writer.add(np.arange(11, dtype=np.uint16).tobytes(), lengths)
    writer.publish({"tokenizer": {"type": "ByteLevelTokenizer", "sha256": "0" * 64}, "max_token_id": 10})
    return {suffix: Path(prefix + suffix).read_bytes() for suffix in (".bin", ".idx", ".meta.json")}


def read_as_training_does(folder: Path, files: dict[str, bytes]) -> bool:
    """Whether the corpus is accepted; then mcore can read every document. Raises what is no refusal."""
    prefix = str(folder / "drawn")
    for suffix, data in files.items():
        Path(prefix + suffix).write_bytes(data)
    try:
        index = check_corpus(prefix, 257, "0" * 64)
        fingerprint(prefix)
    except ValueError as error:
        assert prefix in str(error) and "\n" not in str(error), error
        return False
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix, mmap=True)
    for place, length in enumerate(index.lengths):
        tokens = dataset[place]
        assert len(tokens) == length
    return True


def test_the_corpus_is_good_undamaged(corpus: dict[str, bytes], tmp_path: Path) -> None:
    assert read_as_training_does(tmp_path, corpus)


@pytest.mark.parametrize("suffix", [".idx", ".bin", ".meta.json"])
def test_damaged_token_files(suffix: str, corpus: dict[str, bytes], tmp_path: Path) -> None:
    @drawing(150)
    @given(damaged_bytes(corpus[suffix]))
    def check(damaged: bytes) -> None:
        read_as_training_does(tmp_path, {**corpus, suffix: damaged})

    check()


def test_odd_sidecars(corpus: dict[str, bytes], tmp_path: Path) -> None:
    @drawing(150)
    @given(damaged_json(json.loads(corpus[".meta.json"])))
    def check(document: Any) -> None:
        read_as_training_does(tmp_path, {**corpus, ".meta.json": as_text(document)})

    check()


@pytest.mark.parametrize("changes", cases("sidecars"), ids=str)
def test_sidecars_that_once_failed(changes: dict[str, Any], corpus: dict[str, bytes], tmp_path: Path) -> None:
    sidecar = as_text({**json.loads(corpus[".meta.json"]), **changes})
    assert not read_as_training_does(tmp_path, {**corpus, ".meta.json": sidecar})


def test_indices_of_any_header(corpus: dict[str, bytes], tmp_path: Path) -> None:
    """Counts and contents drawn apart from each other, so that many indices have the size that the header asks for."""
    numbers = st.integers(-2, 12)

    @drawing(200)
    @given(
        st.sampled_from((1, 2, 3, 4, 5, 6, 8, 9, 255)),
        st.lists(numbers, max_size=4),
        st.lists(numbers, max_size=4),
        st.lists(numbers, max_size=5),
    )
    @example(8, [], [], [])
    def check(code: int, lengths: list[int], offsets: list[int], documents: list[int]) -> None:
        offsets = (offsets + [0] * len(lengths))[: len(lengths)]
        index = b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + bytes([code])
        index += len(lengths).to_bytes(8, "little") + len(documents).to_bytes(8, "little")
        index += np.array(lengths, np.int32).tobytes() + np.array(offsets, np.int64).tobytes()
        index += np.array(documents, np.int64).tobytes()
        read_as_training_does(tmp_path, {**corpus, ".idx": index})

    check()


# -- corpora of text ------------------------------------------------------------------------------------------------

LINES = st.one_of(
    st.text(max_size=20).map(lambda text: json.dumps({"text": text}).encode()),
    ODD_VALUES.map(lambda value: as_text({"text": value}).strip()),
    ODD_VALUES.map(lambda value: as_text(value).strip()),
    st.binary(max_size=12),
    st.sampled_from((
        b"", b"{", b'{"text"', b'{"text": "a"}{', b"[" * 2000, b'{"text": "\\ud800"}', b"\xef\xbb\xbf{}",
        b'{"text": "a"}\r',
        b'{"text": "a", "text": 1}', b'{"text": 1e999}', b"NaN", b"\x00", b'{"t\\u0065xt": "b"}', b"9" * 5000,
    )),
)  # fmt: skip


def preprocess_bytes(folder: Path, name: str, data: bytes, *flags: str) -> None:
    """Run the tool over one file; afterwards either a whole corpus is there, or none of its files."""
    for old in folder.glob("out*"):
        old.unlink()
    (folder / name).write_bytes(data)
    argv = ["--input", str(folder / name), "--output-prefix", str(folder / "out"), "--log-interval", "1000000"]
    outcome = run_tool_with(preprocess_data.build_parser(), preprocess_data.main, [*argv, *flags])
    left = sorted(path.name.removeprefix("out_text_document") for path in folder.glob("out*"))
    left = [name for name in left if "quarantine" not in name]
    assert left == ([".bin", ".idx", ".meta.json"] if outcome.code == 0 else []), (left, outcome)
    if outcome.code == 0:
        check_corpus(str(folder / "out_text_document"), 257)


@drawing(60)
@given(
    lines=st.lists(LINES, max_size=4),
    name=st.sampled_from(("a.jsonl", "a.txt", "a.jsonl.gz", "a.jsonl.zst", "a.json")),
    flags=st.sampled_from(((), ("--append-eod",), ("--on-bad-line", "quarantine"), ("--text-split", "line"))),
)
def test_drawn_corpora(lines: list[bytes], name: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    preprocess_bytes(tmp_path, name, b"\n".join(lines), "--tokenizer-type", "ByteLevelTokenizer", *flags)
