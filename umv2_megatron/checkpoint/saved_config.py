"""config.json of a checkpoint: the run's settings as they were when it saved, checked before anybody trusts one.

    {"format": 1, "version": ..., "values": {settings by key}, "data": {identity of the corpora, blends},
     "world_size": ..., "tokenizer_vocab_size": ..., "padded_vocab_size": ...}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from umv2_megatron.checkpoint.store import CheckpointStore
from umv2_megatron.config.flags import read_mapping
from umv2_megatron.config.option_table import option_table
from umv2_megatron.config.usage import UsageError
from umv2_megatron.durable_files import CheckpointError

CONFIG_FILE = "config.json"
_SIZES = ("world_size", "tokenizer_vocab_size", "padded_vocab_size")
_NEVER_NULL = ("num_layers", "hidden_size", "num_attention_heads", "init_method_std", "tokenizer_type")
"""Settings that every run has when it saves, though their flags have no default."""


class _Settings(dict):
    """A mapping read from ``path`` that names the file where a key is missing, instead of a bare KeyError."""

    def __init__(self, found: dict[str, Any], path: Path, what: str) -> None:
        super().__init__(found)
        self._path, self._what = path, what

    def __missing__(self, key: str) -> Any:
        raise CheckpointError(f"{self._path} has no {self._what}{key}: it is damaged, or of another version")


def read_config(store: CheckpointStore, iteration: int) -> dict[str, Any]:
    """config.json of a published checkpoint. Needs no process group.

    Settings that this version knows have the types and limits of their options; others, of other versions, are as they
    were written. Raises CheckpointError naming the file, and the setting that is missing or of another kind.
    """
    path = store.path(iteration) / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a readable configuration: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a configuration: expected a mapping")
    config = _Settings(config, path, "")
    for key in ("values", "data"):
        if not isinstance(config.get(key, {}), dict):
            raise CheckpointError(f"{path} has {key} {config[key]!r}: expected a mapping")
    if not isinstance(config.get("data", {}).get("training_blends", []), list):
        raise CheckpointError(f"{path} has training_blends {config['data']['training_blends']!r}: expected a list")
    for key in _SIZES:
        if key in config and (type(config[key]) is not int or not 0 < config[key] < 2**63):
            raise CheckpointError(f"{path} has {key} {config[key]!r}: expected a positive integer")
    if "values" not in config:
        return config
    values = config["values"]
    try:
        read_mapping({key: value for key, value in values.items() if key in option_table()}, str(path))
    except UsageError as error:
        raise CheckpointError(str(error)) from error
    for key in _NEVER_NULL:
        if key in values and values[key] is None:
            raise CheckpointError(f"{path} has the setting {key} null: expected a value, as every run has one")
    config["values"] = _Settings(values, path, "setting ")
    return config
