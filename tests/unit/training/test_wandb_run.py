"""The steps that an offline file of W&B holds."""

from __future__ import annotations

import struct

from umv2_megatron.training.wandb_run import _fragments


def _file(records: list[bytes]) -> bytes:
    """Records in LevelDB's log format, behind the seven bytes with which wandb begins."""
    data = b":W&B\xe1\xbe\x00"
    for record in records:
        first = True
        while first or record:
            left = 32768 - len(data) % 32768
            if left < 7:
                data += b"\x00" * left
                left = 32768
            part, record = record[: left - 7], record[left - 7 :]
            kind = (1 if not record else 2) if first else (4 if not record else 3)
            data += struct.pack("<IHB", 0, len(part), kind) + part
            first = False
    return data


def test_records_across_blocks():
    records = [bytes([i]) * size for i, size in enumerate((1, 32700, 40, 5, 100_000, 32754, 32754, 0, 9))]
    data = _file(records)
    assert list(_fragments(data)) == records
    assert list(_fragments(data[:7])) == []
    assert list(_fragments(data[:-1])) == records[:-1], "a file that breaks off gives its whole records"
