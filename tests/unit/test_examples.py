"""What users read and copy: example scripts resolve to a checked run, and every flag that the docs name exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from umv2_megatron.config import flags_page, noted_flags
from umv2_megatron.config.checks import check_data
from umv2_megatron.config.option_table import names
from umv2_megatron.config.presets import PRESETS
from umv2_megatron.config.resolve import model_values, resolve
from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.evaluation.ablation.plan import read_plan
from umv2_megatron.evaluation.ablation.runner import read_results

ROOT = Path(__file__).resolve().parents[2]
RANKS = {
    "pretrain_8m_cpu.sh": 2,
    "pretrain_227m_single_node.sh": 8,
    "slurm/pretrain_227m.sh": 16,
    "slurm/pretrain_1b_7b.sh": 32,
    "slurm/pretrain_7b_41b.sh": 64,
    "slurm/pretrain_2.5b_120b.sh": 1024,
}
JOBS = {f"slurm/{name}.sh" for name in ("requeue", "convert", "evaluate", "ablation_array", "preprocess")}
OTHERS = {"bench_8gpu.sh", *JOBS}
"""Scripts that start other programs: tests/functional/test_bench_8gpu.py, tests/slurm/test_slurm.py."""
PROGRAMS = ("umv2_megatron/commands", "umv2_megatron/evaluation", "tools", "benchmarks")
TOOLS = sorted(path for folder in PROGRAMS for path in (ROOT / folder).glob("*.py"))
# Flags in commands of other programs: torchrun, pip, SLURM, mpirun, nsys, zstd, Megatron-LM, transformers, systemd-run,
# and lm_eval's up to their first underscore.
OTHER_PROGRAMS = set(
    re.findall(
        r"\S+",
        """
--nproc-per-node --nnodes --standalone --shutdown-timeout --rdzv-id --rdzv-backend --rdzv-endpoint --node-rank
--no-build-isolation --job-name --nodes --ntasks-per-node --gpus-per-node --exclusive --time --signal --requeue
--open-mode --output --kill-on-bad-exit --mpi --capture-range --spec --help --host --port --model --include --trust
--scope --no-python --long --ultra --cpus-per-task --array --wait --exclude --batch --partition --parsable
--max-restarts --nodelist
""",
    )
)
EXAMPLES = sorted(path for path in (ROOT / "examples").rglob("*") if path.is_file())
TEXTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), *EXAMPLES]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Token files and a tokenizer, empty: the command line is checked for their presence only."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("p.bin", "p.idx", "tokenizer.model"):
        (folder / name).touch()
    return {"DATA": str(folder / "p"), "TOKENIZER": str(folder / "tokenizer.model"), "RUN": str(folder / "run")}


def command_of(script: str, files: dict[str, str], launch: str, *extra: str, **environment: str) -> str:
    """Output of an example that starts ``launch`` instead of its ranks."""
    finished = subprocess.run(
        [str(ROOT / "examples" / script), *extra],
        env={**os.environ, **files, "LAUNCH": launch, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def resolved(script: str, files: dict[str, str], folder: Path) -> RunConfig:
    show = folder / "show.py"
    show.write_text("import sys; print(*sys.argv[1:], sep='\\n')")
    program, *argv = command_of(script, files, f"{sys.executable} {show}", "--log-interval", "3").splitlines()
    assert program == "pretrain_umv2.py"
    run = resolve([word.replace("examples/", f"{ROOT}/examples/") for word in argv], RANKS[script])
    check_data(run)
    return run


def test_every_script_is_tested():
    scripts = {str(path.relative_to(ROOT / "examples")) for path in (ROOT / "examples").rglob("*.sh")}
    assert scripts == RANKS.keys() | OTHERS


@pytest.mark.parametrize("script", [script for script in RANKS if script.startswith("slurm/")])
def test_the_lines_for_slurm_fit_the_run(script):
    text = (ROOT / "examples" / script).read_text(encoding="utf-8")
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", text, re.M))
    assert int(asked["nodes"]) * int(asked["ntasks-per-node"]) == RANKS[script]
    assert asked["gpus-per-node"] == asked["ntasks-per-node"]
    assert re.fullmatch(r"B:USR1@\d+", asked["signal"]), "requeue.sh waits for USR1 to the batch shell"


def test_a_job_that_is_none_is_refused(files):
    finished = subprocess.run(
        [str(ROOT / "examples" / "slurm" / "pretrain_227m.sh")],
        env={k: v for k, v in os.environ.items() if not k.startswith("SLURM")} | files,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert finished.returncode == 2
    assert finished.stderr == "there is no SLURM job here, expected one; submit the script with sbatch, or set LAUNCH\n"
    assert not Path(files["RUN"]).exists()


@pytest.mark.parametrize("script", RANKS)
def test_example_is_a_run(script, files, tmp_path):
    run = resolved(script, files, tmp_path)
    assert run.training.log_interval == 3, "flags after the script's own override them"
    assert run.training.save and run.training.save.startswith(files["RUN"])
    assert run.training.save_interval, "an example can be interrupted"
    assert run.num_microbatches * run.training.micro_batch_size * run.data_parallel_size == run.global_batch_size
    run.transformer_config(), run.optimizer_config(), run.ddp_config()
    if script != "pretrain_8m_cpu.sh":
        assert run.bf16 and run.use_distributed_optimizer and run.overlap_grad_reduce and run.overlap_param_gather


@pytest.mark.parametrize("script", ["slurm/pretrain_7b_41b.sh", "slurm/pretrain_2.5b_120b.sh"])
def test_checkpoints_on_the_nodes_own_disks(script, files, tmp_path):
    assert resolved(script, files, tmp_path).training.non_persistent_save_interval is None
    run = resolved(script, files | {"LOCAL": "/scratch/a b"}, tmp_path)
    assert (run.training.non_persistent_local_ckpt_dir, run.non_persistent_type) == ("/scratch/a b", "local")


@pytest.mark.slow
def test_example_through_the_program(files):
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    shown = command_of("pretrain_8m_cpu.sh", files, sys.executable, "--dry-run", **ranks)
    assert re.search(r"num_layers \.+ 6   \(examples/umv2_8m.yaml\)", shown)
    assert not Path(files["RUN"]).exists(), "a dry run writes nothing"


def test_the_file_has_the_sizes_of_the_preset(files, tmp_path):
    run = resolved("pretrain_8m_cpu.sh", files, tmp_path)
    preset = resolve(["--model-preset", "umv2-8m-first", "--train-iters", "100"])
    ours, theirs = model_values(run.values), model_values(preset.values)
    for key in ("num_query_groups", "kv_channels"):  # without grouped queries both follow from the heads
        ours.pop(key), theirs.pop(key)
    assert ours == theirs


def test_the_job_of_preprocessing(tmp_path):
    train = [sys.executable, "tools/train_tokenizer.py", "--input", "README.md", "--text-split", "line"]
    train += ["--vocab-size", "400", "--output-prefix", str(tmp_path / "t")]
    subprocess.run(train, cwd=ROOT, check=True, timeout=120)
    given = {"INPUT": "README.md", "TOKENIZER": str(tmp_path / "t.model"), "OUTPUT": str(tmp_path / "p")}
    told = command_of("slurm/preprocess.sh", given, sys.executable, "--text-split", "line", SLURM_CPUS_PER_TASK="2")
    assert " documents, " in told and (tmp_path / "p_text_document.idx").exists()


# -- docs --------------------------------------------------------------------------------------------------------------


def known_flags() -> set[str]:
    """Flags of pretrain_umv2.py, of the tools and benchmarks, and those of programs that are not ours."""
    translated = {*noted_flags.entries(), *noted_flags.FILES}
    known = {"--" + name for name in (*names(), *translated)} | {"--model-preset", "--config", *OTHER_PROGRAMS}
    for path in TOOLS:
        known |= set(re.findall(r'"(--[a-z][a-z0-9-]*)"', path.read_text(encoding="utf-8")))
    return known


# The page of flags holds those that are refused, as does megatron-lm.md; gpu-results.md holds logs.
OWN_FLAGS = [path for path in TEXTS if path.name not in ("megatron-lm.md", "flags.md", "gpu-results.md")]


@pytest.mark.parametrize("path", OWN_FLAGS, ids=lambda path: path.name)
def test_every_flag_that_is_named_exists(path):
    # `--memory-<name>` and `--memory-…` stand for several flags
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9](?![\w-]*[<…{*]|-[<…{*])", path.read_text()))
    unknown = sorted(named - known_flags())
    assert not unknown, f"{path.name} names {unknown}"


def test_the_page_of_flags_is_that_of_the_options():
    page = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
    assert page.split(flags_page.MARK)[1].strip() == flags_page.tables().strip(), "run make flags-page"


def test_every_preset_is_in_the_table():
    text = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
    missing = [preset for preset in PRESETS if not re.search(rf"^\| `?{re.escape(preset)}`? \|", text, re.M)]
    assert not missing


@pytest.mark.parametrize("path", [path for path in TEXTS if path.suffix == ".md"], ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)\)|src=\"([^\"]+)\"", path.read_text(encoding="utf-8")):
        link = target[0] or target[1]
        if not link.startswith(("http://", "https://")):
            assert (path.parent / link).exists(), f"{path.name} links to {link}"


@pytest.mark.parametrize("path", sorted((ROOT / "examples/ablations").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_plan_makes_the_directories_of_its_data(path: Path) -> None:
    """In a new clone nothing is there that its first lines write into; ablate.py makes its own."""
    head = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
    made = set(re.findall(r"mkdir -p (\S+)", head))
    commands = head.replace("\\\n#", " ")
    written = re.findall(r"(?:> |--output(?:-prefix)?\s+)(runs/\S+)/", re.sub(r"ablate\.py.*", "", commands))
    written = {directory for directory in written if "$" not in directory}
    assert written <= made, f"expected mkdir -p {' '.join(sorted(written - made))}"


def test_result_files_are_trials_of_their_plans() -> None:
    """Settings and evaluation of every one are those that its plan has now, so that a report can be made of them."""
    folders = [path for path in (ROOT / "docs" / "result-files").iterdir() if path.is_dir()]
    assert folders
    for folder in folders:
        plan = read_plan(ROOT / "examples" / "ablations" / f"{folder.name}.yaml", folder)
        results = read_results(plan)
        assert sum(map(len, results.values())) == len(list(folder.glob("*/seed*/result.json"))) > 0
        for result in (result for group in results.values() for result in group):
            assert result["devices"] and result["curve"][-1][0] * result["tokens_per_iteration"] == result["tokens"]
