"""Which rows of value tables some documents pick more than others do: counts, their ranking, and the files of both.

A row is ranked by tf-idf, as in sparse memory fine-tuning (arXiv 2510.15103, the equation of its ranking). With c(i)
picks of row i in the new documents, and the batches B of a background corpus,

    score(i) = c(i) / sum_j c(j)  *  log( (|B| + 1) / (sum over b in B of 1[row i is picked in b] + 1) )

where j runs over the rows of the same table. A row that every batch of the background picks has score 0.

Both kinds of files are safetensors. A table is named by the memory layer that owns it, counted from 0:

    counts        layer_000.picks [A], layer_000.batches [A]    int64
    selections    layer_000.rows [at most A]                    int64, ascending

Their metadata hold the format and, as JSON under "origin", where they are from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from umv2_megatron.durable_files import replace_synced, sha256_of

COUNTS_FORMAT = "umv2 row counts 1"
ROWS_FORMAT = "umv2 selected rows 1"


@dataclass(frozen=True)
class RowCounts:
    """Picks of the rows of every table, by the memory layer that owns it.

    picks: [A] int64, how often each row was picked by any layer that sees the table; batches: [A] int64, in how many
    batches it was; num_batches: |B|; origin: JSON.
    """

    picks: dict[int, Tensor]
    batches: dict[int, Tensor]
    num_batches: int
    origin: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Put the file in its place at once."""
        tensors = {f"layer_{layer:03d}.picks": counts for layer, counts in self.picks.items()}
        tensors |= {f"layer_{layer:03d}.batches": counts for layer, counts in self.batches.items()}
        _write(path, COUNTS_FORMAT, tensors, {**self.origin, "batches": self.num_batches})

    @classmethod
    def read(cls, flag: str, path: str) -> RowCounts:
        """Raises ``ValueError`` naming ``flag`` and ``path`` where that is no file of counts."""
        found, origin = _read(flag, path, COUNTS_FORMAT, "'select_rows.py count'")
        picks = {layer: tensor for (layer, what), tensor in found.items() if what == "picks"}
        batches = {layer: tensor for (layer, what), tensor in found.items() if what == "batches"}
        whole = picks.keys() == batches.keys() and all(picks[each].shape == batches[each].shape for each in picks)
        if not whole or not isinstance(origin.get("batches"), int):
            raise ValueError(f"{flag} is {path}, which lacks a part; count again with 'select_rows.py count'")
        return cls(picks, batches, origin["batches"], origin)


@dataclass(frozen=True)
class RowSelection:
    """Rows of tables: ``rows`` by the memory layer that owns the table, each [at most A] int64, ascending; ``sha256``
    of the file, "" for one that was not read from any."""

    rows: dict[int, Tensor]
    origin: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""

    def write(self, path: Path) -> None:
        """Put the file in its place at once."""
        _write(path, ROWS_FORMAT, {f"layer_{layer:03d}.rows": rows for layer, rows in self.rows.items()}, self.origin)

    @classmethod
    def read(cls, flag: str, path: str) -> RowSelection:
        """Raises ``ValueError`` naming ``flag`` and ``path`` where that is no selection."""
        found, origin = _read(flag, path, ROWS_FORMAT, "'select_rows.py select'")
        rows = {layer: tensor for (layer, what), tensor in found.items() if what == "rows"}
        if any((each.diff() <= 0).any() or (each < 0).any() for each in rows.values()):
            raise ValueError(f"{flag} is {path}; expected ascending row numbers: make it with 'select_rows.py select'")
        return cls(rows, origin, sha256_of(Path(path)))

    def check(self, flag: str, path: str, tables: Mapping[int, int]) -> None:
        """Raise ``ValueError`` where ``tables``, rows of each of the model's tables, are not those of the selection."""
        if set(self.rows) != set(tables):
            raise ValueError(
                f"{flag} is {path}, with rows of the tables of memory layers {_numbers(self.rows)}; expected those of "
                f"{_numbers(tables)}, which this model has: select rows of this model"
            )
        for layer, rows in self.rows.items():
            if len(rows) and int(rows[-1]) >= tables[layer]:
                raise ValueError(
                    f"{flag} is {path}, with row {int(rows[-1])} of the table of memory layer {layer}; expected rows "
                    f"below {tables[layer]}: select rows of this model"
                )


def tf_idf(new: RowCounts, background: RowCounts) -> dict[int, Tensor]:
    """Scores [A] float64 of the rows of each table, as at the top of this file.

    Raises ``ValueError`` where the two are not of the same tables.
    """
    if {layer: len(each) for layer, each in new.picks.items()} != {
        layer: len(each) for layer, each in background.picks.items()
    }:
        raise ValueError(
            f"the counts of new documents are of tables with {_sizes(new)} rows, those of the background with "
            f"{_sizes(background)}; count both with one checkpoint"
        )
    scores = {}
    for layer, picks in new.picks.items():
        frequency = picks.double() / picks.sum().clamp(min=1)
        rarity = (background.num_batches + 1) / (background.batches[layer].double() + 1)
        scores[layer] = frequency * rarity.log()
    return scores


def highest(scores: Mapping[int, Tensor], count: int) -> dict[int, Tensor]:
    """The ``count`` rows of each table with the highest ``scores`` above 0, fewer where fewer have one; ascending. Of
    rows with equal scores those with lower numbers come first."""
    found = {}
    for layer, values in scores.items():
        order = values.sort(descending=True, stable=True).indices[:count]
        found[layer] = order[values[order] > 0].sort().values
    return found


def _sizes(counts: RowCounts) -> list[int]:
    return [len(counts.picks[layer]) for layer in sorted(counts.picks)]


def _numbers(layers: Mapping[int, Any]) -> str:
    return ", ".join(map(str, sorted(layers))) or "none"


def _write(path: Path, kind: str, tensors: dict[str, Tensor], origin: dict[str, Any]) -> None:
    assert all(tensor.dtype == torch.int64 for tensor in tensors.values())
    made = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    replace_synced(path, save(made, {"format": kind, "origin": json.dumps(origin, sort_keys=True)}))


def _read(flag: str, path: str, kind: str, maker: str) -> tuple[dict[tuple[int, str], Tensor], dict[str, Any]]:
    """Tensors by (layer, name), and the origin."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
        origin = json.loads(metadata.get("origin", "{}"))
        named = {(int(name[6:9]), name[10:]): each for name, each in tensors.items() if name.startswith("layer_")}
        sound = len(named) == len(tensors) and all(
            each.dtype == torch.int64 and each.dim() == 1 for each in tensors.values()
        )
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{flag} is {path}; expected a file that {maker} wrote: {error}") from error
    if metadata.get("format") != kind or not sound or not isinstance(origin, dict):
        held = metadata.get("format", "something else")
        raise ValueError(f"{flag} is {path}, which holds {held}; expected a file that {maker} wrote")
    return named, origin
