"""tools/evaluate.py gives the same numbers on every layout as on one rank, and refuses mistakes in one line."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from program_runs import command_line, tiny_run, train

from umv2_megatron.config.flags import UsageError

pytestmark = pytest.mark.thorough

TEXTS = ["def one(value):\n    return value + 1\n", "a second document, a little longer than the first", "é and ü"]
# Two blocks, an untrained model but for one step: every layout loads the same weights.
MODEL = {"tokenizer_type": "ByteLevelTokenizer", "train_iters": 1, "make_vocab_size_divisible_by": 512,
         "memory_num_keys": 16, "num_layers": 2, "max_position_embeddings": 64}  # fmt: skip
ASKED = {"tasks": "key-value,fact-recall", "forms": "trained", "context_lengths": "140", "num_examples": 3,
         "max_fact_frequency": 1, "micro_batch_size": 2, "data_context_length": 24, "stride": 16}  # fmt: skip


def run_evaluate_instead() -> None:
    """On a forked rank: its program becomes tools/evaluate.py."""
    from umv2_megatron.commands import pretrain

    pretrain.main = tool("evaluate").main


def run_convert_instead() -> None:
    """On a forked rank: its program becomes tools/convert_checkpoint.py."""
    from umv2_megatron.commands import pretrain

    convert = tool("convert_checkpoint")
    pretrain.main = lambda argv: convert.main(convert.parser().parse_args(argv)) or 0


def tool(name: str):
    """The module of a program."""
    return importlib.import_module(f"umv2_megatron.commands.{name}")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    save = tmp_path_factory.mktemp("evaluated") / "run"
    train(1, tiny_run(**MODEL, save=save), save.parent / "train")
    (save.parent / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return save


def evaluated(ranks: int, checkpoint: Path, folder: Path, **layout) -> dict:
    """The report of ``ranks`` ranks."""
    output = folder / "report.json"
    settings = {**ASKED, "load": checkpoint, "data": checkpoint.parent / "texts.jsonl", "output": output, **layout}
    finished = train(ranks, command_line(settings), folder / "output", run_evaluate_instead)
    assert finished.outputs[0].count("bits/byte") == 1 and all("bits/byte" not in text for text in finished.outputs[1:])
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def alone(checkpoint) -> dict:
    return evaluated(1, checkpoint, checkpoint.parent / "alone")


LAYOUTS = {
    "data": (2, {"data_form": "stream"}),
    "tensor-and-memory": (2, {"tensor_model_parallel_size": 2, "memory_parallel_size": 2}),
    "sequence-and-rows": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "memory_parallel_size": 2,
                              "memory_parallel_mode": "row"}),
    "data-and-memory": (2, {"memory_parallel_size": 2}),
    "pipeline": (2, {"pipeline_model_parallel_size": 2}),
    "context": (2, {"context_parallel_size": 2}),
}  # fmt: skip


SLOW = ("data", "data-and-memory", "tensor-and-memory", "pipeline")


def compare(report: dict, alone: dict, tolerance: float) -> None:
    """Every number of every record."""
    assert len(report["tasks"]) == len(alone["tasks"]) == 3
    for ours, theirs in zip(report["texts"] + report["tasks"], alone["texts"] + alone["tasks"], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            same = pytest.approx(theirs[name], rel=tolerance, abs=1e-7) if isinstance(value, float) else theirs[name]
            assert value == same, name


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [pytest.param(*case, marks=pytest.mark.slow if name in SLOW else ()) for name, case in LAYOUTS.items()],
    ids=LAYOUTS,
)
def test_numbers_do_not_depend_on_the_layout(ranks, layout, checkpoint, alone, tmp_path):
    compare(evaluated(ranks, checkpoint, tmp_path, **layout), alone, 1e-5)


def test_an_export_gives_the_numbers_of_its_checkpoint(checkpoint, alone, tmp_path):
    export = tmp_path / "export"
    train(1, ["to-hf", "--load", str(checkpoint), "--save", str(export)], tmp_path / "convert", run_convert_instead)
    compare(evaluated(1, checkpoint, tmp_path, load=None, hf_model=export, memory_tables="mmap"), alone, 1e-4)
    # what both take where no context is asked for: that of training
    assert json.loads((export / "config.json").read_text())["max_position_embeddings"] == 32


@pytest.mark.slow
def test_an_export_with_experts_gives_the_numbers_of_its_checkpoint(tmp_path):
    """Trained on two ranks that share the experts, evaluated on one, and exported."""
    save, export = tmp_path / "run", tmp_path / "export"
    experts = {"ffn_variant": "moe", "num_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 48,
               "memory_num_keys": None}  # fmt: skip
    train(2, tiny_run(**{**MODEL, **experts, "expert_model_parallel_size": 2, "save": save}), tmp_path / "train")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    alone = evaluated(1, save, tmp_path)
    train(1, ["to-hf", "--load", str(save), "--save", str(export)], tmp_path / "convert", run_convert_instead)
    compare(evaluated(1, save, tmp_path, load=None, hf_model=export), alone, 1e-4)


def test_what_one_rank_reports(alone, checkpoint):
    text = alone["texts"][0]
    assert text["bytes"] == sum(len(text.encode()) for text in TEXTS) and text["end_of_document_tokens"] == 3
    assert text["tokens"] == text["bytes"] + 3
    assert 4 < text["loss"] < 7  # a model that knows nothing, of 257 tokens
    assert [task["examples"] for task in alone["tasks"]] == [3, 3, 3]
    assert [task["times_seen"] for task in alone["tasks"]] == [None, 0, 1]
    assert (checkpoint.parent / "alone" / "report_facts.png").read_bytes().startswith(b"\x89PNG")


def test_mistakes_are_refused_before_anything_starts(checkpoint, tmp_path):
    main = tool("evaluate").main
    for settings, words in (
        ({"load": checkpoint, "hf_model": tmp_path, "tasks": "all"}, "--hf-model"),
        ({"load": checkpoint, "memory_tables": "mmap", "tasks": "all"}, "--memory-tables"),
        ({"load": checkpoint, "dtype": "float32", "tasks": "all"}, "--dtype is float32; it belongs to --hf-model"),
        ({"load": checkpoint, "tokenizer_type": "ByteLevelTokenizer", "tasks": "all"}, "--tokenizer-type"),
        ({"load": checkpoint, "vocab_size": 300, "tasks": "all"}, "--vocab-size"),
        ({"load": checkpoint, "trust_remote_code": True, "tasks": "all"}, "--trust-remote-code is given"),
        ({"hf_model": tmp_path, "ckpt_step": 7, "tasks": "all"}, "--ckpt-step is 7; it belongs to --load"),
        ({"hf_model": tmp_path, "tensor_model_parallel_size": 2, "tasks": "all"}, "--tensor-model-parallel-size"),
        ({"hf_model": tmp_path, "memory_parallel_mode": "row", "tasks": "all"}, "--memory-parallel-mode"),
        ({"hf_model": tmp_path, "sequence_parallel": True, "tasks": "all"}, "--sequence-parallel"),
        ({"hf_model": tmp_path, "tokenizer_model": "t.model", "tasks": "all"}, "--tokenizer-type"),
        ({"load": checkpoint, "tasks": "fact-recall", "facts_per_frequency": 64000}, "at most 32000"),
        ({"load": checkpoint, "tasks": "all", "output": tmp_path}, "a directory"),
        ({"load": checkpoint, "tasks": "sums"}, "'sums'"),
        ({"load": checkpoint, "tasks": "icl", "num_pairs": "2"}, "--num-pairs is 2; it belongs to key-value"),
        ({"load": checkpoint, "tasks": "icl", "num_shots": "2,x"}, "--num-shots is '2,x'; expected integers"),
        ({"load": checkpoint, "tasks": "all", "num_examples": 0}, "--num-examples"),
        ({"load": checkpoint, "data": tmp_path / "none"}, "none"),
        ({"load": checkpoint, "tasks": "all", "output": tmp_path / "none" / "x.json"}, "--output"),
    ):
        with pytest.raises(UsageError, match=words):
            main(command_line(settings))


def test_nothing_is_scored_before_everything_is_checked(tmp_path, monkeypatch):
    """A model with learned positions, whose end is not passed either."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from umv2_megatron.evaluation import evaluate_model

    program = tool("evaluate")
    config = GPT2Config(vocab_size=257, n_positions=256, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    (tmp_path / "text.txt").write_text(TEXTS[0])
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{}\n')
    shared = {"hf_model": tmp_path / "gpt2", "tokenizer_type": "ByteLevelTokenizer", "data": tmp_path / "text.txt"}
    scored = []
    monkeypatch.setattr(evaluate_model, "text_loss", lambda *_, **__: scored.append("text"))
    monkeypatch.setattr(evaluate_model, "score", lambda *_: scored.append("task"))
    for settings, more, words in (
        ({"tasks": "key-value", "context_lengths": "256,400"}, [], "--context-lengths holds 400; .* end at 256: give"),
        ({"tasks": "needle", "context_lengths": "256,16"}, [], "--context-lengths .* holds 16"),
        ({"tasks": "icl", "difficulty": "2000"}, [], "--difficulty .* 4000 different words"),
        ({}, [str(tmp_path / "empty.txt")], "--data names .*empty.txt, which holds no text"),
        ({}, [str(tmp_path / "bad.jsonl")], "bad.jsonl:2"),
    ):
        argv = command_line({**settings, "num_examples": 2, **shared})
        with pytest.raises(UsageError, match=words):
            program.main([*argv, *more])  # more texts
    GPT2LMHeadModel(GPT2Config(**{**config.to_dict(), "n_positions": 24})).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UsageError, match="--tasks holds fact-recall, .* end at 24: leave it out"):
        program.main(command_line({"tasks": "fact-recall", "max_fact_frequency": 1, **shared}))
    assert not scored


def test_mistakes_are_one_line(checkpoint, tmp_path):
    cases = [
        ({"load": checkpoint}, "nothing to evaluate"),
        ({"load": checkpoint, "tasks": "icl", "context_lengths": "20"}, "--context-lengths"),
        ({"load": tmp_path, "tasks": "icl"}, str(tmp_path)),
    ]
    for number, (settings, words) in enumerate(cases):
        finished = train(1, command_line(settings), tmp_path / str(number), run_evaluate_instead, codes=2)
        lines = [line for line in finished.outputs[0].splitlines() if "error" in line]
        assert len(lines) == 1 and words in lines[0], finished.text
