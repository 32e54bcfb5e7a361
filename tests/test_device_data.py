"""Claims about data on the device, on the CPU through the same code: the batches of the loader, and the same runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from experiment_cases import CONFIG, MODEL, latest_digest, trained
from torch import Tensor

from dwiml_func.core.rng import Key
from dwiml_func.data import device_data
from dwiml_func.data.augmentation import Augmentation
from dwiml_func.data.batch import StreamlineBatch
from dwiml_func.data.dataset import StreamlineDataset
from dwiml_func.data.device_data import copy_to_device, device_bytes, make_on_device, plan_batch
from dwiml_func.data.hdf5.read import open_dataset
from dwiml_func.data.loader import BatchRequest, LoaderSpec, load_batch
from dwiml_func.data.neighborhood import Neighborhood
from dwiml_func.data.prefetch import MovedAhead
from dwiml_func.data.resampling import Resampling
from dwiml_func.experiment import batches as batches_of_runs
from dwiml_func.experiment.batches import make_batches, open_data
from dwiml_func.models.config import ModelConfig

PHANTOM = Path(__file__).parent / "data" / "phantom.hdf5"
CPU = torch.device("cpu")
ALL = Augmentation(noise_gaussian_size_forward=0.1, noise_gaussian_size_loss=0.05, split_ratio=0.5, reverse_ratio=0.5)
SPECS = {
    "plain": LoaderSpec(),
    "augmented": LoaderSpec(augmentation=ALL),
    "with EOS": LoaderSpec(augmentation=ALL, add_eos=True),
    "nearest": LoaderSpec(interpolation="nearest"),
    "corner": LoaderSpec(interpolation="trilinear-corner"),
    "neighborhood": LoaderSpec(neighborhood=Neighborhood(type="axes", radius=2, resolution=0.5)),
    "nearest, neighborhood": LoaderSpec(interpolation="nearest", neighborhood=Neighborhood(type="grid")),
    "compressed": LoaderSpec(resampling=Resampling(compress=0.1)),
    "without volumes": LoaderSpec(streamlines_only=True),
}


@pytest.fixture(scope="module")
def dataset() -> StreamlineDataset:
    return open_dataset(PHANTOM)


def _ids(dataset: StreamlineDataset, seed: int = 0) -> Any:
    order = torch.randperm(dataset.index.num_total, generator=torch.Generator().manual_seed(seed))
    return order[:30].numpy()


def _both(dataset: StreamlineDataset, spec: LoaderSpec) -> tuple[StreamlineBatch, StreamlineBatch]:
    request = BatchRequest(_ids(dataset), Key(5), 2, 7)
    data = copy_to_device(dataset, spec, CPU)
    made = make_on_device(plan_batch(request, data=data, spec=spec), data=data, spec=spec)
    assert isinstance(made, StreamlineBatch)
    return made, load_batch(request, dataset=dataset, spec=spec)


def _tensors(batch: StreamlineBatch) -> dict[str, Tensor]:
    return {f.name: value for f in fields(batch) if isinstance(value := getattr(batch, f.name), Tensor)}


def _assert_equal(ours: StreamlineBatch, theirs: StreamlineBatch) -> None:
    ours_by_name, theirs_by_name = _tensors(ours), _tensors(theirs)
    assert list(ours_by_name) == list(theirs_by_name)
    for name, tensor in ours_by_name.items():
        assert (tensor.dtype, tensor.shape) == (theirs_by_name[name].dtype, theirs_by_name[name].shape)
        assert torch.equal(tensor, theirs_by_name[name]), name


@pytest.mark.parametrize("name", SPECS)
def test_a_batch_made_on_the_device_is_that_of_the_loader(dataset: StreamlineDataset, name: str) -> None:
    assert len(dataset.index.subjects) > 1
    _assert_equal(*_both(dataset, SPECS[name]))


def test_voxels_that_are_no_cubes_and_lazy_data_give_the_same_batches(dataset: StreamlineDataset) -> None:
    sizes = torch.tensor([[2.0, 2.0, 3.0], [2.0, 2.0, 2.0]])
    _assert_equal(*_both(replace(dataset, voxel_sizes=sizes), SPECS["augmented"]))
    lazy = open_dataset(PHANTOM, lazy=True)
    _assert_equal(_both(lazy, SPECS["augmented"])[0], _both(dataset, SPECS["augmented"])[1])
    assert device_bytes(lazy) == device_bytes(dataset)
    volumes: Any = dataset.volumes
    assert device_bytes(dataset) == sum(v.nbytes for v in volumes) + dataset.streamlines.points.nbytes


@pytest.mark.parametrize("resampling", [Resampling(step_size=0.7), Resampling(nb_points=23)])
def test_resampled_points_are_equal_to_rounding(
    dataset: StreamlineDataset, resampling: Resampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of subjects whose voxels differ, in several parts."""
    monkeypatch.setattr(device_data, "_CHUNK", 40)
    dataset = replace(dataset, voxel_sizes=torch.tensor([[1.0, 1.5, 1.0], [2.0, 2.0, 2.0]]))
    ours, theirs = _both(dataset, LoaderSpec(resampling=resampling, augmentation=ALL))
    assert torch.equal(ours.offsets, theirs.offsets)
    torch.testing.assert_close(ours.points, theirs.points, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.inputs, theirs.inputs, rtol=1e-4, atol=1e-4)


def test_making_a_batch_waits_for_no_device(dataset: StreamlineDataset) -> None:
    """On the device `meta`, which has shapes and no values, whatever reads one fails."""
    spec = replace(SPECS["augmented"], neighborhood=Neighborhood(type="axes"))
    sizes = torch.tensor([[2.0, 2.0, 3.0], [2.0, 2.0, 2.0]])
    data = copy_to_device(replace(dataset, voxel_sizes=sizes), spec, torch.device("meta"))
    plan = plan_batch(BatchRequest(_ids(dataset), Key(5), 0, 0), data=data, spec=spec)
    made = make_on_device(plan.to("meta"), data=data, spec=spec)
    assert isinstance(made, StreamlineBatch)
    assert (made.inputs.device.type, made.inputs.shape[1]) == ("meta", spec.num_inputs(dataset))


@pytest.mark.parametrize("shards", [1, 2])
def test_a_run_ends_in_the_same_state_with_its_data_on_the_device(tmp_path: Path, shards: int) -> None:
    batches = replace(CONFIG.batches, reverse_ratio=0.5, split_ratio=0.3, noise_gaussian_size_forward=0.1)
    model = replace(MODEL, nb_previous_dirs=1)
    training = replace(CONFIG.training, num_shards=shards, max_epochs=1, skip_window_lag=True)
    config = replace(CONFIG, batches=batches, model=model, training=training)
    ordinary = trained(tmp_path, config, "off")
    on_device = trained(tmp_path, replace(config, training=replace(training, device_data="on")), "on")
    assert latest_digest(on_device) == latest_digest(ordinary)


def test_data_are_copied_once_for_all_who_use_them_and_only_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    data, on = open_data(CONFIG), replace(CONFIG, training=replace(CONFIG.training, device_data="on"))
    for config in (CONFIG, on, on):
        train, *_ = make_batches(config, data, CPU)
        assert isinstance(train(Key(1), 0, 0), MovedAhead) == (config is on)
    assert len(data.on_device) == 1
    total = device_bytes(data.training) + device_bytes(data.validation)
    monkeypatch.setattr(batches_of_runs, "_free_bytes", lambda device: 2 * total - 1)
    with pytest.raises(ValueError, match=r"device_data: the data take .* GB that are free on cpu\. Use auto or off"):
        make_batches(on, open_data(CONFIG), CPU)
    monkeypatch.setattr(batches_of_runs, "_free_bytes", lambda device: 2 * total)
    make_batches(on, open_data(CONFIG), CPU)


def test_split_streamlines_of_an_autoencoder_are_made_on_the_host() -> None:
    model = ModelConfig(model="autoencoder")
    batches, training = (
        replace(CONFIG.batches, nb_points=40, split_ratio=0.5),
        replace(CONFIG.training, device_data="on"),
    )
    config = replace(CONFIG, model=model, batches=batches, training=training)
    with pytest.raises(ValueError, match="device_data: expected auto or off for an autoencoder with a split_ratio"):
        make_batches(config, open_data(config), CPU)


def test_batches_are_moved_one_ahead_in_order_and_an_error_comes_in_its_turn() -> None:
    moved: list[int] = []

    class Source:
        def __len__(self) -> int:
            return 4

        def __iter__(self) -> Iterable[Any]:
            yield from (1, 2, 3)
            raise ValueError("the fourth is corrupt")

    source: Any = Source()

    def make(batch: Any) -> Any:
        moved.append(batch)
        return 10 * batch

    ahead: Any = MovedAhead(source, make, CPU)
    batches = iter(ahead)
    assert len(ahead) == 4
    assert (next(batches), moved) == (10, [1, 2])
    assert (next(batches), moved) == (20, [1, 2, 3])
    with pytest.raises(ValueError, match="the fourth is corrupt"):
        list(batches)
