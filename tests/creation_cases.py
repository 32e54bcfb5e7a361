"""A folder of subjects with small NIfTI volumes and tractograms, for the tests of creation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine, voxel_sizes
from nibabel.orientations import aff2axcodes
from nibabel.streamlines import Tractogram

SHAPE = (12, 10, 9)
_LINEAR = np.array([[0.36, -0.48, 0.8], [0.8, 0.6, 0.0], [-0.48, 0.64, 0.6]]) * [2.0, 1.5, -3.0]
# Rotated, voxels of 2 x 1.5 x 3 mm, the last axis flipped.
AFFINE = np.block([[_LINEAR, np.array([[10.0], [-20.0], [30.0]])], [np.zeros((1, 3)), np.ones((1, 1))]])
CONFIG: dict[str, Any] = {
    "input": {"type": "volume", "files": ["dwi.nii.gz"], "standardization": "all", "std_mask": ["mask.nii.gz"]},
    "streamlines": {"type": "streamlines", "files": ["bundles/*.trk"]},
    "wm_mask": {"type": "volume", "files": ["mask.nii.gz"], "standardization": "none"},
}


def save_volume(path: Path, data: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, affine), path)


def some_lines(num: int, seed: int = 0) -> list[np.ndarray]:
    """Random smooth streamlines inside the grid, RAS mm, float32."""
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(num):
        ends = rng.uniform(0.5, 1.0, (2, 3)) * (np.array(SHAPE) - 1) * rng.uniform(0.2, 0.9, (2, 3))
        share = np.linspace(0, 1, rng.integers(5, 30))[:, None]
        bent = ends[0] * (1 - share) + ends[1] * share + 0.3 * np.sin(3 * share)
        lines.append(apply_affine(AFFINE, bent).astype(np.float32))
    return lines


def save_lines(
    path: Path,
    lines: list[np.ndarray],
    *,
    affine: np.ndarray = AFFINE,
    shape: tuple[int, ...] = SHAPE,
    per_streamline: dict[str, np.ndarray] | None = None,
) -> None:
    """Write TRK or TCK by nibabel, TRX by trx-python."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tractogram = Tractogram(lines, data_per_streamline=per_streamline, affine_to_rasmm=np.eye(4))
    if path.suffix == ".trk":
        order = "".join(aff2axcodes(affine))
        sizes = voxel_sizes(affine).astype(np.float32)
        header = {"voxel_to_rasmm": affine, "dimensions": shape, "voxel_sizes": sizes, "voxel_order": order}
        nib.streamlines.save(nib.streamlines.TrkFile(tractogram, header), str(path))
    elif path.suffix == ".tck":
        nib.streamlines.save(nib.streamlines.TckFile(tractogram), str(path))
    else:
        from dipy.io.stateful_tractogram import Space, StatefulTractogram
        from dipy.io.streamline import save_tractogram

        reference = nib.Nifti1Image(np.zeros(shape, np.float32), affine)
        sft = StatefulTractogram(lines, reference, Space.RASMM, data_per_streamline=per_streamline)
        save_tractogram(sft, str(path), bbox_valid_check=False)


def make_subject(folder: Path, name: str, *, seed: int = 0, num_lines: int = 7) -> Path:
    """A subject with a 4-D volume, two 3-D ones, masks, and two bundles in TRK."""
    rng, subject = np.random.default_rng(seed), folder / name
    save_volume(subject / "dwi.nii.gz", rng.normal(100, 20, (*SHAPE, 4)).astype(np.float32))
    save_volume(subject / "fa.nii.gz", rng.uniform(0, 1, SHAPE).astype(np.float32))
    save_volume(subject / "t1.nii.gz", rng.uniform(10, 500, SHAPE).astype(np.float32))
    mask = np.zeros(SHAPE, np.uint8)
    mask[2:8, 2:6] = 1
    save_volume(subject / "mask.nii.gz", mask)
    other = np.zeros(SHAPE, np.uint8)
    other[7:11, 2:6] = 1
    save_volume(subject / "gm.nii.gz", other)
    save_lines(subject / "bundles" / "a.trk", some_lines(num_lines, seed))
    save_lines(subject / "bundles" / "b.trk", some_lines(3, seed + 1))
    return subject


def make_folder(tmp_path: Path, names: tuple[str, ...] = ("s1", "s2"), config: dict[str, Any] = CONFIG) -> list[str]:
    """The folder `subjects`, config.json and lists of subjects; returns the arguments of create-hdf5."""
    for seed, name in enumerate(names):
        make_subject(tmp_path / "subjects", name, seed=10 * seed)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "train.txt").write_text("\n".join(names[:1]) + "\n")
    (tmp_path / "valid.txt").write_text("\n".join(names[1:]) + "\n\n")
    paths = [str(tmp_path / name) for name in ("subjects", "config.json", "out.hdf5")]
    lists = ["--training-subjects", str(tmp_path / "train.txt"), "--validation-subjs", str(tmp_path / "valid.txt")]
    return [*paths, *lists]
