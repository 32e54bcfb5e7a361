"""Embeddings: the first layers of a model, on the input volume and on the previous directions.

Parameters have dwi_ml's names (`embeddings.py` there): `linear.weight`, `cnn_0.weight`, ...
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dwiml_func._checks import check_choice, check_number
from dwiml_func.data.neighborhood import Neighborhood

__all__ = ["CNNEmbedding", "NNEmbedding", "NoEmbedding", "make_embedding", "make_input_embedding"]


class NoEmbedding(torch.nn.Module):
    """Returns its inputs, (N, input_size)."""

    def __init__(self, input_size: int) -> None:
        super().__init__()
        self.output_size = input_size

    def forward(self, x: Tensor) -> Tensor:
        """Return the inputs themselves."""
        return x


class NNEmbedding(torch.nn.Module):
    """One linear layer, then ReLU: (N, input_size) to (N, output_size)."""

    def __init__(self, input_size: int, output_size: int) -> None:
        super().__init__()
        self.output_size = output_size
        self.linear = torch.nn.Linear(input_size, output_size)

    def forward(self, x: Tensor) -> Tensor:
        """Embed each row."""
        return self.linear(x).relu()


class CNNEmbedding(torch.nn.Module):
    """3-D convolutions over a grid neighbourhood, each followed by ReLU; without padding, so each shrinks the grid.

    The grid has K = 2 radius + 1 points a side. `nb_cnn_filters` are the channels of each layer's output, `kernel_size`
    the side of each layer's cubic kernel.

    Source: dwi_ml, `embeddings.py`; the order of the neighbours, `neighborhood.py`.
    """

    def __init__(
        self, nb_features: int, *, radius: int, nb_cnn_filters: Sequence[int], kernel_size: Sequence[int]
    ) -> None:
        super().__init__()
        if not nb_cnn_filters or len(nb_cnn_filters) != len(kernel_size):
            raise ValueError(
                "nb_cnn_filters, kernel_size: cnn_embedding requires both, one of each for every layer, "
                f"received {list(nb_cnn_filters)} and {list(kernel_size)}."
            )
        for num_filters, size in zip(nb_cnn_filters, kernel_size, strict=True):
            check_number("nb_cnn_filters", num_filters, at_least=1)
            check_number("kernel_size", size, at_least=1)
        self.side = 2 * radius + 1
        last_side = self.side - sum(size - 1 for size in kernel_size)
        if last_side < 1:
            raise ValueError(
                f"kernel_size: expected kernels that fit one after the other into a grid of {self.side} points a side, "
                f"received {list(kernel_size)}. Use smaller kernels or a larger neighborhood_radius."
            )
        self.nb_features = nb_features
        self.output_size = nb_cnn_filters[-1] * last_side**3
        self._names = [f"cnn_{number}" for number in range(len(nb_cnn_filters))]
        channels = [nb_features, *nb_cnn_filters]
        for number, name in enumerate(self._names):
            self.add_module(name, torch.nn.Conv3d(channels[number], channels[number + 1], kernel_size[number]))

    def forward(self, x: Tensor) -> Tensor:
        """Embed the features (N, K**3 * nb_features) of each point, then of its neighbours as `neighborhood_vectors`.

        The result (N, output_size) is the remaining grid by x, y and z, channels last.
        """
        points = x.reshape(len(x), self.side**3, self.nb_features)
        half = self.side**3 // 2  # the point itself is first in the list, and in the middle of the grid
        grid = torch.cat([points[:, 1 : half + 1], points[:, :1], points[:, half + 1 :]], dim=1)
        image = grid.reshape(len(x), self.side, self.side, self.side, self.nb_features).permute(0, 4, 1, 2, 3)
        for name in self._names:
            image = self.get_submodule(name)(image).relu()
        return image.permute(0, 2, 3, 4, 1).flatten(1)


def make_embedding(kind: str, key: str, input_size: int, embedded_size: int | None) -> NoEmbedding | NNEmbedding:
    """An embedding of rows from its key, no_embedding or nn_embedding; `kind` is "input" or "prev_dirs", for errors."""
    check_choice(f"{kind}_embedding_key", key, ("no_embedding", "nn_embedding"))
    if key == "no_embedding":
        if embedded_size is not None:
            raise ValueError(f"{kind}_embedded_size: requires {kind}_embedding_key nn_embedding, received {key}.")
        return NoEmbedding(input_size)
    if embedded_size is None:
        raise ValueError(f"{kind}_embedding_key: nn_embedding requires {kind}_embedded_size, received none.")
    check_number(f"{kind}_embedded_size", embedded_size, at_least=1)
    return NNEmbedding(input_size, embedded_size)


def make_input_embedding(
    key: str,
    nb_features: int,
    neighborhood: Neighborhood | None,
    *,
    embedded_size: int | None,
    nb_cnn_filters: Sequence[int] | None,
    kernel_size: Sequence[int] | None,
) -> NoEmbedding | NNEmbedding | CNNEmbedding:
    """An embedding of the input volume from its key, which may also be cnn_embedding."""
    if key != "cnn_embedding":
        if nb_cnn_filters is not None or kernel_size is not None:
            raise ValueError(f"nb_cnn_filters, kernel_size: require input_embedding_key cnn_embedding, received {key}.")
        num_points = neighborhood.num_points if neighborhood else 1
        return make_embedding("input", key, nb_features * num_points, embedded_size)
    if embedded_size is not None:
        raise ValueError(f"input_embedded_size: requires input_embedding_key nn_embedding, received {key}.")
    if neighborhood is None or neighborhood.type != "grid":
        kind = neighborhood.type if neighborhood else "none"
        raise ValueError(f"input_embedding_key: cnn_embedding requires neighborhood_type grid, received {kind}.")
    return CNNEmbedding(
        nb_features, radius=neighborhood.radius, nb_cnn_filters=nb_cnn_filters or (), kernel_size=kernel_size or ()
    )
