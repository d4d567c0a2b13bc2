"""The Weights & Biases run of a training run: one run however often training is restarted, and each step sent once.

W&B only takes steps in rising order, and a restart repeats those between its checkpoint and the kill. So the run's id
and the last step sent are kept in ``wandb_run.json`` in the checkpoint directory, and repeated steps are left out: what
was sent first stays. A killed process has not delivered all that it was given, though, because wandb writes in blocks
and in the background. What W&B holds is asked of the server, or read from the files of an offline run, and what it
lacks is sent from ``metrics.jsonl``.
"""

from __future__ import annotations

import json
import os
import secrets
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.user_paths import is_url

WANDB_FILE = "wandb_run.json"
# An offline file is a log of records in LevelDB's format: blocks, in them fragments with a header of seven bytes.
_BLOCK, _FILE_HEADER = 32768, 7
_FULL, _FIRST, _LAST = 1, 2, 4


class WandbRun:
    """Sends numbers to W&B.

    Args:
        run: the configuration.
        records: what ``metrics.jsonl`` holds of the steps up to the checkpoint that the run resumes from.

    Raises ``ValueError`` naming --wandb-project where the package wandb is not installed or starts no run.
    """

    def __init__(self, run: RunConfig, records: Iterable[dict[str, Any]] = ()):
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                "--wandb-project is set, but the package wandb is not installed; install it or drop the flag"
            ) from error
        training = run.training
        save = None if training.save is None or is_url(training.save) else training.save  # wandb needs a local disk
        folder = training.wandb_save_dir or save
        # an evaluation alone is not a part of the training run, whose steps it would repeat
        self._file = Path(save, WANDB_FILE) if save and not training.skip_train else None
        self._record: dict[str, Any] = {"project": training.wandb_project, "entity": training.wandb_entity, "id": None}
        earlier = self._read()
        chosen = os.environ.get("WANDB_RUN_ID")
        if chosen and earlier.get("id") != chosen:
            earlier = {}
        if self._file is not None:
            self._record["id"] = earlier.get("id") or chosen or secrets.token_hex(4)
        held = _offline_step(Path(folder), self._record["id"]) if earlier and folder else None
        try:
            self._run = wandb.init(
                project=training.wandb_project,
                entity=training.wandb_entity,
                name=training.wandb_exp_name,
                id=self._record["id"],
                resume=None if self._file is None else "allow",
                dir=folder,
                config=run.values,
                allow_val_change=True,
            )
        except wandb.Error as error:
            kept = f"; remove {self._file} for a new run" if earlier else ""
            raise ValueError(
                f"--wandb-project is {training.wandb_project}, and wandb starts no run there: {error}{kept}"
            ) from error
        self._sent: int = earlier.get("iteration", -1)
        self._names: set[str] | None = set(earlier.get("names", ()))
        if self._run.disabled:
            self._file = None
        elif not self._run.offline:
            self._sent, self._names = (self._run.starting_step - 1 if self._run.resumed else -1), None
        elif held is not None and not earlier.get("finished"):
            self._sent, self._names = held, None
        self._record |= {"iteration": self._sent, "names": sorted(self._names or ()), "finished": False}
        self._write()
        for record in records if earlier else ():
            numbers = {name: value for name, value in record.items() if name != "iteration" and value is not None}
            self.log(record["iteration"], numbers)

    def log(self, iteration: int, numbers: dict[str, float]) -> None:
        """Send named numbers of ``iteration``, but for what W&B had before this process started."""
        if iteration == self._sent:
            had = numbers.keys() if self._names is None else self._names
            numbers = {name: value for name, value in numbers.items() if name not in had}
        if iteration < self._sent or not numbers:
            return
        self._run.log(numbers, step=iteration)
        if self._record["iteration"] != iteration:
            self._record |= {"iteration": iteration, "names": []}
        self._record["names"] += numbers
        self._write()

    def finish(self) -> None:
        """Wait until everything is sent."""
        self._run.finish()
        self._record["finished"] = True
        self._write()

    def _read(self) -> dict[str, Any]:
        """What an earlier process left about a run of the same project; {} where there is none."""
        if self._file is None or not self._file.exists():
            return {}
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
            same = all(found[key] == self._record[key] for key in ("project", "entity"))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self._file} is not what this program writes ({error!r}): remove it") from None
        return found if same else {}

    def _write(self) -> None:
        if self._file is None:
            return
        temporary = self._file.with_suffix(".json.tmp")
        temporary.write_text(json.dumps(self._record) + "\n", encoding="utf-8")
        os.replace(temporary, self._file)


def _offline_step(folder: Path, run_id: str) -> int | None:
    """The last step in the files that offline processes of a run have left; -1 for none in them, None for no file."""
    files = list(folder.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))
    if not files:
        return None
    from wandb.proto.wandb_internal_pb2 import Record

    last = -1
    for file in files:
        for data in _fragments(file.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            for item in record.history.item:
                if "_step" in (item.key, *item.nested_key):
                    last = max(last, int(item.value_json))
    return last


def _fragments(data: bytes) -> Iterator[bytes]:
    """The records of an offline file, up to where it breaks off."""
    place, record = _FILE_HEADER, b""
    while place + _FILE_HEADER <= len(data):
        if _BLOCK - place % _BLOCK < 7:  # too little of the block is left for a header
            place += _BLOCK - place % _BLOCK
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)  # after a checksum
        part = data[place + 7 : place + 7 + length]
        if len(part) < length or not kind:
            return
        place += 7 + length
        record = part if kind in (_FULL, _FIRST) else record + part
        if kind in (_FULL, _LAST):
            yield record
