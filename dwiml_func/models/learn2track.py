"""Learn2Track: a recurrent model that reads the signal along a streamline and gives the next direction at each point.

Source: Poulin et al., "Learn to Track: Deep Learning for Tractography", MICCAI 2017; dwi_ml, `learn2track_model.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import dropout

from dwiml_func.data.batch import StreamlineBatch
from dwiml_func.data.streamlines import directions, input_offsets, previous_directions
from dwiml_func.models.baselines import angular_error
from dwiml_func.models.direction_getters import DIRECTION_GETTERS
from dwiml_func.models.packing import packed_layout
from dwiml_func.models.rnn import StackedRNN

__all__ = ["Learn2Track", "compute_batch_loss"]


class Learn2Track(torch.nn.Module):
    """Recurrent layers on the input volume and the previous directions, then a direction getter.

    Parameters have the names they have in dwi_ml, so that its model states load as they are.

    Args:
        nb_features: features of the input volume at a point.
        rnn_key: "lstm" or "gru".
        rnn_layer_sizes: features of each recurrent layer.
        nb_previous_dirs: how many previous directions (voxel space, not normalised, zeros where the streamline had not
            begun) follow the input's features.
        dropout: probability, 0 <= dropout < 1, of dropping a value when training: between recurrent layers and, where
            there are previous directions, in the recurrent layers' input.
        dg_key: a key of `DIRECTION_GETTERS`.
        dg_dropout: the same probability inside the direction getter.

    Raises:
        ValueError: an argument is not one of those above.

    Example:
        >>> model = Learn2Track(28, rnn_layer_sizes=(16, 12), nb_previous_dirs=1)
        >>> [name for name, _ in model.named_parameters()][-2:]
        ['direction_getter.layers.1.weight', 'direction_getter.layers.1.bias']
    """

    def __init__(
        self,
        nb_features: int,
        *,
        rnn_key: str = "lstm",
        rnn_layer_sizes: Sequence[int] = (100, 100),
        nb_previous_dirs: int = 0,
        dropout: float = 0.0,
        dg_key: str = "cosine-regression",
        dg_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if nb_features < 1:
            raise ValueError(f"Expected nb_features of at least 1. Received: {nb_features}")
        if nb_previous_dirs < 0:
            raise ValueError(f"Expected nb_previous_dirs of at least 0. Received: {nb_previous_dirs}")
        if dg_key not in DIRECTION_GETTERS:
            raise ValueError(f"Expected a dg_key among {', '.join(DIRECTION_GETTERS)}. Received: {dg_key!r}")
        self.nb_features = nb_features
        self.nb_previous_dirs = nb_previous_dirs
        self.dropout = dropout
        self.rnn_model = StackedRNN(rnn_key, nb_features + 3 * nb_previous_dirs, rnn_layer_sizes, dropout)
        self.direction_getter = DIRECTION_GETTERS[dg_key](self.rnn_model.output_size, dropout=dg_dropout)

    def forward(self, batch: StreamlineBatch) -> Tensor:
        """Predict at every point that has a next direction, from the streamline up to that point.

        Args:
            batch: S streamlines, N = P - S points that have a next direction, F features.

        Returns:
            (N, K), in the order of `batch.inputs`: the direction getter's outputs (for cosine regression directions in
            voxel space).

        Raises:
            ValueError: the batch does not have the model's number of features, or no point has a next direction.

        Example:
            >>> one = torch.zeros(1, dtype=torch.int64)
            >>> batch = StreamlineBatch(
            ...     points=torch.rand(5, 3), offsets=torch.tensor([0, 5]), subject=one, ids=one, inputs=torch.rand(4, 6)
            ... )
            >>> Learn2Track(6, nb_previous_dirs=2)(batch).shape
            torch.Size([4, 3])
        """
        x = batch.inputs
        if x.shape[1] != self.nb_features:
            raise ValueError(
                f"Expected a batch with {self.nb_features} input features, those the model was made for. "
                f"Received: {x.shape[1]}. Use the input volume that the model was trained on"
            )
        if batch.num_points == 0:
            raise ValueError("Expected a batch with streamlines of two points or more. Received: none")
        offsets = input_offsets(batch.offsets)
        if self.nb_previous_dirs > 0:
            dirs = directions(batch.forward_points, batch.offsets)
            x = torch.cat([x, previous_directions(dirs, offsets, self.nb_previous_dirs)], dim=1)
            x = dropout(x, self.dropout, self.training)
        layout = packed_layout(offsets)
        features = self.rnn_model(layout.pack(x), layout.batch_sizes)
        return layout.unpack(self.direction_getter(features))


def compute_batch_loss(model: Learn2Track, batch: StreamlineBatch) -> tuple[Tensor, int, dict[str, Tensor]]:
    """The loss of a batch, in the form that `dwiml_func.loss.module_loss` takes.

    Args:
        model: the model, in training or in evaluation mode.
        batch: S streamlines, N = P - S points that have a next direction.

    Returns:
        The mean over the N points of the direction getter's loss; N; and `{"angular_error": ...}`, the mean angle in
        degrees between predicted and true directions, without gradient.

    Example:
        >>> one = torch.zeros(1, dtype=torch.int64)
        >>> batch = StreamlineBatch(
        ...     points=torch.rand(5, 3), offsets=torch.tensor([0, 5]), subject=one, ids=one, inputs=torch.rand(4, 6)
        ... )
        >>> loss, weight, aux = compute_batch_loss(Learn2Track(6), batch)
        >>> loss.shape, weight, list(aux)
        (torch.Size([]), 4, ['angular_error'])
    """
    targets = directions(batch.target_points, batch.offsets)
    outputs = model(batch)
    loss = model.direction_getter.losses(outputs, targets).mean()
    predictions = model.direction_getter.directions(outputs.detach())
    return loss, batch.num_points, {"angular_error": angular_error(predictions, targets).mean()}
