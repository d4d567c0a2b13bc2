"""Parquet files by pyarrow: their row groups, and the strings that their rows hold under some keys.

The footer tells where each row group lies, so that a range of a file can be read alone. Only the columns that are asked
for are read. pyarrow is imported when a Parquet file is opened, and not before.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Optional

from umv2_megatron.data.compression import INSTALL, Damaged, Unsupported
from umv2_megatron.data.row_filter import RowFilter

_BATCH_ROWS = 256


class RowGroup(NamedTuple):
    """``begin``: the file's byte at which it begins; ``first``: rows of the file before it; ``rows``: its own."""

    number: int
    begin: int
    first: int
    rows: int


class Row(NamedTuple):
    """``number`` counts from 0 in the row group; ``values`` are the bytes under each key, None where there are none."""

    number: int
    values: list[Optional[bytes]]


class ParquetFile:
    """An open file. Raises ``Damaged`` or ``Unsupported``, and ``OSError`` where the system fails."""

    def __init__(self, path: str) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise Unsupported(f"reading Parquet needs the module pyarrow, which is not installed: {INSTALL}") from error
        self._pa = pyarrow
        self.size = os.path.getsize(path)
        with self._faults():
            # pages are read one after another: the memory does not grow with the row group
            self._file = pyarrow.parquet.ParquetFile(
                path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True
            )
            self.schema = self._file.schema_arrow
            self.row_groups = self._row_groups()

    def close(self) -> None:
        self._file.close()

    def check(self, keys: Sequence[str], row_filter: Optional[RowFilter]) -> None:
        """Raise ``ValueError`` where a key names no column of strings, or the filter does not fit the columns."""
        for key in keys:
            kind = self._column_of(key)[1]
            types = self._pa.types
            if types.is_dictionary(kind):
                kind = kind.value_type
            tests = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
            if not any(test(kind) for test in tests):
                raise ValueError(f"the column {key!r} holds {kind}: expected strings")
        if row_filter is not None:
            for column in row_filter.columns:
                self._column_of(column)
            try:
                self.schema.empty_table().filter(row_filter.expression)
            except (self._pa.ArrowException, TypeError) as error:
                raise ValueError(f"--filter does not fit its columns: {_first_line(error)}") from None

    def rows(self, group: RowGroup, keys: Sequence[str], row_filter: Optional[RowFilter]) -> Iterator[list[Row]]:
        """The rows of ``group`` in batches, without those that the filter leaves out."""
        columns = [*dict.fromkeys([*keys, *(row_filter.columns if row_filter else ())])]
        paths = [self._column_of(key)[0] for key in keys]
        done = 0
        with self._faults():
            for batch in self._file.iter_batches(
                _BATCH_ROWS, row_groups=[group.number], columns=columns, use_threads=False
            ):
                table = self._pa.Table.from_batches([batch])
                numbers = self._pa.array(range(done, done + len(batch)))
                done += len(batch)
                if row_filter is not None:
                    # a name that no column of the file has
                    name = "row" + "_" * max(len(each) for each in table.column_names)
                    table = self._filtered(table.append_column(name, numbers), row_filter)
                    numbers = table.column(name)
                values = [self._bytes_of(table, path) for path in paths]
                yield [Row(number, list(each)) for number, *each in zip(numbers.to_pylist(), *values)]

    def _filtered(self, table: Any, row_filter: RowFilter) -> Any:
        try:
            return table.filter(row_filter.expression)
        except self._pa.ArrowException as error:  # a division by zero, for one
            raise ValueError(f"--filter fails: {_first_line(error)}") from None

    def _bytes_of(self, table: Any, path: tuple[str, ...]) -> list[Optional[bytes]]:
        import pyarrow.compute

        column = table.column(path[0])
        for name in path[1:]:
            column = pyarrow.compute.struct_field(column, name)
        if self._pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        # as bytes, for pyarrow does not look whether strings are UTF-8
        large = column.type in (self._pa.large_string(), self._pa.large_binary())
        return column.cast(self._pa.large_binary() if large else self._pa.binary()).to_pylist()

    def _column_of(self, key: str) -> tuple[tuple[str, ...], Any]:
        """Path and type of the column that ``key`` names; names with dots are read as keys of JSON objects are."""
        path: tuple[str, ...] = ()
        fields, rest = {field.name: field.type for field in self.schema}, key
        while rest not in fields:
            ends = [
                end for end, letter in enumerate(rest)
                if letter == "." and rest[:end] in fields and self._pa.types.is_struct(fields[rest[:end]])
            ]  # fmt: skip
            if not ends:
                known = ", ".join(map(str, self.schema.names[:20])) + (", ..." if len(self.schema.names) > 20 else "")
                raise ValueError(f"there is no column {key!r}: the file has {known}")
            head, rest = rest[: ends[-1]], rest[ends[-1] + 1 :]
            path = (*path, head)
            fields = {fields[head].field(i).name: fields[head].field(i).type for i in range(fields[head].num_fields)}
        return (*path, rest), fields[rest]

    def _row_groups(self) -> list[RowGroup]:
        found: list[RowGroup] = []
        begin = first = 0
        meta = self._file.metadata
        for number in range(meta.num_row_groups):
            group = meta.row_group(number)
            offsets = []
            for i in range(group.num_columns):
                column = group.column(i)
                offsets += [column.data_page_offset, *filter(None, [column.dictionary_page_offset])]
            begin = max(begin, min(offsets, default=begin))  # in the order of rows, whatever the footer says
            found.append(RowGroup(number, begin, first, group.num_rows))
            first += group.num_rows
        return found

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except (self._pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            words = _first_line(error)
            if isinstance(error, self._pa.ArrowMemoryError):
                raise Unsupported(f"reading it needs more memory than there is ({words})") from None
            if isinstance(error, self._pa.ArrowNotImplementedError):
                raise Unsupported(f"it is written in a way that pyarrow cannot read ({words})") from None
            raise Damaged(words) from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
