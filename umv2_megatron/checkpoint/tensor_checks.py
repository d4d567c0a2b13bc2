"""Two things found out about a tensor in one pass while it still is where the run keeps it: a checksum, and NaN or Inf.

Files are proved by SHA-256, but only from the moment when they are written: a copy that went wrong on its way out of a
device's memory is written, hashed and read back without complaint. So each stored part of a tensor has a checksum taken
before it leaves memory, and compared after it was read. It has to run on the device that holds the tensor, which rules
out SHA-256, CRC-32 and xxHash (they exist for CPUs only); a few elementwise operations of torch do at the speed of
memory, and are the same integers on every device.

The checksum of a block of 64-bit words x_i is sum_i (x_i xor (x_i >>> 32)) (2 i + 1) mod 2^64, and block sums s_b are
joined by h <- h P + s_b with odd P, starting with the number of bytes. Both steps are invertible in a single word, so
that any change of one word, or within one, changes the result; so does exchanging two different words of a block. The
shift keeps changes of the highest bit alone (signs) from cancelling in pairs. Other changes pass unseen with a
probability of about 2^-64. It finds errors, it does not withstand forgery.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

CHECKSUM = "words64"
"""Name of the checksum in the files that hold it."""
_WORDS = 1 << 16  # a block of 512 KiB stays in a core's cache
_BLOCKS_ON_DEVICE = 128
_P = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Examined:
    """checksum: 16 hexadecimal digits. finite: no element is NaN or Inf (always so for integers)."""

    checksum: str
    finite: bool


def examine(tensors: Iterable[Tensor]) -> list[Examined]:
    """Look at each tensor once. Memory: one block, on the tensor's device (a tensor that is not contiguous: a copy of
    it); a device is waited for once, at the end."""
    pending = [(tensor, *_scan(tensor)) for tensor in tensors]
    return [
        Examined(
            _joined(sums.tolist(), tensor.numel() * tensor.itemsize),
            extremes is None or bool(torch.isfinite(extremes).all()),
        )
        for tensor, sums, extremes in pending
    ]


def checksum(data: Tensor | bytes | memoryview) -> str:
    """The checksum of a tensor's elements in row-major order, or of bytes."""
    if isinstance(data, Tensor):
        tensor = data
    else:
        tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8) if len(data) else torch.zeros(0)
    sums, _ = _scan(tensor, extremes=False)
    return _joined(sums.tolist(), tensor.numel() * tensor.itemsize)


def checksums(tensors: Iterable[Tensor]) -> list[int]:
    """The checksum of each tensor as a whole number in [0, 2^64). Memory and waits as those of ``examine``."""
    pending = [(tensor, _scan(tensor, extremes=False)[0]) for tensor in tensors]
    return [int(_joined(sums.tolist(), tensor.numel() * tensor.itemsize), 16) for tensor, sums in pending]


def first_not_finite(tensor: Tensor) -> tuple[int, ...]:
    """The place of the first element in row-major order that is NaN or Inf; there must be one."""
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), _WORDS):
        bad = torch.isfinite(flat[start : start + _WORDS]).logical_not_().nonzero()
        if bad.numel():
            place = torch.unravel_index(torch.tensor(start + int(bad[0])), tensor.shape)
            return tuple(int(axis) for axis in place)
    raise AssertionError("every element is finite")


def _scan(tensor: Tensor, extremes: bool = True) -> tuple[Tensor, Tensor | None]:
    """Block sums, int64, and the smallest and largest elements of each step, where it has floating-point elements."""
    flat = tensor.detach().reshape(-1)
    step = _WORDS * 8 // flat.itemsize * (1 if flat.is_cpu else _BLOCKS_ON_DEVICE)
    sums, found = [], []
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step]
        sums += _block_sums(_as_words(part))
        if extremes and part.is_floating_point():
            found += torch.aminmax(part)  # NaN shows in both
    joined = torch.cat(sums) if sums else torch.zeros(0, dtype=torch.int64)
    return joined, torch.stack(found) if found else None


def _as_words(part: Tensor) -> Tensor:
    """The bytes of a flat tensor as int64, the last word filled up with zeros."""
    raw = part.view(torch.uint8)
    if raw.numel() % 8 == 0 and raw.storage_offset() % 8 == 0:
        return raw.view(torch.int64)
    words = torch.zeros(-(-raw.numel() // 8) * 8, dtype=torch.uint8, device=raw.device)
    words[: raw.numel()] = raw
    return words.view(torch.int64)


def _block_sums(words: Tensor) -> list[Tensor]:
    """One sum for each block of ``words``, the last of which may be shorter."""
    mixed = words >> 32
    mixed.bitwise_and_(0xFFFFFFFF).bitwise_xor_(words)
    weights = _weights(words.device)
    whole = words.numel() // _WORDS * _WORDS
    sums = []
    if whole:
        sums.append(mixed[:whole].view(-1, _WORDS).mul_(weights).sum(1))
    if whole < words.numel():
        sums.append(mixed[whole:].mul_(weights[: words.numel() - whole]).sum(0, keepdim=True))
    return sums


@cache
def _weights(device: torch.device) -> Tensor:
    return torch.arange(1, 2 * _WORDS, 2, dtype=torch.int64, device=device)


def _joined(sums: list[int], num_bytes: int) -> str:
    total = num_bytes
    for block in sums:
        total = (total * _P + block) & _MASK
    return f"{total:016x}"
