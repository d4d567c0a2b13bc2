"""The name table and what follows from it: each row of each tensor once, in both directions."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from umv2_megatron.conversion.plan import (
    Piece,
    assemble,
    copies_to_hf,
    copies_to_megatron,
    group_by_size,
    parse_size,
    part_shape,
)
from umv2_megatron.conversion.safetensors_files import (
    ConversionError,
    SafetensorsFile,
    SafetensorsWriter,
    TensorInfo,
)
from umv2_megatron.hf.name_table import MemorySizes, Sizes, pairings

MEMORY = MemorySizes(
    heads=2, keys=5, key_dim=4, rank=2, cores=2, query_norm=True, key_norm=True, query_rows=16, pre_value_dim=6,
    value_dim=8, projected=8, table_rows=25, gate_rows=8, projects_input=True,
)  # fmt: skip
RICH = Sizes(
    vocabulary=101, positions=7, hidden=12, ffn=10, heads=6, groups=2, head_dim=4, tied=False, gated=True,
    linear_bias=True, qkv_bias=True, norm_bias=True, qk_norm=True,
    memory=(None, MEMORY, dataclasses.replace(MEMORY, table_rows=0)), chunk_rows=9,
)  # fmt: skip
KINDS = {"weights": torch.float32, "float32": torch.float32, "index": torch.int32}


def _numbered(sizes: Sizes) -> dict[str, torch.Tensor]:
    """A Megatron tensor for every pairing, in which every row is another number."""
    count = iter(range(10**6))
    made = {}
    for pairing in pairings(sizes):
        rows = torch.tensor([next(count) for _ in range(pairing.shape[0])], dtype=KINDS[pairing.dtype])
        made[pairing.key] = rows.view(-1, *[1] * (len(pairing.shape) - 1)).expand(pairing.shape).contiguous()
    return made


def _apply(copies, source):
    return {
        copy.name: torch.cat([source[piece.name][piece.start : piece.stop] for piece in copy.pieces]) for copy in copies
    }


def _infos(tensors):
    return {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "changes",
    [{}, {"tied": True, "gated": False, "positions": 0}, {"linear_bias": False, "norm_bias": False, "qk_norm": False},
     {"groups": 6}, {"chunk_rows": 25}, {"chunk_rows": 1}],
)  # fmt: skip
def test_there_and_back_every_row_returns_to_its_place(changes):
    sizes = dataclasses.replace(RICH, **changes)
    pairs, source = list(pairings(sizes)), _numbered(sizes)
    there = _apply(copies_to_hf(pairs, _infos(source), torch.float32), source)
    assert sum(tensor.shape[0] for tensor in there.values()) == sum(tensor.shape[0] for tensor in source.values())
    shapes = {part.name: part_shape(pairing, part) for pairing in pairs for part in pairing.parts}
    assert {name: tuple(tensor.shape) for name, tensor in there.items()} == shapes
    back = _apply(copies_to_megatron(pairs, _infos(there), torch.float32), there)
    assert back.keys() == source.keys() and all(torch.equal(back[key], source[key]) for key in source)


def test_names_and_the_interleaved_layout_of_queries_keys_and_values():
    copies = {copy.name: copy for copy in copies_to_hf(list(pairings(RICH)), _infos(_numbered(RICH)), torch.float32)}
    # a group: 3 query heads of 4 rows, a key head, a value head
    spans = {name: [(p.start, p.stop) for p in copies[f"model.layers.0.self_attn.{name}_proj.weight"].pieces]
             for name in "qkv"}  # fmt: skip
    assert spans == {"q": [(0, 12), (20, 32)], "k": [(12, 16), (32, 36)], "v": [(16, 20), (36, 40)]}
    chunks = [name for name in copies if ".table.values." in name]
    assert chunks == [f"model.layers.1.memory.table.values.{number}" for number in range(3)]
    assert [copies[name].info.rows for name in chunks] == [9, 9, 7]
    assert "model.layers.0.memory.perm" not in copies and "model.layers.2.memory.perm" in copies


def test_blocks_cover_a_tensor_in_order():
    (copy,) = (
        copy for copy in copies_to_megatron(list(pairings(RICH)), _infos(_hf(RICH)), torch.float32)
        if copy.name == "decoder.layers.0.self_attention.linear_qkv.weight"
    )  # fmt: skip
    rows = [piece for block in copy.blocks(rows=3) for piece in block]
    assert sum(piece.stop - piece.start for piece in rows) == 40
    assert all(sum(piece.stop - piece.start for piece in block) <= 3 for block in copy.blocks(rows=3))
    assert [piece.name.rsplit(".", 2)[1][0] for block in copy.blocks(rows=20) for piece in block] == list("qkvqkv")


def _hf(sizes: Sizes) -> dict[str, torch.Tensor]:
    source = _numbered(sizes)
    return _apply(copies_to_hf(list(pairings(sizes)), _infos(source), torch.float32), source)


def test_what_float16_cannot_hold_is_refused():
    source = {"a": torch.tensor([[1.0, 2.0], [3.0, 65504.0]]), "b": torch.tensor([[-7e4, 1.0], [float("inf"), 0.0]])}

    def rows(name: str, start: int, stop: int) -> torch.Tensor:
        return source[name][start:stop]

    block = [Piece("a", 0, 2), Piece("b", 1, 2)]
    made = assemble(rows, block, torch.float16)
    assert made.dtype == torch.float16 and torch.equal(made.float(), torch.cat([source["a"], source["b"][1:]]))
    with pytest.raises(ConversionError, match="b holds a number too large for float16"):
        assemble(rows, [Piece("a", 0, 1), Piece("b", 0, 1)], torch.float16)
    assert assemble(rows, [Piece("b", 0, 1)], torch.bfloat16).isfinite().all()


def test_files_are_filled_up_to_their_size():
    copies = copies_to_hf(list(pairings(RICH)), _infos(_numbered(RICH)), torch.float32)
    groups = group_by_size(copies, 5000)
    assert [copy for group in groups for copy in group] == copies
    assert all(sum(copy.info.num_bytes for copy in group) <= 5000 for group in groups)
    assert [len(group) for group in group_by_size(copies, 1)] == [1] * len(copies)


@pytest.mark.parametrize(("text", "size"), [("4GB", 4 * 10**9), ("1.5 GiB", 3 << 29), ("700", 700), ("2kb", 2000)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "nan", "1 XB", "0", "1e999GB"])
def test_bad_sizes(text):
    with pytest.raises(ValueError, match="--max-shard-size"):
        parse_size(text)


def test_safetensors_files_are_those_of_the_package(tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = {"a": torch.randn(5, 3), "b": torch.arange(7, dtype=torch.int32), "c": torch.randn(2, 2).bfloat16()}
    with SafetensorsWriter(tmp_path / "own", [(name, info) for name, info in _infos(tensors).items()]) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor[:1].contiguous())
            writer.write(name, tensor[1:].contiguous())
    assert writer.size == (tmp_path / "own").stat().st_size
    loaded = load_file(tmp_path / "own")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "theirs")
    assert all(torch.equal(file.rows(name, 0, len(tensor)), tensor) for name, tensor in tensors.items())
    assert all(file.crc32(name) == writer.crc32[name] for name in tensors)


@pytest.mark.parametrize("length", [0, 7, 8, 9, 40, -1, -8])
def test_any_truncation_of_a_safetensors_file_is_found(length, tmp_path):
    with SafetensorsWriter(tmp_path / "file", [("x", TensorInfo(torch.float32, (4, 2)))]) as writer:
        writer.write("x", torch.zeros(4, 2))
    data = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(data[:length])
    with pytest.raises(ConversionError, match="file"):
        SafetensorsFile(tmp_path / "file")


@pytest.mark.parametrize(
    "header",
    ['{"x":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
     '{"x":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}',
     '{"x":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}', '{"x":{"dtype":"F9","shape":[2],"data_offsets":[0,8]}}',
     '{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"y":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
     "[1]", "{"],
)  # fmt: skip
def test_headers_that_lie_are_found(header, tmp_path):
    text = header.encode()
    (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 8)
    with pytest.raises(ConversionError, match="file"):
        SafetensorsFile(tmp_path / "file")
