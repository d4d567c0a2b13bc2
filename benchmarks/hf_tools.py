"""What works with the Hugging Face model: tools of its ecosystem, each on every kind of model, and how exactly.

    python benchmarks/hf_tools.py                                    all of it: 3 minutes of one core
    python benchmarks/hf_tools.py --tool export --tool offload-disk --variant plain     a quick look
    python benchmarks/hf_tools.py --docs docs/hugging-face.md        writes the table there
    python benchmarks/hf_tools.py --backend inductor                 what compiles, by torch's compiler: half an hour

Models of four small blocks with random weights (``tests/unit/hf/tiny_model.py``), in float64, where no pick of a memory
layer is a tie. A number is the largest difference of logits (of parameters, for rows of training) from the same model
without the tool, as part of the largest one; "to the bit" is no difference at all. What ends with an error is
"refused", and the errors stand under the table. Exit code 1 where a difference is above 1e-6 or something is refused.

A tool is a function in ``TOOLS``: it takes a model and a folder, and gives the difference.
"""

from __future__ import annotations

import argparse
import copy
import os
import pickle
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests" / "unit" / "hf")]

import torch  # noqa: E402
from measure import Table, describe_machine, put_between_marks  # noqa: E402
from tiny_model import CONTRACT, tiny_model, tokens  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers.utils import logging  # noqa: E402

from umv2_megatron.hf import UMv2ForCausalLM  # noqa: E402

LIMIT = 1e-6
Tool = Callable[[UMv2ForCausalLM, Path], float]
BACKEND = "eager"
"""Of torch.compile, see --backend: it takes whole graphs and runs their operations."""
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}


class NotForThis(Exception):
    """The tool has nothing to do with this kind of model."""


def made(variant: str) -> UMv2ForCausalLM:
    """A model of this kind, always with the same weights."""
    return tiny_model(**CONTRACT[variant]).double()


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def logits_of(model: Any, *shape: int) -> Tensor:
    with torch.no_grad():
        return model(tokens(*shape)).logits


def same_logits(other: Any, model: UMv2ForCausalLM) -> float:
    """The difference of logits; and greedy text must be the same."""
    if not torch.equal(other.generate(tokens(2, 9), **GREEDY), model.generate(tokens(2, 9), **GREEDY)):
        return float("inf")
    return distance(logits_of(other, 2, 9), logits_of(model, 2, 9))


def loaded(model: UMv2ForCausalLM, folder: Path, **options: Any) -> UMv2ForCausalLM:
    """``model`` saved and loaded with ``options``."""
    model.save_pretrained(folder / "model")
    return UMv2ForCausalLM.from_pretrained(folder / "model", dtype=torch.float64, **options).eval()


def compiled(model: UMv2ForCausalLM, folder: Path) -> float:
    whole = torch.compile(model, fullgraph=True, dynamic=True, backend=BACKEND)
    return max(distance(logits_of(whole, *shape), logits_of(model, *shape)) for shape in ((3, 9), (5, 20)))


def compiled_training(model: UMv2ForCausalLM, folder: Path) -> float:
    """Three steps of fused AdamW; the difference of parameters, and then of the logits of the saved model."""
    models = [model.train(), copy.deepcopy(model)]
    for each, forward in zip(models, (model, torch.compile(models[1], fullgraph=True, backend=BACKEND)), strict=True):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-2, fused=True)
        for step in range(3):
            batch = tokens(2, 9, seed=step + 1)
            forward(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    pairs = zip(*(each.parameters() for each in models), strict=True)
    apart = max(distance(one.detach(), two.detach()) for one, two in pairs)
    return max(apart, same_logits(loaded(models[1], folder), models[1].eval()))


def exported(model: UMv2ForCausalLM, folder: Path) -> float:
    """By torch.export, with any batch and length, saved and loaded again."""
    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=100)}
    with torch.no_grad():
        program = torch.export.export(
            model, (tokens(2, 9),), {"use_cache": False}, dynamic_shapes={"input_ids": sizes, "use_cache": None}
        )
        torch.export.save(program, folder / "program.pt2")
        run = torch.export.load(folder / "program.pt2").module()
        shapes = ((2, 9), (1, 40), (5, 3))
        found = [run(tokens(*shape), use_cache=False).logits for shape in shapes]
    return max(distance(one, logits_of(model, *shape)) for one, shape in zip(found, shapes, strict=True))


def static_cache(model: UMv2ForCausalLM, folder: Path) -> float:
    """``generate`` with a compiled step; the logits of its tokens."""
    from transformers import CompileConfig

    config = CompileConfig(fullgraph=True, backend=BACKEND, mode="default" if BACKEND == "inductor" else None)
    config._compile_all_devices = True
    outputs = [
        model.generate(tokens(2, 9), **GREEDY, **options, return_dict_in_generate=True, output_logits=True)
        for options in ({"cache_implementation": "static", "compile_config": config}, {"use_cache": False})
    ]
    if not torch.equal(outputs[0].sequences, outputs[1].sequences):
        return float("inf")
    return distance(torch.stack(outputs[0].logits), torch.stack(outputs[1].logits))


def offloaded_to_memory(model: UMv2ForCausalLM, folder: Path) -> float:
    from accelerate import cpu_offload

    return same_logits(cpu_offload(loaded(model, folder), execution_device=torch.device("cpu")), model)


def offloaded_to_disk(model: UMv2ForCausalLM, folder: Path) -> float:
    return same_logits(loaded(model, folder, device_map={"": "disk"}, offload_folder=str(folder / "rows")), model)


def tensor_parallel(model: UMv2ForCausalLM, folder: Path) -> float:
    """On two processes, by the plan: logits and gradients."""
    model.save_pretrained(folder / "model")
    torch.multiprocessing.spawn(_rank, (str(folder),), nprocs=2)
    return max(float((folder / f"rank{rank}").read_text()) for rank in range(2))


def _rank(rank: int, folder: str) -> None:
    from transformers.distributed import DistributedConfig

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    path, batch = Path(folder, "model"), tokens(2, 9)
    config = DistributedConfig(tp_plan="auto")
    split = UMv2ForCausalLM.from_pretrained(path, dtype=torch.float64, distributed_config=config).eval()
    whole = UMv2ForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    apart = [distance(logits_of(split, 2, 9), logits_of(whole, 2, 9))]
    for model in (split, whole):
        model(batch, labels=batch).loss.backward()
    for name, parameter in split.named_parameters():
        grad, expected = parameter.grad, whole.get_parameter(name).grad
        assert grad is not None and expected is not None, name
        apart.append(distance(getattr(grad, "full_tensor", lambda grad=grad: grad)(), expected))
    Path(folder, f"rank{rank}").write_text(str(max(apart)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def trainer(model: UMv2ForCausalLM, folder: Path) -> float:
    """Four steps, and the same in two parts; the difference of parameters, and of the reloaded model's logits."""
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": row, "labels": row} for row in tokens(16, 20)]

    def train(each: UMv2ForCausalLM, name: str, resume: str | None) -> UMv2ForCausalLM:
        arguments = TrainingArguments(
            str(folder / name), max_steps=4, save_steps=2, per_device_train_batch_size=4, learning_rate=1e-2,
            report_to=[], disable_tqdm=True, use_cpu=True, seed=3, logging_strategy="no",
        )  # fmt: skip
        Trainer(model=each, args=arguments, train_dataset=data).train(resume_from_checkpoint=resume)
        return each.eval()

    begun = copy.deepcopy(model)
    whole = train(model, "whole", None)
    parts = train(begun, "parts", str(folder / "whole" / "checkpoint-2"))
    apart = max(distance(one.detach(), two.detach()) for one, two in zip(parts.parameters(), whole.parameters()))
    again = UMv2ForCausalLM.from_pretrained(folder / "parts" / "checkpoint-4", dtype=torch.float64).eval()
    return max(apart, same_logits(again, parts))


def copied(model: UMv2ForCausalLM, folder: Path) -> float:
    """By deepcopy and by pickle, with tables in each of their places."""
    has_tables = model.config.ffn_variant == "umv2"
    apart = []
    for place in ("device", "cpu", "mmap") if has_tables else ("device",):
        each = loaded(model, folder / place, memory_tables=place)
        apart += [same_logits(other, model) for other in (copy.deepcopy(each), pickle.loads(pickle.dumps(each)))]
    return max(apart)


TOOLS: dict[str, tuple[str, Tool]] = {
    "compile": ("`torch.compile(fullgraph=True)`, any shape", compiled),
    "compile-training": ("compiled training, fused AdamW, reloaded", compiled_training),
    "export": ("`torch.export`, any batch and length", exported),
    "static-cache": ("`generate`, static cache, compiled step", static_cache),
    "offload-cpu": ("accelerate `cpu_offload`", offloaded_to_memory),
    "offload-disk": ('`device_map={"": "disk"}`', offloaded_to_disk),
    "tensor-parallel": ('`tp_plan="auto"`, 2 ranks, gradients too', tensor_parallel),
    "trainer": ("`Trainer`, resumed, reloaded", trainer),
    "copy": ("`deepcopy` and `pickle`, all places of tables", copied),
}


def measure(tool: Tool, variant: str, errors: list[str], name: str) -> str:
    """One cell of the table; what went wrong is added to ``errors``."""
    torch._dynamo.reset()
    with tempfile.TemporaryDirectory(prefix="hf_tools_") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            apart = tool(made(variant), Path(folder))
        except NotForThis:
            return "-"
        except Exception as error:
            errors.append(f"{name}, {variant}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
            return "refused"
    if not apart <= LIMIT:
        errors.append(f"{name}, {variant}: the difference is {apart:.1e}")
    return f"{apart:.0e}" if apart else "to the bit"


def main() -> int:
    """The program; its exit code."""
    global BACKEND
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", choices=tuple(TOOLS), action="append", help="default: all")
    parser.add_argument("--variant", choices=tuple(CONTRACT), action="append", help="default: all")
    parser.add_argument("--backend", default=BACKEND, help=f"of torch.compile (default: {BACKEND})")
    parser.add_argument("--docs", type=Path, help="a document with this program's marks, to put the table into")
    options = parser.parse_args()
    BACKEND = options.backend
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    variants, rows, errors = options.variant or list(CONTRACT), [], []
    for name in options.tool or TOOLS:
        words, tool = TOOLS[name]
        rows.append((words, *(measure(tool, variant, errors, name) for variant in variants)))
        print(*rows[-1], sep=" | ", flush=True)
    table = Table(describe_machine(quick=True)["device"] + f", torch {torch.__version__}.", ("", *variants), rows)
    print(f"\n{table.text()}")
    print("\n".join(errors))
    if options.docs:
        put_between_marks("\n\n".join([table.markdown(), *errors]), options.docs, "hf_tools.py")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
