"""--save in an object store: SIGKILL at every stage of a save, then the same command. A local S3 server (moto)."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

pytest.importorskip("s3fs", reason="requirements-storage.txt is not installed")
pytest.importorskip("moto", reason="requirements-storage.txt is not installed")

from program_runs import Job, losses, tiny_run  # noqa: E402
from test_kills import SAVE_MODES  # noqa: E402
from test_object_store import SETTINGS, die_at, local, run_to_end, server  # noqa: E402, F401 - two are fixtures

from umv2_megatron.checkpoint import manifest, object_storage, store  # noqa: E402
from umv2_megatron.checkpoint.store import CheckpointStore  # noqa: E402

pytestmark = pytest.mark.faults

_SOURCES = "".join(Path(each.__file__).read_text() for each in (store, object_storage, manifest))
STAGES = sorted(set(re.findall(r'stage\("([a-z-]+)"\)', _SOURCES)))
TRACKED = {"tracker-written", "prune-marked", "pruned"}


@pytest.mark.parametrize("mode", SAVE_MODES)
@pytest.mark.parametrize("stage", STAGES)
def test_at_every_stage_of_a_save(stage, mode, server, local, figure, tmp_path):  # noqa: F811
    """In the third save, of iteration 6, which also removes an older checkpoint."""
    save = f"s3://bucket/stages/{stage}{len(mode)}"
    argv = tiny_run(**SETTINGS, train_iters=6, save=save, **mode)
    job = Job(2, argv, tmp_path / "o", die_at, (server.environment, stage, 6, 0))
    try:
        assert job.wait().codes[0] == -signal.SIGKILL, job.output()[-4000:]
    finally:
        job.kill()
    found = CheckpointStore(save).resolve()
    assert found == (6 if stage in TRACKED else 4)
    finished = run_to_end(server, argv, tmp_path / "o")
    assert f"loaded checkpoint of iteration {found} " in finished.text
    assert finished.weights == local[1].weights and losses(save) == losses(local[0])
    figure(
        "5  SIGKILL at a stage of a save in an object store",
        f"{stage}: went on from {'the new' if found == 6 else 'the old'} one, bitwise",
    )
