from __future__ import annotations

import gc
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from preloaded import run_program

from dwiml_func.data.config import DataConfig
from dwiml_func.data.hdf5 import lazy
from dwiml_func.data.hdf5.cache_size import parse_bytes
from dwiml_func.data.hdf5.lazy import LazyStreamlines, LazyVolumes
from dwiml_func.data.hdf5.read import open_dataset
from dwiml_func.data.hdf5.write import new_dataset, write_streamlines, write_volume
from dwiml_func.data.loader import BatchRequest, LoaderSpec, load_batch
from dwiml_func.experiment.batches import open_data
from dwiml_func.experiment.config import RunConfig

PHANTOM = Path(__file__).parent / "data" / "phantom.hdf5"
VOLUME_BYTES = 24**3 * 6 * 4


@pytest.fixture(autouse=True)
def fresh_store(monkeypatch: pytest.MonkeyPatch) -> lazy._ProcessStore:
    store = lazy._ProcessStore()
    monkeypatch.setattr(lazy, "_store", store)
    return store


@pytest.fixture
def edited(tmp_path: Path) -> Path:
    return Path(shutil.copy(PHANTOM, tmp_path / "edited.hdf5"))


def test_a_lazy_dataset_says_and_gives_the_same_as_one_in_memory():
    there, here = open_dataset(PHANTOM, lazy=True), open_dataset(PHANTOM)
    assert isinstance(there.streamlines, LazyStreamlines)
    assert isinstance(there.volumes, LazyVolumes)
    assert there.index.subjects == here.index.subjects
    assert there.index.num_streamlines.tolist() == here.index.num_streamlines.tolist()
    assert there.index.lengths_mm is not None
    assert here.index.lengths_mm is not None
    assert np.array_equal(there.index.lengths_mm, here.index.lengths_mm)
    assert there.num_features == here.num_features == 6
    assert there.resampling == here.resampling
    assert len(there.streamlines) == len(here.streamlines)
    assert torch.equal(there.streamlines.lengths, here.streamlines.lengths)
    assert torch.equal(there.streamlines.offsets, here.streamlines.offsets)
    assert torch.equal(there.streamlines.points, here.streamlines.points)
    assert all(map(torch.equal, there.streamlines.to_list(), here.streamlines.to_list()))
    assert len(there.volumes) == 2
    assert all(map(torch.equal, there.volumes, here.volumes))


def test_a_user_block_before_the_data_moves_no_point(tmp_path):
    path = tmp_path / "block.hdf5"
    with h5py.File(PHANTOM) as source, h5py.File(path, "w", userblock_size=1024) as file:
        file.attrs.update(source.attrs)
        for name in source:
            source.copy(name, file)
    assert torch.equal(open_dataset(path, lazy=True).streamlines.points, open_dataset(PHANTOM).streamlines.points)


def test_the_lengths_in_mm_are_those_of_the_points():
    dataset = open_dataset(PHANTOM)
    lengths = [line.diff(dim=0).norm(dim=1).sum().item() for line in dataset.streamlines.to_list()]  # voxels of 1 mm
    assert dataset.index.lengths_mm is not None
    np.testing.assert_allclose(dataset.index.lengths_mm, lengths, rtol=1e-4)


def test_opening_reads_neither_points_nor_volumes(fresh_store):
    dataset = open_dataset(PHANTOM, lazy=True)
    assert dataset.num_features == 6
    assert not fresh_store.files
    assert not fresh_store.volumes


def test_any_order_may_be_asked_for_and_a_streamline_may_come_twice():
    ids = np.array([95, 0, 48, 47, 0, 12])
    found, expected = (open_dataset(PHANTOM, lazy=lazily).streamlines.select(ids) for lazily in (True, False))
    assert torch.equal(found.points, expected.points)
    assert torch.equal(found.offsets, expected.offsets)
    assert len(open_dataset(PHANTOM, lazy=True).streamlines.select([])) == 0
    for number in (96, -1):
        with pytest.raises(IndexError):
            open_dataset(PHANTOM, lazy=True).streamlines.select([number])


def test_points_that_are_not_finite_are_refused_when_they_are_read_and_only_then(edited):
    with h5py.File(edited, "r+") as file:
        group: Any = file["subj1/streamlines"]
        for streamline in (7, 9):
            group["data"][group["offsets"][streamline], 1] = np.nan
    lines = open_dataset(edited, lazy=True).streamlines
    assert len(lines.select([0, 48 + 8])) == 2
    with pytest.raises(ValueError, match=r"subject 'subj1', .* 1 of 48 streamlines have NaN .* number 9 "):
        lines.select([3, 48 + 9, 48 + 8])


def test_of_any_subject_the_streamline_is_told_by_its_own_number(edited):
    with h5py.File(edited, "r+") as file:
        file.attrs["training_subjs"] = ["subj0", "subj1", "subj2"]
        del file.attrs["validation_subjs"]
        group: Any = file["subj2/streamlines"]
        group["data"][group["offsets"][5], 1] = np.inf
    with pytest.raises(ValueError, match=r"subject 'subj2', .* 1 of 48 streamlines have NaN .* number 5 "):
        open_dataset(edited, lazy=True).streamlines.select([3, 96 + 5, 48 + 8])


def test_a_volume_that_is_not_finite_is_refused_when_it_is_read_and_only_then(edited):
    with h5py.File(edited, "r+") as file:
        contents: Any = file
        contents["subj1/input/data"][3, 4, 5, :2] = np.inf
    volumes = open_dataset(edited, lazy=True).volumes
    assert volumes[0].isfinite().all()
    with pytest.raises(ValueError, match=r"subject 'subj1', .* 2 of 82944 values are NaN or infinite"):
        volumes[1]


def test_numbers_of_another_kind_are_read_as_in_memory(edited):
    with h5py.File(edited, "r+") as file:
        for name in ("subj0/streamlines/data", "subj0/input/data"):
            contents: Any = file
            data = contents[name][()].astype(np.float64) / 3
            del file[name]
            file.create_dataset(name, data=data, chunks=True, compression=1)
    there, here = open_dataset(edited, lazy=True), open_dataset(edited)
    assert torch.equal(there.streamlines.points, here.streamlines.points)
    assert torch.equal(there.volumes[0], here.volumes[0])


@pytest.mark.parametrize("rest", [0, 7, VOLUME_BYTES - 1])
def test_the_cache_keeps_the_volumes_used_last_within_its_bytes(fresh_store, rest):
    size = 2 * VOLUME_BYTES + rest
    subsets = [open_dataset(PHANTOM, subset, lazy=True, cache_size=size) for subset in ("training", "validation")]
    training, validation = subsets[0].volumes, subsets[1].volumes
    kept = [training[0], training[1]]
    assert training[0] is kept[0]
    assert validation[0].shape == (24, 24, 24, 6)  # training[1] has to go: all datasets share the bytes
    assert sum(volume.nbytes for volume in fresh_store.volumes.values()) == 2 * VOLUME_BYTES
    assert training[0] is kept[0]
    assert training[1] is not kept[1]
    assert torch.equal(training[1], kept[1])


def test_a_volume_larger_than_the_cache_is_read_each_time_and_not_kept(fresh_store):
    config = RunConfig(hdf5_file=str(PHANTOM), data=DataConfig(lazy=True, cache_size="0"))
    for dataset in (open_dataset(PHANTOM, lazy=True, cache_size=VOLUME_BYTES - 1), open_data(config).training):
        assert dataset.volumes[0] is not dataset.volumes[0]
        assert torch.equal(dataset.volumes[0], open_dataset(PHANTOM).volumes[0])
    assert not fresh_store.volumes


def test_a_process_holds_few_open_files(tmp_path, fresh_store):
    datasets = []
    for number in range(10):
        path = Path(shutil.copy(PHANTOM, tmp_path / f"{number}.hdf5"))
        datasets.append(open_dataset(path, lazy=True))
    for dataset in [*datasets, *datasets]:
        assert len(dataset.streamlines.select([1])) == 1
        assert len(fresh_store.files) <= 8
    assert [version.path.stem for version in fresh_store.files] == [str(number) for number in range(2, 10)]
    datasets[3].streamlines.select([1])
    datasets[0].streamlines.select([1])  # the file used longest ago is closed
    assert [version.path.stem for version in fresh_store.files] == ["4", "5", "6", "7", "8", "9", "3", "0"]


def test_a_file_that_ends_before_its_points_is_corrupt(edited):
    points = np.zeros((3, 3), np.float32)
    with h5py.File(edited) as file:
        read = lazy._byte_reader(file, edited.stat().st_size - 24, points)
        read(0, 2, 1)
        with pytest.raises(ValueError, match=r"truncated or corrupt: .*the file ends before its points"):
            read(0, 3, 0)


def test_a_pickle_is_small_and_opens_the_file_itself(fresh_store):
    dataset = open_dataset(PHANTOM, lazy=True)
    points, volume = dataset.streamlines.points, dataset.volumes[0]
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 10_000
    fresh_store.files.clear()
    fresh_store.volumes.clear()
    fresh_store.volume_bytes = 0
    back = pickle.loads(pickled)
    assert torch.equal(back.streamlines.points, points)
    assert torch.equal(back.volumes[0], volume)


def _first_bytes(dataset: Any) -> bytes:
    assert not lazy._store.files  # the parent's handle is not the child's
    gc.collect()
    inherited = [file for store in lazy._inherited for file in store.files.values()]
    assert inherited  # kept, as HDF5 closes a handle that is let go
    assert all(inherited)
    return dataset.streamlines.select([0]).points.numpy().tobytes() + dataset.volumes[0][0, 0].numpy().tobytes()


FORKING = """
import multiprocessing, sys
sys.path.insert(0, sys.argv[2])
from dwiml_func.data.hdf5.read import open_dataset
from test_lazy import _first_bytes

dataset = open_dataset(sys.argv[1], lazy=True)
expected = dataset.streamlines.select([0]).points.numpy().tobytes() + dataset.volumes[0][0, 0].numpy().tobytes()
with multiprocessing.get_context("fork").Pool(1) as pool:
    assert pool.apply(_first_bytes, (dataset,)) == expected
assert dataset.streamlines.select([0]).points.numpy().tobytes() == expected[: -6 * 24 * 4]
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_opens_the_file_itself():
    # In a process of its own: where an earlier test has loaded JAX, every fork warns.
    run_program(FORKING, PHANTOM, Path(__file__).parent)


def replace_by_a_copy(path: Path) -> None:
    shutil.copy2(path, path.with_name("other.hdf5"))
    os.replace(path.with_name("other.hdf5"), path)


def append_a_byte(path: Path) -> None:
    before = path.stat()
    path.write_bytes(path.read_bytes() + b"x")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [replace_by_a_copy, append_a_byte, lambda path: os.utime(path, ns=(1, 1))])
def test_a_file_that_was_replaced_or_changed_is_refused(edited, change):
    dataset = open_dataset(edited, lazy=True)
    change(edited)
    with pytest.raises(ValueError, match=f"has changed since it was opened: {re.escape(str(edited))}"):
        dataset.streamlines.select([0])


def test_batches_that_need_more_volumes_than_the_cache_holds_have_the_same_bytes():
    request = BatchRequest(np.array([90, 3, 48, 47]), None, 0, 0)
    found, expected = (
        load_batch(request, dataset=dataset, spec=LoaderSpec())
        for dataset in (open_dataset(PHANTOM, lazy=True, cache_size=0), open_dataset(PHANTOM))
    )
    assert torch.equal(found.inputs, expected.inputs)
    assert torch.equal(found.points, expected.points)


MANY = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from dwiml_func.data import LoaderSpec, SamplerSpec, epoch_batches, open_dataset
from dwiml_func.core.rng import Key
if __name__ == "__main__":
    dataset = open_dataset(sys.argv[1], lazy=True)
    for num_workers in (0, 1):
        loader = epoch_batches(
            dataset, SamplerSpec(batch_size=200), LoaderSpec(), key=Key(1), epoch=0, num_workers=num_workers
        )
        print(len(dataset.index.subjects), sum(len(batch) for batch in loader))
"""


@pytest.mark.soak
def test_three_hundred_subjects_work_with_64_open_files(tmp_path):
    path, names = tmp_path / "many.hdf5", [f"s{number:04}" for number in range(300)]
    with new_dataset(path, training=names, groups_config={}, date="today") as file:
        points, offsets = np.linspace(0.1, 1.9, 15).reshape(5, 3), np.array([0, 3, 5])
        for number, name in enumerate(names):
            subject = file.create_group(name)
            write_volume(subject, "input", np.full((2, 2, 2, 1), number), np.eye(4))
            lines = points * (1 - number / 1000)
            write_streamlines(subject, "streamlines", lines, offsets, affine=np.eye(4), dimensions=(2, 2, 2))
    assert run_program(MANY, path).splitlines() == ["300 600"] * 2


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GB", 2 * 10**9),
        ("500 mb", 5 * 10**8),
        ("1.5GiB", 3 * 2**29),
        ("1000000", 10**6),
        (7, 7),
        ("0", 0),
        ("3000000B", 3 * 10**6),
    ],
)
def test_sizes_are_read_with_their_units(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["4", "0.5", "999kB"])
def test_a_cache_that_holds_no_volume_is_refused_with_what_the_option_of_dwi_ml_means(text):
    with pytest.raises(
        ValueError, match=rf"expected at least 1MB, received '{text}'\. .*dwi_ml's option.*counts volumes"
    ):
        parse_bytes(text)
    with pytest.raises(ValueError, match="expected at least 1MB"):
        DataConfig(cache_size=text)


@pytest.mark.parametrize("text", ["", "GB", "2XB", "-1GB", "two", "1e9", -1])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match=r"^cache_size: .* Received: "):
        parse_bytes(text)


def test_a_training_subject_that_is_not_in_the_file_is_nothing_to_other_subsets(tmp_path):
    path = Path(shutil.copy(PHANTOM, tmp_path / "a.hdf5"))
    with h5py.File(path, "r+") as file:
        file.attrs["training_subjs"] = ["gone", "subj1"]
    assert open_dataset(path, "validation").index.subjects == ("subj2",)
