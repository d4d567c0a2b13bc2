"""The decode benchmark at tiny sizes: both sides decode, and what a step touches is counted right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import decode, decode_kernels, decode_side
from umv2_megatron.config.presets import find_preset
from umv2_megatron.hf import native_umv2
from umv2_megatron.planning.parameters import count_parameters

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {"preset": "umv2-tiny", "dtype": "float32", "device": "cpu"}
LAYERS, TOPK, ROW_BYTES = 4, 4, (8 + 24) * 4


@pytest.fixture(scope="module")
def memory() -> decode_side.Memory:
    return decode_side.build_umv2(OPTIONS)


@pytest.fixture(scope="module")
def experts() -> decode_side.Experts:
    return decode_side.build_olmoe(OPTIONS)


def same_tokens(side: decode_side.Side) -> None:
    """Let every sequence of a step get the same token and the same cache, so that all pick the same items."""
    side.draw_tokens = lambda steps: [torch.full((side.batch, 1), 7 + step) for step in range(steps)]
    with torch.inference_mode():
        for layer in side.cache.layers:
            layer.keys.copy_(layer.keys[:1].clone().expand_as(layer.keys))
            layer.values.copy_(layer.values[:1].clone().expand_as(layer.values))


def test_distinct_rows_are_counted_once(memory):
    memory.prepare(batch=3, context=8)
    same_tokens(memory)
    found = memory.count(steps=2)
    assert found["items"] == LAYERS * TOPK
    assert found["sparse"] == LAYERS * TOPK * ROW_BYTES
    config = memory.config
    keys = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    assert found["cache"] == 3 * 8 * LAYERS * 2 * keys * 4
    count = count_parameters(find_preset("umv2-tiny").model, find_preset("umv2-tiny").memory_config())
    assert found["dense"] == 4 * (count.total - count.tables + count.embedding)
    del memory.draw_tokens
    memory.prepare(batch=64, context=8)
    rows = 16 * 16
    assert LAYERS * TOPK < memory.count(steps=2)["items"] < LAYERS * rows


def test_distinct_experts_are_counted_once(experts):
    experts.prepare(batch=3, context=8)
    same_tokens(experts)
    found = experts.count(steps=2)
    active, inner, hidden = 8, experts.config.intermediate_size, 64
    assert found["items"] == LAYERS * active
    assert found["sparse"] == LAYERS * active * 3 * inner * hidden * 4
    assert found["dense"] + LAYERS * 64 * 3 * inner * hidden * 4 == experts.describe()["bytes"]
    del experts.draw_tokens
    experts.prepare(batch=64, context=8)
    assert experts.count(steps=1)["items"] > LAYERS * 50  # of 64 in each layer


def test_sizes_are_those_of_the_preset(memory):
    preset = find_preset("umv2-tiny")
    count = count_parameters(preset.model, preset.memory_config())
    facts = memory.describe()
    assert facts["total"] == count.total and facts["activated"] == count.activated
    assert facts["sparse_bytes"] == 4 * count.tables


@pytest.mark.parametrize("preset, inner", [("umv2-227m-1.2b", 384), ("umv2-1b-7b", 1024)])
def test_olmoe_of_equal_total_has_the_papers_inner_size(preset, inner):
    assert decode_side.olmoe_config(preset).intermediate_size == inner


def test_decoding_after_a_cache_equals_a_pass_over_all_tokens(memory):
    from transformers import StaticCache

    tokens = torch.randint(0, 512, (2, 9))
    with torch.inference_mode():
        expected = memory.model(input_ids=tokens).logits[:, -1]
        memory.prepare(batch=2, context=8)
        memory.cache = StaticCache(config=memory.config, max_cache_len=9)
        memory.model(input_ids=tokens[:, :8], past_key_values=memory.cache, use_cache=True)
        for _ in range(2):  # a step leaves the context as it was
            assert torch.allclose(memory.step(tokens[:, 8:])[:, -1], expected, atol=1e-5)


def test_a_limit_is_bytes_or_operations():
    ours = {"dense": 5e9, "sparse": 2e9, "cache": 1e9}
    result, machine = {"batch": 4, "sides": {decode.OURS: ours}}, {"copy_bytes_per_s": 2e9, "gemm_flops_per_s": 1e9}
    assert decode.limit_ms(result, 100_000_000, machine) == pytest.approx(4000)
    assert decode.limit_ms(result, 1_000_000_000, machine) == pytest.approx(8000)
    assert decode.in_dtype(machine, "float32", "cpu", True) is machine
    assert decode.in_dtype(machine, "bfloat16", "cpu", True)["gemm_flops_per_s"] != 1e9


class SideHere:
    """Stands for a process of decode_side.py: the same side in this process, which saves the starts of two."""

    def __init__(self, options: dict) -> None:
        self._side = decode_side.SIDES[options["side"]](options)
        self.facts = self._side.describe()

    def ask(self, do: str, **request) -> dict:
        return json.loads(json.dumps(decode_side.answer(self._side, {"do": do, **request})))

    def close(self) -> None:
        pass


def page_in(folder: Path) -> Path:
    page = folder / "page.md"
    page.write_text("before\n<!-- benchmarks/decode.py: begin -->\nold\n<!-- benchmarks/decode.py: end -->\nafter\n")
    return page


def test_sides_take_turns_and_all_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "SideProcess", SideHere)
    page, out = page_in(tmp_path), tmp_path / "out.json"
    assert decode.main(["--quick", "--batch", "2", "--no-mmap", "--docs", str(page), "--json", str(out)]) == 0
    (batch,) = json.loads(out.read_text())["results"][0]["batches"]
    for side in batch["sides"].values():
        assert len(side["rounds_ms"]) == 2 and min(side["rounds_ms"]) > 0
        assert side["peak_bytes"] > side["dense"] > 0
    ratios = [slow / fast for fast, slow in zip(*(side["rounds_ms"] for side in batch["sides"].values()))]
    assert batch["times_faster"] == pytest.approx(sum(ratios) / 2)
    text = page.read_text()
    assert "old" not in text and text.startswith("before") and "| 2 |" in text and "decode.png" in text
    assert "\n`python benchmarks/decode.py --batch 2 --no-mmap --quick`\n" in text and str(tmp_path) not in text
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(native_umv2.library() is None, reason="there is no C++ compiler")
def test_kernels_against_operations(tmp_path):
    out = tmp_path / "out.json"
    flags = ["--quick", "--batch", "2", "--dtype", "bfloat16", "--json", str(out)]
    assert decode_kernels.main([*flags, "--history", str(tmp_path / "history")]) == 0
    (history,) = (tmp_path / "history").iterdir()
    kept = json.loads(history.read_text())["times"]
    assert sorted(kept) == ["PyTorch, bfloat16, batch 2", "kernels, bfloat16, batch 2"]
    assert all(0 < lowest <= median <= highest < 10 for median, lowest, highest in kept.values()), "seconds"
    assert decode_kernels.main([*flags, "--no-plain"]) == 0
    (result,) = json.loads(out.read_text())["results"]
    assert list(result["times"]) == [decode_kernels.KERNELS] and min(result["times"][decode_kernels.KERNELS]) > 0
    assert result["sides"][decode.OURS]["cache"] and result["limit_ms"] > 0
    for flags in (["--steps", "0"], ["--batch", "0"], ["--context", "0"]):
        with pytest.raises(SystemExit) as stopped:
            decode_kernels.main(flags)
        assert stopped.value.code == 2


@pytest.mark.skipif(native_umv2.library() is None, reason="there is no C++ compiler")
def test_operations_are_timed_without_kernels(memory, monkeypatch):
    from umv2_megatron.hf import step_umv2

    called = []
    run = step_umv2._run
    monkeypatch.setattr(step_umv2, "_run", lambda *given: called.append(given[0]) or run(*given))
    memory.prepare(batch=2, context=8)
    for way, count in ((decode_kernels.PLAIN, 0), (decode_kernels.KERNELS, 2 * LAYERS)):
        with decode_kernels.computed_by(way):
            memory.time(1)
        assert len(called) == count


@pytest.mark.slow
def test_the_program_with_processes_and_tables_in_files(tmp_path):
    page, out = page_in(tmp_path), tmp_path / "out.json"
    flags = ["--quick", "--batch", "2", "--docs", str(page), "--json", str(out)]
    done = subprocess.run(
        [sys.executable, "benchmarks/decode.py", *flags], cwd=ROOT, capture_output=True, text=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(out.read_text())["results"][0]
    assert result["resident"]
    (row,) = result["mmap"]["batches"]
    assert min(row["warm"] + row["cold"]) > 0 and "RLIMIT_AS" in page.read_text()


def test_where_memory_has_room_for_one_the_other_ends_first(monkeypatch):
    monkeypatch.setattr(decode, "SideProcess", SideHere)
    sides = {name: {"side": side, **OPTIONS} for name, side in ((decode.OURS, "umv2"), (decode.PEER, "olmoe"))}
    contestants = decode.Contestants(sides, resident=False)
    for name in (decode.OURS, decode.PEER, decode.OURS):
        contestants.ready(name, 1, 8)
        assert list(contestants._kept) == [name]
    assert set(contestants.facts) == set(sides)


def test_wrong_values_are_refused_before_anything_is_measured(capsys):
    for flags in (["--steps", "0"], ["--batch", "0"], ["--docs", "missing.md"]):
        with pytest.raises(SystemExit) as stopped:
            decode.main(flags)
        assert stopped.value.code == 2 and flags[0] in capsys.readouterr().err
