"""Command-line tools: what they say of files that they cannot read."""

import pytest

from umv2_megatron.training.tool_entry import read_text


def test_a_file_that_is_no_text_is_named_with_its_flag(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    for name in ("bad.txt", "missing.txt", ""):
        with pytest.raises(ValueError, match=f"--text is {tmp_path / name}; expected a readable UTF-8 text file"):
            read_text("--text", str(tmp_path / name))
