"""`dwiml-func score`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro

from dwiml_func._checks import aligned, check_number, pluralize
from dwiml_func.cli._messages import print_progress
from dwiml_func.cli._output import folders_above
from dwiml_func.cli._parsing import CommandOptions
from dwiml_func.core.rng import Key
from dwiml_func.data.bundles import Bundles
from dwiml_func.data.creation.files import Source
from dwiml_func.data.creation.tractograms import load_streamlines
from dwiml_func.data.hdf5.subject import read_subject_streamlines
from dwiml_func.data.streamlines import Streamlines, scale_streamlines
from dwiml_func.files.atomic import atomic_write
from dwiml_func.files.json import null_if_not_finite
from dwiml_func.tracking.scores import (
    BundleScores,
    ReferenceBundle,
    TractogramScores,
    ceiling_scores,
    reference_bundles,
    score_tractogram,
)

__all__ = ["Options", "run"]

_SHARES = ("valid", "both_ends", "wrong_path", "wrong_connection", "no_connection")
_TABLES = (  # heads and fields; heads that come twice differ by a space
    {
        "streamlines": "num_streamlines",
        **{name.replace("_", " "): name for name in _SHARES},
        "length mm": "length_mm",
        "MDF mm": "mdf_mm",
    },
    {
        "voxels: overlap": "overlap",
        "overreach": "overreach",
        "F1": "f1",
        "within 2 mm: overlap": "overlap_2mm",
        "overreach ": "overreach_2mm",
        "F1 ": "f1_2mm",
    },
)


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Score a tractogram beside the real streamlines of a dataset's subject: for each bundle, how many streamlines join
    its two ends, how many of them also run along it (valid), and how far they cover it. The ceiling is what one half of
    the real streamlines reaches beside the other half.

    Example: dwiml-func score tracked.trk data.hdf5 --subject sub_4
    """

    tractogram: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TRACTOGRAM")]
    """The tracked streamlines: .trk, .tck or .trx."""
    hdf5_file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="HDF5_FILE")]
    """The dataset."""
    subject: str
    """The subject whose streamlines are real, on the tractogram's grid."""
    streamline_group: Annotated[str, tyro.conf.arg(aliases=["--streamline-group-name"])] = "streamlines"
    """Name of the group of real streamlines."""
    nb_seeds: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Number of seeds of the tracking, for shares of them: too short lines are not in the file. None: not known."""
    remove_invalid: bool = False
    """Remove streamlines that leave the volume, have NaN points or have no length; otherwise they are an error."""
    out: Annotated[str | None, tyro.conf.arg(metavar="FILE.json")] = None
    """Write the scores, the ceiling and the thresholds as JSON; an existing file is replaced. None: print only."""


def run(options: Options) -> int:
    """Score the tractogram and print the tables."""
    check_number("nb_seeds", options.nb_seeds, at_least=1)
    real = read_subject_streamlines(options.hdf5_file, options.subject, options.streamline_group)
    if not Path(options.tractogram).is_file():
        raise FileNotFoundError(f"The tractogram does not exist: {options.tractogram}")
    source = Source(options.subject, options.streamline_group, Path(options.tractogram))
    tracked = load_streamlines(
        [source], expected=real.grid, remove_invalid=options.remove_invalid, allow_empty=True, note=print_progress
    )
    sizes = torch.tensor(real.voxel_sizes)
    lines = Streamlines(torch.from_numpy(tracked.points).float() * sizes, torch.from_numpy(tracked.offsets))
    if options.nb_seeds is not None and options.nb_seeds < len(lines):
        raise ValueError(f"nb_seeds: expected at least the {len(lines)} streamlines, received {options.nb_seeds}.")
    real_lines = scale_streamlines(real.streamlines, sizes)
    # Without bundles, all real streamlines are one: how far they are covered can still be said.
    bundles = real.bundles or Bundles(("all",), np.zeros(len(real_lines), dtype=np.int64))
    references = reference_bundles(real_lines, bundles)
    scores = score_tractogram(lines, references, voxel_sizes=real.voxel_sizes)
    ceiling = ceiling_scores(real_lines, bundles, voxel_sizes=real.voxel_sizes, key=Key(0))
    has_bundles = real.bundles is not None
    if options.out is not None:
        data = _as_json(scores, ceiling, references if has_bundles else ())
        data = {"subject": options.subject, "num_real_streamlines": len(real_lines), **data}
        if options.nb_seeds is not None and has_bundles:
            data["of_seeds"] = _of_seeds(scores.all, options.nb_seeds)
        with folders_above(options.out) as path:
            atomic_write(path, json.dumps(null_if_not_finite(data), indent=2) + "\n")
    count = f"{pluralize(len(lines), 'streamline')} beside {len(real_lines)} real ones of {options.subject}"
    print(f"{options.tractogram}: {count}")
    print("\n".join(_text(scores, ceiling, references if has_bundles else (), options.nb_seeds)))
    return 0


def _as_json(
    scores: TractogramScores, ceiling: TractogramScores | None, references: tuple[ReferenceBundle, ...]
) -> dict[str, Any]:
    def to_json(found: TractogramScores) -> dict[str, Any]:
        whole = {"all": _row(found.all, references), "mean": _row(found.mean, references)}
        by_bundle = {name: asdict(of_bundle) for name, of_bundle in found.bundles.items()}
        return {"bundles": by_bundle, **whole} if references else {"all": whole["all"]}

    thresholds = {bundle.name: {"ends_mm": bundle.ends_mm, "mdf_mm": bundle.mdf_mm} for bundle in references}
    return {
        "scores": to_json(scores),
        "ceiling": None if ceiling is None else to_json(ceiling),
        "thresholds": thresholds or None,
    }


def _row(scores: BundleScores, references: tuple[ReferenceBundle, ...]) -> dict[str, Any]:
    """The scores; without bundles those that need none."""
    return {name: value for name, value in asdict(scores).items() if references or name not in _SHARES}


def _of_seeds(scores: BundleScores, nb_seeds: int) -> dict[str, float]:
    share = scores.num_streamlines / nb_seeds
    return {"num_seeds": nb_seeds, "valid": scores.valid * share, "both_ends": scores.both_ends * share}


def _text(
    scores: TractogramScores,
    ceiling: TractogramScores | None,
    references: tuple[ReferenceBundle, ...],
    nb_seeds: int | None,
) -> list[str]:
    rows = dict(scores.bundles) if references else {}
    rows |= {"mean of bundles": scores.mean} if references else {}
    rows["all streamlines"] = scores.all
    if ceiling is not None:
        rows["ceiling"] = ceiling.mean if references else ceiling.all
    lines = []
    for heads in _TABLES:
        shown = {head: name for head, name in heads.items() if references or name not in _SHARES}
        cells = [
            ["", *map(str.strip, shown)],
            *([label, *_cells(row, list(shown.values()))] for label, row in rows.items()),
        ]
        lines += ["", *aligned(cells, indent="  ")]
    if references:
        near = [[bundle.name, f"{bundle.ends_mm:.2f}", f"{bundle.mdf_mm:.2f}"] for bundle in references]
        title = "Thresholds, kept by 95 % of the real streamlines (each left out once; ends: at least 4 mm):"
        lines += ["", title, *aligned([["", "ends mm", "MDF mm"], *near], indent="  ")]
        if nb_seeds is not None:
            of_seeds = _of_seeds(scores.all, nb_seeds)
            lines += ["", f"Of {nb_seeds} seeds: valid {of_seeds['valid']:.3f}, both ends {of_seeds['both_ends']:.3f}"]
    else:
        lines += ["", "The dataset does not say of which bundle its streamlines are: no shares of valid streamlines."]
    return lines


def _cells(scores: BundleScores, names: list[str]) -> list[str]:
    digits = {"num_streamlines": 0, "length_mm": 1, "mdf_mm": 2}
    values = {name: getattr(scores, name) for name in names}
    return ["-" if np.isnan(value) else f"{value:.{digits.get(name, 3)}f}" for name, value in values.items()]
