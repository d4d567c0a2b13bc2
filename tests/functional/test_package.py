"""The package as a user installs it: sdist and wheel are complete, and the wheel trains from an empty directory."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from umv2_megatron.config.presets import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "NOTICE", "umv2_megatron")


def call(command: list[str], cwd: Path, **environ: str) -> str:
    """Run a command; returns what it prints."""
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "COVERAGE_PROCESS_START")}
    done = subprocess.run(
        command, cwd=cwd, env=clean | {"OMP_NUM_THREADS": "1"} | environ, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the sdist, and the wheel that was built from it."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    out = source / "dist"
    call([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)], source)
    return out


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of a new environment with the wheel, beside the packages of this one, so that nothing is downloaded."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False)
    packages = home / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (packages / "packages_of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = str(home / "bin" / "python")
    wheel = next(built.glob("*.whl"))
    call([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)], home)
    return home / "bin"


def test_the_files_of_the_wheel(built: Path) -> None:
    names = set(zipfile.ZipFile(next(built.glob("*.whl"))).namelist())
    data = {f"umv2_megatron/{name}" for name in ("py.typed", "ops/cpu_threads.h", "ops/cpu_kernels.cpp")}
    data |= {f"umv2_megatron/config/preset_files/{family}.yaml" for family in FAMILIES}
    assert data <= names
    assert not [name for name in names if name.startswith(("tests/", "tools/", "benchmarks/"))]
    in_package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "umv2_megatron").rglob("*") if path.is_file()}
    lacking = {name for name in in_package if "__pycache__" not in name} - names
    assert not lacking
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        inside = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"LICENSE", "NOTICE", *data} <= inside


@pytest.mark.slow
def test_the_wheel_trains_with_compiled_kernels(installed: Path, tmp_path: Path) -> None:
    where = [str(installed / "python"), "-c", "import umv2_megatron; print(umv2_megatron.__file__)"]
    assert str(installed.parent) in call(where, tmp_path)
    flags = "--model-preset umv2-tiny --mock-data --tokenizer-type NullTokenizer --vocab-size 128"
    flags += " --train-iters 2 --lr 1e-3 --memory-backend cpu"
    told = call(
        [str(installed / "umv2-pretrain"), *flags.split(), "--save", "run", "--log-interval", "1"],
        tmp_path,
        UMV2_CACHE_DIR=str(tmp_path / "kernels"),
    )
    assert re.search(r"iteration +2/ +2 .*\| lm loss: \d\.\d+E[+-]\d+ \|", told), told
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == "2", told
    assert (tmp_path / "run" / "iter_0000002" / "manifest.json").is_file(), told
    assert list((tmp_path / "kernels").glob("*.so")), "the kernels were not built from the wheel's files"


def test_every_program_tells_its_flags(built: Path, installed: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        listed = next(name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
        parser = configparser.ConfigParser()
        parser.read_string(wheel.read(listed).decode())
    scripts = parser["console_scripts"]
    assert {"umv2-pretrain", "umv2-generate"} <= set(scripts)
    for name in scripts:
        told = call([str(installed / name), "--help"], tmp_path, UMV2_CACHE_DIR=str(tmp_path / "cache"))
        assert f"usage: {name}" in told, told
