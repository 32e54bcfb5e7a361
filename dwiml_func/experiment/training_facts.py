"""What a model was trained on: recorded in `model.json`, compared with the volume that it shall track in."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from dwiml_func.data.dataset import StreamlineDataset
from dwiml_func.data.grid import orientation_of

__all__ = ["TRAINED_ON", "check_dataset", "check_same_kind", "training_facts", "volume_facts"]

TRAINED_ON = "trained_on"
"""The key of the facts in `model.json`; models of earlier versions, and of dwi_ml, do not have it."""

_TEXTS = {
    "sh_basis": "the SH basis",
    "sh_order": "the SH order",
    "sh_legacy": "the legacy form of the SH basis",
    "sh_of": "what the SH describe",
    "standardization": "the standardization",
    "orientation": "the orientation of the voxel axes",
}
_SHARE = 0.01  # by which voxel sizes may differ


def training_facts(dataset: StreamlineDataset) -> dict[str, Any]:
    """JSON data about a training set: `volume_facts`, voxel sizes, and the step in mm of its streamlines.

    orientation: where the voxel axes point, such as "RAS"; directions are along them.
    voxel_sizes: the smallest and the largest of all subjects, mm along the three axes.
    """
    facts, sizes = volume_facts(dataset.input_attributes), dataset.voxel_sizes.double().numpy()
    facts["voxel_sizes"] = [np.round(sizes.min(axis=0), 4).tolist(), np.round(sizes.max(axis=0), 4).tolist()]
    if dataset.affine is not None:
        facts["orientation"] = orientation_of(dataset.affine)
    facts["step_size"] = dataset.resampling.step_size
    return facts


def volume_facts(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """JSON data about the kind of a volume, from the attributes of its group: what they say of it.

    standardization: "independent" where each feature has its own mean, "all" where all have one.
    """
    facts = {name: attributes[name] for name in _TEXTS if isinstance(attributes.get(name), str | int | bool)}
    mean = attributes.get("standardization_mean")
    if mean is not None:
        width = np.atleast_1d(np.asarray(mean)).shape[-1]  # there may be a row for each subject
        facts["standardization"] = "all" if width == 1 else "independent"
    return facts


def check_dataset(trained_on: Mapping[str, Any], dataset: StreamlineDataset, *, source: str) -> None:
    """Raise ValueError for a dataset with volumes of another kind than in the training; warn of other voxel sizes."""
    facts = training_facts(dataset)
    check_same_kind({name: trained_on[name] for name in _TEXTS if name in trained_on}, facts, (), source=source)
    try:
        for sizes in facts["voxel_sizes"]:
            check_same_kind(trained_on, {}, sizes, source=source)
    except ValueError as error:
        logging.getLogger(__name__).warning("%s", error)


def check_same_kind(
    trained_on: Mapping[str, Any], facts: Mapping[str, Any], voxel_sizes: ArrayLike, *, source: str
) -> None:
    """Raise ValueError, which begins with `source`, for a volume of another kind than those of the training.

    What one of both does not say is not compared.
    """
    for name, text in _TEXTS.items():
        if name in trained_on and name in facts and trained_on[name] != facts[name]:
            raise ValueError(
                f"{source}: expected {text} {trained_on[name]!r}, as in the model's training ({name}). "
                f"Received: {facts[name]!r}. Make the volume as that of the training was made."
            )
    if "voxel_sizes" in trained_on:
        lowest, highest = (np.asarray(sizes) for sizes in trained_on["voxel_sizes"])
        sizes = np.asarray(voxel_sizes, dtype=np.float64)
        if ((sizes < lowest * (1 - _SHARE)) | (sizes > highest * (1 + _SHARE))).any():
            texts = [" x ".join(f"{size:.4g}" for size in row) for row in (lowest, highest, sizes)]
            expected = texts[0] if texts[0] == texts[1] else f"{texts[0]} to {texts[1]}"
            raise ValueError(
                f"{source}: expected voxels of {expected} mm, as in the model's training. Received: {texts[2]} mm. "
                "Resample the volume."
            )
