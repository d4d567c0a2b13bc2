"""When torch is told to ask for huge pages."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from umv2_megatron.parallel import huge_pages


@pytest.mark.parametrize(
    ("system", "given", "expected"),
    [
        ("always [madvise] never", None, "1"),
        ("[always] madvise never", None, "1"),
        ("always madvise [never]", None, None),
        ("always [madvise] never", "0", "0"),
        (None, None, None),
    ],
)
def test_huge_pages_are_asked_for_where_the_system_has_them_and_the_user_did_not_say(
    system: str | None, given: str | None, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "enabled"
    if system is not None:
        file.write_text(system + "\n")
    monkeypatch.setattr(huge_pages, "SYSTEM", file)
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    if given is not None:
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", given)
    huge_pages.use_huge_pages()
    assert os.environ.get("THP_MEM_ALLOC_ENABLE") == expected
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
