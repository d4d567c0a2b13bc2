"""Command-line tools: what they say of files that they cannot read."""

import pytest

from umv2_megatron.training.tool_entry import read_text


def test_a_file_that_is_no_text_is_named_with_its_flag(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    for name in ("bad.txt", "missing.txt", ""):
        with pytest.raises(ValueError, match=f"--text is {tmp_path / name}; expected a readable UTF-8 text file"):
            read_text("--text", str(tmp_path / name))


def test_the_rank_that_tells_an_error(monkeypatch):
    """mpirun's number before SLURM's, which is 0 in all that a batch script starts; nonsense is no further error."""
    from umv2_megatron.training.program import _rank

    for name in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    assert _rank() == 0
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("PMI_RANK", "3")
    assert _rank() == 3
    monkeypatch.setenv("RANK", "x")
    assert _rank() == 3
