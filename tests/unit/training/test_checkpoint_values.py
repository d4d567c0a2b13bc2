"""Which checkpoint --use-checkpoint-args takes its settings from, and how little of it is read for that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from umv2_megatron.checkpoint import manifest
from umv2_megatron.checkpoint.store import CheckpointError, CheckpointStore
from umv2_megatron.config.flags import UsageError
from umv2_megatron.config.training_config import TrainingConfig
from umv2_megatron.training.resume import checkpoint_values


def publish(directory: Path, iteration: int, **values) -> None:
    store = CheckpointStore(directory)
    made = store.begin(iteration)
    (made / "__0_0.distcp").write_bytes(bytes(100))
    (made / "config.json").write_text(json.dumps({"values": values}))
    store.publish(iteration, num_keys=1, tensor_bytes=100)


def values(**training) -> tuple[str, dict] | None:
    return checkpoint_values(TrainingConfig(**{key: str(value) for key, value in training.items()}))


@pytest.fixture
def load(tmp_path) -> Path:
    publish(tmp_path / "load", 1, num_layers=1)
    publish(tmp_path / "load", 2, num_layers=2)
    return tmp_path / "load"


def test_from_where_the_run_goes_on(load, tmp_path):
    save = tmp_path / "save"
    assert values(load=load, save=save) == (str(load), {"num_layers": 2})
    assert checkpoint_values(TrainingConfig(load=str(load), ckpt_step=1)) == (str(load), {"num_layers": 1})
    publish(save, 5, num_layers=5)
    for start in (load, tmp_path / "nothere"):  # the same command again: --load was only where it started
        assert values(load=start, save=save) == (str(save), {"num_layers": 5})
    evaluation = TrainingConfig(load=str(load), save=str(save), skip_train=True)
    assert checkpoint_values(evaluation) == (str(load), {"num_layers": 2})


def test_no_checkpoint(tmp_path):
    assert values() is None and values(save=tmp_path) is None
    with pytest.raises(UsageError, match="--load is .*; no checkpoint is there"):
        values(load=tmp_path)


def test_only_the_configuration_is_hashed(load, monkeypatch, capsys):
    monkeypatch.setattr(manifest, "sha256_of", None)
    (load / "iter_0000002" / "__0_0.distcp").write_bytes(b"x" * 100)  # rank 0 finds this later, before the load
    assert values(load=load) == (str(load), {"num_layers": 2})
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name, content", [("config.json", b'{"values": {"num_layers": 7}}'), ("__0_0.distcp", b"x")])
def test_a_damaged_checkpoint_gives_way_to_an_older_one(name, content, load, capsys):
    (load / "iter_0000002" / name).write_bytes(content)
    assert values(load=load) == (str(load), {"num_layers": 1})
    assert f"iter_0000002/{name} has " in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=f"{name} has "):
        checkpoint_values(TrainingConfig(load=str(load), ckpt_step=2))
