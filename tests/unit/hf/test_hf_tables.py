"""Value tables in host memory or in the mapped files: the same bits as on the device; damage is refused by name."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from tiny_model import VARIANTS, tiny_config, tiny_model, tokens  # noqa: E402

from umv2_megatron.hf import UMv2ForCausalLM, UMv2Model, linear_umv2, lookup_umv2, step_umv2, tables_umv2  # noqa: E402
from umv2_megatron.hf.tables_umv2 import MappedTensor, attach_tables, tensor_files  # noqa: E402


def saved(folder: Path, shard: str = "50GB", **changes: Any) -> Path:
    model = tiny_model(**changes)
    model(tokens(1, 1))
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [*((name, torch.float32) for name in VARIANTS if "ffn_variant" not in VARIANTS[name]), ("chunks", torch.bfloat16)],
)
def test_places_give_the_same_bits(
    variant: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dtype == torch.bfloat16:  # of files in float32: kernels read mapped rows in the dtype of the model alone
        for module in (step_umv2, linear_umv2, lookup_umv2):
            monkeypatch.setattr(module, "usable", lambda x: False)
    folder = saved(tmp_path, "50GB" if dtype == torch.float32 else "40KB", **VARIANTS[variant])
    models = {
        place: UMv2ForCausalLM.from_pretrained(folder, memory_tables=place, dtype=dtype).eval()
        for place in ("device", "cpu", "mmap")
    }
    held = {place: sum(p.numel() for p in model.parameters()) for place, model in models.items()}
    rows = sum(chunk.numel() for name, chunk in models["device"].named_parameters() if ".table." in name)
    assert rows > 0 and held["cpu"] == held["mmap"] == held["device"] - rows
    with torch.inference_mode():
        for batch in (tokens(1, 1), tokens(5, 1), tokens(2, 40)):
            logits = {place: model(batch).logits for place, model in models.items()}
            assert torch.equal(logits["cpu"], logits["device"]) and torch.equal(logits["mmap"], logits["device"])
    if variant != "chunks":
        return
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    for prompt in (tokens(1, 5), tokens(3, 5)):
        decoded = {place: model.generate(prompt, **options) for place, model in models.items()}
        for place in ("cpu", "mmap"):
            assert torch.equal(torch.stack(decoded[place].logits), torch.stack(decoded["device"].logits))


def test_places_give_the_same_bits_by_kernels_in_bfloat16(tmp_path: Path) -> None:
    tiny_model(**VARIANTS["chunks"]).bfloat16().save_pretrained(tmp_path, max_shard_size="40KB")
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    decoded = {}
    for place in ("device", "cpu", "mmap"):
        model = UMv2ForCausalLM.from_pretrained(tmp_path, memory_tables=place, dtype=torch.bfloat16).eval()
        decoded[place] = torch.stack(model.generate(tokens(3, 5), **options).logits)
    assert torch.equal(decoded["cpu"], decoded["device"]) and torch.equal(decoded["mmap"], decoded["device"])


def test_large_batches_are_looked_up_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from umv2_megatron.hf import memory_umv2, retrieval_umv2

    for variant in ("chunks", "v1"):
        model, batch = tiny_model(**VARIANTS[variant]).double(), tokens(2, 40)  # in float32 a near tie might turn round
        expected = model(batch).logits
        with monkeypatch.context() as patch:
            patch.setattr(memory_umv2, "_PICKED_NUMBERS", 3 * 4 * 24)
            patch.setattr(retrieval_umv2, "_GRID_CELLS", 50)
            torch.testing.assert_close(model(batch).logits, expected, rtol=0, atol=1e-12)


def test_model_with_mapped_tables_is_saved_elsewhere(tmp_path: Path) -> None:
    folder, batch = saved(tmp_path / "first", "40KB", memory_table_chunk_rows=100), tokens(2, 9)
    model = UMv2ForCausalLM.from_pretrained(folder, memory_tables="mmap").eval()
    with pytest.raises(ValueError, match="expected another directory"):
        model.save_pretrained(folder)
    for place in ("mmap", "cpu"):
        copy = UMv2ForCausalLM.from_pretrained(folder, memory_tables=place)
        copy.save_pretrained(tmp_path / place)
        loaded, report = UMv2ForCausalLM.from_pretrained(tmp_path / place, output_loading_info=True)
        assert not any(report.values()), report
        assert torch.equal(loaded.eval()(batch).logits, model(batch).logits)
    bare = UMv2Model.from_pretrained(folder, memory_tables="mmap").eval()
    assert torch.equal(bare(batch).last_hidden_state, model.model(batch).last_hidden_state)


def test_tables_off_the_device_are_saved_in_the_dtype_of_the_model(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = saved(tmp_path / "float32", memory_table_chunk_rows=100)
    files = {}
    for place in ("device", "mmap", "cpu"):
        model = UMv2ForCausalLM.from_pretrained(folder, memory_tables=place, dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / place)
        files[place] = load_file(tmp_path / place / "model.safetensors")
    for place in ("mmap", "cpu"):
        assert sorted(os.listdir(tmp_path / place)) == sorted(os.listdir(tmp_path / "device"))
        assert files[place].keys() == files["device"].keys()
        for name, tensor in files["device"].items():
            assert files[place][name].dtype == tensor.dtype and torch.equal(files[place][name], tensor), name
    moved = UMv2ForCausalLM.from_pretrained(folder, memory_tables="cpu").to(torch.bfloat16)
    moved.save_pretrained(tmp_path / "moved")
    written = load_file(tmp_path / "moved" / "model.safetensors")
    assert all(tensor.dtype == torch.bfloat16 for name, tensor in written.items() if ".table." in name)


def test_other_parameters_learn_beside_mapped_tables(tmp_path: Path) -> None:
    folder, batch = saved(tmp_path), tokens(2, 9)
    grads = {}
    for place in ("device", "mmap"):
        model = UMv2ForCausalLM.from_pretrained(folder, memory_tables=place)
        model(batch, labels=batch).loss.backward()
        grads[place] = {name: p.grad for name, p in model.named_parameters() if ".table." not in name}
    assert all(torch.equal(grads["mmap"][name], grad) for name, grad in grads["device"].items())


def test_tables_do_not_move_with_the_model(tmp_path: Path) -> None:
    model = UMv2ForCausalLM.from_pretrained(saved(tmp_path), memory_tables="mmap").eval()
    chunk = model.value_tables()["layers.0.memory.table"].values[0]
    model.to(torch.bfloat16)
    again = model.value_tables()["layers.0.memory.table"].values[0]
    assert again is chunk and chunk.dtype == torch.float32
    reference = UMv2ForCausalLM.from_pretrained(tmp_path).to(torch.bfloat16).eval()
    assert torch.equal(model(tokens(2, 9)).logits, reference(tokens(2, 9)).logits)
    assert model.to("meta").value_tables()["layers.0.memory.table"].values[0].device.type == "cpu"


@pytest.mark.parametrize("columns", [24, 3000])
def test_rows_are_fetched_ahead(columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = torch.randn(40, columns)
    path = tmp_path / "t"
    path.write_bytes(b"x" * 5000 + numbers.numpy().tobytes())
    entry = {"dtype": "F32", "shape": [40, columns], "data_offsets": [1000, 1000 + numbers.numel() * 4]}
    mapped = MappedTensor(str(path), "t", entry, 4000)
    assert torch.equal(mapped.tensor, numbers)
    page, width, asked = mmap.PAGESIZE, columns * 4, []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, at, size, advice: asked.append((at, size)))
    for rows in ([0], [39], [0, 39, 39, 17], list(range(40)), []):
        asked.clear()
        mapped.fetch(torch.tensor(rows, dtype=torch.int64))
        assert all(at % page == 0 and size % page == 0 for at, size in asked)
        found = [number for at, size in asked for number in range(at // page, (at + size) // page)]
        bounds = [(5000 + row * width, 5000 + (row + 1) * width - 1) for row in rows]
        assert found == sorted({n for first, last in bounds for n in range(first // page, last // page + 1)})


def test_one_thread_fetches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(MappedTensor, "fetch", lambda mapped, rows: asked.append((mapped.path, rows.tolist())))
    monkeypatch.setattr(tables_umv2, "_page_faults", lambda: 0)
    model = UMv2ForCausalLM.from_pretrained(saved(tmp_path), memory_tables="mmap")
    (table, *_) = model.value_tables().values()
    for row in range(20):
        table.announce(torch.tensor([row]))
    deadline = time.monotonic() + 20
    while len(asked) < 40 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [rows for _, rows in asked] == [[row] for row in range(20) for _ in table.widths]
    assert sum(thread.name == "umv2 fetch" for thread in threading.enumerate()) == 1


def test_the_thread_ends_with_the_process_and_may_start_anew() -> None:
    served: list[int] = []

    class Table:
        def _fetch_now(self, rows: torch.Tensor) -> None:
            time.sleep(0.2)
            served.append(int(rows))

    fetcher, table = tables_umv2._Fetcher(), Table()
    for row in range(50):
        fetcher.put(table, torch.tensor(row))
    (thread, _) = fetcher._worker
    fetcher.stop()  # what atexit calls
    assert not thread.is_alive() and len(served) <= 2  # what waited is dropped
    fetcher.stop()
    fetcher.put(table, torch.tensor(99))
    fetcher._worker[1].put(None)
    fetcher._worker[0].join(20)
    assert served[-1] == 99


def test_two_callers_may_fetch_for_the_first_time_at_once() -> None:
    served: list[int] = []
    errors: list[RuntimeError] = []
    together = threading.Barrier(2)

    class Table:
        def _fetch_now(self, rows: torch.Tensor) -> None:
            served.append(int(rows))

    class Fetcher(tables_umv2._Fetcher):
        """A caller that has noted something waits for the other one to note the same, if it is about to."""

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if value is not None:
                with contextlib.suppress(threading.BrokenBarrierError):
                    together.wait(1)

    fetcher = Fetcher()

    def put(row: int) -> None:
        try:
            fetcher.put(Table(), torch.tensor(row))  # type: ignore[arg-type]
        except RuntimeError as error:
            errors.append(error)

    callers = [threading.Thread(target=put, args=(row,)) for row in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(30)
    deadline = time.monotonic() + 20
    while len(served) < 2 and not errors and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not errors and sorted(served) == [0, 1]


def change_header(path: Path, change: Any) -> None:
    """Write the file's header anew, changed, in the same number of bytes."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    assert len(text) == length
    path.write_bytes(content[:8] + text + content[8 + length :])


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    """By our own reader: transformers' refuses some of these earlier, in its words."""
    name = "model.layers.1.memory.table.pre_values.0"
    model = UMv2ForCausalLM.from_pretrained(saved(tmp_path / "good"), memory_tables="mmap")

    def refused(folder: Path, *words: str) -> None:
        def find(file: str) -> str | None:
            return str(folder / file) if (folder / file).exists() else None

        with pytest.raises(ValueError) as caught:
            attach_tables(model.value_tables(), tensor_files(find))
        assert all(word in str(caught.value) for word in words), caught.value

    first = saved(tmp_path / "missing")
    change_header(first / "model.safetensors", lambda header: header.pop(name))
    refused(first, "layers.1.memory.table.pre_values.0", "in none of")
    second = saved(tmp_path / "shape")
    change_header(second / "model.safetensors", lambda header: header[name].update(shape=[512, 4]))
    refused(second, name, "[512, 4]", "[256, 8]")
    third = saved(tmp_path / "bytes")
    change_header(third / "model.safetensors", lambda header: header[name].update(shape=[256, 7]))
    refused(third, name, "damaged")
    fourth = saved(tmp_path / "truncated")
    whole = (fourth / "model.safetensors").read_bytes()
    (fourth / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(fourth, ".memory.table.", "damaged")
    (fourth / "model.safetensors").write_bytes(b"not a header at all" + whole)
    refused(fourth, "expected a safetensors file")
    fifth = saved(tmp_path / "shards", "40KB")
    index = json.loads((fifth / "model.safetensors.index.json").read_text())["weight_map"]
    (fifth / index[name]).unlink()
    refused(fifth, index[name], "missing")
    elsewhere = {"weight_map": {**index, name: "../good/model.safetensors"}}
    (fifth / "model.safetensors.index.json").write_text(json.dumps(elsewhere))
    refused(fifth, "'../good/model.safetensors'", "beside it")
    refused(tmp_path, "model.safetensors, which is missing")


def test_places_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    with pytest.raises(ValueError, match="memory_tables is 'disk'"):
        UMv2ForCausalLM.from_pretrained(folder, memory_tables="disk")
    with pytest.raises(ValueError, match="expected 'device'"):
        UMv2ForCausalLM.from_pretrained(folder, memory_tables="mmap", variant="other")
    with pytest.raises(ValueError, match="from_pretrained"):
        UMv2ForCausalLM(tiny_config(), memory_tables="mmap")(tokens(1, 3))


def test_the_tools_offer_the_places_that_the_model_has() -> None:
    from umv2_megatron.evaluation.local_export import MEMORY_TABLES
    from umv2_megatron.hf.tables_umv2 import PLACES

    assert MEMORY_TABLES == PLACES
