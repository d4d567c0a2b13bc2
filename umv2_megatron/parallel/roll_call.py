"""Stopgap: overwritten by the real one."""
import contextlib


@contextlib.contextmanager
def watched(group, group_name, step):
    yield
