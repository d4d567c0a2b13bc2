"""Which checkpoint comes first where some are persistent and others are not; flags of non-persistent ones."""

from __future__ import annotations

from typing import Any

import pytest

from umv2_megatron.config.resolve import resolve
from umv2_megatron.config.usage import UsageError
from umv2_megatron.training.non_persistent import merged


@pytest.mark.parametrize(
    ("persistent", "others", "expected"),
    [
        ([10, 5], [12, 8], "l12 p10 l8 p5"),
        ([10, 5], [10, 8], "p10 l8 p5"),
        ([10, 5, 20], [12, 8], "l12 p10 l8 p5 p20"),  # 20 is newer than the tracker: of a time before it went back
        ([], [4, 2], "l4 l2"),
        ([10], [], "p10"),
        ([10, 5], [4], "p10 p5 l4"),
    ],
)
def test_the_newest_first(persistent: list[int], others: list[int], expected: str) -> None:
    class Named:
        def __init__(self, kind: str, iteration: int) -> None:
            self.kind, self.iteration = kind, iteration

    found: list[Any] = merged([Named("p", each) for each in persistent], [Named("l", each) for each in others])  # type: ignore[misc]
    assert " ".join(f"{each.kind}{each.iteration}" for each in found) == expected


def run_with(*more: str) -> Any:
    argv = ["--model-preset", "umv2-tiny", "--mock-data", "--train-iters", "10", "--lr", "1e-3", *more]
    return resolve(argv, 1)


SAVE = ("--save", "s", "--save-interval", "6")
EVERY_2 = ("--non-persistent-save-interval", "2")
LOCAL, GLOBAL = ("--non-persistent-local-ckpt-dir", "d"), ("--non-persistent-global-ckpt-dir", "d")


@pytest.mark.parametrize(
    ("argv", "kind"),
    [
        ((*LOCAL,), "local"),
        ((*GLOBAL,), "global"),
        (("--non-persistent-ckpt-type", "global"), "global"),
        ((*LOCAL, "--non-persistent-ckpt-type", "local", "--non-persistent-local-ckpt-algo", "atomic"), "local"),
    ],
)
def test_the_type_follows_from_the_directory(argv, kind):
    assert run_with(*SAVE, *EVERY_2, *argv).non_persistent_type == kind


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ((*EVERY_2, *LOCAL), "--non-persistent-save-interval is 2; expected no value without --save"),
        (("--save", "s", *EVERY_2, *LOCAL), "--non-persistent-save-interval is 2; expected no value without --save-i"),
        ((*SAVE, *EVERY_2), "is 2; expected --non-persistent-local-ckpt-dir too"),
        ((*SAVE, *LOCAL), "--non-persistent-local-ckpt-dir is d; expected no value without --non-persistent-save-int"),
        ((*SAVE, "--non-persistent-save-interval", "6", *LOCAL), "is 6; expected fewer iterations than --save-int"),
        ((*SAVE, "--non-persistent-save-interval", "0", *LOCAL), "expected an integer of at least 1"),
        ((*SAVE, *EVERY_2, *LOCAL, *GLOBAL), "--non-persistent-global-ckpt-dir is d; expected no value with non-pers"),
        ((*SAVE, *EVERY_2, *LOCAL, "--non-persistent-ckpt-type", "global"), "-local-ckpt-dir is d; expected no value"),
        ((*SAVE, *EVERY_2, *LOCAL, "--non-persistent-ckpt-type", "in_memory"), "--non-persistent-ckpt-type"),
        ((*SAVE, *EVERY_2, *LOCAL, "--non-persistent-local-ckpt-algo", "fully_parallel"), "expected atomic: every"),
    ],
)
def test_flags_that_do_not_fit(argv, told):
    with pytest.raises(UsageError) as caught:
        run_with(*argv)
    assert told in str(caught.value)
