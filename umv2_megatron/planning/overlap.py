"""What runs beside what in the slot of a block that holds the FFN and a memory layer with exchanges.

Forward, in the order of ``memory/row_sharded.py`` and ``memory/dim_sharded.py``:

    retrieval                    beside it: exchanges that need no picks ("early")
    FFN                          beside it: exchanges of picks ("beside")
    lookup, part by part         then what each part sends ("waited"), beside the lookup of the next part
    value projection

and backward the other way round: each part's lookup waits for what arrives of that part, the FFN's backward runs beside
the exchanges that follow, that of the retrieval beside the last one. With --memory-stream lookup and exchanges do not
wait for the FFN, nor it for them: what is left idle by the one the other fills. Where the host is the device (a CPU)
nothing is hidden: who moves bytes does not compute.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Work:
    """Seconds of computation in one direction, of one block: ``search``: projections, scores and search; ``lookup``:
    rows and what belongs to them; ``rest``: the value projection; ``ffn``. The sum of two is that of both at one
    place."""

    search: float = 0.0
    lookup: float = 0.0
    rest: float = 0.0
    ffn: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other))))

    @property
    def all(self) -> float:
        """One after the other."""
        return self.search + self.lookup + self.rest + self.ffn


@dataclass(frozen=True)
class Sent:
    """Seconds of exchanges in one direction, of one memory layer, by what may hide them (see the top of this file)."""

    early: float = 0.0
    beside: float = 0.0
    waited: float = 0.0

    def __add__(self, other: Sent) -> Sent:
        return Sent(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other))))

    @property
    def all(self) -> float:
        """How long the links are busy."""
        return self.early + self.beside + self.waited


def slot_seconds(work: Work, sent: Sent, parts: int, *, stream: bool, hides: bool) -> float:
    """Seconds of FFN and memory layer in one direction.

    Args:
        parts: in how many pieces lookup and ``waited`` exchanges follow each other.
        stream: --memory-stream.
        hides: whether the device computes while bytes travel.
    """
    if not hides:
        return work.all + sent.all
    beside = sent.beside + max(0.0, sent.early - work.search)
    chain = max(work.lookup + sent.waited / parts, work.lookup / parts + sent.waited)
    if stream:
        together = max(work.ffn + work.lookup, beside + chain)
    else:
        together = max(work.ffn, beside) + chain
    return work.search + together + work.rest
