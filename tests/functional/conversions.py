"""What the tests of conversions share: small checkpoints of any layout, and work done in forked processes.

A forked process starts in 0.1 s with torch and mcore loaded, may be killed, and may make a process group of its own.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import runpy
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "functional"))

from program_runs import _fork_server, _free_port, tiny_run, train  # noqa: E402

RICH = {
    "untie_embeddings_and_output_weights": True,
    "group_query_attention": True,
    "num_query_groups": 2,
    "qk_layernorm": True,
    "add_bias_linear": True,
    "normalization": "LayerNorm",
    "memory_sharing": "block",
    "memory_sharing_size": 2,
}
"""A model with everything that has a tensor of its own."""


def saved(folder: Path, ranks: int = 1, iters: int = 2, **changes: Any) -> Path:
    """The --save directory of a short run."""
    save = folder / "run"
    train(ranks, tiny_run(train_iters=iters, save=save, **{"vocab_size": 500, **changes}), folder / "log")
    return save


def forked(function: Callable[..., Any], *arguments: Any, timeout: float = 120.0) -> Any:
    """``function(*arguments)`` in a process of its own; the function must be at the top level of its file.

    Raises AssertionError with the process's traceback; where it was killed, returns the negative signal.
    """
    context = _fork_server()
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(there, _free_port(), function, arguments))
    process.start()
    there.close()
    try:
        failed, result = pickle.loads(here.recv_bytes()) if here.poll(timeout) else (True, "no answer in time")
    except EOFError:
        process.join()
        return process.exitcode
    finally:
        process.kill()
        process.join()
    assert not failed, result
    return result


def _work(pipe: Any, port: int, function: Callable[..., Any], arguments: tuple) -> None:
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["TQDM_DISABLE"] = "1"
    import torch

    torch.set_num_threads(1)
    try:
        answer = (False, function(*arguments))
    except BaseException:
        answer = (True, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(answer))


def to_hf(save: Path, export: Path, say: Callable[[str], None] = lambda line: None, **options: Any) -> Path:
    """Export the newest checkpoint in ``save``."""
    from umv2_megatron.checkpoint.contents import locate
    from umv2_megatron.conversion.to_hf import ExportOptions, export_checkpoint

    export_checkpoint(*locate(save), export, ExportOptions(**options), say)
    return export


def from_hf(export: Path, save: Path, say: Callable[[str], None] = lambda line: None, **options: Any) -> Path:
    """Import an export."""
    from umv2_megatron.conversion.from_hf import import_export

    import_export(export, save, say=say, **options)
    return save


def differences(save: Path, export: Path) -> list[tuple[str, float, bool]]:
    """(dtype, difference of logits, within the limit) of each comparison of a checkpoint with an export."""
    from umv2_megatron.conversion.verify import compare

    return [(str(found.dtype), found.difference, found.good) for found in compare(str(save), None, export, None, 256)]


def different_weights(save: Path, export: Path) -> tuple[str, ...]:
    """What ``verify`` says of the weights of a checkpoint and an export."""
    from umv2_megatron.conversion.verify import compare_weights

    return compare_weights(str(save), None, export, lambda line: None).different


def there_and_back(save: Path, folder: Path) -> dict[str, Any]:
    """Export, compare, import, export again; returns the differences and whether the files of both exports agree."""
    first = to_hf(save, folder / "first")
    found = differences(save, first)
    assert different_weights(save, first) == ()
    second = to_hf(from_hf(first, folder / "back"), folder / "second")
    # the card tells how the checkpoint was trained, which a converted one does not know
    differ = ("export_manifest.json", "README.md")
    names = sorted(path.name for path in first.iterdir() if path.name not in differ)
    same = [name for name in names if (first / name).read_bytes() == (second / name).read_bytes()]
    return {"differences": found, "files": names, "other": sorted(set(names) - set(same))}


def republish(save: Path) -> None:
    """Give a tampered checkpoint a manifest that fits, as whoever can write it can."""
    from umv2_megatron.checkpoint.contents import locate
    from umv2_megatron.checkpoint.manifest import MANIFEST, MANIFEST_HASH

    store, iteration = locate(save)
    path = store.path(iteration)
    for name in (MANIFEST, MANIFEST_HASH):
        (path / name).unlink()
    shutil.move(path, store.temporary_path(iteration))
    store.publish(iteration, num_keys=0, tensor_bytes=0)


def with_export(folder: Path) -> tuple[Path, Path]:
    """A checkpoint of one rank with 512 tokens, so without padding, and its export in several files."""
    save = saved(folder, vocab_size=511)
    return save, to_hf(save, folder / "export", max_shard_bytes=100_000)


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    """Change the content of a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def flip_bit(path: Path, offset: int) -> None:
    """Change one bit of a file's byte."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)


def shard_of(export: Path, name: str) -> Path:
    """The file that holds a tensor of an export."""
    return export / json.loads((export / "model.safetensors.index.json").read_text())["weight_map"][name]


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the tensors of a safetensors file."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def tool(*arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the tool, in a process that has its imports already."""
    sys.argv = ["convert_checkpoint.py", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(str(ROOT / "tools" / "convert_checkpoint.py"), run_name="__main__")
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
    return code, out.getvalue(), err.getvalue()
