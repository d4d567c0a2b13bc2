"""Builds C++ kernels with the machine's own compiler at first use, and keeps the library for later runs.

Nothing of PyTorch's headers is read: a few seconds with g++, once per machine. The library is kept in
``$UMV2_CACHE_DIR`` (default ``~/.cache/umv2_megatron``) under a name that holds a digest of everything it depends on:
source, compiler, flags, kind of processor, C and OpenMP libraries. So nodes of different kinds can share a home
directory. Ranks that start together wait for one of them to build (a file lock); the finished file appears in one step,
and is built again where it cannot be loaded any more.

Threads: torch's own OpenMP runtime is linked in, the one that this process has already loaded. A second one would bring
a second pool of threads, which spin on the cores that torch's threads need.

An export carries this file for its own kernels (``native_umv2``); training's are built by it, too (``ops/cpu_build``).
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # not on this system
    fcntl = None  # type: ignore[assignment]

# UMV2_CPU_ARCH is what the compiler's -march takes: another kind of CPU, for tests and for machines that share a cache.
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", f"-march={os.environ.get('UMV2_CPU_ARCH', 'native')}")
# How a loop is cut up must not depend on where a row lies in memory, or the rounding of its sum would.
GCC_FLAGS = ("--param", "vect-max-peeling-for-alignment=0")
BUILD_SECONDS = 600  # until a compiler counts as one that hangs: on a busy machine it may take ten times its usual


def load(name: str, files: Mapping[str, str]) -> ctypes.CDLL:
    """The library ``name``, built if need be. Raises ``ImportError`` with the reason where it cannot be built.

    Args:
        files: texts by the names of their files; what ends with .cpp is compiled, the rest is there to be included.
    """
    compiler = find_compiler()
    problems = []
    for flags in _flag_sets():
        try:
            return _load(compiler, flags, name, files)
        except (OSError, subprocess.SubprocessError) as problem:
            problems.append(_explain(problem))
    raise ImportError(f"{compiler} did not build the kernels for CPUs: {problems[-1]}")


def find_compiler() -> str:
    """Path of the C++ compiler: $CXX, or g++, c++ or clang++ of the path. Raises ``ImportError`` without any."""
    named = os.environ.get("CXX")
    for name in [named] if named else ["g++", "c++", "clang++"]:
        path = shutil.which(name)
        if path:
            return path
    raise ImportError(f"there is no C++ compiler: {f'$CXX is {named}' if named else 'no g++, c++ or clang++ found'}")


def cache_directory() -> Path:
    """Where libraries are kept: $UMV2_CACHE_DIR, the user's cache, or else a private directory for temporary files."""
    if not hasattr(os, "getuid"):
        raise ImportError("files have no owners here as on Unix, which say whether a library is one's own")
    named = os.environ.get("UMV2_CACHE_DIR")
    usual = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "umv2_megatron"
    own = Path(tempfile.gettempdir()) / f"umv2_megatron-{os.getuid()}"
    # A user of a container may have neither a name nor a home; the path begins with ~ then.
    places = [Path(named)] if named else [usual, own] if usual.is_absolute() else [own]
    for place in places:
        with contextlib.suppress(OSError):
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Code is loaded from here, so nobody else may have made it.
            if place.stat().st_uid == os.getuid() and os.access(place, os.W_OK):
                return place
    raise ImportError(f"no directory to keep a compiled library in; tried {', '.join(map(str, places))}")


def _flag_sets() -> Iterator[tuple[str, ...]]:
    """What to try in turn: g++ with torch's OpenMP, then what any compiler takes, on one thread."""
    runtime = _openmp_runtime()
    if runtime:
        yield (*FLAGS, *GCC_FLAGS, "-fopenmp", runtime)
    yield (*FLAGS, "-fopenmp-simd")


def _openmp_runtime() -> str:
    """Path of the OpenMP library that torch has loaded into this process, "" where it cannot be told."""
    maps = Path("/proc/self/maps")
    found = re.findall(r"(/\S*/lib(?:gomp|iomp5|omp)[^/\s]*)", maps.read_text()) if maps.exists() else []
    own = [path for path in found if str(Path(torch.__file__).parent) in path]
    return (own or found or [""])[0]


def _load(compiler: str, flags: tuple[str, ...], name: str, files: Mapping[str, str]) -> ctypes.CDLL:
    library = cache_directory() / f"{name}-{_digest(compiler, flags, files)}.so"
    if not library.exists():
        with _lock(library.with_suffix(".lock")):
            if not library.exists():
                _build(compiler, flags, files, library)
    try:
        return ctypes.CDLL(str(library))
    except OSError:  # damaged: it worked when it got its name
        with _lock(library.with_suffix(".lock")):
            _build(compiler, flags, files, library)
        return ctypes.CDLL(str(library))


def _build(compiler: str, flags: tuple[str, ...], files: Mapping[str, str], library: Path) -> None:
    """Compile, load once as a check, then give the file its name: a name stands for a library that works."""
    with tempfile.TemporaryDirectory(prefix="build-", dir=library.parent) as folder:
        made = Path(folder) / "made.so"
        paths = [Path(folder) / name for name in files]
        for path in paths:
            path.write_text(files[path.name], encoding="utf-8")
        sources = [str(path) for path in paths if path.suffix == ".cpp"]
        # Flags after the sources, because the linker takes a library's symbols only for what comes before it.
        command = [compiler, "-o", str(made), *sources, *flags]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_SECONDS)
        ctypes.CDLL(str(made))
        with open(made, "rb") as file:
            os.fsync(file.fileno())
        os.replace(made, library)


def _digest(compiler: str, flags: tuple[str, ...], files: Mapping[str, str]) -> str:
    state = os.stat(compiler)
    parts = [*files.items(), compiler, state.st_size, state.st_mtime_ns, *flags, torch.__version__, _processor()]
    parts.append(platform.libc_ver())
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def _processor() -> str:
    """What -march=native depends on."""
    information = Path("/proc/cpuinfo")
    if not information.exists():
        return platform.processor()
    fields = dict(re.findall(r"^(model name|flags|Features|CPU part)\s*:\s*(.*)$", information.read_text(), re.M))
    return f"{platform.machine()} {sorted(fields.items())}"


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold ``path`` while others wait; on file systems without locks every process builds for itself."""
    with open(path, "w") as file:
        if fcntl is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _explain(problem: Exception) -> str:
    if not isinstance(problem, subprocess.CalledProcessError):
        return str(problem)
    lines = (problem.stderr or "").strip().splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else str(problem))
