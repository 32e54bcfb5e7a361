"""`dwiml-func visualize-loss`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from numpy.typing import NDArray

from dwiml_func._checks import check_number, pluralize
from dwiml_func.cli._messages import print_progress
from dwiml_func.cli._output import new_folder
from dwiml_func.cli._parsing import CommandOptions
from dwiml_func.core.rng import Key, numpy_rng
from dwiml_func.data.creation.files import Source
from dwiml_func.data.creation.tractograms import load_streamlines
from dwiml_func.data.grid import Grid
from dwiml_func.data.hdf5.subject import read_subject_streamlines
from dwiml_func.data.resampling import Resampling
from dwiml_func.data.streamlines import Streamlines, offsets_of
from dwiml_func.data.tractogram_writers import write_trk
from dwiml_func.experiment.figures.losses import Colormap, colours_of, draw_eos, draw_losses
from dwiml_func.experiment.figures.plots import save_figure
from dwiml_func.experiment.model_store import LoadedModel, find_model, load_model
from dwiml_func.experiment.point_losses import PointLosses, displacement, of_one_subject, point_losses, resampling_of
from dwiml_func.experiment.tracking.input import read_dataset_input
from dwiml_func.files.atomic import atomic_directory

__all__ = ["Options", "run"]

_TRUE = (213.0, 94.0, 0.0)  # no colour of a gradient comes near it


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Show where along streamlines a model's loss is high. The command makes a folder with loss.trk, coloured by the
    loss; best.trk and worst.trk, the streamlines of least and largest mean loss; displacement.trk, some real
    streamlines, and at each of their points a step in the predicted direction and back; loss.png, histograms and the
    scale of colours. Of a model with EOS also eos_probability.trk, eos_error.trk and eos.png. Data per point: `loss`,
    the values of EOS, and `color`.

    Example: dwiml-func visualize-loss experiments/first_run data.hdf5 losses --subject sub_4
    """

    model_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL_OR_EXPERIMENT_DIR")]
    """A model directory, or an experiment, for its best model."""
    hdf5_file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="HDF5_FILE")]
    """The dataset."""
    out_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT_DIR")]
    """The folder to make; missing folders above are made."""
    subject: str
    """The subject, of whichever subset."""
    input_group_name: str | None = None
    """Name of the input volume's group. None: that of the model's training."""
    streamline_group_name: str | None = None
    """Name of the streamlines' group. None: that of the model's training."""
    streamlines_file: Annotated[str | None, tyro.conf.arg(metavar="TRACTOGRAM")] = None
    """Streamlines of your own in place of the dataset's, on the subject's grid: .trk, .tck or .trx."""
    best_and_worst: Annotated[float, tyro.conf.arg(metavar="PERCENT")] = 10.0
    """How many of the streamlines best.trk and worst.trk have each, at least one."""
    displacement: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """How many streamlines displacement.trk shows, chosen at random, the same ones in every run; 0: no such file."""
    colormap: Colormap = "viridis"
    """The gradient of the colours; all of these are legible to the colour-blind."""
    min_range: float | None = None
    """The loss of the first colour; smaller ones have it too. None: the 1st percentile of the losses."""
    max_range: float | None = None
    """The loss of the last colour; larger ones have it too. None: the 99th percentile of the losses."""
    batch_size: int = 100
    """Number of streamlines that the model reads at once. It affects only the rounding."""
    num_threads: int = 1
    """Number of CPU threads."""


def run(options: Options) -> int:
    """Compute the losses, and write the folder."""
    _check(options)
    torch.set_num_threads(options.num_threads)
    model = load_model(find_model(options.model_dir))
    with new_folder(options.out_dir) as folder:
        losses, grid = _losses(options, model)
        low, high = _range(options, losses.loss)
        with atomic_directory(folder, replace=False) as out:
            _write(out, options, losses, grid, low, high)
            names = sorted(path.name for path in out.iterdir())
    lines = [
        f"{pluralize(len(losses.lines), 'streamline')} of {options.subject}, {len(losses.loss)} points",
        _describe("Loss by point", losses.loss),
        _describe("Loss by streamline", losses.by_streamline),
        *([] if losses.eos_error is None else [_describe("Error of EOS by point", losses.eos_error)]),
        f"Colours: {options.colormap}, from {low:.4g} to {high:.4g}",
        f"{options.out_dir}: {', '.join(names)}",
    ]
    print("\n".join(lines))
    return 0


def _check(options: Options) -> None:
    for name, bounds in (("batch_size", 1), ("num_threads", 1), ("displacement", 0)):
        check_number(name, getattr(options, name), at_least=bounds)
    if not 0 < options.best_and_worst <= 100:
        raise ValueError(
            f"best_and_worst: expected a percentage above 0, up to 100, received {options.best_and_worst}."
        )
    for name in ("min_range", "max_range"):
        value = getattr(options, name)
        if value is not None and not np.isfinite(value):
            raise ValueError(f"{name}: expected a finite loss, received {value}.")


def _losses(options: Options, model: LoadedModel) -> tuple[PointLosses, Grid]:
    data = model.config.data
    real = None
    found = read_dataset_input(
        options.hdf5_file, options.subject, model, input_group=options.input_group_name or data.input_group_name
    )
    if options.streamlines_file is None:
        group = options.streamline_group_name or data.streamline_group_name
        real = read_subject_streamlines(options.hdf5_file, options.subject, group)
        lines, resampling = real.streamlines, resampling_of(options.hdf5_file)
    else:
        if not Path(options.streamlines_file).is_file():
            raise FileNotFoundError(f"The tractogram does not exist: {options.streamlines_file}")
        source = Source(options.subject, "streamlines_file", Path(options.streamlines_file))
        given = load_streamlines([source], expected=found.grid, note=lambda line: print_progress(line))
        lines = Streamlines(torch.from_numpy(given.points).float(), torch.from_numpy(given.offsets))
        resampling = Resampling()
    if bool((lines.lengths < 2).any()):
        raise ValueError("Expected streamlines of two points or more. Received: one of a single point.")
    dataset = of_one_subject(
        options.hdf5_file, options.subject, volume=found.volume, grid=found.grid, lines=lines, resampling=resampling
    )
    return point_losses(model, dataset, batch_size=options.batch_size), found.grid


def _range(options: Options, loss: NDArray[np.float32]) -> tuple[float, float]:
    low, high = np.percentile(loss, [1, 99]).tolist()
    low = low if options.min_range is None else options.min_range
    high = high if options.max_range is None else options.max_range
    if low > high or (low == high and None not in (options.min_range, options.max_range)):
        raise ValueError(
            f"Expected a range of colours from a smaller loss to a larger one. Received: {low:g} to {high:g}. "
            "Change --min-range or --max-range."
        )
    return low, high


def _write(out: Path, options: Options, losses: PointLosses, grid: Grid, low: float, high: float) -> None:
    title = f"{Path(options.model_dir).resolve().name}: {options.subject}, {pluralize(len(losses.lines), 'streamline')}"

    def coloured(name: str, part: PointLosses, values: NDArray[np.float32], low: float, high: float) -> None:
        data = {"loss": part.loss[:, None], "color": colours_of(values, low, high, options.colormap)}
        if part.eos is not None and part.eos_error is not None:
            data |= {"eos_probability": part.eos[:, None], "eos_error": part.eos_error[:, None]}
        write_trk(out / name, grid, part.lines.points.numpy(), part.lines.offsets.numpy(), data)

    coloured("loss.trk", losses, losses.loss, low, high)
    order = np.argsort(losses.by_streamline, kind="stable")
    num = max(1, round(len(order) * options.best_and_worst / 100))
    for name, ids in (("best.trk", order[:num]), ("worst.trk", order[::-1][:num])):
        part = losses.select(ids)
        coloured(name, part, part.loss, low, high)
    if losses.eos is not None and losses.eos_error is not None:
        coloured("eos_probability.trk", losses, losses.eos, 0.0, 1.0)
        coloured("eos_error.trk", losses, losses.eos_error, 0.0, 1.0)
        save_figure(draw_eos(losses, title=title), out / "eos.png")
    if options.displacement > 0:
        chosen = np.sort(numpy_rng(Key(0)).permutation(len(order))[: options.displacement])
        _write_displacement(out / "displacement.trk", losses.select(chosen), grid, options.colormap)
    save_figure(draw_losses(losses, low, high, options.colormap, title=title), out / "loss.png")


def _write_displacement(path: Path, losses: PointLosses, grid: Grid, colormap: Colormap) -> None:
    """The real streamlines in one colour, then their zigzags, coloured from the first point to the last."""
    zigzags, lengths = displacement(losses), 3 * losses.lines.lengths
    place = torch.arange(len(zigzags.points)) - zigzags.offsets[:-1].repeat_interleave(lengths)
    share = place / (lengths - 1).clamp(min=1).repeat_interleave(lengths)
    true = np.broadcast_to(np.array(_TRUE), (len(losses.loss), 3))
    colour = np.concatenate([true, colours_of(share, 0.0, 1.0, colormap)])
    points = torch.cat([losses.lines.points, zigzags.points]).numpy()
    offsets = offsets_of(torch.cat([losses.lines.lengths, lengths])).numpy()
    write_trk(path, grid, points, offsets, {"color": colour})


def _describe(name: str, values: NDArray[np.floating]) -> str:
    return f"{name}: mean {values.mean():.6g}, deviation {values.std():.6g}, {values.min():.6g} to {values.max():.6g}"
