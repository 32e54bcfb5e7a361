"""Embeddings: the first layers of a model, which turn the inputs at each point into what the next layers read.

Parameters have dwi_ml's names (`embeddings.py`): `linear.weight`, `cnn_0.weight`, ...
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["CNNEmbedding", "NNEmbedding", "NoEmbedding", "make_embedding"]


class NoEmbedding(torch.nn.Module):
    """Leaves its inputs as they are.

    Args:
        input_size: features of an input row.

    Example:
        >>> NoEmbedding(3).output_size
        3
    """

    def __init__(self, input_size: int) -> None:
        super().__init__()
        self.output_size = input_size

    def forward(self, x: Tensor) -> Tensor:
        """Give back the inputs.

        Args:
            x: (N, input_size).

        Returns:
            `x` itself.
        """
        return x


class NNEmbedding(torch.nn.Module):
    """One linear layer, then ReLU.

    Args:
        input_size: features of an input row.
        output_size: features of an output row.

    Raises:
        ValueError: the output size is below 1.

    Source: dwi_ml, `embeddings.py`.

    Example:
        >>> NNEmbedding(3, 5)(torch.zeros(2, 3)).shape
        torch.Size([2, 5])
    """

    def __init__(self, input_size: int, output_size: int) -> None:
        super().__init__()
        if output_size < 1:
            raise ValueError(f"Expected an embedded size of at least 1. Received: {output_size}")
        self.output_size = output_size
        self.linear = torch.nn.Linear(input_size, output_size)

    def forward(self, x: Tensor) -> Tensor:
        """Embed each row.

        Args:
            x: (N, input_size) float.

        Returns:
            (N, output_size), not negative.

        Example:
            >>> NNEmbedding(1, 1)(torch.ones(2, 1)).min() >= 0
            tensor(True)
        """
        return self.linear(x).relu()


class CNNEmbedding(torch.nn.Module):
    """3-D convolutions over a grid neighbourhood, each followed by ReLU; without padding, so each shrinks the grid.

    Args:
        nb_features: features of the volume at one point.
        radius: of the grid: it has K = 2 radius + 1 points a side.
        nb_filters: channels of each layer's output.
        kernel_sizes: side of each layer's cubic kernel, as many as filters.

    Raises:
        ValueError: there is no layer, the numbers of filters and kernels differ, one is below 1, or the kernels are too
            large for the grid.

    Source: dwi_ml, `embeddings.py`; the order of the neighbours, `neighborhood.py`.

    Example:
        >>> embedding = CNNEmbedding(6, radius=2, nb_filters=(8, 4), kernel_sizes=(3, 2))
        >>> embedding.output_size, embedding(torch.zeros(7, 6 * 125)).shape  # 4 channels on 2 x 2 x 2 points
        (32, torch.Size([7, 32]))
    """

    def __init__(
        self, nb_features: int, *, radius: int, nb_filters: Sequence[int], kernel_sizes: Sequence[int]
    ) -> None:
        super().__init__()
        if not nb_filters or len(nb_filters) != len(kernel_sizes) or min(*nb_filters, *kernel_sizes) < 1:
            raise ValueError(
                "Expected numbers of filters and kernel sizes of at least 1, one of each for every layer. "
                f"Received: {list(nb_filters)} and {list(kernel_sizes)}"
            )
        self.side = 2 * radius + 1
        last_side = self.side - sum(size - 1 for size in kernel_sizes)
        if last_side < 1:
            raise ValueError(
                f"Expected kernels that fit one after the other into a grid of {self.side} points a side, which is not "
                f"padded. Received: {list(kernel_sizes)}. Use smaller ones, or a larger neighborhood_radius"
            )
        self.nb_features = nb_features
        self.output_size = nb_filters[-1] * last_side**3
        self._names = [f"cnn_{number}" for number in range(len(nb_filters))]
        channels = [nb_features, *nb_filters]
        for number, name in enumerate(self._names):
            self.add_module(name, torch.nn.Conv3d(channels[number], channels[number + 1], kernel_sizes[number]))

    def forward(self, x: Tensor) -> Tensor:
        """Embed the neighbourhood of each point.

        Args:
            x: (N, K**3 * nb_features) float: the features at the point itself, then those of each neighbour, in the
                order of `dwiml_func.data.neighborhood.neighborhood_vectors` for a grid.

        Returns:
            (N, output_size), not negative: by x, y and z on the grid that is left, channels last.

        Example:
            >>> CNNEmbedding(2, radius=1, nb_filters=(4,), kernel_sizes=(3,))(torch.zeros(5, 54)).shape
            torch.Size([5, 4])
        """
        points = x.reshape(len(x), self.side**3, self.nb_features)
        half = self.side**3 // 2  # the point itself stands first in the list, and in the middle of the grid
        grid = torch.cat([points[:, 1 : half + 1], points[:, :1], points[:, half + 1 :]], dim=1)
        image = grid.reshape(len(x), self.side, self.side, self.side, self.nb_features).permute(0, 4, 1, 2, 3)
        for name in self._names:
            image = self.get_submodule(name)(image).relu()
        return image.permute(0, 2, 3, 4, 1).flatten(1)


def make_embedding(key: str, input_size: int, output_size: int | None) -> NoEmbedding | NNEmbedding:
    """Make an embedding of rows from its key.

    Args:
        key: "no_embedding" or "nn_embedding".
        input_size: features of an input row.
        output_size: features of an output row, with nn_embedding and only then.

    Returns:
        A new module.

    Raises:
        ValueError: the key is neither, or the output size is missing or too much.

    Example:
        >>> make_embedding("nn_embedding", 3, None)
        Traceback (most recent call last):
        ...
        ValueError: nn_embedding: expected an embedded size beside it. Received: none
    """
    if key == "nn_embedding":
        if output_size is None:
            raise ValueError("nn_embedding: expected an embedded size beside it. Received: none")
        return NNEmbedding(input_size, output_size)
    if key != "no_embedding":
        raise ValueError(
            f"Expected an embedding key no_embedding, nn_embedding or, for inputs, cnn_embedding. Received: {key!r}"
        )
    if output_size is not None:
        raise ValueError(f"no_embedding: expected no embedded size beside it. Received: {output_size}")
    return NoEmbedding(input_size)
