"""What a model is asked to track in one subject: its volume, mask and real streamlines; and who else tracks there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dwiml_func.core.rng import Key
from dwiml_func.data.bundles import Bundles
from dwiml_func.data.dataset import StreamlineDataset
from dwiml_func.data.grid import Grid
from dwiml_func.data.hdf5.grid import streamline_grid
from dwiml_func.data.hdf5.layout import group_of, read_volume, subject_group
from dwiml_func.data.hdf5.problems import open_hdf5, raise_first
from dwiml_func.data.resampling import resample_streamlines
from dwiml_func.data.streamlines import Streamlines, scale_streamlines
from dwiml_func.experiment.config import RunConfig
from dwiml_func.tracking.baselines import KeepStraight, NearestDirection, PrincipalDirection, position_space
from dwiml_func.tracking.protocols import Protocol, ProtocolLines, Tracker, ask_tracker, track_protocols
from dwiml_func.tracking.scores import ReferenceBundle, TractogramScores, ceiling_scores, reference_bundles
from dwiml_func.tracking.space import TrackingMask, TrackingSpace
from dwiml_func.tracking.spec import TrackingSpec
from dwiml_func.tracking.window_lag import even_step

__all__ = ["KEEP_STRAIGHT", "MASK_GROUP", "ORACLE", "PRINCIPAL_DIRECTION", "TrackingCase", "tracking_case"]

MASK_GROUP = "wm_mask"
"""The volume group that, where a subject has it, holds the mask of seeds and lines (or --tracking-mask)."""

KEEP_STRAIGHT = "keep going straight"
"""Who tracks as `KeepStraight`."""

PRINCIPAL_DIRECTION = "principal direction"
"""Who tracks as `PrincipalDirection`."""

ORACLE = "nearest real direction"
"""Who tracks as `NearestDirection`."""


class TrackingCase(NamedTuple):
    """A subject in which to track. `real` is in voxel space, `in_mm` the same lines in mm from the corner of the grid;
    `mask` (X, Y, Z) has the free seeds and keeps the lines, if there is one."""

    subject: str
    real: Streamlines
    in_mm: Streamlines
    bundles: Bundles
    references: tuple[ReferenceBundle, ...]
    space: TrackingSpace
    spec: TrackingSpec
    mask: Tensor | None
    grid: Grid
    attributes: Mapping[str, Any]

    def baselines(self) -> dict[str, tuple[Any, TrackingSpace]]:
        """Who tracks beside a model, and in what; without spherical harmonics there is no principal direction."""
        trackers: dict[str, tuple[Any, TrackingSpace]] = {KEEP_STRAIGHT: (KeepStraight(), self.space)}
        if "sh_order" in self.attributes:
            at_the_point = replace(self.space, neighborhood=None)
            trackers[PRINCIPAL_DIRECTION] = (PrincipalDirection(self.attributes), at_the_point)
        trackers[ORACLE] = (NearestDirection(self.real, self.space.voxel_sizes), position_space(self.space))
        return trackers

    def track(self, tracker: Any, space: TrackingSpace, *, key: Key) -> dict[Protocol, ProtocolLines]:
        """Track by the three protocols."""
        return track_protocols(
            tracker,
            self.real,
            self.bundles,
            self.references,
            space=space,
            spec=self.spec,
            seeding_mask=self.mask,
            key=key,
        )

    def ask(self, tracker: Tracker, *, key: Key) -> dict[Protocol, ProtocolLines]:
        """Let a program of others track by the three protocols."""
        return ask_tracker(
            tracker,
            self.real,
            self.bundles,
            self.references,
            space=self.space,
            max_length=self.spec.max_length,
            seeding_mask=self.mask,
            key=key,
        )

    def ceiling(self) -> TractogramScores | None:
        """What half of the real streamlines reaches beside the other half; None where there are too few."""
        return ceiling_scores(self.in_mm, self.bundles, voxel_sizes=self.space.voxel_sizes, key=Key(0))


def tracking_case(dataset: StreamlineDataset, config: RunConfig) -> TrackingCase | None:
    """The first subject of a dataset, read as for a model of this config; None where it does not say of which bundle
    its streamlines are, where they have no even steps, or a bundle has a single one."""
    if dataset.bundles is None:
        return None
    numbers = torch.arange(int(dataset.index.num_streamlines[0]))
    bundles = Bundles(dataset.bundles.names, dataset.bundles.ids[: len(numbers)])
    x, y, z = dataset.voxel_sizes[0].tolist()
    sizes = dataset.voxel_sizes[:1].expand(len(numbers), 3)
    real = resample_streamlines(dataset.streamlines.select(numbers), sizes, config.batches.resampling)
    step = even_step(real, sizes)
    counts = torch.bincount(torch.from_numpy(bundles.ids), minlength=len(bundles.names))
    if step is None or (counts == 1).any() or counts.sum() == 0:
        return None
    in_mm = scale_streamlines(real, dataset.voxel_sizes[0])
    subject = dataset.index.subjects[0]
    mask, grid = _mask_and_grid(dataset, subject, config)
    space = TrackingSpace(
        volume=dataset.volumes[0],
        voxel_sizes=(x, y, z),
        mask=None if mask is None else TrackingMask(values=mask),
        interpolation=config.data.interpolation,
        neighborhood=config.data.neighborhood,
    )
    return TrackingCase(
        subject=subject,
        real=real,
        in_mm=in_mm,
        bundles=bundles,
        references=reference_bundles(in_mm, bundles),
        space=space,
        spec=TrackingSpec(step_size=config.batches.step_size or round(step, 3)),
        mask=mask,
        grid=grid,
        attributes=dataset.input_attributes,
    )


def _mask_and_grid(dataset: StreamlineDataset, subject: str, config: RunConfig) -> tuple[Tensor | None, Grid]:
    """The mask of seeds and lines, where the subject has one, and the grid of its streamlines."""
    name = config.training.tracking_mask or MASK_GROUP
    with open_hdf5(dataset.path) as file:
        parent = raise_first(subject_group(file, subject), dataset.path)
        streamlines = raise_first(group_of(parent, config.data.streamline_group_name, "streamlines"), dataset.path)
        grid = raise_first(streamline_grid(streamlines), dataset.path)
        if name not in parent:
            return None, grid
        group = raise_first(group_of(parent, name, "volume"), dataset.path)
        values = raise_first(read_volume(group), dataset.path)
    mask = torch.from_numpy(values[..., 0])
    return mask if mask.shape == dataset.volumes[0].shape[:3] and bool((mask > 0).any()) else None, grid
