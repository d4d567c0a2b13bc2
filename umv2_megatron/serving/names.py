"""The names by which clients may ask for the model served."""

from __future__ import annotations

import os
from pathlib import Path


class ModelNames:
    """Accepts the path given at the start, with or without a slash at its end, relative or absolute, its last part,
    and the names of --served-model-name.

    Args:
        path: of the export, as it was given.
        served: names given beside it; the first is the model's ``id`` in answers, otherwise the path is.
    """

    def __init__(self, path: str, served: list[str] | None = None) -> None:
        self._place = os.path.abspath(path)
        self._names = {*(served or []), Path(self._place).name, Path(path).resolve().name}
        self._places = {self._place, str(Path(path).resolve())}
        self.id = served[0] if served else path.rstrip("/") or path

    def __contains__(self, name: str) -> bool:
        """Whether ``name`` is one of them. By spelling alone: what a client says is never looked up on the disk."""
        if name in self._names or (name and name.rstrip("/") in self._names):
            return True
        return bool(name) and os.path.abspath(name) in self._places
