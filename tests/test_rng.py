"""Claims about `dwiml_func.core.rng`: a key's path is hashed, numbers are pinned, global generators are left alone."""

import os
import random
import threading
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dwiml_func.core import rng
from dwiml_func.core.rng import Key, Stream, fold_in, numpy_rng, torch_rng, watched_generators, without_seeds

SEEDS = st.integers(0, 2**64 - 1)
PATHS = st.lists(st.integers(0, 2**32 - 1), max_size=4).map(tuple)


def first_numpy(key: Key) -> bytes:
    return numpy_rng(key).bytes(16)


def first_torch(key: Key) -> bytes:
    with torch_rng(key):
        return torch.randint(-(2**63), 2**63 - 1, (2,)).numpy().tobytes()


@pytest.mark.parametrize("first", [first_numpy, first_torch])
def test_no_two_of_200_seeds_times_50_epochs_have_equal_streams(first):
    samples = {first(fold_in(Key(seed), Stream.TRAIN_PLAN, epoch)) for seed in range(200) for epoch in range(50)}
    assert len(samples) == 200 * 50


@pytest.mark.parametrize("first", [first_numpy, first_torch])
def test_seed_and_epoch_are_not_added(first):
    for seed in range(30):
        for epoch in range(30):
            here = first(fold_in(Key(seed), epoch + 1))
            assert here != first(fold_in(Key(seed + 1), epoch))
            assert here != first(Key(seed + epoch + 1))


@pytest.mark.parametrize("first", [first_numpy, first_torch])
def test_paths_of_zeros_differ_by_their_length(first):
    assert len({first(Key(0, (0,) * length)) for length in range(6)}) == 6


@pytest.mark.parametrize("first", [first_numpy, first_torch])
def test_named_streams_epochs_and_batches_have_their_own_draws(first):
    keys = [Key(1, (stream, epoch)) for stream in Stream for epoch in range(10)]
    keys += [Key(1, (stream, epoch, batch)) for stream in Stream for epoch in range(10) for batch in range(10)]
    assert len({first(key) for key in keys}) == len(keys) == 8 * 10 * 11


def test_a_large_seed_does_not_read_as_a_small_seed_with_a_path():
    assert first_numpy(Key(1 << 32)) != first_numpy(Key(0, (1,)))
    assert first_numpy(Key((1 << 32) + 5, (7,))) != first_numpy(Key(5, (1, 7)))


@given(SEEDS, PATHS, PATHS)
def test_folding_in_parts_is_folding_in_at_once(seed, first, second):
    key = fold_in(fold_in(Key(seed), *first), *second)
    assert key == fold_in(Key(seed), *first, *second) == Key(seed, first + second)


@given(st.lists(st.builds(Key, SEEDS, PATHS), min_size=2, max_size=8, unique=True))
def test_different_keys_give_different_draws(keys):
    assert len({first_numpy(key) for key in keys}) == len(keys)
    assert len({first_torch(key) for key in keys}) == len(keys)


@given(SEEDS, PATHS)
def test_a_key_gives_the_same_draws_whenever_it_is_asked(seed, path):
    key = Key(seed, path)
    assert first_numpy(key) == first_numpy(key)
    before = first_torch(key)
    torch.rand(3)  # whatever the global generator did in between
    assert first_torch(key) == before


GOLDEN_INTEGERS = [4294309196, 341362649, 3343067227, 3646496321]
GOLDEN_PERMUTATION = [8, 6, 7, 5, 0, 3, 4, 2, 1, 9]
GOLDEN_UNIFORM = ["0x1.458c7d9fff5f0p-4", "0x1.b2b23c838e865p-1"]
GOLDEN_NORMAL = ["-0x1.8125901ade09cp-1", "0x1.04f1824c57790p+0"]
GOLDEN_TORCH = [711581704, 1245857479, 463014866, 1940163136]


def test_draws_are_pinned():
    # Old runs must replay: if these numbers change with an upgrade, so do all plans and dropout masks.
    key = fold_in(Key(1234), Stream.TRAIN_PLAN, 3)
    assert numpy_rng(key).integers(0, 2**32, 4).tolist() == GOLDEN_INTEGERS
    assert numpy_rng(key).permutation(10).tolist() == GOLDEN_PERMUTATION
    assert [x.hex() for x in numpy_rng(key).random(2).tolist()] == GOLDEN_UNIFORM
    assert [x.hex() for x in numpy_rng(key).standard_normal(2).tolist()] == GOLDEN_NORMAL
    with torch_rng(key):
        assert torch.randint(0, 2**31, (4,)).tolist() == GOLDEN_TORCH


def test_stream_numbers_are_pinned():
    assert {stream.name: int(stream) for stream in Stream} == {
        "INIT": 0,
        "TRAIN_PLAN": 1,
        "TRAIN_STEP": 2,
        "TRAIN_AUGMENT": 3,
        "VALID_PLAN": 4,
        "VALID_STEP": 5,
        "EXAMPLE_DATA": 6,
        "TRACK": 7,
    }


def test_numpy_rng_touches_no_global_generator():
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    numpy_rng(Key(3)).random(10)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert repr(np.random.get_state()) == repr(numpy_state)  # noqa: NPY002
    assert random.getstate() == python_state


@pytest.mark.parametrize("fails", [False, True])
def test_torch_rng_puts_the_generator_back(fails):
    torch.manual_seed(5)
    torch.rand(7)
    before = torch.get_rng_state()
    try:
        with torch_rng(Key(3)):
            torch.rand(1000)
            if fails:
                raise KeyError("inside")
    except KeyError:
        assert fails
    assert torch.equal(torch.get_rng_state(), before)


def test_a_forked_process_seeds_generators_that_a_thread_of_its_parent_holds():
    is_held, is_over = threading.Event(), threading.Event()

    def hold() -> None:
        with torch_rng(Key(1)):
            is_held.set()
            is_over.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    is_held.wait()
    with warnings.catch_warnings(action="ignore"):  # of jax, if it is there: it has threads
        child = os.fork()
    if child == 0:
        os._exit(0 if rng._GLOBAL_GENERATORS.acquire(blocking=False) else 3)
    is_over.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_one_thread_at_a_time_seeds_the_generators():
    is_free = []

    def look() -> None:
        is_free.append(rng._GLOBAL_GENERATORS.acquire(blocking=False))
        if is_free[-1]:
            rng._GLOBAL_GENERATORS.release()

    for block in (torch_rng(Key(1)), watched_generators(), nullcontext()):
        with block:
            other = threading.Thread(target=look)
            other.start()
            other.join()
    assert is_free == [False, False, True]


def test_watched_generators_tell_whether_something_was_drawn_and_are_put_back():
    before = torch.get_rng_state()
    with watched_generators() as has_drawn:
        assert not has_drawn()
        torch.rand(1)
        assert has_drawn()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("drawn_from", [(), (0,), (1,), (0, 1)])
def test_the_generators_of_all_devices_are_seeded_watched_and_put_back(drawn_from, monkeypatch):
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    monkeypatch.setattr(rng, "default_generators", lambda: generators)
    before = [generator.get_state() for generator in generators]

    def draw() -> list[float]:
        return [torch.rand(1, generator=generators[number]).item() for number in drawn_from]

    with watched_generators() as has_drawn:
        draw()
        assert has_drawn() == bool(drawn_from)
    assert all(map(torch.equal, before, (generator.get_state() for generator in generators)))
    with torch_rng(Key(1)):
        first = draw()
    assert all(map(torch.equal, before, (generator.get_state() for generator in generators)))
    with torch_rng(Key(1)):
        assert first == draw()
        assert len({generator.initial_seed() for generator in generators}) == 1


def test_without_seeds_a_thread_draws_from_the_generators_as_they_are():
    def first() -> list[float]:
        with torch_rng(Key(1)):
            return torch.rand(3).tolist()

    expected = first()
    torch.manual_seed(2)
    with without_seeds():
        unseeded = first()
        in_thread: list[list[float]] = []
        other = threading.Thread(target=lambda: in_thread.append(first()))
        other.start()
        other.join()
    torch.manual_seed(2)
    assert unseeded == torch.rand(3).tolist() != expected
    assert in_thread == [expected] == [first()]


def test_torch_rng_nests():
    with torch_rng(Key(1)):
        expected = torch.rand(4)
    with torch_rng(Key(1)):
        first = torch.rand(2)
        with torch_rng(Key(2)):
            torch.rand(5)
        second = torch.rand(2)
    assert torch.equal(torch.cat([first, second]), expected)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "7", None])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(ValueError, match=r"Expected a seed .*2\*\*64 - 1\. Received: ") as error:
        fold_in(Key(seed))
    assert repr(seed) in str(error.value)


@pytest.mark.parametrize("element", [-1, 2**32, 1.5])
def test_a_path_element_out_of_range_is_refused(element):
    with pytest.raises(ValueError, match=r"Expected path elements .*Received: ") as error:
        fold_in(Key(0), 3, element)
    assert f"(3, {element})" in str(error.value)
    with pytest.raises(ValueError, match="Expected path elements"):
        fold_in(Key(0, (element,)), 3)


def test_the_ends_of_the_ranges_are_accepted():
    key = fold_in(Key(2**64 - 1), 0, 2**32 - 1)
    assert key == Key(2**64 - 1, (0, 2**32 - 1))
    assert first_numpy(key) != first_numpy(Key(2**64 - 1, (0, 2**32 - 2)))
    assert first_torch(key) != first_torch(Key(2**64 - 2, (0, 2**32 - 1)))


def test_numpy_integers_become_plain_ones():
    key = fold_in(Key(3), np.int64(2), Stream.TRAIN_STEP)  # pyright: ignore[reportArgumentType]
    assert key == Key(3, (2, 2))
    assert {type(element) for element in key.path} == {int}
