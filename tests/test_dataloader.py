"""Claims about `dwiml_func.data.dataloader`: a batch is a function of key, epoch and number."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from dataloader_cases import Noisy
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, random_split

from dwiml_func import Key, Stream, from_loader, init_state, module_loss, run_epoch, sgd, train_step
from dwiml_func.checkpoint import state_digest
from dwiml_func.data.workers import process_context


class NoisyStream(IterableDataset):
    def __iter__(self) -> Iterator[list[float]]:
        return (Noisy()[index] for index in range(10))


class Stream10(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(10))


def batches(source, epoch: int = 0, start: int = 0, seed: int = 7) -> list:
    key = Key(seed)
    return [torch.stack(b).tolist() if isinstance(b, list) else b.tolist() for b in source(key, epoch, start)]


def test_a_batch_depends_on_key_epoch_and_number_alone() -> None:
    source = from_loader(lambda: DataLoader(Noisy(), batch_size=3, shuffle=True))
    whole = batches(source)
    assert [len(batch[0]) for batch in whole] == [3, 3, 3, 1]
    assert sorted(index for batch in whole for index in batch[0]) == list(range(10))
    for start in range(5):
        assert batches(source, start=start) == whole[start:]
        assert len(source(Key(7), 0, start)) == 4 - start
    assert batches(source, epoch=1) != whole
    assert batches(source, seed=8) != whole
    noise = {value for batch in whole for row in batch[1:] for value in row}
    assert len(noise) == 30  # no number is drawn twice


def test_a_random_split_in_the_function_gives_the_same_parts_in_all_epochs_and_sources() -> None:
    training = from_loader(lambda: DataLoader(random_split(range(10), [7, 3])[0], batch_size=2, shuffle=True))  # type: ignore[arg-type]
    held_out = from_loader(
        lambda: DataLoader(random_split(range(10), [7, 3])[1], batch_size=2),  # type: ignore[arg-type]
        stream=Stream.VALID_PLAN,
    )
    parts = [{index for batch in batches(training, epoch=epoch) for index in batch} for epoch in (0, 0, 5)]
    assert parts[0] == parts[1] == parts[2] == set(range(10)) - {i for batch in batches(held_out) for i in batch}
    assert batches(training, start=2) == batches(training)[2:]


def test_workers_give_the_same_batches_from_any_start() -> None:
    options: dict[str, Any] = {"batch_size": 3, "shuffle": True}
    whole = batches(from_loader(lambda: DataLoader(Noisy(), **options)))
    source = from_loader(
        lambda: DataLoader(Noisy(), num_workers=2, multiprocessing_context=process_context("torch"), **options)
    )
    assert batches(source) == whole
    assert batches(source, start=2) == whole[2:]


def test_global_generators_are_left_alone() -> None:
    before = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())  # noqa: NPY002
    batches(from_loader(lambda: DataLoader(Noisy(), batch_size=3, shuffle=True)))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert repr(np.random.get_state()) == before[2]  # noqa: NPY002


def test_a_generator_of_the_loaders_own_is_seeded_by_the_key() -> None:
    def make() -> DataLoader:
        return DataLoader(range(20), batch_size=4, shuffle=True, generator=torch.Generator())  # type: ignore[arg-type]

    source = from_loader(make)
    assert batches(source) == batches(source)
    assert batches(source, epoch=1) != batches(source)
    assert batches(source) != batches(from_loader(make, stream=Stream.VALID_PLAN))


def test_samples_without_batches_and_iterable_datasets_resume_too() -> None:
    single = from_loader(lambda: DataLoader(torch.arange(5.0), batch_size=None, shuffle=True))  # type: ignore[arg-type]
    assert batches(single, start=2) == batches(single)[2:]
    stream = from_loader(lambda: DataLoader(Stream10(), batch_size=4))
    assert batches(stream, start=1) == [[4, 5, 6, 7], [8, 9]]
    noisy = from_loader(lambda: DataLoader(NoisyStream(), batch_size=4))
    assert batches(noisy, start=1) == batches(noisy)[1:] != batches(noisy, epoch=1)[1:]
    assert len({str(batch[1:]) for batch in batches(noisy)}) == len(batches(noisy))  # each has numbers of its own


def test_a_loop_resumes_within_an_epoch_of_a_loader_without_length() -> None:
    model = torch.nn.Linear(4, 1)
    loss_fn = module_loss(model, lambda model, x: (model(torch.stack(x, 1).float()).square().mean(), len(x[0])))
    source = from_loader(lambda: DataLoader(NoisyStream(), batch_size=4))
    options: Any = {
        "train": source,
        "step": partial(train_step, loss_fn=loss_fn, optimizer=sgd()),
        "learning_rate": 0.1,
    }
    seen: list[Any] = []
    whole, _ = run_epoch(init_state(model, sgd(), seed=0), on_batch=lambda state, sums: seen.append(state), **options)
    assert state_digest(run_epoch(seen[0], **options)[0]) == state_digest(whole)


def test_samplers_follow_the_key_and_the_epoch_whatever_state_they_keep() -> None:
    shared = RandomSampler(range(20), generator=torch.Generator())
    for sampler in (shared, DistributedSampler(range(20), num_replicas=1, rank=0)):  # type: ignore[arg-type]
        source = from_loader(lambda sampler=sampler: DataLoader(range(20), batch_size=4, sampler=sampler))  # type: ignore[arg-type]
        assert batches(source) == batches(source) != batches(source, epoch=1)
        assert batches(source, start=2) == batches(source)[2:]


def test_items_that_a_dataset_gives_together_are_asked_for_together() -> None:
    class Together(Noisy):
        def __getitems__(self, indices: list[int]) -> list[list[float]]:
            return [[float(sum(indices)), float(torch.rand(())), 0.0, 0.0] for _ in indices]

    (first, *_) = batches(from_loader(lambda: DataLoader(Together(), batch_size=5)))
    assert first[0] == [10.0] * 5


def test_a_loader_keeps_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[DataLoader] = []

    class Recorded(DataLoader):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)

        def __iter__(self) -> Any:
            return iter([])

    given: dict[str, Any] = {"num_workers": 1, "multiprocessing_context": "spawn", "prefetch_factor": 5, "timeout": 7.0}
    given |= {"collate_fn": list, "worker_init_fn": print, "pin_memory": True}
    monkeypatch.setattr("dwiml_func.data.dataloader.DataLoader", Recorded)
    list(from_loader(lambda: DataLoader(Noisy(), batch_size=2, **given))(Key(7), 0, 0))
    for name, value in (given | {"multiprocessing_context": made[0].multiprocessing_context}).items():
        assert getattr(made[0], name) == value
    assert made[0].multiprocessing_context.get_start_method() == "spawn"  # type: ignore[union-attr]


def test_what_makes_no_loader_is_refused() -> None:
    with pytest.raises(TypeError, match=r"that makes a DataLoader\. It made: list"):
        batches(from_loader(lambda: [1]))  # type: ignore[arg-type, return-value]


def test_a_loader_in_place_of_a_function_is_refused_with_what_to_write() -> None:
    with pytest.raises(TypeError, match=r"Received: DataLoader\. Give from_loader\(lambda: loader\)\."):
        from_loader(DataLoader(range(4)))  # type: ignore[arg-type]
