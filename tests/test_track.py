"""`dwiml-func track`, on an experiment with the phantom."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import zipfile
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.affines import apply_affine
from preloaded import finished, start_program

from dwiml_func.cli._tracking import header_facts, with_progress
from dwiml_func.cli.track import Options, _device
from dwiml_func.core.rng import Key
from dwiml_func.data.creation.files import SingleFile
from dwiml_func.data.creation.volumes import load_volume
from dwiml_func.data.grid import Grid
from dwiml_func.data.streamlines import Streamlines
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.model_store import LoadedModel, find_model, load_model
from dwiml_func.experiment.tracking.input import TrackingInput, read_dataset_input, read_nifti_input
from dwiml_func.experiment.training_facts import check_same_kind, volume_facts
from dwiml_func.models import Learn2Track
from dwiml_func.tracking.track import Tracked

LOADERS: Any = nib.streamlines
PHANTOM = Path(__file__).parent / "data" / "phantom.hdf5"
OBLIQUE = np.eye(4)  # turned by 20 degrees, and moved
OBLIQUE[:2, :2] = [[np.cos(0.35), -np.sin(0.35)], [np.sin(0.35), np.cos(0.35)]]
OBLIQUE[:3, 3] = 5, -3, 2


@pytest.fixture(scope="module")
def model(stopped_early: Path) -> Path:
    return stopped_early / "run"


@pytest.fixture(scope="module")
def data(stopped_early: Path) -> Path:
    return stopped_early.parent / "data.hdf5"


@pytest.fixture
def track(cli, model, data, tmp_path):
    """Track in subj2 and read the file; options replace those of the same name."""

    def run(*arguments: object, name: str = "a.trk", nt: int | None = 30, mask: bool = True):
        options: list[object] = ["--subject", "subj2", "--min-length", 2, "--max-length", 20, "--theta", 180]
        options += ["--nt", nt] if nt is not None else []
        options += ["--tracking-mask-group", "wm_mask"] if mask else []
        result = cli("track", model, data, tmp_path / name, *options, *arguments)
        assert result.code == 0, result.err
        return LOADERS.load(tmp_path / name)

    return run


def lines(file) -> list[bytes]:
    return [np.asarray(line).tobytes() for line in file.streamlines]


def steps(file) -> np.ndarray:
    return np.concatenate([np.linalg.norm(np.diff(line, axis=0), axis=1) for line in file.streamlines])


def test_it_writes_lines_and_says_how_many(cli, model, data, tmp_path):
    options = ("--subject", "subj2", "--tracking-mask-group", "wm_mask", "--nt", 40, "--min-length", 1, "--theta", 180)
    result = cli("track", model, data, tmp_path / "new" / "a.trk", *options)
    assert result.code == 0
    file = LOADERS.load(tmp_path / "new" / "a.trk")
    assert len(file.streamlines) > 10
    mean = np.mean([np.linalg.norm(np.diff(line, axis=0), axis=1).sum() for line in file.streamlines])
    assert f"{len(file.streamlines)} streamlines of 40 seeds, mean length {mean:.1f} mm;" in result.out
    assert not result.err
    np.testing.assert_allclose(steps(file), 0.5, rtol=1e-4)  # the step of the data that it was trained on


def test_what_is_asked_for_reaches_the_tracking_and_lengths_are_in_mm(cli, model, data, tmp_path, monkeypatch):
    loaded = load_model(find_model(model))
    around: Any = {"neighborhood_type": "axes", "neighborhood_radius": 1, "neighborhood_resolution": 1.0}
    config = replace(loaded.config, data=replace(loaded.config.data, **around))
    mask, volume = torch.ones(4, 4, 4), torch.rand(4, 4, 4, 6)
    found = TrackingInput(volume, Grid(np.diag([2.0, 2.0, 2.0, 1.0]), (4, 4, 4)), None, mask, "data")
    asked: dict[str, Any] = {}

    def tracked(seeds, **given):
        asked.update(given, seeds=seeds)
        yield Tracked(torch.tensor([7, 9]), Streamlines.from_list([[[0, 0, 0], [0, 1, 0], [0, 1, 1]], [[1, 1, 1]]]), 4)

    for name, value in (("load_model", lambda _: replace(loaded, config=config)), ("track_in_processes", tracked)):
        monkeypatch.setattr(f"dwiml_func.cli.track.{name}", value)
    for name, value in (("_read_input", lambda *_: found), ("check_tracking", lambda *_: None)):
        monkeypatch.setattr(f"dwiml_func.cli.track.{name}", value)
    np.save(tmp_path / "seeds.npy", np.arange(30, dtype=np.float32).reshape(10, 3))
    options = ("--subject", "a", "--in-custom-seeds", tmp_path / "seeds.npy", "--skip", 6, "--rng-seed", 5)
    options += ("--simultaneous-tracking", 513, "--processes", 3, "--mask-interp", "trilinear", "--save-seeds")
    outcome = cli("track", model, data, tmp_path / "a.trk", *options)
    assert (outcome.code, outcome.err) == (0, "")
    assert f"{tmp_path / 'a.trk'}: 2 streamlines of 4 seeds, mean length 2.0 mm; " in outcome.out
    file = LOADERS.load(tmp_path / "a.trk").tractogram
    assert file.data_per_streamline["seeds"].tolist() == [[20.5, 21.5, 22.5], [26.5, 27.5, 28.5]]
    space = asked["space"]
    assert space.mask.values is mask
    assert (space.mask.interpolation, space.interpolation) == ("trilinear", config.data.interpolation)
    assert (space.neighborhood, space.voxel_sizes) == (config.data.neighborhood, (2, 2, 2))
    assert (asked["num_processes"], asked["num_blocks"], asked["key"]) == (3, 2, Key(5))
    assert (asked["numbers"].tolist(), len(asked["seeds"])) == ([6, 7, 8, 9], 4)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_counts_the_seeds_that_are_done(monkeypatch):
    results: list[Any] = [SimpleNamespace(num_done=number) for number in (10, 25, 40)]
    for stream, is_shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr("sys.stderr", stream)
        assert list(with_progress(iter(results), 40)) == results
        assert ("40/40" in stream.getvalue()) == ("seed/s" in stream.getvalue()) == is_shown
        assert is_shown or not stream.getvalue()


def test_the_file_is_the_same_each_time_and_by_two_processes(cli, model, data, tmp_path):
    options = ("--subject", "subj2", "--tracking-mask-group", "wm_mask", "--nt", 1300, "--max-length", 3)
    options += ("--min-length", 1, "--track-forward-only", "--theta", 180, "--skip", 100)
    for kind in ("trk", "tck", "trx"):
        for name, more in (("one", ()), ("two", ("--processes", 2)), ("many", ("--simultaneous-tracking", 1000))):
            if kind == "trk" or name != "two":
                assert cli("track", model, data, tmp_path / f"{name}.{kind}", *options, *more).code == 0
        first = (tmp_path / f"one.{kind}").read_bytes()
        assert (tmp_path / f"many.{kind}").read_bytes() == first
        assert kind != "trk" or (tmp_path / "two.trk").read_bytes() == first


def test_lines_come_in_the_order_of_their_seeds_and_pass_through_them(track):
    file = track("--save-seeds")
    seeds = file.tractogram.data_per_streamline["seeds"]
    skipped = track("--save-seeds", "--skip", 20, name="b.trk").tractogram.data_per_streamline["seeds"]
    np.testing.assert_array_equal(skipped, seeds[-len(skipped) :])
    assert 0 < len(skipped) <= 10
    world = apply_affine(file.affine, seeds)
    for seed, line in zip(world, file.streamlines, strict=True):
        assert np.abs(line - seed).sum(axis=1).min() < 1e-3


def test_the_headers_of_tck_and_trx_have_the_model_and_the_command(cli, track, model, data, tmp_path):
    header = track(name="a.tck").header
    assert header["model"] == "Learn2Track cosine-regression, epoch 2"
    assert header["command"].startswith(f"dwiml-func track {model} {data} --subject subj2")
    assert "--nt 30" in header["command"]
    facts = json.loads((model / "best_model" / "model.json").read_text())
    assert json.loads(header["trained_on"]) == facts["trained_on"]
    assert header["program"].startswith("dwiml-func ")
    assert (
        cli("track", model, data, tmp_path / "a.trx", "--subject", "subj2", "--tracking-mask-group", "wm_mask").code
        == 0
    )
    with zipfile.ZipFile(tmp_path / "a.trx") as archive:
        in_trx = json.loads(archive.read("header.json"))
    assert {name: in_trx[name] for name in ("program", "model", "trained_on")} == {
        name: header[name] for name in ("program", "model", "trained_on")
    }


def test_options_act(track, tmp_path):
    usual = track()
    assert lines(track(name="again.trk")) == lines(usual)
    assert lines(track("--rng-seed", 2, name="rng.trk")) != lines(usual)
    np.testing.assert_allclose(steps(track("--step-size", 0.3, name="step.trk")), 0.3, rtol=1e-4)
    half = track("--track-forward-only", name="half.trk")
    assert sum(map(len, half.streamlines)) < sum(map(len, usual.streamlines))
    for option in (("--data-interp", "nearest"), ("--discard-last-point",), ("--max-length", 4), ("--theta", 5)):
        assert lines(track(*option, name=f"{option[0]}.trk")) != lines(usual), option
    short = track("--max-length", 4, name="short.trk")
    assert max(map(len, short.streamlines)) == 9
    assert min(map(len, track("--min-length", 5, name="long.trk").streamlines)) >= 11
    few = track("--compress", name="few.trk")
    assert sum(map(len, few.streamlines)) < 0.7 * sum(map(len, usual.streamlines))
    np.testing.assert_allclose([line[-1] for line in few.streamlines], [line[-1] for line in usual.streamlines])
    assert len(track("--seeding-mask-group", "wm_mask", mask=False, name="free.trk").streamlines) > 0
    other_mask = track("--mask-interp", "trilinear", name="mask.trk")
    assert lines(other_mask) != lines(usual)


def test_seeds_of_your_own_and_by_voxel(track, data, tmp_path):
    with h5py.File(data) as file:
        mask: Any = file["subj2/wm_mask/data"]
        voxels = np.argwhere(mask[..., 0] > 0)
    np.save(tmp_path / "seeds.npy", voxels[:7] + 0.25)
    own = track("--in-custom-seeds", tmp_path / "seeds.npy", "--save-seeds", "--min-length", 0, nt=None)
    seeds = own.tractogram.data_per_streamline["seeds"]
    assert len(seeds) > 3
    assert {tuple(seed) for seed in seeds} <= {tuple(seed) for seed in (voxels[:7] - 0.25).astype(np.float32)}
    two = track("--npv", 2, "--save-seeds", "--min-length", 0, "--max-length", 1, nt=None, name="npv.trk")
    seeds = two.tractogram.data_per_streamline["seeds"]
    assert len(voxels) < len(seeds) <= 2 * len(voxels)


def test_nifti_files_give_the_lines_of_the_dataset(cli, track, model, data, tmp_path):
    with h5py.File(data) as file:
        for group in ("input", "wm_mask"):
            values: Any = file[f"subj2/{group}/data"]
            affine: Any = file[f"subj2/{group}"].attrs["affine"]
            nib.save(nib.Nifti1Image(np.squeeze(values[()]), affine), tmp_path / f"{group}.nii.gz")
            nib.save(nib.Nifti1Image(np.squeeze(values[()]), OBLIQUE @ affine), tmp_path / f"oblique_{group}.nii.gz")
    options = ("--min-length", 2, "--max-length", 20, "--theta", 180, "--nt", 30, "--standardization", "none")
    for prefix, kind in (("", "trk"), ("oblique_", "tck")):
        files = ("--input", tmp_path / f"{prefix}input.nii.gz", "--tracking-mask", tmp_path / f"{prefix}wm_mask.nii.gz")
        result = cli("track", model, tmp_path / f"{prefix}b.{kind}", *files, *options)
        assert result.code == 0, result.err
    expected = track()
    assert lines(LOADERS.load(tmp_path / "b.trk")) == lines(expected)
    turned = LOADERS.load(tmp_path / "oblique_b.tck").streamlines
    np.testing.assert_array_equal([len(line) for line in turned], [len(line) for line in expected.streamlines])
    np.testing.assert_allclose(
        np.concatenate(list(turned)), apply_affine(OBLIQUE, np.concatenate(list(expected.streamlines))), atol=1e-4
    )


def test_nothing_long_enough_makes_an_empty_file_and_a_warning(cli, model, data, tmp_path):
    options = ("--subject", "subj2", "--tracking-mask-group", "wm_mask", "--nt", 5, "--min-length", 290)
    result = cli("track", model, data, tmp_path / "a.trk", *options)
    assert result.code == 0
    assert "No line of at least 290 mm" in result.err
    assert len(LOADERS.load(tmp_path / "a.trk").streamlines) == 0


def test_a_model_records_what_it_was_trained_on(model):
    facts = json.loads((model / "best_model" / "model.json").read_text())
    assert facts["trained_on"] == {
        "sh_order": 2,
        "orientation": "RAS",
        "voxel_sizes": [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]],
        "step_size": 0.5,
    }


@pytest.mark.parametrize(
    ("mean", "kind"),
    [
        *((0.5, "all"), (np.array([0.5]), "all"), (np.ones((3, 1)), "all")),
        *((np.ones(6), "independent"), (np.ones((3, 6)), "independent"), (None, None)),
    ],
)
def test_the_standardization_is_told_from_its_means_also_of_several_subjects(mean, kind):
    attributes = {"sh_order": 2} | ({} if mean is None else {"standardization_mean": mean})
    assert volume_facts(attributes).get("standardization") == kind


@pytest.mark.parametrize(
    ("given", "recorded", "expected"),
    [(None, "all", "all"), ("none", "all", "none"), ("independent", "all", "independent"), (None, None, "none")],
)
def test_nifti_files_are_standardised_as_asked_for_or_as_the_models_data(tmp_path, given, recorded, expected):
    values = np.random.default_rng(0).uniform(1, 2, (4, 4, 4, 2)) * [1, 5]
    nib.save(nib.Nifti1Image(values.astype(np.float32), np.eye(4)), tmp_path / "a.nii")
    facts = {} if recorded is None else {"trained_on": {"standardization": recorded}}
    model = LoadedModel(module=Learn2Track(2), config=RunConfig(hdf5_file=""), facts=facts)
    found = read_nifti_input([str(tmp_path / "a.nii")], model, standardization=given)
    source = SingleFile.at(tmp_path / "a.nii")
    np.testing.assert_array_equal(found.volume, load_volume([source], standardization=expected).data)


@pytest.mark.parametrize(("shear", "told"), [(0.1, ["a.nii: voxel axes at 84.3 degrees"]), (0.005, [])])
def test_a_nifti_grid_whose_axes_are_not_at_right_angles_is_told(tmp_path, caplog, shear, told):
    affine = np.eye(4)
    affine[0, 1] = shear
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4, 2), np.float32), affine), tmp_path / "a.nii")
    read_nifti_input(
        [str(tmp_path / "a.nii")], LoadedModel(module=Learn2Track(2), config=RunConfig(hdf5_file=""), facts={})
    )
    assert [record.message.rpartition("/")[2].partition(",")[0] for record in caplog.records] == told


@pytest.mark.parametrize(("size", "fits"), [(1.981, True), (1.979, False), (3.029, True), (3.031, False)])
def test_voxels_are_as_large_as_those_of_the_training_to_a_hundredth(size, fits):
    trained_on = {"voxel_sizes": [[2.0, 2.0, 2.0], [3.0, 3.0, 3.0]]}  # the smallest and the largest
    with nullcontext() if fits else pytest.raises(ValueError, match="expected voxels of 2 x 2 x 2 to 3 x 3 x 3"):
        check_same_kind(trained_on, {}, (2.5, size, 2.5), source="a.nii")


def test_a_subject_in_other_code_points_than_the_datasets_is_told_from_one_that_is_missing(tmp_path):
    with h5py.File(tmp_path / "data.hdf5", "w") as file:
        file.create_group("noe\u0301")
    model = LoadedModel(module=Learn2Track(2), config=RunConfig(hdf5_file=""), facts={})
    for subject, told in (("no\u00e9", ". Spelt with other Unicode code points (NFC, NFD): 'no\u00e9'"), ("noe", "")):
        with pytest.raises(ValueError, match=re.escape(f"among noe\u0301{told}. Received: '{subject}'.") + "$"):
            read_dataset_input(str(tmp_path / "data.hdf5"), subject, model, input_group="input")


def test_a_volume_of_another_kind_is_refused_by_name(cli, model, data, tmp_path):
    options = ("--subject", "subj2", "--tracking-mask-group", "wm_mask", "--nt", 5)
    for change, named in (
        (lambda g: g.attrs.__setitem__("sh_order", 4), ("the SH order 2", "Received: 4")),
        (lambda g: g.attrs.__setitem__("affine", np.diag([1.5, 1.5, 1.5, 1])), ("voxels of 1 x 1 x 1 mm", "1.5 x 1.5")),
        (
            lambda g: g.attrs.__setitem__("affine", np.diag([-1.0, 1, 1, 1])),
            ("the orientation of the voxel axes 'RAS'", "Received: 'LAS'"),
        ),
        (_one_feature_less, ("a volume with 6 features", "Received: 5")),
    ):
        other = shutil.copy(data, tmp_path / "other.hdf5")
        with h5py.File(other, "r+") as file:
            for group in ("input", "wm_mask"):
                if group == "input" or "voxel" in named[0]:
                    change(file[f"subj2/{group}"])
        cli("track", model, other, tmp_path / "a.trk", *options).check_refusal("subj2", *named)
        assert not (tmp_path / "a.trk").exists()


def _one_feature_less(group: Any) -> None:
    values = group["data"][..., :5]
    del group["data"]
    group["data"] = values


@pytest.mark.parametrize(("epoch", "named"), [(None, "Learn2Track gaussian"), (0, "Learn2Track gaussian, epoch 0")])
def test_the_header_says_what_the_lines_depend_on(epoch, named):
    facts = {"class": "Learn2Track"} | ({} if epoch is None else {"epoch": epoch, "trained_on": {"step_size": 0.5}})
    model: Any = SimpleNamespace(facts=facts, config=SimpleNamespace(model=SimpleNamespace(dg_key="gaussian")))
    without_effect = {"processes": 3, "simultaneous_tracking": 7, "overwrite": True, "quiet": True}
    lines = {"track_forward_only": True, "nt": 5, "min_length": 2.5, "save_seeds": False, "theta": 90.0}
    options = Options(model_dir="a b", paths=("out.trk",), input=("x.nii", "y.nii"), **without_effect, **lines)
    found = header_facts(options, model)
    given = "--input x.nii y.nii --track-forward-only --nt 5 --min-length 2.5"
    assert found["command"] == f"dwiml-func track 'a b' {given}"
    assert (found["model"], found["program"]) == (named, f"dwiml-func {version('dwiml_func')}")
    assert json.loads(found["trained_on"]) == ({} if epoch is None else {"step_size": 0.5})
    of_dataset = header_facts(Options(model_dir="m", paths=("d.hdf5", "out.trk"), subject="s"), model)
    assert of_dataset["command"] == "dwiml-func track m d.hdf5 --subject s"


def test_tracking_takes_one_thread(monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    options: Any = SimpleNamespace(use_gpu=False)
    assert _device(options) == torch.device("cpu")
    assert asked == [1]


def test_what_cannot_be_done_is_refused_in_one_line(cli, model, data, tmp_path):
    out = tmp_path / "a.trk"
    usual = (model, data, out, "--subject", "subj2", "--tracking-mask-group", "wm_mask")
    np.save(tmp_path / "bad.npy", np.zeros((4, 2)))
    np.save(tmp_path / "far.npy", np.full((4, 3), 99.0))
    (tmp_path / "text.npy").write_text("no array")
    for arguments, named in (
        ((model, data, out), ("subject",)),
        ((model, out), ("Expected HDF5_FILE and OUT",)),
        ((model, data, out, "--subject", "nobody"), ("'nobody'", "subj2")),
        ((model, data, out, "--subject", "subj2"), ("--seeding-mask-group",)),
        ((model, data, out, "--subject", "subj2", "--tracking-mask-group", "gm"), ("'gm'", "wm_mask")),
        ((model, data, out, "--subject", "subj2", "--tracking-mask-group", "input"), ("one value a voxel",)),
        ((*usual, "--algo", "prob"), ("cosine-regression", "det")),
        ((*usual, "--eos-stop", "0.5"), ("eos_stop", "add_eos")),
        ((*usual, "--eos-stop", "often"), ("eos_stop", "'often'")),
        ((*usual, "--nt", 5, "--npv", 1), ("npv", "nt")),
        ((*usual, "--nt", 5, "--skip", 5), ("skip",)),
        ((*usual, "--step-size", 0), ("step_size",)),
        ((*usual, "--in-custom-seeds", tmp_path / "none.npy"), ("none.npy",)),
        ((*usual, "--in-custom-seeds", tmp_path / "bad.npy"), ("(4, 2)",)),
        ((*usual, "--in-custom-seeds", tmp_path / "far.npy"), ("4 of 4 outside",)),
        ((*usual, "--in-custom-seeds", tmp_path / "text.npy"), ("text.npy",)),
        ((*usual, "--processes", 0), ("processes",)),
        *([] if torch.cuda.is_available() else [((*usual, "--use-gpu"), ("use_gpu: expected a CUDA GPU",))]),
        ((*usual, "--simultaneous-tracking", 0), ("simultaneous_tracking: expected", "at least 1")),
        ((*usual, "--skip", -1), ("skip: expected", "at least 0")),
        ((*usual, "--compress", 0), ("compress: expected", "above 0")),
        ((*usual, "--processes", 2, "--use-gpu"), ("processes: expected 1 with --use-gpu",)),
        ((*usual, "--nt", 5, "--in-custom-seeds", "a.npy"), ("nt: not allowed with in_custom_seeds",)),
        ((*usual, "--tracking-mask", "m.nii.gz"), ("tracking_mask", "--input")),
        ((model, out, "--input", "no.nii.gz", "--subject", "a"), ("subject",)),
        ((model, out, "--input", "no.nii.gz"), ("no.nii.gz",)),
        ((model, data, tmp_path / "a.vtk", *usual[3:]), (".trk, .tck, .trx",)),
        ((model, data, tmp_path / "a.tck", *usual[3:], "--save-seeds"), ("TCK",)),
    ):
        cli("track", *arguments).check_refusal(*named)
    assert not out.exists()
    out.write_text("mine")
    cli("track", *usual).check_refusal("exists", "--overwrite")
    assert out.read_text() == "mine"
    assert cli("track", *usual, "--nt", 5, "-f").code == 0
    assert LOADERS.load(out)


KILLED = """
import os, signal, sys
from dwiml_func.cli.main import main
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # all is written, nothing has its name yet
main(sys.argv[1:])
"""


def test_a_run_that_is_killed_leaves_the_file_that_stood_there(model, data, tmp_path):
    out = tmp_path / "a.trk"
    out.write_bytes(b"before")
    options = ("--subject", "subj2", "--tracking-mask-group", "wm_mask", "--nt", 20, "--theta", 180, "--min-length", 0)
    killed = finished(start_program(KILLED, "track", model, data, out, "-f", *options))
    assert killed.returncode == -signal.SIGKILL, killed.err
    assert out.read_bytes() == b"before"
    (left,) = set(tmp_path.iterdir()) - {out}  # what the next run removes
    assert left.stat().st_size > 1000


def test_the_next_run_removes_what_a_killed_one_left(track, tmp_path):
    leftover = tmp_path / ".dwiml-tmp-a.trk.999999-01234567"
    leftover.write_bytes(b"part")
    track()
    assert [path.name for path in tmp_path.iterdir()] == ["a.trk"]
