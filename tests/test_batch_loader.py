from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dwiml_func.data.batch_loader import BatchRequest, LoaderSpec, epoch_batches, load_batch
from dwiml_func.data.batch_sampler import SamplerSpec, sample_epoch
from dwiml_func.data.dataset import DatasetIndex, StreamlineDataset
from dwiml_func.data.hdf5 import open_dataset
from dwiml_func.data.interpolation import Interpolation, interpolate
from dwiml_func.data.streamlines import StreamlineBatch, Streamlines
from dwiml_func.rng import Key

PHANTOM = Path(__file__).parent / "data" / "phantom.hdf5"
KEY = Key(1234, (1,))
SPEC = SamplerSpec(batch_size=20)


@pytest.fixture(scope="module")
def dataset() -> StreamlineDataset:
    return open_dataset(PHANTOM)


def as_bytes(batch: StreamlineBatch) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: (t.dtype, t.shape, t.numpy().tobytes()) for name, t in tensors.items() if t is not None}


def all_bytes(batches: Iterable[StreamlineBatch]) -> list[dict[str, tuple[torch.dtype, torch.Size, bytes]]]:
    return [as_bytes(batch) for batch in batches]


def global_random_states() -> tuple[bytes, str, object]:
    return torch.get_rng_state().numpy().tobytes(), str(np.random.get_state()), random.getstate()  # noqa: NPY002


@pytest.mark.parametrize("mode", ["trilinear", "trilinear-corner"])
def test_a_batch_holds_its_streamlines_and_their_own_subjects_volume_along_them(dataset, mode: Interpolation):
    ids = np.array([90, 3, 48, 47, 12])
    batch = load_batch(BatchRequest(ids, None, 0, 0), dataset=dataset, spec=LoaderSpec(interpolation=mode))
    lines = dataset.streamlines.to_list()
    subjects = [1, 0, 1, 0, 0]
    assert batch.ids.tolist() == ids.tolist()
    assert batch.subject.tolist() == subjects
    assert torch.equal(batch.points, torch.cat([lines[i] for i in ids]))
    assert batch.offsets.diff().tolist() == [len(lines[i]) for i in ids]
    inputs = [interpolate(dataset.volumes[s], lines[i][:-1], mode=mode) for s, i in zip(subjects, ids, strict=True)]
    assert torch.equal(batch.inputs, torch.cat(inputs))
    assert batch.inputs.shape == (batch.num_points, dataset.num_features)
    assert {t.dtype for t in (batch.points, batch.inputs)} == {torch.float32}
    assert {t.dtype for t in (batch.offsets, batch.subject, batch.ids)} == {torch.int64}


def test_the_two_interpolations_differ(dataset):
    request = BatchRequest(np.arange(5), None, 0, 0)
    right, corner = (
        load_batch(request, dataset=dataset, spec=LoaderSpec(interpolation=mode)).inputs
        for mode in ("trilinear", "trilinear-corner")
    )
    assert not torch.allclose(right, corner)


def test_loading_is_pure(dataset):
    tensors = [dataset.streamlines.points, dataset.streamlines.offsets, dataset.voxel_sizes, *dataset.volumes]
    before = [(t._version, t.numpy().tobytes()) for t in tensors]
    ids = np.array([3, 60])
    ids.flags.writeable = False
    states = global_random_states()
    first, second = (load_batch(BatchRequest(ids, None, 0, 0), dataset=dataset, spec=LoaderSpec()) for _ in range(2))
    assert as_bytes(first) == as_bytes(second)
    first.points.fill_(0)
    first.ids.fill_(0)
    assert as_bytes(load_batch(BatchRequest(ids, None, 0, 0), dataset=dataset, spec=LoaderSpec())) == as_bytes(second)
    assert [(t._version, t.numpy().tobytes()) for t in tensors] == before
    assert global_random_states() == states


def test_an_epoch_loads_the_plans_batches_in_order(dataset):
    plan = sample_epoch(dataset.index, SPEC, KEY, 2)
    batches = list(epoch_batches(dataset, SPEC, LoaderSpec(), key=KEY, epoch=2))
    assert len(batches) == len(plan) == 5
    assert all(np.array_equal(batch.ids.numpy(), plan[i]) for i, batch in enumerate(batches))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with one core
def test_workers_change_neither_a_byte_nor_a_global_random_state(dataset):
    alone = all_bytes(epoch_batches(dataset, SPEC, LoaderSpec(), key=KEY, epoch=1))
    states = global_random_states()
    helped = all_bytes(epoch_batches(dataset, SPEC, LoaderSpec(), key=KEY, epoch=1, start_batch=1, num_workers=2))
    assert global_random_states() == states
    assert len(helped) == 4
    assert helped == alone[1:]


def test_starting_later_gives_the_rest_of_the_epoch(dataset):
    whole = all_bytes(epoch_batches(dataset, SPEC, LoaderSpec(), key=KEY, epoch=1))
    for start in range(len(whole) + 1):
        loader = epoch_batches(dataset, SPEC, LoaderSpec(), key=KEY, epoch=1, start_batch=start)
        assert len(loader) == len(whole) - start
        assert all_bytes(loader) == whole[start:]


def test_a_request_knows_its_place_in_the_epoch(dataset):
    requests: Any = epoch_batches(dataset, SPEC, LoaderSpec(), key=KEY, epoch=4, start_batch=3).dataset
    assert [(requests[i].epoch, requests[i].batch) for i in range(2)] == [(4, 3), (4, 4)]


def test_making_and_iterating_a_loader_leaves_the_global_random_states_alone(dataset):
    states = global_random_states()
    loader = epoch_batches(dataset, SPEC, LoaderSpec(), key=KEY, epoch=0)
    first = all_bytes(loader)
    assert global_random_states() == states
    assert all_bytes(loader) == first


def test_a_dataset_without_subjects_has_no_batches():
    empty = open_dataset(PHANTOM, "testing")
    loader = epoch_batches(empty, SPEC, LoaderSpec(), key=KEY, epoch=0, num_workers=2)
    assert len(loader) == 0
    assert list(loader) == []


def test_a_subject_without_streamlines_is_passed_over():
    lines = [np.full((3, 3), 0.5), np.full((4, 3), 0.5)]
    dataset = StreamlineDataset(
        path=Path("made.hdf5"),
        subset="training",
        index=DatasetIndex(("a", "empty", "b"), np.array([1, 0, 1])),
        volumes=tuple(torch.full((2, 2, 2, 1), float(value)) for value in range(3)),
        streamlines=Streamlines.from_list(lines),
        voxel_sizes=torch.ones(3, 3),
        input_attributes={},
    )
    batch = load_batch(BatchRequest(np.array([1, 0]), None, 0, 0), dataset=dataset, spec=LoaderSpec())
    assert batch.subject.tolist() == [2, 0]
    assert batch.inputs[:, 0].tolist() == [2, 2, 2, 0, 0]


@pytest.mark.parametrize("start_batch", [-1, 6])
def test_a_first_batch_out_of_range_is_refused(dataset, start_batch):
    with pytest.raises(ValueError, match=f"first batch between 0 and 5. Received: {start_batch}$"):
        epoch_batches(dataset, SPEC, LoaderSpec(), key=KEY, epoch=0, start_batch=start_batch)


def test_a_negative_number_of_workers_is_refused(dataset):
    with pytest.raises(ValueError, match=r"at least 0\. Received: -1$"):
        epoch_batches(dataset, SPEC, LoaderSpec(), key=KEY, epoch=0, num_workers=-1)


def test_an_unknown_interpolation_is_refused():
    with pytest.raises(ValueError, match=r"Received: 'cubic'$"):
        LoaderSpec(interpolation="cubic")  # pyright: ignore[reportArgumentType]
