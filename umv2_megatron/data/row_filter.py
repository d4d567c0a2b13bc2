"""--filter: which rows of a Parquet file are read, written as a Python expression and computed by pyarrow.

    language == "en" and score >= 0.5 and not (source in ["a", "b"]) and meta.url is not None

Names are columns (``meta.url``: the field of a struct; ``field("lang-id")``: a name that is no identifier). Functions
are pyarrow.compute's own that work row by row, such as ``utf8_length(text) > 100`` or ``match_substring(url, "wiki")``.
A row for which the result is null is left out, as pyarrow does. The text is parsed, never run as code.
"""

from __future__ import annotations

import ast
import operator
from typing import Any, NamedTuple

_COMPARISONS = {ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
                ast.Gt: operator.gt, ast.GtE: operator.ge}  # fmt: skip
_ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


class RowFilter(NamedTuple):
    """``expression``: a pyarrow.compute.Expression; ``columns``: paths of the columns in it, such as ``meta.url``."""

    expression: Any
    columns: list[str]


def parse_filter(text: str) -> RowFilter:
    """Raises ``ValueError`` naming --filter for what is no such expression; ``ImportError`` without pyarrow."""
    try:
        body = ast.parse(text.strip(), mode="eval").body
        parser = _Parser()
        return RowFilter(parser.expression(body), parser.columns)
    except (SyntaxError, RecursionError) as error:
        raise _wrong(text, getattr(error, "msg", "it is nested too deeply")) from None
    except OverflowError:
        raise _wrong(text, "a number in it has more than 64 bits") from None
    except _NotUnderstood as error:
        raise _wrong(text, str(error)) from None


def _wrong(text: str, reason: str) -> ValueError:
    return ValueError(f"--filter is {text!r}: {reason}; expected comparisons of columns such as 'language == \"en\"'")


class _NotUnderstood(Exception):
    pass


class _Parser:
    def __init__(self) -> None:
        import pyarrow.compute

        self._pc = pyarrow.compute
        self._functions = {
            name for name in self._pc.list_functions() if self._pc.get_function(name).kind == "scalar"
        } & set(dir(self._pc))
        self.columns: list[str] = []

    def expression(self, node: ast.expr) -> Any:
        if isinstance(node, ast.BoolOp):
            join = operator.and_ if isinstance(node.op, ast.And) else operator.or_
            found = self.expression(node.values[0])
            for other in node.values[1:]:
                found = join(found, self.expression(other))
            return found
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~self.expression(node.operand)
        negated = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
        if negated and not isinstance(node.operand, ast.Constant):  # type: ignore[attr-defined]
            return self._pc.negate(self.expression(node.operand))  # type: ignore[attr-defined]
        if isinstance(node, ast.Compare):
            return self._comparison(node)
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            return _ARITHMETIC[type(node.op)](self.expression(node.left), self.expression(node.right))
        if isinstance(node, (ast.Name, ast.Attribute)):
            return self._column(_path(node))
        if isinstance(node, ast.Call):
            return self._call(node)
        return self._pc.scalar(_constant(node))

    def _comparison(self, node: ast.Compare) -> Any:
        found = None
        left = node.left
        for op, right in zip(node.ops, node.comparators):
            one = self._compared(left, op, right)
            found = one if found is None else found & one
            left = right
        return found

    def _compared(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Any:
        value = self.expression(left)
        if isinstance(op, (ast.Is, ast.IsNot)):
            if not (isinstance(right, ast.Constant) and right.value is None):
                raise _NotUnderstood("'is' goes with None only")
            return value.is_null() if isinstance(op, ast.Is) else value.is_valid()
        if isinstance(op, (ast.In, ast.NotIn)):
            if not isinstance(right, (ast.List, ast.Tuple, ast.Set)):
                raise _NotUnderstood("'in' goes with a list of values")
            among = value.isin([_constant(each) for each in right.elts])
            return among if isinstance(op, ast.In) else ~among
        if isinstance(right, ast.Constant) and right.value is None:
            raise _NotUnderstood("nothing compares to None: write 'is None' or 'is not None'")
        return _COMPARISONS[type(op)](value, self.expression(right))

    def _column(self, path: tuple[str, ...]) -> Any:
        self.columns.append(".".join(path))
        return self._pc.field(path[0]) if len(path) == 1 else self._pc.field(*path)

    def _call(self, node: ast.Call) -> Any:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name == "field":
            path = tuple(_constant(each) for each in node.args)
            if not path or node.keywords or not all(isinstance(each, str) for each in path):
                raise _NotUnderstood("field(...) takes the name of a column")
            return self._column(path)
        if name not in self._functions:
            raise _NotUnderstood(f"{ast.unparse(node.func)!r} is no function of pyarrow.compute on single values")
        arguments = [_constant(each) if isinstance(each, ast.Constant) else self.expression(each) for each in node.args]
        options = {str(each.arg): _constant(each.value) for each in node.keywords}
        try:
            return getattr(self._pc, name)(*arguments, **options)
        except Exception as error:  # wrong arguments raise many kinds
            raise _NotUnderstood(f"{name}: {str(error).splitlines()[0]}") from None


def _path(node: ast.expr) -> tuple[str, ...]:
    if isinstance(node, ast.Name):
        return (node.id,)
    if isinstance(node, ast.Attribute):
        return (*_path(node.value), node.attr)
    raise _NotUnderstood(f"{ast.unparse(node)!r} is not understood")


def _constant(node: ast.expr) -> Any:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _constant(node.operand)
        if isinstance(value, (int, float)):
            return -value
    if isinstance(node, ast.Constant) and isinstance(node.value, (str, int, float)):
        return node.value
    raise _NotUnderstood(f"{ast.unparse(node)!r} is not understood")
