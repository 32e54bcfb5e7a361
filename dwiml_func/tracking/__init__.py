"""Tracking: from a trained model and seeds to streamlines, and from streamlines to scores, as pure functions."""

from dwiml_func.tracking.baselines import KeepStraight, NearestDirection, PrincipalDirection, position_space
from dwiml_func.tracking.connectivity import (
    ConnectivityScores,
    connection_counts,
    connectivity_scores,
    end_points,
    mean_square_differences,
    regions_of_blocs,
    regions_of_labels,
)
from dwiml_func.tracking.distances import final_distances, lags
from dwiml_func.tracking.overlap import Overlap, overlap_within, voxel_overlap
from dwiml_func.tracking.processes import track_in_processes
from dwiml_func.tracking.protocols import ProtocolLines, ProtocolScores, score_protocols, track_protocols
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
from dwiml_func.tracking.seeds import seeds_in_mask
from dwiml_func.tracking.space import TrackingMask, TrackingSpace
from dwiml_func.tracking.spec import TrackingSpec
from dwiml_func.tracking.state import TrackState, init_track_state
from dwiml_func.tracking.step import track_step
from dwiml_func.tracking.track import Tracked, track
from dwiml_func.tracking.window_lag import LagWindows, choose_windows, continue_lines, window_lags

__all__ = [
    "BundleScores",
    "ConnectivityScores",
    "KeepStraight",
    "LagWindows",
    "LineScores",
    "NearestDirection",
    "Overlap",
    "PrincipalDirection",
    "ProtocolLines",
    "ProtocolScores",
    "ReferenceBundle",
    "TrackState",
    "Tracked",
    "TrackingMask",
    "TrackingSpace",
    "TrackingSpec",
    "TractogramScores",
    "ceiling_scores",
    "choose_windows",
    "connection_counts",
    "connectivity_scores",
    "continue_lines",
    "end_points",
    "final_distances",
    "init_track_state",
    "lags",
    "mean_square_differences",
    "overlap_within",
    "position_space",
    "reference_bundles",
    "regions_of_blocs",
    "regions_of_labels",
    "score_lines",
    "score_protocols",
    "score_tractogram",
    "seeds_in_mask",
    "track",
    "track_in_processes",
    "track_protocols",
    "track_step",
    "voxel_overlap",
    "window_lags",
]
