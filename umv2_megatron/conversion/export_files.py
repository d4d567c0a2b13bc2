"""The files of an export beside its tensors, and the manifest by which a reader finds damage.

``export_manifest.json`` lists size and SHA-256 of every file that the conversion wrote. Whoever changes an export on
purpose removes it; a reader without it can still find every fault of structure, but no flipped bit.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from umv2_megatron.conversion.journal import write_json
from umv2_megatron.conversion.progress import Progress
from umv2_megatron.conversion.safetensors_files import ConversionError, SafetensorsFile
from umv2_megatron.durable_files import check_relative_path, fsync_path, sha256_of

MANIFEST = "export_manifest.json"
INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
# Beginnings of names: transformers, accelerate and others put _fsdp, _1, -00001-of-00002 or .00 behind.
_PICKLED_WEIGHTS = ("pytorch_model", "model", "adapter_model", "consolidated")
_NOT_EXPORTED = ("__init__.py", "name_table.py")


def copy_model_code(directory: Path) -> None:
    """Copy configuration and modeling files into an export, for trust_remote_code."""
    from umv2_megatron import hf

    assert hf.__file__ is not None
    for path in sorted(Path(hf.__file__).parent.glob("*.py")):
        if path.name not in _NOT_EXPORTED:
            shutil.copyfile(path, directory / path.name)


def write_config(directory: Path, config: Any) -> None:
    """Write config.json and generation_config.json of a ``UMv2Config``."""
    from transformers import GenerationConfig

    config.save_pretrained(directory)
    end = config.eos_token_id
    GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=end, pad_token_id=end).save_pretrained(directory)


def shard_names(count: int) -> list[str]:
    """Names of the files of tensors, as transformers writes them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_manifest(directory: Path, known: dict[str, dict[str, Any]], details: dict[str, Any]) -> None:
    """Write the manifest of all files of ``directory``; ``known`` are the entries of those hashed already."""
    files = dict(known)
    for path in sorted(directory.iterdir()):
        if path.name not in known:
            fsync_path(path)
            files[path.name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    write_json(directory / MANIFEST, {"format": 1, **details, "files": files})


def verify_manifest(directory: Path, say: Callable[[str], None]) -> None:
    """Compare every listed file with its size and hash; without a manifest only say so.

    Raises ``ConversionError`` naming the file at fault.
    """
    path = directory / MANIFEST
    if not path.exists():
        say(f"{directory} has no {MANIFEST}: names, shapes and dtypes are checked, hashes cannot be")
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files = {str(name): (int(note["size"]), str(note["sha256"])) for name, note in content["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{path} is not the manifest of an export: {error!r}") from error
    advice = f"export it again, or remove {MANIFEST} if you changed it on purpose"
    for name, (size, _) in files.items():
        check_relative_path(name, path)
        if not (directory / name).is_file():
            raise ConversionError(f"{directory / name} is missing; {advice}")
        actual = (directory / name).stat().st_size
        if actual != size:
            raise ConversionError(f"{directory / name} has {actual} bytes, the manifest says {size}; {advice}")
    with Progress("hashes", sum(size for size, _ in files.values())) as progress:
        for name, (size, expected) in files.items():
            found = sha256_of(directory / name)
            if found != expected:
                where = _damaged(directory / name, content["files"][name].get("crc32", {}))
                raise ConversionError(
                    f"{directory / name} has SHA-256 {found}, the manifest says {expected}{where}; {advice}"
                )
            progress.add(size)


def _damaged(path: Path, crc32: dict[str, int]) -> str:
    """Which tensors of a damaged file are not what they were, as words of a sentence."""
    names = []
    with contextlib.suppress(ConversionError):
        file = SafetensorsFile(path)
        names = [name for name in file.tensors if name in crc32 and file.crc32(name) != crc32[name]]
        file.close()
    more = " ..." if len(names) > 4 else ""
    return f" (damaged: {', '.join(names[:4])}{more})" if names else ""


def unread_pickles(directory: Path) -> list[str]:
    """Names of the pickles beside an export's files that are no weights, such as a Trainer's ``training_args.bin`` and
    ``optimizer.pt``; nothing here opens them. Raises ``ConversionError`` naming one of weights."""
    found = sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLES)
    for name in found:
        if name.startswith(_PICKLED_WEIGHTS):
            raise ConversionError(
                f"{directory / name} holds weights as a pickle, which may run code when it is read: remove it; weights "
                "are read from safetensors alone"
            )
    return found


class ExportTensors:
    """The tensors of an export, by name, over all its files; ``tensors`` says what there is.

    Only safetensors files are opened. Raises ``ConversionError`` naming the file or tensor at fault: pickled weights, a
    file that the index does not list, a tensor that is in another file than the index says, or in two.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        if not directory.is_dir():
            raise ConversionError(f"{directory} is no directory; expected an export with config.json and safetensors")
        self.unread = unread_pickles(directory)
        self._files: list[SafetensorsFile] = []
        self._of: dict[str, SafetensorsFile] = {}
        try:
            self._open(self._listed())
        except BaseException:
            self.close()
            raise
        self.tensors = {name: file.tensors[name] for name, file in self._of.items()}

    def _listed(self) -> dict[str, str] | None:
        """Tensor -> file by the index; None without one."""
        index = self.directory / INDEX
        present = sorted(path.name for path in self.directory.glob("*.safetensors"))
        if not index.exists():
            if present != ["model.safetensors"]:
                raise ConversionError(
                    f"{self.directory} holds {', '.join(present) or 'no safetensors file'}; expected "
                    f"model.safetensors, or several files and {INDEX}"
                )
            return None
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            listed = {str(name): str(file) for name, file in weight_map.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConversionError(f"{index} is not an index of safetensors files: {error!r}") from error
        for file in listed.values():
            check_relative_path(file, index)
        for name in set(present) - set(listed.values()):
            raise ConversionError(f"{self.directory / name} is extra: {INDEX} lists no tensor in it")
        return listed

    def _open(self, listed: dict[str, str] | None) -> None:
        for name in ["model.safetensors"] if listed is None else sorted(set(listed.values())):
            file = SafetensorsFile(self.directory / name)
            self._files.append(file)
            for tensor in file.tensors:
                if listed is not None and listed.get(tensor) != name:
                    raise ConversionError(f"{file.path}: {tensor} is extra: {INDEX} does not list it there")
                self._of[tensor] = file
        for tensor, name in (listed or {}).items():
            if tensor not in self._of:
                raise ConversionError(f"{self.directory / name}: {tensor} is missing, which {INDEX} lists there")

    def rows(self, name: str, start: int, stop: int) -> Any:
        """Rows [start, stop) of a tensor."""
        return self._of[name].rows(name, start, stop)

    def close(self) -> None:
        """Close all files."""
        for file in self._files:
            file.close()
