"""`dwiml-func track`."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from dwiml_func._checks import pluralize
from dwiml_func.cli._output import folders_above
from dwiml_func.cli._parsing import CommandOptions, optional_value
from dwiml_func.cli._tracking import check_options, header_facts, seed_columns, with_progress
from dwiml_func.core.precision import set_matmul_precision
from dwiml_func.core.rng import Key
from dwiml_func.data.creation.config import Standardization
from dwiml_func.data.interpolation import Interpolation
from dwiml_func.data.resampling import Resampling, lengths_mm, resample_streamlines
from dwiml_func.data.tractogram_writers import new_tractogram
from dwiml_func.experiment.model_store import LoadedModel, find_model, load_model
from dwiml_func.experiment.tracking.input import TrackingInput, read_dataset_input, read_nifti_input
from dwiml_func.experiment.training_facts import TRAINED_ON
from dwiml_func.tracking.processes import track_in_processes
from dwiml_func.tracking.seeds import load_seeds, seeds_in_mask
from dwiml_func.tracking.space import TrackingMask, TrackingSpace
from dwiml_func.tracking.spec import Algorithm, TrackingSpec
from dwiml_func.tracking.track import NUM_ROWS, check_tracking

__all__ = ["Options", "run"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Track streamlines with a model, in a subject of a dataset or in NIfTI files. The same command gives the same
    file, whatever the number of processes; the lines are in the order of their seeds.

    Example: dwiml-func track experiments/first_run data.hdf5 sub_5.trk --subject sub_5 --tracking-mask-group wm_mask

    Example: dwiml-func track experiments/first_run out.trk --input sh.nii.gz --tracking-mask wm.nii.gz
    """

    model_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL_OR_EXPERIMENT_DIR")]
    """A model directory, or an experiment, for its best model."""
    paths: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[HDF5_FILE] OUT.trk|.tck|.trx")]
    """The dataset, unless --input is given, and the tractogram to write; missing folders are made."""

    subject: str | None = None
    """Of the dataset: the subject."""
    input_group_name: str | None = None
    """Of the dataset: the group of the input volume. None: that of the model's training."""
    seeding_mask_group: str | None = None
    """Of the dataset: the group of the mask in which lines start. None: that of --tracking-mask-group."""
    tracking_mask_group: str | None = None
    """Of the dataset: the group of the mask that lines may not leave. None: lines end at the border of the volume."""
    input: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE.nii.gz")] = ()
    """In place of a dataset: NIfTI files of the input volume, joined along their features."""
    seeding_mask: Annotated[str | None, tyro.conf.arg(metavar="FILE.nii.gz")] = None
    """With --input: the mask in which lines start. None: that of --tracking-mask."""
    tracking_mask: Annotated[str | None, tyro.conf.arg(metavar="FILE.nii.gz")] = None
    """With --input: the mask that lines may not leave. None: lines end at the border of the volume."""
    standardization: Standardization | None = None
    """With --input: how to standardise it, as in create-hdf5. None: as the volumes of the model's training."""
    std_mask: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE.nii.gz")] = ()
    """With --input: where to measure mean and deviation. None: in voxels without a zero."""

    algo: Algorithm = "det"
    """Follow the model's best direction, or sample from its distribution."""
    step_size: Annotated[float | None, tyro.conf.arg(metavar="MM")] = None
    """Distance between two points. None: that of the streamlines of the model's training."""
    track_forward_only: bool = False
    """Follow each seed in one direction only."""
    mask_interp: Interpolation = "nearest"
    """How to read the tracking mask between the centres of its voxels; dwi_ml's trilinear is trilinear-corner."""
    data_interp: Interpolation | None = None
    """How to read the input volume. None: as in the model's training."""
    npv: int | None = None
    """Number of seeds in each voxel of the seeding mask. None: 1, unless --nt or --in-custom-seeds is given."""
    nt: int | None = None
    """Number of seeds in all."""
    in_custom_seeds: Annotated[str | None, tyro.conf.arg(metavar="FILE.npy")] = None
    """Seeds of your own: an array (S, 3), voxel space, the corner of the first voxel at 0."""
    min_length: Annotated[float, tyro.conf.arg(metavar="MM")] = 10.0
    """Leave out shorter lines."""
    max_length: Annotated[float, tyro.conf.arg(metavar="MM")] = 300.0
    """End lines at this length, both halves together."""
    theta: Annotated[float, tyro.conf.arg(metavar="DEGREES")] = 90.0
    """Largest angle between two steps; a line with a larger one ends."""
    eos_stop: Annotated[str | None, tyro.conf.arg(metavar="PROBABILITY|max")] = None
    """Of a model with EOS: end lines where its probability is above this, or with max where it is likelier than to
    continue. None: 0.5."""
    discard_last_point: bool = False
    """Leave out the point outside the tracking mask with which a line ends."""
    rng_seed: int = 1234
    """Seed of all random numbers."""
    skip: int = 0
    """Leave out this number of first seeds; the others stay as they are."""

    processes: int = 1
    """Number of processes, on CPUs. It does not change the file."""
    use_gpu: bool = False
    """Track on the GPU. The lines differ from those of a CPU by rounding."""
    simultaneous_tracking: int = 1
    """Number of lines that are followed at once, rounded up to what the model reads at once (512; on a GPU 4096). It
    does not change the file."""
    compress: Annotated[float | None, optional_value(float, float, "[MM]", alone=0.1)] = None
    """Remove points within this distance of a straight line; 0.1 mm without a value. None: keep all points."""
    save_seeds: bool = False
    """Store each line's seed as data per streamline `seeds` (TRK, TRX): voxel space, the first voxel's centre at 0."""
    overwrite: Annotated[bool, tyro.conf.arg(aliases=["-f"])] = False
    """Replace an existing file."""


def run(options: Options) -> int:
    """Track, and write the tractogram."""
    start = time.monotonic()
    out = check_options(options)
    model = load_model(find_model(options.model_dir))
    tracker = model.tracker
    found = _read_input(options, model)
    spec = _spec(options, model)
    seeds, first = _seeds(options, found)
    device = _device(options)
    mask = None if found.tracking_mask is None else found.tracking_mask.to(device)
    space = TrackingSpace(
        volume=found.volume.to(device),
        voxel_sizes=found.voxel_sizes,
        mask=None if mask is None else TrackingMask(values=mask, interpolation=options.mask_interp),
        interpolation=options.data_interp or model.config.data.interpolation,
        neighborhood=model.config.data.neighborhood,
    )
    module = tracker.to(device)
    check_tracking(seeds, module, space, spec)
    results = track_in_processes(
        seeds,
        model=module,
        space=space,
        spec=spec,
        key=Key(options.rng_seed),
        numbers=torch.arange(first, first + len(seeds)),
        num_processes=options.processes,
        num_blocks=-(-options.simultaneous_tracking // NUM_ROWS[device.type]),
    )
    num_lines, total_length = 0, 0.0
    writing = {
        "facts": header_facts(options, model),
        "columns": seed_columns(options.save_seeds),
        "overwrite": options.overwrite,
    }
    with folders_above(out) as path, new_tractogram(path, found.grid, **writing) as file:
        for tracked in with_progress(results, len(seeds)):
            lines = tracked.streamlines
            sizes = torch.tensor(found.voxel_sizes, dtype=torch.float64).expand(len(lines), 3)
            in_mm = lines.points.numpy().astype(np.float64) * np.array(found.voxel_sizes)
            total_length += float(lengths_mm(in_mm, lines.offsets.numpy()).sum())
            if options.compress is not None:
                lines = resample_streamlines(lines, sizes, Resampling(compress=options.compress))
            # As scilpy has them: the origin at the first voxel's centre.
            own = {"seeds": seeds[tracked.seeds - first].numpy() - 0.5} if options.save_seeds else None
            file.write(lines.points.numpy(), lines.offsets.numpy(), own)
            num_lines += len(lines)
    if num_lines == 0:
        _log.warning("No line of at least %g mm: %s has no streamlines.", spec.min_length, out)
    mean = f", mean length {total_length / num_lines:.1f} mm" if num_lines else ""
    print(
        f"{out}: {pluralize(num_lines, 'streamline')} of {pluralize(len(seeds), 'seed')}{mean}; "
        f"{time.monotonic() - start:.1f} s"
    )
    return 0


def _read_input(options: Options, model: LoadedModel) -> TrackingInput:
    if options.input:
        return read_nifti_input(
            options.input,
            model,
            seeding_mask=options.seeding_mask,
            tracking_mask=options.tracking_mask,
            standardization=options.standardization,
            std_masks=options.std_mask,
        )
    return read_dataset_input(
        options.paths[0],
        options.subject or "",
        model,
        input_group=options.input_group_name or model.config.data.input_group_name,
        seeding_group=options.seeding_mask_group,
        tracking_group=options.tracking_mask_group,
    )


def _spec(options: Options, model: LoadedModel) -> TrackingSpec:
    step_size = options.step_size or model.config.batches.step_size or model.facts.get(TRAINED_ON, {}).get("step_size")
    if options.step_size is None and step_size is None:
        raise ValueError("step_size: the model does not say the step of its training. Give --step-size, in mm.")
    eos_stop: float | Literal["max"] | None
    try:
        eos_stop = "max" if options.eos_stop == "max" else None if options.eos_stop is None else float(options.eos_stop)
    except ValueError:
        raise ValueError(f"eos_stop: expected a probability or max, received {options.eos_stop!r}.") from None
    return TrackingSpec(
        step_size=step_size if options.step_size is None else options.step_size,
        algo=options.algo,
        track_forward_only=options.track_forward_only,
        min_length=options.min_length,
        max_length=options.max_length,
        theta=options.theta,
        eos_stop=eos_stop,
        discard_last_point=options.discard_last_point,
    )


def _seeds(options: Options, found: TrackingInput) -> tuple[Tensor, int]:
    """Seeds (N, 3), and the number of the first."""
    if options.in_custom_seeds is not None:
        seeds = load_seeds(options.in_custom_seeds)[options.skip :]
    else:
        mask = found.seeding_mask if found.seeding_mask is not None else found.tracking_mask
        if mask is None:
            option = "--seeding-mask" if options.input else "--seeding-mask-group"
            raise ValueError(f"Expected where lines start. Received no mask. Give {option} or --in-custom-seeds.")
        npv = 1 if options.npv is None and options.nt is None else options.npv
        seeds = seeds_in_mask(mask, npv=npv, nt=options.nt, key=Key(options.rng_seed))[options.skip :]
    if len(seeds) == 0:
        raise ValueError(f"Expected a seed or more. Received: none, after --skip {options.skip}. Ask for more seeds.")
    return seeds, options.skip


def _device(options: Options) -> torch.device:
    torch.set_num_threads(1)
    if options.use_gpu and not torch.cuda.is_available():
        raise ValueError("use_gpu: expected a CUDA GPU. Torch finds none. Leave --use-gpu out.")
    set_matmul_precision("highest")
    return torch.device("cuda" if options.use_gpu else "cpu")
