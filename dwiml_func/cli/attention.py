"""`dwiml-func attention`."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
import tyro
from torch import Tensor

from dwiml_func._checks import pluralize
from dwiml_func.cli._output import new_folder
from dwiml_func.cli._parsing import CommandOptions
from dwiml_func.data.grid import Grid
from dwiml_func.data.hdf5.subject import read_subject_streamlines
from dwiml_func.data.loader import BatchRequest, load_batch
from dwiml_func.data.neighborhood import direction_units
from dwiml_func.data.streamlines import Streamlines
from dwiml_func.data.tractogram_writers import write_trk
from dwiml_func.experiment.batches import check_usable, loader_spec
from dwiml_func.experiment.figures.losses import Colormap, colours_of
from dwiml_func.experiment.figures.plots import save_figure
from dwiml_func.experiment.model_store import LoadedModel, find_model, load_model
from dwiml_func.experiment.point_losses import of_one_subject, resampling_of
from dwiml_func.experiment.tracking.input import read_dataset_input
from dwiml_func.files.atomic import atomic_directory
from dwiml_func.models.transformers.transformer import Transformer
from dwiml_func.models.transformers.weights import AttentionSummary, attention_weights, summary_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Options", "draw_matrices", "run"]


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Show what a transformer attends to along streamlines. The command makes a folder with matrices_ID.png, the
    weights of each layer and head beside the largest of their row, and three coloured tractograms for each attention,
    of the mean over heads: mean_attention (the mean weight that a point has for later ones), importance (the share of
    later points that give it more than an even share of their attention) and looked_far (how many points back the
    important ones lie). Attentions are encoder_1, ..., and of a tto also decoder_1 and cross_1, ...

    Example: dwiml-func attention experiments/transformer data.hdf5 attention --subject sub_4 --ids 0 7
    """

    model_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL_OR_EXPERIMENT_DIR")]
    """A model directory, or an experiment, for its best model."""
    hdf5_file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="HDF5_FILE")]
    """The dataset."""
    out_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT_DIR")]
    """The folder to make; missing folders above are made."""
    subject: str
    """The subject, of whichever subset."""
    ids: tuple[int, ...] = (0,)
    """Numbers of the subject's streamlines, from 0."""
    colormap: Colormap = "viridis"
    """The gradient of the colours; all of these are legible to the colour-blind."""


def run(options: Options) -> int:
    """Run the model on each streamline, and write the folder."""
    model = load_model(find_model(options.model_dir))
    module = model.module
    if not isinstance(module, Transformer):
        raise ValueError(f"Expected a transformer. Received: {model.facts['class']}, which has no attention.")
    with new_folder(options.out_dir) as folder:
        lines, weights, grid = _weights(options, model, module)
        with atomic_directory(folder, replace=False) as out:
            for number, own in zip(options.ids, weights, strict=True):
                figure = draw_matrices(own, title=f"Streamline {number} of {options.subject}")
                save_figure(figure, out / f"matrices_{number}.png")
            for name in weights[0]:
                _write_tractograms(out, name, lines, [own[name] for own in weights], grid, options.colormap)
    print(f"{options.out_dir}: {pluralize(len(lines), 'streamline')}, attentions {', '.join(weights[0])}")
    return 0


def _weights(
    options: Options, model: LoadedModel, module: Transformer
) -> tuple[Streamlines, list[dict[str, Tensor]], Grid]:
    data, path = model.config.data, options.hdf5_file
    found = read_dataset_input(path, options.subject, model, input_group=data.input_group_name)
    lines = read_subject_streamlines(path, options.subject, data.streamline_group_name).streamlines
    if not options.ids or len(set(options.ids)) < len(options.ids):
        raise ValueError(f"ids: expected different numbers, at least one, received {' '.join(map(str, options.ids))}.")
    for number in options.ids:
        if not 0 <= number < len(lines):
            raise ValueError(f"ids: expected numbers from 0 to {len(lines) - 1}, received {number}.")
    dataset = of_one_subject(
        path, options.subject, volume=found.volume, grid=found.grid, lines=lines, resampling=resampling_of(path)
    )
    check_usable(dataset, model.config)
    units = direction_units(dataset.voxel_sizes)[0]
    points, weights = [], []
    for number in options.ids:
        request = BatchRequest(np.array([number]), None, 0, 0)
        batch = load_batch(request, dataset=dataset, spec=loader_spec(model.config))
        points.append((batch.points[: batch.num_points] / units).numpy())
        weights.append(attention_weights(module, batch))
    return Streamlines.from_list(points), weights, found.grid


def _write_tractograms(
    out: Path, name: str, lines: Streamlines, weights: list[Tensor], grid: Grid, colormap: Colormap
) -> None:
    summaries = [summary_of(own.mean(0)) for own in weights]
    for kind in AttentionSummary._fields:
        values = torch.cat([getattr(summary, kind) for summary in summaries]).float().numpy()
        data = {kind: values[:, None], "color": colours_of(values, 0.0, float(values.max()), colormap)}
        write_trk(out / f"{name}_{kind}.trk", grid, lines.points.numpy(), lines.offsets.numpy(), data)


def draw_matrices(weights: dict[str, Tensor], *, title: str) -> Figure:
    """One matrix for each attention (rows) and head (columns): light where a point attends most.

    Weights are shares of the largest of their row: the first rows have few points to attend to, and would outshine the
    others.
    """
    from matplotlib.figure import Figure

    num_heads = len(next(iter(weights.values())))
    figure = Figure(figsize=(1.0 + 1.7 * num_heads, 1.05 + 1.7 * len(weights)))
    axes = figure.subplots(len(weights), num_heads, squeeze=False)
    height = figure.get_figheight()
    figure.subplots_adjust(left=0.9 / figure.get_figwidth(), right=0.99, top=1 - 0.7 / height, bottom=0.65 / height)
    for row, (name, own) in zip(axes, weights.items(), strict=True):
        for head, (panel, matrix) in enumerate(zip(row, own, strict=True), start=1):
            hidden = np.triu(np.ones(matrix.shape, dtype=bool), 1)
            shares = (matrix / matrix.amax(1, keepdim=True)).numpy()
            panel.imshow(np.ma.array(shares, mask=hidden), cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
            panel.tick_params(labelsize=7)
            if name == next(iter(weights)):
                panel.set_title(f"head {head}", fontsize=9)
        row[0].set_ylabel(name, fontsize=9)
    figure.suptitle(title, x=0.02, ha="left", y=1 - 0.12 / height, va="top")
    below = "point attended to (rows: the point that attends; weights / largest of the row)"
    figure.supxlabel(textwrap.fill(below, int(14 * figure.get_figwidth())), fontsize=9)  # about 14 letters an inch
    return figure
