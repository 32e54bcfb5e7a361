"""Figures of an autoencoder: its latent space, and streamlines beside their reconstructions."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from dwiml_func.data.batch import StreamlineBatch
from dwiml_func.data.dataset import StreamlineDataset
from dwiml_func.experiment.batches import sampled_batch
from dwiml_func.experiment.figures.panel import COLOURS, GREY, plain_axes
from dwiml_func.experiment.figures.plots import save_figure
from dwiml_func.experiment.figures.streamline_views import VIEWS
from dwiml_func.experiment.reconstruction import to_mm
from dwiml_func.experiment.setup import RunParts
from dwiml_func.models.autoencoder.autoencoder import Autoencoder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["latent_figure", "reconstruction_figure", "save_autoencoder_figures"]

_MOST_DRAWN = 60  # streamlines of the figure of reconstructions
_OTHER = "other bundles"
_AXES = ("x (mm)", "y (mm)", "z (mm)")


def save_autoencoder_figures(directory: Path, model: Autoencoder, parts: RunParts) -> None:
    """Write `plots/latent_space.png` and `plots/reconstructions.png` of the validation; an error is only a warning."""
    try:
        dataset, folder = parts.data.evaluation, directory / "plots"
        batch = sampled_batch(dataset, parts.config)
        points = batch.points.unflatten(0, (-1, model.nb_points))
        with torch.no_grad():
            latent = model.encode(points)
            reconstructed = model.decode(latent)
        factors = to_mm(dataset, batch.subject)
        names = _bundle_names(dataset, batch)
        folder.mkdir(exist_ok=True)
        title = f"{directory.name}, {dataset.subset} streamlines"
        save_figure(latent_figure(latent.numpy(), names, title=title), folder / "latent_space.png")
        figure = reconstruction_figure((points * factors).numpy(), (reconstructed * factors).numpy(), title=title)
        save_figure(figure, folder / "reconstructions.png")
    except Exception as error:
        logging.getLogger(__name__).warning("The figures of %s were not drawn: %s", directory, error)


def latent_figure(latent: NDArray[Any], bundles: Sequence[str] | None, *, title: str) -> Figure:
    """Each streamline's place (S, L) along the two principal components of the latent space, coloured by bundle."""
    from matplotlib.figure import Figure

    centred = latent.astype(np.float64) - latent.mean(axis=0)
    _, values, components = np.linalg.svd(centred, full_matrices=False)
    places = np.zeros((len(latent), 2))
    places[:, : min(2, len(components))] = centred @ components[:2].T
    shares = np.zeros(2)
    shares[: len(values[:2])] = values[:2] ** 2 / max(float((values**2).sum()), np.finfo(np.float64).tiny)
    figure = Figure(figsize=(9, 6.5))
    axes = figure.add_axes((0.09, 0.1, 0.66, 0.8))
    if bundles is None:
        axes.scatter(places[:, 0], places[:, 1], s=14, color=COLOURS[0])
    else:
        labels = np.array(bundles)
        known, counts = np.unique(labels, return_counts=True)
        shown = [str(name) for name in known[np.argsort(-counts, kind="stable")][: len(COLOURS) - 1]]
        rest = ~np.isin(labels, shown)
        entries = {}  # given as they are: in a legend that is made by itself, names that begin with _ are hidden
        if rest.any():
            entries[f"{_OTHER} ({rest.sum()})"] = axes.scatter(places[rest, 0], places[rest, 1], s=14, color=GREY)
        for name, colour in zip(sorted(shown), COLOURS, strict=False):
            own = labels == name
            entries[f"{name} ({own.sum()})"] = axes.scatter(places[own, 0], places[own, 1], s=14, color=colour)
        where = {"loc": "center left", "bbox_to_anchor": (0.76, 0.5)}
        figure.legend([*entries.values()], [*entries], **where, frameon=False, title="bundle (streamlines)")
    axes.set_title(f"Latent space of {title}", loc="left", fontweight="bold")
    axes.set_xlabel(f"first principal component ({100 * shares[0]:.0f} % of the variance)")
    axes.set_ylabel(f"second principal component ({100 * shares[1]:.0f} %)")
    plain_axes(axes)
    return figure


def reconstruction_figure(real: NDArray[Any], reconstructed: NDArray[Any], *, title: str) -> Figure:
    """Streamlines (S, n, 3) in mm beside their reconstructions, in three views; at most 60, at even distances."""
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    errors = np.linalg.norm(reconstructed - real, axis=2).mean(axis=1)
    drawn = np.unique(np.linspace(0, len(real) - 1, min(len(real), _MOST_DRAWN)).astype(int))
    figure = Figure(figsize=(15, 5.6))
    axes: Any = figure.subplots(1, 3)
    figure.subplots_adjust(left=0.05, right=0.99, top=0.8, bottom=0.1, wspace=0.16)
    for panel, (view, first, second) in zip(axes, VIEWS, strict=True):
        for lines, colour, text in ((real, GREY, "streamline"), (reconstructed, COLOURS[1], "reconstruction")):
            paths = lines[drawn][:, :, [first, second]]
            panel.add_collection(LineCollection(list(paths), colors=colour, linewidths=0.9, alpha=0.8, label=text))
        panel.autoscale()
        panel.set_aspect("equal")
        panel.set_title(view, loc="left")
        panel.set_xlabel(_AXES[first])
        panel.set_ylabel(_AXES[second])
        panel.spines[["top", "right"]].set_visible(False)
    handles, texts = axes[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="upper right", frameon=False, ncols=2)
    figure.suptitle(
        f"{title}: {len(drawn)} of {len(real)}, mean distance {errors.mean():.2f} mm", x=0.05, ha="left", y=0.95
    )
    return figure


def _bundle_names(dataset: StreamlineDataset, batch: StreamlineBatch) -> list[str] | None:
    if dataset.bundles is None:
        return None
    return [dataset.bundles.names[number] for number in dataset.bundles.ids[batch.ids.numpy()]]
