"""Which checkpoint --use-checkpoint-args takes its settings from, how little of it is read for that, and which settings
of the schedule a resumed run must share with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from umv2_megatron.checkpoint import manifest
from umv2_megatron.checkpoint.store import CheckpointError, CheckpointStore
from umv2_megatron.config.flags import UsageError
from umv2_megatron.config.resolve import resolve
from umv2_megatron.config.training_config import TrainingConfig
from umv2_megatron.training.resume import check_same_run, checkpoint_values, find_source


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


SCHEDULE = {
    "lr": ("1e-2", "1e-3"),
    "min_lr": ("1e-4", "1e-5"),
    "lr_decay_style": ("cosine", "linear"),
    "lr_warmup_iters": ("2", "3"),
    "lr_warmup_init": ("1e-4", "1e-5"),
    "weight_decay": ("0.1", "0.2"),
    "adam_beta1": ("0.9", "0.8"),
    "adam_beta2": ("0.95", "0.99"),
    "adam_eps": ("1e-8", "1e-6"),
    "memory_value_lr_mult": ("3", "4"),
    "memory_value_lr_decay_iters": ("4", "5"),
    "memory_value_weight_decay": ("0.1", "0.0"),
    "lr_decay_iters": ("10", "11"),
}


TOKENIZER = ("--tokenizer-type", "ByteLevelTokenizer")


def run_with(directory: Path, *more: str, **changes: str):
    """The run of ``SCHEDULE`` that goes on from ``directory``, with changed flags."""
    settings = {key: old for key, (old, _) in SCHEDULE.items()} | changes
    argv = ["--model-preset", "umv2-tiny", "--mock-data", "--train-iters", "10", "--micro-batch-size", "1"]
    argv += [*TOKENIZER, "--save", str(directory), *more]
    for key, value in settings.items():
        argv += ["--" + key.replace("_", "-"), value]
    return resolve(argv, 1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("trained")
    publish(directory, 1, **run_with(directory).values)
    return directory


def test_the_same_schedule_goes_on(trained):
    run = run_with(trained)
    check_same_run(run, find_source(run), {})


@pytest.mark.parametrize("key", SCHEDULE)
def test_another_schedule_is_refused_by_name(key, trained):
    run = run_with(trained, **{key: SCHEDULE[key][1]})
    with pytest.raises(UsageError, match="--" + key.replace("_", "-")):
        check_same_run(run, find_source(run), {})
    run = run_with(trained, "--override-opt-param-scheduler", **{key: SCHEDULE[key][1]})
    check_same_run(run, find_source(run), {})


def test_load_of_the_directory_that_is_saved_to(tmp_path):
    """With non-persistent checkpoints and no other yet the run goes on from them, but for --finetune."""
    argv = ["--model-preset", "umv2-tiny", "--mock-data", "--lr", "1e-3", "--train-iters", "10", "--allow-fresh"]
    argv += ["--save", str(tmp_path), "--load", str(tmp_path / "." / "")]
    run = resolve(argv, 1)
    found = find_source(run, others=True)
    assert found is not None and Path(found.directory) == tmp_path and not found.continues
    assert find_source(run) is None and find_source(resolve([*argv, "--finetune"], 1), others=True) is None


def test_weight_decay_that_grows_does_so_over_the_same_run(tmp_path):
    argv = ["--model-preset", "umv2-tiny", "--mock-data", *TOKENIZER, "--lr", "1e-3", "--lr-decay-iters", "8"]
    argv += ["--train-iters"]
    growing = ["--weight-decay-incr-style", "linear", "--start-weight-decay", "0.05", "--end-weight-decay", "0.25"]
    for name, flags in (("constant", []), ("growing", growing)):
        save = ["--save", str(tmp_path / name)]
        publish(tmp_path / name, 1, **resolve([*argv, "10", *save, *flags], 1).values)
        run = resolve([*argv, "12", *save, *flags], 1)
        if name == "growing":
            with pytest.raises(UsageError, match="weight decay grows over 10 iterations, the flags say 12 iterations"):
                check_same_run(run, find_source(run), {})
            run = resolve([*argv, "12", *save, *flags, "--override-opt-param-scheduler"], 1)
        check_same_run(run, find_source(run), {})


BLEND = {"corpora": {"data_path": {"weights": None, "fingerprints": ["a"]}}, "seed": 1}
OTHER_BLEND = {"corpora": {"data_path": {"weights": None, "fingerprints": ["a", "b"]}}, "seed": 1}


@pytest.mark.parametrize(
    ("old", "new", "flags", "told"),
    [
        ({}, {"data_order": "sequential"}, [], "--data-order is sequential, .* trained with shuffled"),
        ({"data_order": "sequential"}, {"data_order": "shuffled"}, [], "--data-order is shuffled, .* with sequential"),
        ({"marks": {"a": "x"}}, {"data_order": "shuffled", "marks": {"a": "y"}}, [], "marks of that key have changed"),
        (
            {"data_order": "sequential"},
            {**OTHER_BLEND, "data_order": "shuffled"},
            ["--allow-new-blend", "--allow-config-change"],
            "--data-order has to be as it was; it is shuffled, the checkpoint's is sequential",
        ),
        # what is no other run
        ({}, {"data_order": "shuffled", "infilling": None, "marks": None}, [], None),
        ({}, {"data_order": "shuffled", "training_samples": 8, "split": "1,1,1"}, [], None),  # recorded later
        (
            {"marks": {"a": "x"}},
            {**OTHER_BLEND, "data_order": "shuffled", "marks": {"a": "x", "b": "y"}},
            ["--allow-new-blend"],
            None,
        ),
    ],
)
def test_other_samples_are_refused_by_name(old, new, flags, told, trained):
    run = run_with(trained, *flags)
    config = {"values": run.values, "data": {**BLEND, **old}}
    if told is None:
        return check_same_run(run, find_source(run), {**BLEND, **new}, config)
    with pytest.raises(UsageError, match=told):
        check_same_run(run, find_source(run), {**BLEND, **new}, config)


def test_other_marks_of_the_loss_are_refused_by_name(trained):
    run = run_with(trained)
    config = {"values": {**run.values, "loss_mask_key": "loss"}}
    with pytest.raises(UsageError, match="--loss-mask-key is None, .* trained with loss"):
        check_same_run(run, find_source(run), {}, config)


def test_a_setting_that_the_checkpoint_does_not_know_was_at_its_default(trained):
    run = run_with(trained)
    old = {"values": {key: value for key, value in run.values.items() if key not in ("loss_mask_key", "muon_momentum")}}
    check_same_run(run, find_source(run), {}, old)
    with pytest.raises(UsageError, match="--loss-mask-key is loss, .* trained with None"):
        run = run_with(trained, loss_mask_key="loss")
        check_same_run(run, find_source(run), {}, old)


@pytest.mark.parametrize("flag", ["--use-rope-scaling", "--engram-layer-freq=2"])
def test_a_setting_of_the_model_that_the_checkpoint_does_not_know(flag, trained):
    run = run_with(trained, *flag.split("="))
    unknown = ("use_rope", "engram")
    old = {key: value for key, value in run.values.items() if not key.startswith(unknown)}
    with pytest.raises(UsageError, match=f"{flag.partition('=')[0]} is .* was trained with"):
        check_same_run(run, find_source(run), {}, {"values": old})
    run = run_with(trained)
    check_same_run(run, find_source(run), {}, {"values": old})


def test_one_side_without_ngram_layers_is_told_so(trained):
    """Not that the rates of their tables differ."""
    flags = ["--engram-layer-freq", "2", "--engram-value-lr-mult", "7"]
    plain, both = run_with(trained), run_with(trained, *flags)
    for run, saved in ((plain, both), (both, plain)):
        with pytest.raises(UsageError, match="--engram-layer-freq is "):
            check_same_run(run, find_source(run), {}, {"values": saved.values})
