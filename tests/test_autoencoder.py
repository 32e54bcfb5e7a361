"""The autoencoder: torch's own layers are the truth; from the command line to mm, figures and dwi_ml's files."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from experiment_cases import PHANTOM, latest_digest, trained
from torch import Tensor

from dwiml_func.checkpoint.checkpoint import newest
from dwiml_func.core.gradients import value_and_grad
from dwiml_func.core.loss import module_loss
from dwiml_func.core.rng import Key
from dwiml_func.data.augmentation import Augmentation
from dwiml_func.data.config import BatchConfig, DataConfig
from dwiml_func.data.hdf5.read import open_dataset
from dwiml_func.data.loader import BatchRequest, LoaderSpec, load_batch
from dwiml_func.data.resampling import Resampling
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.folder import create_experiment
from dwiml_func.experiment.model_store import load_model
from dwiml_func.experiment.resume import resume_experiment
from dwiml_func.experiment.run import run_experiment
from dwiml_func.experiment.setup import prepare
from dwiml_func.experiment.signals import StopRequest, TrainingStopped
from dwiml_func.experiment.training_config import TrainingConfig
from dwiml_func.models.autoencoder.autoencoder import Autoencoder, compute_reconstruction_loss
from dwiml_func.models.config import ModelConfig

N = 40
MODEL = ModelConfig(model="autoencoder", latent_space_dims=4, first_channels=2)
BATCHES = BatchConfig(
    batch_size_training=20,
    nb_points=N,
    noise_gaussian_size_forward=0.5,
    noise_gaussian_size_loss=0.1,
    split_ratio=0.3,
    reverse_ratio=0.5,
)
CONFIG = RunConfig(hdf5_file=str(PHANTOM), model=MODEL, batches=BATCHES, training=TrainingConfig(max_epochs=2))
OPTIONS = ("--model", "autoencoder", "--latent-space-dims", 4, "--first-channels", 2, "--nb-points", N)


class TorchModules(torch.nn.Module):
    """The model of dwi_ml's paper from torch's modules, for streamlines of 256 points, with dwi_ml's names."""

    def __init__(self, channels: int, latent: int) -> None:
        super().__init__()
        sizes = [3, *(channels * 2**number for number in range(6))]
        self.fc1 = torch.nn.Linear(sizes[-1] * 8, latent)
        self.fc2 = torch.nn.Linear(latent, sizes[-1] * 8)
        for number in range(6):
            stride = 1 if number == 5 else 2
            down = torch.nn.Conv1d(sizes[number], sizes[number + 1], 3, stride=stride)
            up = torch.nn.Conv1d(sizes[6 - number], sizes[5 - number], 3)
            for name, layer in ((f"encod_conv{number + 1}", down), (f"decod_conv{number + 1}", up)):
                self.add_module(name, torch.nn.Sequential(torch.nn.ReflectionPad1d(1), layer))
        self.upsample = torch.nn.Upsample(scale_factor=2, mode="linear", align_corners=False)

    def forward(self, points: Tensor) -> Tensor:
        x = points.transpose(1, 2)
        for number in range(1, 7):
            x = self.get_submodule(f"encod_conv{number}")(x)
            x = torch.nn.functional.relu(x) if number < 6 else x
        x = self.fc2(self.fc1(x.flatten(1))).reshape(len(points), -1, 8)
        for number in range(1, 6):
            x = self.upsample(torch.nn.functional.relu(self.get_submodule(f"decod_conv{number}")(x)))
        return self.get_submodule("decod_conv6")(x).transpose(1, 2)


def _model(num: int, **options: Any) -> Autoencoder:
    torch.manual_seed(num)
    return Autoencoder(num, **{"latent_space_dims": 5, "first_channels": 2, **options})


def _points(num: int, size: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(num)
    return torch.randn(size, num, 3, generator=generator, dtype=torch.float64).cumsum(1)


def test_outputs_loss_and_gradients_are_those_of_torchs_own_modules() -> None:
    model = _model(256, raw_coordinates=True, reconstruction_loss="sum").double()
    theirs, points = TorchModules(2, 5).double(), _points(256)
    theirs.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.decode(model.encode(points)), theirs(points), rtol=1e-10, atol=1e-10)
    loss, weight, aux = compute_reconstruction_loss(model, _batch(points))
    expected = torch.nn.MSELoss(reduction="sum")(theirs(points), points)
    assert weight == 1
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    distances = (theirs(points) - points).norm(dim=2)
    assert aux["reconstruction_error"][0].item() == pytest.approx(distances.mean().item(), rel=1e-10)
    for own, other in ((loss, model), (expected, theirs)):
        own.backward()
        assert all(parameter.grad is not None for parameter in other.parameters())
    named = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, named[name].grad, rtol=1e-8, atol=1e-8)


def _batch(points: Tensor) -> Any:
    from dwiml_func.data.batch import StreamlineBatch

    size, num = points.shape[:2]
    zeros, inputs = torch.zeros(size, dtype=torch.int64), torch.zeros(size * num, 0, dtype=points.dtype)
    offsets = torch.arange(size + 1) * num
    return StreamlineBatch(points=points.flatten(0, 1), offsets=offsets, subject=zeros, ids=zeros, inputs=inputs)


@pytest.mark.parametrize("num", [33, 100, 257])
def test_streamlines_of_any_fixed_number_of_points_are_encoded_and_decoded(num: int) -> None:
    model, points = _model(num).double(), _points(num)
    model.standardize(points.flatten(0, 1))
    latent = model.encode(points)
    assert latent.shape == (3, 5)
    assert model.decode(latent).shape == points.shape
    assert model(_batch(points)).tolist() == model.decode(latent).flatten(0, 1).tolist()
    with pytest.raises(ValueError, match=f"Expected streamlines of {num} points"):
        model.encode(points[:, 1:])


def test_gradients_are_those_of_finite_differences_and_the_loss_is_a_mean_over_points() -> None:
    model, points = _model(33, first_channels=1, latent_space_dims=2).double(), _points(33, 2)
    model.standardize(points.flatten(0, 1))
    batch, loss_fn = _batch(points), module_loss(model, compute_reconstruction_loss)
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    out, gradient = value_and_grad(loss_fn, params, buffers, batch, key=Key(0))
    assert out.weight == 66
    with torch.no_grad():
        distances = (model.decode(model.encode(points)) - points).norm(dim=2)
    assert out.loss.item() == pytest.approx(distances.square().mean().item(), rel=1e-12)
    for name in params:
        direction = torch.randn_like(params[name], generator=torch.Generator().manual_seed(1))
        values = [
            loss_fn({**params, name: params[name].detach() + shift * direction}, buffers, batch, key=Key(0), train=True)
            for shift in (-1e-6, 1e-6)
        ]
        slope = (values[1].loss - values[0].loss).item() / 2e-6
        assert (gradient[name] * direction).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-7)


def test_standardised_coordinates_do_not_depend_on_where_the_streamlines_are() -> None:
    model, points = _model(N).double(), _points(N)
    raw = _model(N, raw_coordinates=True).double()
    torch.testing.assert_close(model.encode(points), raw.encode(points), rtol=0, atol=0)  # until it is told where
    model.standardize(points.flatten(0, 1))
    at_home = model.encode(points)
    model.standardize(points.flatten(0, 1) * 3 + 50)
    torch.testing.assert_close(model.encode(points * 3 + 50), at_home, rtol=1e-9, atol=1e-9)
    flat = points.flatten(0, 1)
    model.standardize(flat)
    assert model.center.tolist() == pytest.approx(flat.mean(0).tolist())
    deviation = (flat - flat.mean(0)).flatten().std(correction=0)  # of all coordinates together
    assert model.scale.item() == pytest.approx(deviation.item())
    model.standardize(torch.full((5, 3), 7.0))
    assert (model.center.tolist(), model.scale.item()) == ([7.0] * 3, 1.0)


def test_augmentation_acts_and_every_streamline_keeps_its_number_of_points() -> None:
    dataset = open_dataset(PHANTOM, "training")
    spec = LoaderSpec(resampling=Resampling(nb_points=N), streamlines_only=True)
    request = BatchRequest(np.arange(12), Key(3), 0, 0)
    plain = load_batch(request, dataset=dataset, spec=spec)
    assert plain.inputs.shape == (12 * N, 0)
    assert plain.offsets.tolist() == [N * number for number in range(13)]
    split = load_batch(request, dataset=dataset, spec=replace(spec, augmentation=Augmentation(split_ratio=0.5)))
    assert len(split) == 18
    assert set(split.offsets.diff().tolist()) == {N}
    whole, halves = plain.points.unflatten(0, (-1, N)), split.points.unflatten(0, (-1, N))
    for number, line in enumerate(whole):
        own = halves[split.ids == number]
        if len(own) == 1:
            assert torch.equal(own[0], line)
        else:  # from the first point to the cut, and on to the last
            ends = own[:, [0, -1]]
            assert torch.equal(ends[0, 0], line[0])
            assert torch.equal(ends[0, 1], ends[1, 0])
            assert torch.equal(ends[1, 1], line[-1])
    flat = replace(dataset, voxel_sizes=torch.tensor([[1.0, 1.0, 1.0], [1.0, 4.0, 1.0]]))
    halves = load_batch(
        request._replace(ids=np.arange(44, 56)),
        dataset=flat,
        spec=replace(spec, augmentation=Augmentation(split_ratio=0.8)),
    )
    assert len(halves) > 18
    for line in halves.points.unflatten(0, (-1, N)).double():  # in mm, as one subject's voxels are no cubes
        steps = line.diff(dim=0).norm(dim=1)
        assert (steps / steps.mean() - 1).abs().mean() < 0.03  # where corners are cut, steps are shorter
    noise = Augmentation(noise_gaussian_size_forward=1.0, noise_gaussian_size_loss=0.5)
    noisy = load_batch(request, dataset=dataset, spec=replace(spec, augmentation=noise))
    model = _model(N)
    seen = model(noisy)
    assert torch.equal(seen, model(replace(plain, points=noisy.forward_points)))
    assert not torch.equal(noisy.target_points, plain.points)
    expected = (seen - noisy.target_points).square().sum(1).mean()
    assert compute_reconstruction_loss(model, noisy)[0].item() == pytest.approx(expected.item(), rel=1e-6)


def test_workers_shards_and_a_stop_within_an_epoch_change_no_bit(tmp_path: Path) -> None:
    whole = trained(tmp_path, CONFIG, "whole")
    workers = replace(CONFIG, batches=replace(BATCHES, processes=2))
    assert latest_digest(trained(tmp_path, workers, "workers")) == latest_digest(whole)
    parts, stop = prepare(CONFIG), StopRequest()
    directory = create_experiment(tmp_path, "stopped", CONFIG)

    def after_batch(state: Any, _: Any) -> None:
        if (state.epoch, state.batch) == (1, 2):
            stop.signal = signal.SIGTERM

    with pytest.raises(TrainingStopped):
        list(run_experiment(directory, parts, on_batch=after_batch, stop=stop))
    checkpoint = newest(directory)
    assert checkpoint is not None
    assert (checkpoint.state.epoch, checkpoint.state.batch) == (1, 2)
    parts, state, history = resume_experiment(directory)
    list(run_experiment(directory, parts, state=state, history=history))
    assert latest_digest(directory) == latest_digest(whole)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dwiml_func.cli.main import main

    folder = tmp_path_factory.mktemp("autoencoder")
    options = [*OPTIONS, "--max-epochs", 2, "--batch-size-training", 20, "--reverse-ratio", 0.5]
    assert main(["train", str(folder), "run", str(PHANTOM), *map(str, options)]) == 0
    return folder / "run"


def test_the_evaluation_is_in_mm_beside_the_mean_streamline_and_principal_components(cli, run: Path) -> None:
    recorded = json.loads((run / "evaluation.json").read_bytes())
    model = load_model(run / "best_model").module
    assert isinstance(model, Autoencoder)
    points = {}
    for subset in ("training", "validation"):
        dataset = open_dataset(PHANTOM, subset)
        request = BatchRequest(np.arange(dataset.index.num_total), None, 0, 0)
        spec = LoaderSpec(resampling=Resampling(nb_points=N), streamlines_only=True)
        points[subset] = load_batch(request, dataset=dataset, spec=spec).points.unflatten(0, (-1, N)).numpy()
    voxel = float(open_dataset(PHANTOM, "validation").voxel_sizes[0, 0])
    real, training = points["validation"], points["training"].astype(np.float64)
    with torch.no_grad():
        reconstructed = model.decode(model.encode(torch.from_numpy(real))).numpy()
    distances = np.linalg.norm((reconstructed - real) * voxel, axis=2)
    assert recorded["model"] == pytest.approx(distances.mean(), rel=1e-5)
    assert recorded["median"] == pytest.approx(np.median(distances.mean(axis=1)), rel=1e-5)
    mean = training.mean(axis=0)
    flat = (training - mean).reshape(len(training), -1)
    axes = np.linalg.eigh(flat.T @ flat)[1][:, -4:]
    projected = ((real - mean).reshape(len(real), -1) @ axes @ axes.T).reshape(real.shape) + mean
    for name, other in (("mean_streamline", mean), ("principal_components", projected)):
        expected = np.linalg.norm((other - real) * voxel, axis=2).mean()
        assert recorded[name] == pytest.approx(expected, rel=1e-5)
    assert (recorded["num_components"], recorded["num_streamlines"]) == (4, len(real))
    outcome = cli("evaluate", run, "--json")
    assert outcome.code == 0
    assert json.loads(outcome.out)["model"] == pytest.approx(recorded["model"], rel=1e-5)
    assert f"{recorded['model']:.2f} mm" in cli("evaluate", run).out


def test_a_run_leaves_its_figures_and_can_be_verified(cli, run: Path) -> None:
    for name in ("latent_space", "reconstructions", "training"):
        assert (run / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    outcome = cli("verify", run)
    assert outcome.code == 0, outcome.err


def test_an_autoencoder_says_that_it_does_not_track_and_is_refused_where_lines_are_tracked(cli, run, tmp_path) -> None:
    again = cli("train", run.parent, "second", PHANTOM, *OPTIONS, "--max-epochs", 1, "--batch-size-training", 96)
    assert "An autoencoder does not track: no window lag, no tracking scores" in again.out
    assert "window lag " not in again.out.partition("\n")[2]
    outcome = cli("track", run, PHANTOM, tmp_path / "lines.tck", "--subject", "subj2", "--nt", 2)
    outcome.check_refusal("Expected a model that tracks. Received: an autoencoder")
    assert not (tmp_path / "lines.tck").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"rnn_key": "gru"}}, "rnn_key: requires --model learn2track, received autoencoder"),
        ({"model": {"nheads": 2}}, "nheads: requires --model a transformer, received autoencoder"),
        ({"model": {"dg_key": "gaussian"}}, "dg_key: requires --model that tracks, received autoencoder"),
        ({"model": {"add_eos": True}}, "add_eos: requires --model that tracks, received autoencoder"),
        ({"model": {"latent_space_dims": 0}}, "latent_space_dims: expected a finite number at least 1"),
        ({"model": {"model": "learn2track", "first_channels": 3}}, "first_channels, latent_space_dims: requires"),
        ({"batches": {"nb_points": 32}}, "nb_points: expected a finite number at least 33 .*, received 32"),
        ({"batches": {"nb_points": None, "step_size": 1.0}}, "step_size: an autoencoder reads streamlines of one"),
        ({"data": {"interpolation": "nearest"}}, "interpolation: requires a --model that reads the input volume"),
        ({"training": {"tracking_mask": "wm"}}, "tracking_mask: an autoencoder does not track"),
        ({"training": {"monitor": "tracking_window_lag"}}, "monitor tracking_window_lag: an autoencoder does not"),
        ({"model": {"reconstruction_loss": "sum"}, "training": {"num_shards": 2}}, "expected mean, received sum"),
    ],
)
def test_options_that_it_does_not_have_are_refused(changes: dict[str, Any], message: str) -> None:
    parts: dict[str, Any] = {"model": MODEL, "batches": BATCHES, "data": DataConfig(), "training": TrainingConfig()}
    with pytest.raises(ValueError, match=message):
        RunConfig(hdf5_file="", **{name: replace(part, **changes.get(name, {})) for name, part in parts.items()})


def test_the_number_of_points_is_256_where_none_is_given() -> None:
    assert RunConfig(hdf5_file="", model=MODEL).batches.nb_points == 256
    assert CONFIG.batches.nb_points == N


def test_models_come_from_dwi_ml_and_go_back_with_standardisation_folded_in(cli, tmp_path: Path) -> None:
    theirs, points = TorchModules(32, 32), _points(256).float() + 40
    folder = tmp_path / "theirs"
    folder.mkdir()
    torch.save(theirs.state_dict(), folder / "model_state.pkl")
    parameters = {"experiment_name": "a", "step_size": None, "compress_lines": None, "nb_points": None}
    (folder / "parameters.json").write_text(json.dumps(parameters))
    (folder / "model_type.txt").write_text("ModelAE")
    assert cli("import-dwi-ml", folder, tmp_path / "ours").code == 0
    ours = load_model(tmp_path / "ours").module
    assert isinstance(ours, Autoencoder)
    with torch.no_grad():
        torch.testing.assert_close(ours.decode(ours.encode(points)), theirs(points), rtol=1e-5, atol=1e-4)
    assert cli("export-dwi-ml", tmp_path / "ours", tmp_path / "back").code == 0
    assert json.loads((tmp_path / "back" / "parameters.json").read_bytes()) == parameters
    back = torch.load(tmp_path / "back" / "model_state.pkl", weights_only=True)
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(tensor, back[name]) for name, tensor in theirs.state_dict().items())
    size = ("--latent-space-dims", 32, "--first-channels", 32, "--nb-points", 256)
    options = ("--max-epochs", 1, "--max-batches-per-epoch-training", 1, "--batch-size-training", 4)
    outcome = cli("train", tmp_path, "run", PHANTOM, "--model", "autoencoder", *size, *options)
    assert outcome.code == 0, outcome.err
    assert cli("export-dwi-ml", tmp_path / "run", tmp_path / "exported").code == 0
    standardised = load_model(tmp_path / "run" / "best_model").module
    assert isinstance(standardised, Autoencoder)
    assert standardised.center.abs().sum() > 1
    exported = torch.load(tmp_path / "exported" / "model_state.pkl", weights_only=True)
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32}
    theirs.load_state_dict(exported)
    with torch.no_grad():
        expected = standardised.decode(standardised.encode(points))
        torch.testing.assert_close(theirs(points), expected, rtol=1e-4, atol=1e-3)


def test_a_size_that_dwi_ml_does_not_have_is_not_exported(cli, run: Path, tmp_path: Path) -> None:
    outcome = cli("export-dwi-ml", run, tmp_path / "exported")
    outcome.check_refusal("dwi_ml's autoencoder has one size", "nb_points 40, latent_space_dims 4, first_channels 2")


def test_ensembles_compiled_steps_and_bf16_train_it(cli, tmp_path: Path) -> None:
    short = (*OPTIONS, "--max-epochs", 1, "--batch-size-training", 48, "--skip-figures")
    alone = cli("train", tmp_path, "alone", PHANTOM, *short)
    outcome = cli("train", tmp_path, "both", PHANTOM, *short, "--num-models", 2)
    assert outcome.code == 0, outcome.err
    errors = {}
    for name, options in {"bf16": ("--precision", "bf16"), "shards": ("--num-shards", 2)}.items():
        assert cli("train", tmp_path, name, PHANTOM, *short, *options).code == 0
        errors[name] = json.loads((tmp_path / name / "evaluation.json").read_bytes())["model"]
    errors["both"] = json.loads(cli("evaluate", tmp_path / "both" / "0", "--json").out)["model"]
    first = json.loads((tmp_path / "alone" / "evaluation.json").read_bytes())["model"]
    assert alone.code == 0
    assert errors == {name: pytest.approx(first, rel=0.02) for name in errors}
