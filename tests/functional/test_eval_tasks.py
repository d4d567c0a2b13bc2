"""--eval-tasks: lm-eval on the native model. Its numbers are those of lm-eval on the export, for every answer, and
the same in every layout; training does not notice; what fails ends on all ranks. Skipped where lm-eval is missing."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from program_runs import tiny_run, train

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "functional"))

from conversions import forked, to_hf  # noqa: E402

from umv2_megatron.config.usage import UsageError  # noqa: E402

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")

MODEL = {"tokenizer_type": "ByteLevelTokenizer", "vocab_size": 257, "seq_length": 48, "max_position_embeddings": 48}
QUESTIONS = [
    {"question": "The sky is", "choices": [" blue", " a colour that nobody has seen before", " x"], "answer": 0},
    {"question": "Two and two are ", "choices": ["four", "five", "é"], "answer": 1},
    {"question": "long " * 20, "choices": [" end", " longer than the others by some letters", "?"], "answer": 2},
]
CHOICES = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}},
              {{metric: acc_norm, aggregation: mean, higher_is_better: true}}]
"""
ROLLING = """
task: own_documents
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}]
"""
TEXTS = """
task: own_texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "x"
generation_kwargs: {{until: ["zz"], max_gen_toks: 6}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
FAILING = CHOICES + "process_results: !function failing.process\n"


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """No network, and lm-eval's caches in a folder of the test."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A directory with our tasks: choices, documents, texts to generate, and one whose Python raises."""
    made = tmp_path_factory.mktemp("tasks")
    data = made / "questions.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS))
    kinds = {"own_choices": CHOICES, "own_documents": ROLLING, "own_texts": TEXTS, "failing": FAILING}
    for name, text in kinds.items():
        (made / f"{name}.yaml").write_text(text.format(name=name, data=data))
    (made / "failing.py").write_text("def process(doc, results):\n    raise LookupError('no such answer')\n")
    return made


def asked(folder: Path, *names: str, **changes: Any) -> dict[str, Any]:
    """Settings of a run that is scored on tasks of ``folder``."""
    return {**MODEL, "eval_tasks": list(names), "eval_tasks_path": [folder], "eval_tasks_interval": 2, **changes}


def scores(directory: Path) -> list[dict[str, float]]:
    """The records of metrics.jsonl that hold scores."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if any(name.startswith("lm-eval/") for name in line)]


def losses(directory: Path) -> list[dict[str, float]]:
    """The other records, without times."""
    timed = ("iteration-time", "throughput")
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in timed}
        for line in lines
        if not any(name.startswith("lm-eval/") for name in line)
    ]


# -- the numbers are those of the export -------------------------------------------------------------------------------

PAIRS = [
    ("", "no context"),
    ("The sky is", " blue"),
    ("spaces at the end  ", "of a context"),
    ("long " * 20, " end"),
    ("x", "a continuation that fills the context of 48 tok"),
    ("é", "ü"),
]
ROLLED = ["x", "", "short", "a text that is longer than one window of the context: " * 4]
PROMPTS = [("The sky is", {"until": ["q"], "max_gen_toks": 12}), ("long " * 20, {"until": [], "max_gen_toks": 9})]


def instances(kind: str, arguments: list[tuple]) -> list[Any]:
    """Requests of lm-eval."""
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def answers(lm: Any) -> dict[str, Any]:
    """What a class of lm-eval answers to all requests."""
    return {
        "pairs": lm.loglikelihood(instances("loglikelihood", PAIRS)),
        "rolled": lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in ROLLED])),
        "texts": lm.generate_until(instances("generate_until", PROMPTS)),
    }


def of_checkpoint(save: str) -> dict[str, Any]:
    """The answers of our class."""
    importlib.import_module("umv2_megatron.evaluation.lm_eval_model")
    from lm_eval.api.registry import get_model

    return answers(get_model("umv2_megatron").create_from_arg_string(f"load={save},batch_size=3"))


def of_export(export: str) -> dict[str, Any]:
    """The answers of lm-eval's class for transformers."""
    importlib.import_module("umv2_megatron.hf")
    from lm_eval.models.huggingface import HFLM

    return answers(HFLM(pretrained=export, dtype="float32", device="cpu", batch_size=1))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("checkpoint")
    train(1, tiny_run(**MODEL, train_iters=3, save=made / "run"), made / "log")
    return made / "run"


def test_every_answer_is_that_of_the_export(checkpoint, tmp_path):
    export = forked(to_hf, checkpoint, tmp_path / "export")
    ours, theirs = forked(of_checkpoint, str(checkpoint)), forked(of_export, str(export))
    assert ours["texts"] == theirs["texts"] and len("".join(ours["texts"])) > 4
    assert [greedy for _, greedy in ours["pairs"]] == [greedy for _, greedy in theirs["pairs"]]
    numbers = [[*(nats for nats, _ in each["pairs"]), *each["rolled"]] for each in (ours, theirs)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-5)
    assert numbers[0][len(PAIRS) + 1] == 0 and numbers[0][-1] < -500


# -- layouts -----------------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "data-and-memory": (2, {"memory_parallel_size": 2}),
    "tensor": (2, {"tensor_model_parallel_size": 2}),
    "sequence-and-rows": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "memory_parallel_size": 2,
                              "memory_parallel_mode": "row"}),
    "pipeline": (2, {"pipeline_model_parallel_size": 2}),
    "virtual-stages": (2, {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}),
    "context": (2, {"context_parallel_size": 2}),
    "documents-apart": (1, {"reset_attention_mask": True, "allow_config_change": True}),
}  # fmt: skip
FOUR = {"num_layers": 4, "make_vocab_size_divisible_by": 514, "train_iters": 1, "lr": 1e-2}


def told(output: str) -> dict[str, float]:
    """Scores of the console's lines."""
    found = re.findall(r" (own_\w+) at iteration \d+ \| (.*) \|", output)
    pairs = [(task, *part.split(": ")) for task, rest in found for part in rest.split(" | ")]
    return {f"{task}/{metric}": float(value.split(" ")[0]) for task, metric, value in pairs}


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("four")
    train(1, tiny_run(**{**MODEL, **FOUR}, save=made / "run"), made / "log")
    return made / "run"


@pytest.fixture(scope="module")
def alone(four, folder, tmp_path_factory) -> dict[str, float]:
    return in_layout(1, four, folder, tmp_path_factory.mktemp("alone"), "own_texts")


def in_layout(ranks: int, four: Path, folder: Path, log: Path, *more: str, **layout: Any) -> dict[str, float]:
    """Scores of ``ranks`` ranks on a checkpoint."""
    settings = asked(folder, "own_choices", "own_documents", *more, **FOUR, skip_train=True, load=four)
    finished = train(ranks, tiny_run(**{**settings, **layout}), log)
    assert finished.codes == [0] * ranks, finished.text[-4000:]
    assert not any(told(output) for output in finished.outputs[:-1])
    return told(finished.outputs[-1])


@pytest.mark.parametrize(
    "name", [name if name in ("virtual-stages",) else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_scores_are_those_of_one_rank(name, four, folder, alone, tmp_path):
    ranks, layout = LAYOUTS[name]
    generates = name in ("data-and-memory", "tensor", "documents-apart")
    found = in_layout(ranks, four, folder, tmp_path, *["own_texts"] * generates, **layout)
    assert len(alone) == 4 and set(found) == {each for each in alone if generates or "own_texts" not in each}
    for each, value in found.items():
        assert value == pytest.approx(alone[each], rel=3e-6), each


# -- training does not notice ------------------------------------------------------------------------------------------


def test_training_is_bit_by_bit_the_same_with_and_without_tasks_and_after_a_resume(folder, tmp_path):
    plain = {**MODEL, "train_iters": 6, "attention_dropout": 0.1, "hidden_dropout": 0.1, "memory_log_interval": 1}
    ways = {
        "without": plain,
        "with": {**plain, **asked(folder, "own_choices", "own_documents", "own_texts")},
        "stopped": {**plain, **asked(folder, "own_choices", "own_documents", "own_texts"), "exit_interval": 3},
    }
    finished = {}
    for name, settings in ways.items():
        for start in range(2 if name == "stopped" else 1):
            argv = tiny_run(**settings, save=tmp_path / name, memory_parallel_size=2)
            finished[name] = train(2, argv, tmp_path / f"{name}_{start}")
            assert finished[name].codes == [0, 0], finished[name].text[-4000:]
    assert finished["with"].weights == finished["without"].weights == finished["stopped"].weights
    assert losses(tmp_path / "with") == losses(tmp_path / "without") == losses(tmp_path / "stopped")
    assert scores(tmp_path / "with") == scores(tmp_path / "stopped")
    assert [each["iteration"] for each in scores(tmp_path / "with")] == [2, 4, 6]
    assert {name for each in scores(tmp_path / "with") for name in each} == {
        "iteration", "lm-eval/own_choices/acc", "lm-eval/own_choices/acc_stderr", "lm-eval/own_choices/acc_norm",
        "lm-eval/own_choices/acc_norm_stderr", "lm-eval/own_documents/bits_per_byte", "lm-eval/own_texts/exact_match",
        "lm-eval/own_texts/exact_match_stderr",
    }  # fmt: skip
    told_events = [json.loads(line) for line in (tmp_path / "with" / "events.jsonl").read_text().splitlines()]
    kept = [each["scores"] for each in told_events if each["event"] == "tasks"]
    assert kept == [{name: each[name] for name in each if name != "iteration"} for each in scores(tmp_path / "with")]


def test_a_limit_and_the_end_of_a_run(folder, tmp_path):
    settings = asked(folder, "own_choices", train_iters=3, eval_tasks_limit=1, eval_tasks_interval=None)
    finished = train(1, tiny_run(**settings, eval_interval=2, save=tmp_path / "run"), tmp_path / "log")
    found = scores(tmp_path / "run")
    assert [each["iteration"] for each in found] == [2, 3]
    assert all(each["lm-eval/own_choices/acc"] in (0, 1) for each in found)
    assert not any("stderr" in name for name in found[0])  # of one document
    assert finished.text.index("saved checkpoint of iteration 3") < finished.text.index("own_choices at iteration 3")


def asked_to_stop(second: int) -> None:
    """Before the program of a rank: SIGTERM comes while tasks are scored for the ``second``-th time."""
    import signal

    from umv2_megatron.evaluation import lm_eval_tasks

    plain, calls = lm_eval_tasks.LmEvalTasks._scores, []

    def interrupted(self, model):
        calls.append(model)
        if len(calls) == second:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, model)

    lm_eval_tasks.LmEvalTasks._scores = interrupted


def test_a_stop_leaves_the_evaluation(folder, tmp_path):
    settings = asked(folder, "own_choices", "own_documents", train_iters=9)
    finished = train(2, tiny_run(**settings, save=tmp_path / "run"), tmp_path / "log", asked_to_stop, (2,))
    assert [each["iteration"] for each in scores(tmp_path / "run")] == [2]
    assert "--eval-tasks at iteration 4 is left out: the run was asked to stop" in finished.text
    assert "saved checkpoint of iteration 5" in finished.text and "iteration 6" not in finished.text


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_a_task_that_raises_is_told_and_training_goes_on(folder, tmp_path):
    settings = asked(folder, "failing", "own_documents", train_iters=2)
    finished = train(2, tiny_run(**settings, save=tmp_path / "run"), tmp_path / "log")
    assert finished.codes == [0, 0], finished.text[-4000:]
    assert "WARNING: --eval-tasks at iteration 2 failed: LookupError: no such answer" in finished.outputs[1]
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [each["text"] for each in events if each["event"] == "tasks-failed"] == ["LookupError: no such answer"]
    only = train(2, tiny_run(**settings, load=tmp_path / "run", skip_train=True), tmp_path / "only", codes=1)
    assert "--eval-tasks failed: LookupError: no such answer" in only.text


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"eval_tasks": ["own_choicse"]}, "--eval-tasks is own_choicse; expected a task"),
        ({"eval_tasks_path": ["nosuch"]}, "--eval-tasks-path is nosuch; expected a directory"),
        ({"eval_tasks": ["unreadable"]}, "--eval-tasks is unreadable, which cannot be loaded: "),
        ({"tokenizer_type": "NullTokenizer"}, "--tokenizer-type NullTokenizer, which reads no text"),
        ({"eval_tasks": ["own_texts"], "pipeline_model_parallel_size": 2},
         "own_texts, which generates text, and the layout of --pipeline-model-parallel-size 2 cannot"),
        ({"eval_tasks": None, "eval_tasks_path": None, "eval_tasks_interval": None, "eval_tasks_limit": 3},
         "--eval-tasks-limit is 3; expected no value without"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_at_the_start(changes, sentence, folder, tmp_path):
    (folder / "unreadable.yaml").write_text(CHOICES.format(name="unreadable", data=tmp_path / "nosuch.jsonl"))
    argv = tiny_run(**{**asked(folder, "own_choices"), "train_iters": 1, **changes, "save": tmp_path / "run"})
    finished = train(2, argv, tmp_path / "log", codes=2)
    assert finished.text.count(sentence) == 1, finished.text[-4000:]
    assert "Traceback" not in finished.text and "memory backend" not in finished.text


# -- lm-eval's own program ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_lm_evals_program_reads_a_checkpoint_on_one_rank_and_on_two(checkpoint, folder, tmp_path):
    found = []
    program = ["tools/run_lm_eval.py", "--model", "umv2_megatron", "--tasks", "own_choices,own_documents",
               "--include_path", str(folder), "--batch_size", "2"]  # fmt: skip
    starts = {"one": [sys.executable], "two": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                                               "--standalone"]}  # fmt: skip
    for name, start in starts.items():
        layout = ",tensor_model_parallel_size=2,memory_parallel_size=2" if name == "two" else ""
        command = [*start, *program, "--model_args", f"load={checkpoint}{layout}", "--output_path", tmp_path / name]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        (report,) = (tmp_path / name).rglob("results_*.json")
        found.append(json.loads(report.read_text())["results"])
    for task in ("own_choices", "own_documents"):
        numbers = {key: value for key, value in found[0][task].items() if isinstance(value, float)}
        assert {key: found[1][task][key] for key in numbers} == pytest.approx(numbers, rel=1e-5)
    wrong = [sys.executable, *program, "--model_args", f"lode={checkpoint}"]
    done = subprocess.run(wrong, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "--model_args has" in done.stderr and "Traceback" not in done.stderr


def test_arguments_of_the_model_that_cannot_be():
    """Told before anything is loaded, as mistakes of flags: exit code 2."""
    made = importlib.import_module("umv2_megatron.evaluation.lm_eval_model").UMv2MegatronLM
    for arguments, words in (
        ({}, "--model_args has no load; give load=DIR"),
        ({"load": "here", "tensor_parallel": 2}, "--model_args has tensor_parallel; expected some of load, ckpt_step"),
        ({"load": "here", "batch_size": "many"}, "--batch_size is many; expected an integer of at least 1, or auto"),
        ({"load": "here", "batch_size": 0}, "--batch_size is 0; expected an integer of at least 1, or auto"),
    ):
        with pytest.raises(UsageError, match=re.escape(words)):
            made(**arguments)
