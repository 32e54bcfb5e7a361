from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from dwiml_func.data.prefetch import Prefetched


class Batches:
    """Numbers, with a note of which were made and an error at one of them."""

    def __init__(self, num: int, bad: int | None = None) -> None:
        self.num = num
        self.bad = bad
        self.made: list[int] = []
        self.threads: set[int] = set()

    def __len__(self) -> int:
        return self.num

    def __iter__(self) -> Iterator[int]:
        for number in range(self.num):
            if number == self.bad:
                raise ValueError(f"batch {number}")
            self.made.append(number)
            self.threads.add(threading.get_ident())
            yield number


def num_threads() -> int:
    return sum(thread.name == "dwiml_func prefetch" for thread in threading.enumerate())


@pytest.mark.parametrize("num", [0, 1, 7])
def test_the_same_batches_come_in_order_again_and_again_and_can_be_counted(num):
    loader = Prefetched(Batches(num))
    assert len(loader) == num
    assert [list(loader) for _ in range(2)] == [list(range(num))] * 2
    assert num_threads() == 0


def test_batches_are_made_in_another_thread():
    batches = Batches(3)
    list(Prefetched(batches))
    assert batches.threads.isdisjoint({threading.get_ident()})


def test_the_next_batch_is_made_while_one_is_in_use():
    started = threading.Event()

    class Two(Batches):
        def __iter__(self) -> Iterator[int]:
            yield 0
            started.set()
            yield 1

    iterator = iter(Prefetched(Two(2)))
    assert next(iterator) == 0
    assert started.wait(300)
    assert list(iterator) == [1]


def test_no_more_is_made_than_may_wait():
    batches = Batches(100)
    iterator = iter(Prefetched(batches))
    next(iterator)
    iterator.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert len(batches.made) <= 3  # in use, waiting, and one that waits for a place
    assert num_threads() == 0


def test_an_error_comes_at_its_place_and_the_thread_ends():
    iterator = iter(Prefetched(Batches(5, bad=2)))
    assert [next(iterator), next(iterator)] == [0, 1]
    with pytest.raises(ValueError, match=r"^batch 2$"):
        next(iterator)
    assert num_threads() == 0


def test_a_training_that_breaks_off_leaves_no_thread():
    def train() -> None:
        for _ in Prefetched(Batches(5)):
            raise RuntimeError("not finite")

    with pytest.raises(RuntimeError, match="not finite"):
        train()
    assert num_threads() == 0
