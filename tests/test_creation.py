"""Creating datasets: what is written is what the files hold."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch
from creation_cases import AFFINE, CONFIG, SHAPE, make_folder, make_subject, save_lines, save_volume, some_lines
from experiment_cases import trained
from nibabel.affines import apply_affine, voxel_sizes
from nibabel.orientations import aff2axcodes

from dwiml_func.cli import create_hdf5
from dwiml_func.cli.main import main
from dwiml_func.data.config import BatchConfig
from dwiml_func.data.creation.config import check_groups_config
from dwiml_func.data.creation.create import create_dataset
from dwiml_func.data.hdf5.read import open_dataset, read_subsets
from dwiml_func.data.resampling import Resampling
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.training_config import TrainingConfig
from dwiml_func.models.config import ModelConfig
from dwiml_func.tracking import PrincipalDirection

File: Any = h5py.File


def to_mm(points: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Voxel space, corner origin -> RAS mm."""
    return apply_affine(affine, points.astype(np.float64) - 0.5)


def create(tmp_path: Path, config: dict[str, Any], names: tuple[str, ...] = ("s1",), **options: Any) -> Path:
    out = tmp_path / "out.hdf5"
    create_dataset(tmp_path / "subjects", check_groups_config(config), out, training=names, **options)
    return out


def add_latin_comment(path: Path) -> str:
    """A copy of a TCK with a line in Latin-1 in its header, as older programs wrote names."""
    head, end, points = path.read_bytes().partition(b"\nEND\n")
    start, _, offset = head.rpartition(b"file: . ")
    line = "author: José\n".encode("latin-1")
    path.with_name("named.tck").write_bytes(start + line + b"file: . %d" % (int(offset) + len(line)) + end + points)
    return "named.tck"


@pytest.mark.parametrize("suffix", [".trk", ".tck", ".trx", ".latin.tck"])
def test_streamlines_come_back_as_dipy_loads_them(tmp_path, suffix):
    from dipy.io.streamline import load_tractogram

    subject = make_subject(tmp_path / "subjects", "s1")
    save_lines(subject / f"lines{suffix}", some_lines(50, 3))
    files = f"lines{suffix}"
    if "latin" in suffix:  # which dipy does not read
        files = add_latin_comment(subject / files)
    config = {"input": CONFIG["input"], "streamlines": {"type": "streamlines", "files": files}}
    dataset = open_dataset(create(tmp_path, config))
    loaded: Any = load_tractogram(str(subject / f"lines{suffix}"), str(subject / "dwi.nii.gz"))
    expected = loaded.streamlines
    assert len(expected) == 50
    with File(tmp_path / "out.hdf5") as file:
        affine = file["s1/streamlines"].attrs["affine"]
    for received, line in zip(dataset.streamlines.to_list(), expected, strict=True):
        assert np.abs(to_mm(received.numpy(), affine) - line).max() < 1e-4


def test_the_affine_of_the_tests_is_rotated_anisotropic_and_flipped():
    assert np.linalg.det(AFFINE[:3, :3]) < 0
    np.testing.assert_allclose(voxel_sizes(AFFINE), [2, 1.5, 3])
    assert np.count_nonzero(np.abs(AFFINE[:3, :3]) > 0.1) > 6


def test_several_files_are_joined_in_the_order_of_their_names_with_their_data_per_streamline(tmp_path):
    subject = make_subject(tmp_path / "subjects", "s1")
    lines = {name: some_lines(number, number) for name, number in (("a", 4), ("b", 2), ("c", 3))}
    for name, of_file in lines.items():
        weights = np.full((len(of_file), 2), ord(name), np.float32)
        tables = {"weight": weights, "other": weights[:, :1]}
        save_lines(subject / "more" / f"{name}.{'trx' if name == 'c' else 'trk'}", of_file, per_streamline=tables)
    config = {
        "input": CONFIG["input"],
        "streamlines": {"type": "streamlines", "files": ["more/c.trx", "more/*.trk"], "dps_keys": "weight"},
    }
    create(tmp_path, config)
    with File(tmp_path / "out.hdf5") as file:
        group = file["s1/streamlines"]
        assert list(group["data_per_streamline"]) == ["weight"]
        assert group["data_per_streamline/weight"][:, 1].tolist() == [ord("c")] * 3 + [ord("a")] * 4 + [ord("b")] * 2
        expected = [*lines["c"], *lines["a"], *lines["b"]]
        assert group["lengths"][:].tolist() == [len(line) for line in expected]
        assert np.abs(to_mm(group["data"][:], group.attrs["affine"]) - np.concatenate(expected)).max() < 1e-4
        lengths = [np.linalg.norm(np.diff(line, axis=0), axis=1).sum() for line in expected]
        np.testing.assert_allclose(group["euclidean_lengths"][:], lengths, rtol=1e-5)


def test_each_file_is_a_bundle_and_removed_streamlines_are_not_counted(tmp_path, capfd):
    for seed, name in enumerate(("s1", "s2")):
        subject = make_subject(tmp_path / "subjects", name, seed=seed)
        lines = some_lines(5, 9)
        save_lines(subject / "bundles" / "CST.trk", [*lines[:2], lines[2] + 1000, *lines[3:]])
        save_lines(subject / "other" / "a.trk", some_lines(2, 4))
    (tmp_path / "subjects" / "s2" / "other" / "a.trk").rename(tmp_path / "subjects" / "s2" / "other" / "z.trk")
    config = {"input": CONFIG["input"], "streamlines": {"type": "streamlines", "files": ["bundles/*", "other/*"]}}
    out = create(tmp_path, config, ("s1", "s2"), remove_invalid=True)
    with File(out) as file:
        group = file["s1/streamlines"]
        assert list(group.attrs["bundle_names"]) == ["CST", "bundles/a", "b", "other/a"]  # in the order of the files
        assert group["bundle_ids"].dtype == np.int32
        assert np.bincount(group["bundle_ids"]).tolist() == [4, 7, 3, 2]
    bundles = open_dataset(out).bundles
    assert bundles is not None
    assert bundles.names == ("CST", "bundles/a", "b", "other/a", "a", "z")
    assert np.bincount(bundles.ids).tolist() == [8, 7, 6, 2, 7, 2]
    assert main(["info", str(out)]) == 0
    assert "with 6 bundles: CST, bundles/a, b, other/a, a, z\n" in capfd.readouterr().out


def test_bundles_of_files_of_one_name_stay_apart(tmp_path):
    files = ["x/b/t.trk", "y/b/t.trk", "t.trk", "t.tck"]
    subject = make_subject(tmp_path / "subjects", "s1")
    for number, name in enumerate(files):
        save_lines(subject / name, some_lines(number + 1))
    out = create(tmp_path, {"input": CONFIG["input"], "streamlines": {"type": "streamlines", "files": files}}, ("s1",))
    bundles = open_dataset(out).bundles
    assert bundles is not None
    assert bundles.names == ("x/b/t", "y/b/t", "t.trk", "t.tck")  # without the subject's: they differ between subjects
    assert np.bincount(bundles.ids).tolist() == [1, 2, 3, 4]


def test_what_nibabel_warns_of_is_told_with_the_file(tmp_path, cli):
    arguments = make_folder(tmp_path)
    path = tmp_path / "subjects" / "s1" / "bundles" / "a.trk"
    content = bytearray(path.read_bytes())
    content[948:952] = bytes(4)  # voxel_order
    path.write_bytes(content)
    outcome = cli("create-hdf5", *arguments)
    assert outcome.code == 0
    assert re.search(r"warning: subject 's1', group 'streamlines', file \S*/a.trk: Voxel order is not", outcome.err)


def test_the_file_has_the_attributes_of_the_layout(tmp_path):
    make_subject(tmp_path / "subjects", "s1")
    make_subject(tmp_path / "subjects", "s2", seed=5)
    groups = check_groups_config(CONFIG)
    options: dict[str, Any] = {"validation": ["s2"], "resampling": Resampling(step_size=0.7), "date": "then"}
    create_dataset(tmp_path / "subjects", groups, tmp_path / "out.hdf5", training=["s1"], **options)
    with File(tmp_path / "out.hdf5") as file:
        assert list(file.attrs["training_subjs"]) == ["s1"]
        assert list(file.attrs["validation_subjs"]) == ["s2"]
        assert file.attrs["testing_subjs"].size == 0
        assert file.attrs["step_size"] == 0.7
        assert file.attrs["nb_points"] == "Not defined by user"
        assert "'standardization': 'all'" in file.attrs["groups_config"]
        assert set(file["s1"]) == {"input", "streamlines", "wm_mask"}
        assert file["s1/wm_mask/data"].shape == (*SHAPE, 1)
        assert file["s1/streamlines"].attrs["voxel_order"] == "".join(aff2axcodes(AFFINE))
    first = (tmp_path / "out.hdf5").read_bytes()
    create_dataset(tmp_path / "subjects", groups, tmp_path / "out.hdf5", training=["s1"], overwrite=True, **options)
    assert (tmp_path / "out.hdf5").read_bytes() == first


def test_the_layout_is_that_of_a_file_of_the_reference(tmp_path):
    make_folder(tmp_path)
    out = create(tmp_path, CONFIG, ("s1", "s2"), resampling=Resampling(step_size=0.5))

    def layout(file: Any) -> dict[str, object]:
        ours_alone = ("standardization", "bundle")  # how to undo it; which bundle a streamline is of
        found: dict[str, object] = {f"@{name}": type(value) for name, value in file.attrs.items()}
        for name, group in file[next(iter(file))].items():
            for key, value in group.attrs.items():
                if not key.startswith(ours_alone):
                    found[f"{name}@{key}"] = getattr(value, "dtype", type(value))
            for key, item in group.items():
                if not key.startswith(ours_alone):
                    found[f"{name}/{key}"] = (item.dtype, item.ndim) if hasattr(item, "ndim") else "group"
        return found

    with File(out) as ours, File(Path(__file__).parent / "data" / "phantom.hdf5") as theirs:
        assert layout(ours) == layout(theirs)


def test_streamlines_can_be_resampled_or_compressed(tmp_path):
    from dipy.tracking.streamlinespeed import compress_streamlines, set_number_of_points

    subject = make_subject(tmp_path / "subjects", "s1")
    save_lines(subject / "lines.trk", some_lines(20, 3))
    lines = [line.astype(np.float64) for line in nib.streamlines.load(subject / "lines.trk").streamlines]
    config = {"streamlines": {"type": "streamlines", "files": "lines.trk"}}
    lengths = [np.linalg.norm(np.diff(line, axis=0), axis=1).sum() for line in lines]
    by_step = [set_number_of_points(line, max(1, round(n / 0.8)) + 1) for line, n in zip(lines, lengths, strict=True)]
    for resampling, expected in (
        (Resampling(step_size=0.8), by_step),
        (Resampling(nb_points=9), [set_number_of_points(line, 9) for line in lines]),
        (Resampling(compress=0.05), compress_streamlines(lines, tol_error=0.05)),
    ):
        out = create(tmp_path, config, resampling=resampling, overwrite=True)
        with File(out) as file:
            group = file["s1/streamlines"]
            assert group["lengths"][:].tolist() == [len(line) for line in expected]
            assert np.abs(to_mm(group["data"][:], group.attrs["affine"]) - np.concatenate(list(expected))).max() < 1e-4
    assert sum(map(len, expected)) < sum(map(len, lines))


def test_without_volumes_the_grid_is_that_of_the_tractogram(tmp_path):
    make_subject(tmp_path / "subjects", "s1")
    out = create(tmp_path, {"streamlines": CONFIG["streamlines"]})
    with File(out) as file:
        np.testing.assert_allclose(file["s1/streamlines"].attrs["affine"], AFFINE, atol=1e-5)
        assert tuple(file["s1/streamlines"].attrs["dimensions"]) == SHAPE


@pytest.mark.parametrize("blocs", [2, [2], [2, 3, 4]])
def test_a_connectivity_matrix_of_blocs_is_kept(tmp_path, blocs):
    subject = make_subject(tmp_path / "subjects", "s1")
    three = blocs if isinstance(blocs, list) and len(blocs) == 3 else [2, 2, 2]
    matrix = np.arange(np.prod(three) ** 2).reshape(np.prod(three), -1) % 3
    np.save(subject / "matrix.npy", matrix)
    lines = {**CONFIG["streamlines"], "connectivity_matrix": "matrix.npy", "connectivity_nb_blocs": blocs}
    with File(create(tmp_path, {"streamlines": lines})) as file:
        group = file["s1/streamlines"]
        assert group.attrs["connectivity_matrix_type"] == "from_blocs"
        assert group.attrs["connectivity_nb_blocs"].tolist() == three
        np.testing.assert_array_equal(group["connectivity_matrix"][:], matrix > 0)
        assert group["connectivity_matrix"].dtype == bool


def test_a_connectivity_matrix_of_labels_is_kept_with_its_labels(tmp_path):
    subject = make_subject(tmp_path / "subjects", "s1")
    labels = np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(np.int16) % 5
    save_volume(subject / "labels.nii.gz", labels)
    np.save(subject / "matrix.npy", np.eye(5))
    keys = {"connectivity_matrix": "matrix.npy", "connectivity_labels": "labels.nii.gz"}
    with File(create(tmp_path, {"streamlines": {**CONFIG["streamlines"], **keys}})) as file:
        group = file["s1/streamlines"]
        assert group.attrs["connectivity_matrix_type"] == "from_labels"
        np.testing.assert_array_equal(group["connectivity_label_volume"][:], labels)
        assert "connectivity_nb_blocs" not in group.attrs


def test_missing_files_are_passed_over_only_when_asked(tmp_path):
    subject = make_subject(tmp_path / "subjects", "s1")
    (subject / "mask.nii.gz").unlink()
    config = {"input": {"type": "volume", "files": ["dwi.nii.gz", "mask.nii.gz"]}, "wm": CONFIG["wm_mask"]}
    config["lines"] = {"type": "streamlines", "files": "none.trx"}
    with pytest.raises(FileNotFoundError, match=r"subject 's1', group 'input', file .*mask.nii.gz: .*\(and 2 more"):
        create(tmp_path, config)
    groups = check_groups_config(config)
    options: dict[str, Any] = {"training": ["s1"], "enforce_files_presence": False}
    notes = create_dataset(tmp_path / "subjects", groups, tmp_path / "out.hdf5", **options)
    assert [note.partition(", file")[0] for note in notes] == [
        "subject 's1', group 'input'",
        "subject 's1', group 'wm'",
        "subject 's1', group 'lines'",
    ]
    assert all(note.endswith("does not exist. It is skipped") for note in notes)
    with File(tmp_path / "out.hdf5") as file:
        assert list(file["s1"]) == ["input"]
        assert file["s1/input/data"].shape[3] == 4


def test_nothing_of_earlier_subjects_stays_in_memory(tmp_path):
    import tracemalloc

    names = tuple(f"s{number}" for number in range(6))
    volume = np.random.default_rng(0).normal(size=(40, 40, 40, 10)).astype(np.float32)
    for name in names:
        save_volume(tmp_path / "subjects" / name / "dwi.nii", volume)
    config = {"input": {"type": "volume", "files": "dwi.nii", "standardization": "independent"}}
    peaks = []
    for number in (1, 6):
        tracemalloc.start()
        create(tmp_path, config, names[:number], overwrite=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]
    assert peaks[0] > volume.nbytes


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:The legacy descoteaux07:PendingDeprecationWarning")
def test_a_real_scan_with_streamlines_tracked_on_it_goes_there_and_back(tmp_path):
    """dipy's small_64D.nii, real diffusion MRI with an oblique affine, as its wheel ships it."""
    from importlib.resources import files

    from dipy.core.gradients import gradient_table
    from dipy.data import default_sphere
    from dipy.direction import DeterministicMaximumDirectionGetter
    from dipy.io.stateful_tractogram import Space, StatefulTractogram
    from dipy.io.streamline import load_tractogram, save_tractogram
    from dipy.reconst.dti import TensorModel, fractional_anisotropy
    from dipy.reconst.shm import CsaOdfModel
    from dipy.tracking.local_tracking import LocalTracking
    from dipy.tracking.stopping_criterion import ThresholdStoppingCriterion
    from dipy.tracking.streamline import Streamlines
    from dipy.tracking.utils import random_seeds_from_mask

    data_folder: Any = files("dipy") / "data" / "files"
    image: Any = nib.load(data_folder / "small_64D.nii")
    data = image.get_fdata(dtype=np.float32)
    bvals, bvecs = (np.load(data_folder / f"small_64D.{name}.npy") for name in ("bvals", "gradients"))
    table = gradient_table(bvals, bvecs=bvecs, b0_threshold=50)
    anisotropy = np.nan_to_num(fractional_anisotropy(TensorModel(table).fit(data).evals))
    peaks = CsaOdfModel(table, sh_order_max=4).fit(data, mask=anisotropy > 0.1)
    getter = DeterministicMaximumDirectionGetter.from_shcoeff(
        peaks.shm_coeff, max_angle=45.0, sphere=default_sphere, sh_to_pmf=True
    )
    seeds = random_seeds_from_mask(anisotropy > 0.1, image.affine, seeds_count=1, random_seed=1)
    tracking: Any = LocalTracking(
        getter, ThresholdStoppingCriterion(anisotropy, 0.1), seeds, image.affine, step_size=0.5, random_seed=1
    )
    tracked: Any = Streamlines(line for line in tracking if len(line) > 5)
    subject = tmp_path / "subjects" / "s1"
    subject.mkdir(parents=True)
    nib.save(image, subject / "dwi.nii")
    sft: Any = StatefulTractogram(tracked, image, Space.RASMM)
    sft.remove_invalid_streamlines()
    num = len(sft)
    assert num > 1_000
    save_tractogram(sft, str(subject / "lines.trk"))
    config = {
        "input": {"type": "volume", "files": ["dwi.nii"], "standardization": "all"},
        "streamlines": {"type": "streamlines", "files": ["lines.trk"]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "train.txt").write_text("s1\n")
    paths = [str(tmp_path / name) for name in ("subjects", "config.json", "new/deep/out.hdf5", "train.txt")]
    assert main(["create-hdf5", *paths[:3], "--training-subjects", paths[3]]) == 0
    assert main(["info", paths[2]]) == 0
    dataset = open_dataset(paths[2])
    assert len(dataset.streamlines) == num
    expected: Any = load_tractogram(str(subject / "lines.trk"), "same")
    points = to_mm(dataset.streamlines.points.numpy(), image.affine)
    assert np.abs(points - expected.streamlines.get_data()).max() < 1e-4
    with File(paths[2]) as file:
        attributes = file["s1/input"].attrs
        back = file["s1/input/data"][:] * attributes["standardization_std"] + attributes["standardization_mean"]
    np.testing.assert_allclose(back, data, atol=1e-2)
    batches, training = BatchConfig(max_batches_per_epoch_training=5), TrainingConfig(max_epochs=2)
    trained(
        tmp_path,
        RunConfig(hdf5_file=paths[2], model=ModelConfig(rnn_layer_sizes=(16,)), batches=batches, training=training),
    )
    assert np.isfinite(np.load(tmp_path / "run" / "logs" / "train_loss_monitor_per_epoch.npy")).all()
    assert torch.isfinite(dataset.streamlines.points).all()


def test_an_interruption_leaves_nothing(tmp_path, capfd, monkeypatch):
    arguments = make_folder(tmp_path)
    before = sorted(tmp_path.iterdir())

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dwiml_func.data.creation.create.load_streamlines", interrupt)
    assert main(["create-hdf5", *arguments]) == 130
    assert capfd.readouterr().err == "dwiml-func create-hdf5: interrupted.\n"
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        ({}, {}),
        ({"enforce_files_presence": False}, {"enforce_files_presence": False}),
        ({"skip_enforce_files_presence": True}, {"enforce_files_presence": False}),
        *(({name: True}, {name: True}) for name in ("remove_invalid", "allow_empty", "overwrite")),
        ({"step_size": 0.5}, {"resampling": Resampling(step_size=0.5)}),
        ({"nb_points": 7}, {"resampling": Resampling(nb_points=7)}),
        ({"compress": 0.1}, {"resampling": Resampling(compress=0.1)}),
    ],
)
def test_the_command_passes_on_what_it_is_given(tmp_path, monkeypatch, capsys, given, changed):
    made: list[Any] = []

    def create(folder: str, groups: object, path: Path, **options: Any) -> list[str]:
        path.write_bytes(b"0" * 2_500_000)
        made.append((folder, groups, options))
        return []

    monkeypatch.setattr(create_hdf5, "create_dataset", create)
    monkeypatch.setattr(create_hdf5, "read_groups_config", lambda path: f"groups of {path}")
    monkeypatch.setattr(create_hdf5, "read_subjects", lambda path: path.split("-"))
    lists = {"training_subjs": "a-b", "validation_subjs": "c", "testing_subjs": None}
    out = tmp_path / "new" / "out.hdf5"
    assert create_hdf5.run(create_hdf5.Options(folder="f", config="c", out_hdf5=str(out), **lists, **given)) == 0
    usual = {"remove_invalid": False, "allow_empty": False, "enforce_files_presence": True, "overwrite": False}
    usual |= {"training": ["a", "b"], "validation": ["c"], "testing": (), "resampling": Resampling()}
    assert made == [("f", "groups of c", usual | changed)]
    subjects = f"{out}: subjects: 2 training, 1 validation, 0 testing; 2.5 MB. To inspect it: dwiml-func info {out}\n"
    assert capsys.readouterr().out == subjects


@pytest.mark.parametrize("num_notes", [0, 1, 10, 11, 13])
def test_the_command_warns_of_ten_things_at_most(tmp_path, monkeypatch, caplog, num_notes):
    out, notes = tmp_path / "out.hdf5", [f"note {number}" for number in range(num_notes)]
    out.touch()
    monkeypatch.setattr(create_hdf5, "create_dataset", lambda *_, **__: notes)
    monkeypatch.setattr(create_hdf5, "read_groups_config", lambda _: {})
    assert create_hdf5.run(create_hdf5.Options(folder="f", config="c", out_hdf5=str(out))) == 0
    more = [f"{num_notes - 10} more like these."] if num_notes > 10 else []
    assert [record.getMessage() for record in caplog.records] == [*(f"{note}." for note in notes[:10]), *more]


def test_the_command_says_what_it_wrote(tmp_path, capfd):
    arguments = make_folder(tmp_path)
    assert main(["create-hdf5", *arguments, "--compress", "--enforce-files-presence"]) == 0
    printed = capfd.readouterr()
    assert "subjects: 1 training, 1 validation, 0 testing; " in printed.out
    assert printed.err == ""  # no bar without a terminal
    with File(tmp_path / "out.hdf5") as file:
        assert file.attrs["compress"] == 0.01
        assert list(file.attrs["validation_subjs"]) == ["s2"]
    assert main(["info", str(tmp_path / "out.hdf5")]) == 0
    assert json.loads((tmp_path / "config.json").read_text()) == CONFIG


def test_the_harmonics_of_a_volume_are_kept_and_shown_and_give_a_principal_direction(tmp_path, cli):
    six = {"files": ["dwi.nii.gz", "fa.nii.gz", "t1.nii.gz"], "sh_order": 2, "sh_basis": "tournier07", "sh_of": "fodf"}
    arguments = make_folder(tmp_path, config={**CONFIG, "input": {**CONFIG["input"], **six, "sh_legacy": True}})
    assert cli("create-hdf5", *arguments).code == 0
    with File(tmp_path / "out.hdf5") as file:
        found = {name: file["s2/input"].attrs[name] for name in ("sh_order", "sh_basis", "sh_legacy", "sh_of")}
    assert found == {"sh_order": 2, "sh_basis": "tournier07", "sh_legacy": True, "sh_of": "fodf"}
    shown = cli("info", tmp_path / "out.hdf5").out
    assert shown.count("spherical harmonics of order 2, basis tournier07, dipy's legacy definition, of an fODF") == 1
    assert PrincipalDirection(open_dataset(tmp_path / "out.hdf5").input_attributes).nb_previous_dirs == 1


@pytest.mark.parametrize(
    "content",
    [b"\xef\xbb\xbfs1\r\n\r\ns2\r\n", "s1\ns2\n".encode("utf-16"), b"\xfe\xff" + "s1\r\ns2".encode("utf-16-be")],
)
def test_lists_and_configs_of_windows_editors_are_read(tmp_path, content, cli):
    arguments = make_folder(tmp_path)
    (tmp_path / "train.txt").write_bytes(content)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_bytes(config.encode("utf-8-sig" if content[0] == 0xEF else "utf-16"))
    assert cli("create-hdf5", *arguments[:5]).code == 0
    assert read_subsets(tmp_path / "out.hdf5")["training"] == ("s1", "s2")


@pytest.mark.parametrize(
    ("pattern", "numbers"),
    [("b/**/*.trk", [2, 3, 4]), ("**/c.trk", [2, 3, 4]), ("b/*/*.trk", [3]), ("b/**/y/*.trk", [4]), ("b/c.trk", [2])],
)
def test_two_stars_are_any_number_of_folders(tmp_path, pattern, numbers):
    make_subject(tmp_path / "subjects", "s1")
    for place, number in (("b", 2), ("b/x", 3), ("b/x/y", 4)):
        save_lines(tmp_path / "subjects" / "s1" / place / "c.trk", some_lines(number, seed=number))
    path = create(tmp_path, {**CONFIG, "streamlines": {"type": "streamlines", "files": [pattern]}})
    with File(path) as file:
        assert len(file["s1/streamlines/lengths"]) == sum(numbers)
