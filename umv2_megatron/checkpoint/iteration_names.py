"""Names of checkpoints in their directory: ``iter_0001000``, as Megatron-LM has them."""

import re

_NAME = re.compile(r"iter_(\d{7,})")


def iteration_name(iteration: int) -> str:
    """The name of a checkpoint's directory."""
    return f"iter_{iteration:07d}"


def iteration_of(name: str) -> int | None:
    """The iteration in the name of a checkpoint's directory; None for any other name."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None
