"""On which devices the Triton kernels are proven: a record that the GPU tests have passed.

    python -m umv2_megatron.ops.proven        records the device of this machine; `make test-gpu` does so at its end

The record is ``proven.json`` beside this file: a list of kinds of devices. A kind is the compute capability, the
versions of torch and triton, and a digest of the kernels' sources, because any of them can break what the tests proved.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Optional

import torch

RECORD = Path(__file__).with_name("proven.json")


def kernel_digest() -> str:
    """Of the sources of the Triton backend."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("triton_*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def kind_of_device() -> dict[str, str]:
    """What a record says of the present CUDA device; raises ``ImportError`` without triton."""
    import triton

    return {
        "capability": ".".join(str(part) for part in torch.cuda.get_device_capability()),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "kernels": kernel_digest(),
    }


def recorded() -> list[dict[str, str]]:
    """The kinds of devices that are recorded; none where the file is missing or is no list of them."""
    try:
        kinds = json.loads(RECORD.read_text())
    except (OSError, ValueError):
        return []
    return [kind for kind in kinds if isinstance(kind, dict)] if isinstance(kinds, list) else []


def doubt() -> Optional[str]:
    """Why the kernels are not proven on the present CUDA device, or None where they are."""
    here = kind_of_device()
    kinds = [{name: kind.get(name) for name in here} for kind in recorded()]
    if here in kinds:
        return None
    told = f"compute capability {here['capability']}, torch {here['torch']}, triton {here['triton']}"
    changed = [kind for kind in kinds if {**kind, "kernels": here["kernels"]} == here]
    what = "other versions of the Triton kernels have" if changed else "the Triton kernels have not"
    return f"{what} passed the GPU tests with {told}: run `make test-gpu`"


def record() -> dict[str, str]:
    """Write that the GPU tests have passed on the present device, and return what was written.

    The caller has run them. Raises ``RuntimeError`` without a CUDA device, where they are skipped.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA device: the GPU tests were skipped, and nothing is recorded")
    here = kind_of_device()
    others = [kind for kind in recorded() if {name: kind.get(name) for name in here} != here]
    written = {"device": torch.cuda.get_device_name(), **here}
    RECORD.write_text(json.dumps([*others, written], indent=1) + "\n")
    return written


def main() -> int:
    """Record the present device; 2 where there is none."""
    try:
        written = record()
    except (RuntimeError, ImportError) as problem:
        print(problem, file=sys.stderr)
        return 2
    print(f"recorded in {RECORD}: {json.dumps(written)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
