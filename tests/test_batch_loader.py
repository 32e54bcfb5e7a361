from __future__ import annotations

import dataclasses
import multiprocessing
import random
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from subprocess import PIPE
from typing import Any

import numpy as np
import pytest
import torch

from dwiml_func.core.rng import Key
from dwiml_func.data import workers
from dwiml_func.data.augmentation import Augmentation
from dwiml_func.data.batch import StreamlineBatch
from dwiml_func.data.dataset import DatasetIndex, StreamlineDataset
from dwiml_func.data.hdf5.read import open_dataset
from dwiml_func.data.interpolation import Interpolation, interpolate
from dwiml_func.data.loader import BatchRequest, LoaderSpec, epoch_batches, load_batch
from dwiml_func.data.neighborhood import Neighborhood
from dwiml_func.data.prefetch import Prefetched
from dwiml_func.data.resampling import Resampling
from dwiml_func.data.sampler import SamplerSpec, sample_epoch
from dwiml_func.data.streamlines import Streamlines, directions
from dwiml_func.data.workers import WorkerLoader, process_context

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
def test_workers_change_neither_a_byte_nor_a_global_random_state_and_end(dataset):
    alone = all_bytes(epoch_batches(dataset, SPEC, LoaderSpec(), key=KEY, epoch=1))
    states, processes = global_random_states(), multiprocessing.active_children()
    helped = all_bytes(epoch_batches(dataset, SPEC, LoaderSpec(), key=KEY, epoch=1, start_batch=1, num_workers=2))
    assert global_random_states() == states
    assert {*multiprocessing.active_children()} <= {*processes}  # they have ended with their epoch
    assert len(helped) == 4
    for start_batch, num_workers in ((1, 2), (4, 1)):  # no more than batches
        options = {"key": KEY, "epoch": 1, "start_batch": start_batch, "num_workers": 2}
        assert epoch_batches(dataset, SPEC, LoaderSpec(), **options).num_workers == num_workers
    assert helped == alone[1:]


def test_a_worker_ignores_signals_also_where_its_server_does_not():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        workers._begin(0)
        assert {signal.getsignal(number) for number in before} == {signal.SIG_IGN}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_workers_end_when_the_process_that_iterates_is_killed():
    script = """if __name__ == "__main__":
        from dwiml_func.data.workers import WorkerLoader
        batches = iter(WorkerLoader(range(100), num_workers=1, preload="math"))
        print(next(batches).item(), flush=True)
        input()
    """
    with subprocess.Popen([sys.executable, "-c", script], stdin=PIPE, stdout=PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "0\n"
        process.kill()
        rest, _ = process.communicate(timeout=60)  # the pipe has an end once no worker and no server holds it
        assert (rest, process.returncode) == ("", -signal.SIGKILL)


def test_starting_later_gives_the_rest_of_the_epoch(dataset):
    whole = all_bytes(epoch_batches(dataset, SPEC, LoaderSpec(), key=KEY, epoch=1))
    for start in range(len(whole) + 1):
        loader = epoch_batches(dataset, SPEC, LoaderSpec(), key=KEY, epoch=1, start_batch=start)
        assert len(loader) == len(whole) - start
        assert all_bytes(loader) == whole[start:]


def test_a_loader_of_workers_starts_them_with_what_makes_them_end_and_in_their_own_way():
    loaders = [WorkerLoader(range(3), num_workers=number) for number in (0, 1)]  # type: ignore[arg-type]
    assert [loader.worker_init_fn for loader in loaders] == [workers._begin] * 2
    assert loaders[0].multiprocessing_context is None
    assert loaders[1].multiprocessing_context is process_context("dwiml_func.data.workers")
    assert all(isinstance(loader.generator, torch.Generator) for loader in loaders)


def test_models_of_streamlines_alone_have_no_inputs(dataset):
    around = Neighborhood(type="axes")
    assert LoaderSpec(streamlines_only=True, neighborhood=around).num_inputs(dataset) == 0
    assert [LoaderSpec(neighborhood=each).num_inputs(dataset) for each in (around, None)] == [7 * 6, 6]


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
    with pytest.raises(ValueError, match="non-negative"):
        epoch_batches(dataset, SPEC, LoaderSpec(), key=KEY, epoch=0, num_workers=-1)


def test_an_unknown_interpolation_is_refused(dataset):
    spec = LoaderSpec(interpolation="cubic")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"^interpolation: .* received 'cubic'\.$"):
        load_batch(BatchRequest(np.arange(3), None, 0, 0), dataset=dataset, spec=spec)


# --- everything at once: augmentation, resampling, neighbours, lazily, with workers ---

AUGMENT_KEY = Key(1234, (3,))
EVERYTHING = LoaderSpec(
    neighborhood=Neighborhood(type="axes"),
    resampling=Resampling(step_size=0.8),
    augmentation=Augmentation(
        split_ratio=0.4, reverse_ratio=0.5, noise_gaussian_size_forward=0.1, noise_gaussian_size_loss=0.05
    ),
)
FIFTY = SamplerSpec(batch_size=2, max_batches=None)


STARTS = ((0, 18), (1, 28))
"""Epochs and the batches that some are taken from."""


def fifty_batches(lazily: bool, num_workers: int = 0, prefetch: bool = False, starts: Any = STARTS) -> list[dict]:
    dataset = open_dataset(PHANTOM, lazy=lazily, cache_size=400_000)  # one volume of two fits
    found = []
    for epoch, start_batch in starts:
        loader = epoch_batches(
            dataset,
            FIFTY,
            EVERYTHING,
            key=KEY,
            epoch=epoch,
            start_batch=start_batch,
            num_workers=num_workers,
            augment_key=AUGMENT_KEY,
        )
        found += all_bytes(Prefetched(loader) if prefetch else loader)
    return found


@pytest.fixture(scope="module")
def expected_fifty() -> list[dict]:
    found = fifty_batches(lazily=False)
    assert len(found) == 50
    assert set(found[0]) >= {"noisy_points", "noisy_targets"}
    return found


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with few cores
@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_fifty_batches_have_the_same_bytes_with_any_number_of_workers(num_workers, lazily, expected_fifty):
    assert fifty_batches(lazily, num_workers) == expected_fifty


@pytest.mark.parametrize("lazily", [False, True])
def test_fifty_batches_have_the_same_bytes_lazily_and_made_ahead_in_a_thread(lazily, expected_fifty):
    assert fifty_batches(lazily) == expected_fifty
    assert fifty_batches(lazily, prefetch=True) == expected_fifty


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches_of_an_epoch_have_the_same_bytes_where_workers_are_spawned(expected_fifty, monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert workers.process_context("").get_start_method() == "spawn"
    found = fifty_batches(True, 1, starts=STARTS[1:])
    assert len(found) >= 20
    assert found == expected_fifty[-len(found) :]


def load(dataset: StreamlineDataset, spec: LoaderSpec, ids: np.ndarray, epoch: int = 0, batch: int = 0):
    return load_batch(BatchRequest(ids, AUGMENT_KEY, epoch, batch), dataset=dataset, spec=spec)


def test_a_request_carries_the_key_of_augmentation(dataset):
    requests: Any = epoch_batches(dataset, SPEC, EVERYTHING, key=KEY, epoch=4, augment_key=AUGMENT_KEY).dataset
    assert requests[2].key == AUGMENT_KEY


def test_inputs_are_read_at_the_points_without_noise_which_the_model_and_the_targets_get_each_their_own(dataset):
    ids = np.arange(10)
    augmentation = Augmentation(noise_gaussian_size_forward=0.1, noise_gaussian_size_loss=0.05)
    clean, noisy = load(dataset, LoaderSpec(), ids), load(dataset, LoaderSpec(augmentation=augmentation), ids)
    assert torch.equal(noisy.points, clean.points)
    assert torch.equal(noisy.inputs, clean.inputs)
    assert clean.forward_points is clean.points
    assert clean.target_points is clean.points
    for points, size in ((noisy.forward_points, 0.1), (noisy.target_points, 0.05)):
        moved = points - clean.points
        assert 1.8 * size < moved.abs().max().item() < 2 * size + 1e-5
    forward = (noisy.forward_points - clean.points) / 0.1
    target = (noisy.target_points - clean.points) / 0.05
    assert abs(torch.corrcoef(torch.stack([forward.flatten(), target.flatten()]))[0, 1].item()) < 0.1


def test_one_kind_of_augmentation_does_not_change_what_another_draws(dataset):
    ids = np.arange(30)
    noise = Augmentation(noise_gaussian_size_forward=0.1)
    more = Augmentation(noise_gaussian_size_forward=0.1, noise_gaussian_size_loss=0.2, reverse_ratio=0.0)
    first, second = (load(dataset, LoaderSpec(augmentation=a), ids) for a in (noise, more))
    assert torch.equal(first.forward_points, second.forward_points)


def test_each_batch_and_epoch_is_augmented_in_its_own_way(dataset):
    ids, spec = np.arange(30), LoaderSpec(augmentation=Augmentation(reverse_ratio=0.5))
    batches = [load(dataset, spec, ids, epoch, batch).points.numpy().tobytes() for epoch in (0, 1) for batch in (0, 1)]
    assert len(set(batches)) == 4


def test_halves_keep_their_streamlines_id_and_subject_and_the_number_of_targets(dataset):
    ids = np.array([3, 50, 7, 90])
    whole = load(dataset, LoaderSpec(), ids)
    halves = load(dataset, LoaderSpec(augmentation=Augmentation(split_ratio=1.0)), ids)
    assert halves.ids.tolist() == [3, 3, 50, 50, 7, 7, 90, 90]
    assert halves.subject.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert halves.num_points == whole.num_points
    assert torch.equal(halves.inputs, whole.inputs)
    assert torch.equal(directions(halves.points, halves.offsets), directions(whole.points, whole.offsets))


def test_the_neighbours_features_follow_those_at_the_point(dataset):
    spec = LoaderSpec(neighborhood=Neighborhood(type="grid", radius=1, resolution=0.5))
    around, alone = (load(dataset, s, np.array([5, 60])) for s in (spec, LoaderSpec()))
    assert around.inputs.shape[1] == spec.num_inputs(dataset) == 27 * 6
    assert torch.equal(around.inputs[:, :6], alone.inputs)


def test_what_the_file_has_already_is_not_resampled_again(dataset):
    ids = np.arange(20)
    assert dataset.resampling == Resampling(step_size=0.5)  # as the file's attributes say
    again, other = (load(dataset, LoaderSpec(resampling=Resampling(step_size=step)), ids) for step in (0.5, 1.0))
    assert torch.equal(again.points, load(dataset, LoaderSpec(), ids).points)
    assert len(other.points) < 0.6 * len(again.points)


def test_augmentation_needs_a_key(dataset):
    with pytest.raises(ValueError, match="Expected a key in the request"):
        load_batch(BatchRequest(np.arange(3), None, 0, 0), dataset=dataset, spec=EVERYTHING)
    with pytest.raises(ValueError, match="Expected an augment_key"):
        epoch_batches(dataset, SPEC, EVERYTHING, key=KEY, epoch=0)


@pytest.mark.parametrize("resampling", [Resampling(), Resampling(step_size=1.0), Resampling(nb_points=10), None])
def test_noise_larger_than_half_a_step_warns(dataset, resampling):
    assert dataset.index.lengths_mm is not None
    mean = dataset.index.lengths_mm.mean()
    if resampling is None:  # nor has the file a step
        dataset, resampling = dataclasses.replace(dataset, resampling=Resampling()), Resampling()
        step = mean / (len(dataset.streamlines.points) / len(dataset.streamlines) - 1)
    else:
        step = {None: 0.5, 1.0: 1.0}[resampling.step_size] if resampling.nb_points is None else mean / 9
    for size, large in ((0.24 * step, False), (0.26 * step, True)):
        spec = LoaderSpec(resampling=resampling, augmentation=Augmentation(noise_gaussian_size_loss=size))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            epoch_batches(dataset, SPEC, spec, key=KEY, epoch=0, augment_key=AUGMENT_KEY)
        assert ["half a step" in str(warning.message) for warning in caught] == [True] * large


# --- voxels of several sizes ---

SIZES = torch.tensor([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [1.0, 2.0, 4.0]])
TO_MM = torch.tensor([[1.0], [2.0], [1.0]])  # points are in voxels, but in mm where voxels are no cubes


@pytest.fixture(scope="module")
def mixed() -> StreamlineDataset:
    """Three subjects whose voxels differ, one anisotropic; each has straight streamlines of 12 voxels along an axis."""
    ends = [np.eye(3)[axis] * 12 for axis in range(3)] * 3
    return StreamlineDataset(
        path=Path("mixed.hdf5"),
        subset="training",
        index=DatasetIndex(("a", "b", "c"), np.array([3, 3, 3]), np.array([12.0] * 3 + [24] * 3 + [12, 24, 48])),
        volumes=tuple(torch.zeros(14, 14, 14, 1) for _ in range(3)),
        streamlines=Streamlines.from_list([np.linspace(0, end, 7) for end in ends]),
        voxel_sizes=SIZES,
        input_attributes={},
    )


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5, 6, 7, 8], [8, 0, 5, 7, 3]])
def test_steps_are_in_mm_of_each_subjects_own_voxels_along_each_axis(mixed, order):
    batch = load(mixed, LoaderSpec(resampling=Resampling(step_size=2.0)), np.array(order))
    expected = [12 * SIZES[number // 3, number % 3].item() / 2 + 1 for number in order]
    assert batch.offsets.diff().tolist() == expected
    steps = directions(batch.points, batch.offsets) * TO_MM[batch.subject].repeat_interleave(
        batch.offsets.diff() - 1, dim=0
    )
    torch.testing.assert_close(steps.norm(dim=1), torch.full((len(steps),), 2.0))


@pytest.mark.parametrize(("size", "large"), [(0.24, False), (0.26, True)])
def test_noise_is_compared_with_the_smallest_step_in_voxels(mixed, size, large):
    # A step of 2 mm is one voxel of the largest cubes, 2 mm: noise of 0.25 voxels reaches half of it.
    spec = LoaderSpec(resampling=Resampling(step_size=2.0), augmentation=Augmentation(noise_gaussian_size_loss=size))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        epoch_batches(mixed, SPEC, spec, key=KEY, epoch=0, augment_key=AUGMENT_KEY)
    assert ["half a step of 1 voxels" in " ".join(str(w.message).split()) for w in caught] == [True] * large


@pytest.mark.parametrize(("size", "large"), [(0.49, False), (0.51, True)])
def test_noise_is_in_mm_where_voxels_are_no_cubes(mixed, size, large):
    flat = dataclasses.replace(mixed, voxel_sizes=SIZES[[2, 2, 2]])
    noise = Augmentation(noise_gaussian_size_forward=size / 2, noise_gaussian_size_loss=size)
    spec = LoaderSpec(resampling=Resampling(step_size=2.0), augmentation=noise)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        epoch_batches(flat, SPEC, spec, key=KEY, epoch=0, augment_key=AUGMENT_KEY)
    assert ["half a step of 2 mm" in " ".join(str(w.message).split()) for w in caught] == [True] * large
    batch = load_batch(BatchRequest(np.arange(9), AUGMENT_KEY, 0, 0), dataset=flat, spec=spec)
    for noisy, expected in ((batch.noisy_points, size / 2), (batch.noisy_targets, size)):
        assert noisy is not None
        moved = (noisy - batch.points).double()
        assert (moved.std(dim=0) / expected - 0.96).abs().max() < 0.15  # a normal clipped at 2 has a std of 0.96
        assert moved.abs().max() <= 2 * expected + 1e-5


def test_points_of_cubes_of_any_size_stay_in_voxels(mixed):
    cubes = dataclasses.replace(mixed, voxel_sizes=SIZES[[0, 1, 1]])
    batch = load_batch(BatchRequest(np.arange(9), None, 0, 0), dataset=cubes, spec=LoaderSpec())
    assert torch.equal(batch.points, mixed.streamlines.points)
