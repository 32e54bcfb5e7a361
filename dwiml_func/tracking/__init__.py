"""Tracking: from a trained model and seeds to streamlines, and from streamlines to scores, as pure functions."""

from dwiml_func.tracking.connectivity import (
    ConnectivityScores,
    connection_counts,
    connectivity_scores,
    end_points,
    regions_of_blocs,
    regions_of_labels,
)
from dwiml_func.tracking.lag import final_distances, lags, remainder
from dwiml_func.tracking.overlap import Overlap, overlap_within, voxel_overlap
from dwiml_func.tracking.scores import (
    BundleScores,
    LineScores,
    ReferenceBundle,
    TractogramScores,
    ceiling_scores,
    reference_bundles,
    score_lines,
    score_tractogram,
)

__all__ = [
    "BundleScores",
    "ConnectivityScores",
    "LineScores",
    "Overlap",
    "ReferenceBundle",
    "TractogramScores",
    "ceiling_scores",
    "connection_counts",
    "connectivity_scores",
    "end_points",
    "final_distances",
    "lags",
    "overlap_within",
    "reference_bundles",
    "regions_of_blocs",
    "regions_of_labels",
    "remainder",
    "score_lines",
    "score_tractogram",
    "voxel_overlap",
]
