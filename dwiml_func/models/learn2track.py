"""Learn2Track: a recurrent model that reads the signal along a streamline and predicts the next direction at each.

Source: Poulin et al., "Learn to Track: Deep Learning for Tractography", MICCAI 2017; dwi_ml, `learn2track_model.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout

from dwiml_func._checks import check_number
from dwiml_func.data.batch import StreamlineBatch
from dwiml_func.data.neighborhood import Neighborhood
from dwiml_func.data.streamlines import directions, previous_directions
from dwiml_func.models.baselines import angular_error
from dwiml_func.models.direction_getters import make_direction_getter
from dwiml_func.models.embeddings import make_embedding, make_input_embedding
from dwiml_func.models.rnn.packing import packed_layout, padded_layout
from dwiml_func.models.rnn.single_step import StepMemory
from dwiml_func.models.rnn.stacked import StackedRNN
from dwiml_func.models.tractography_model import TractographyModel

__all__ = ["Learn2Track", "compute_batch_loss"]

_LEAST_LENGTH = 1e-8  # shorter previous directions are normalised as if they had this length: to almost nothing


class Learn2Track(TractographyModel):
    """Embeddings of the input volume and of the previous directions, recurrent layers, then a direction getter.

    Options and parameters have dwi_ml's names, so its model states load unchanged.

    Args:
        nb_features: features of the input volume at a point.
        neighborhood: points around each point where the inputs are also read; None for the point alone.
        input_embedding_key: "no_embedding", "nn_embedding" (a linear layer and ReLU) or "cnn_embedding" (convolutions
            over a grid neighbourhood).
        input_embedded_size: for nn_embedding: its features.
        nb_cnn_filters, kernel_size: for cnn_embedding: channels and kernel of each layer.
        nb_previous_dirs: number of previous directions (along the voxel axes, zeros before the streamline's start) that
            follow the embedded inputs.
        prev_dirs_embedding_key: "no_embedding" or "nn_embedding".
        prev_dirs_embedded_size: for nn_embedding: features of all previous directions together.
        normalize_prev_dirs: bring previous directions to unit length; those without length stay zero.
        rnn_key: "lstm" or "gru".
        rnn_layer_sizes: features of each recurrent layer.
        use_skip_connection: every recurrent layer also reads the embedded inputs, and the direction getter reads the
            outputs of all layers and the embedded inputs.
        use_layer_normalization: layer normalisation after each recurrent layer.
        dropout: probability, 0 <= dropout < 1, of dropping a value when training: between recurrent layers and, where
            there is an embedding or are previous directions, in the recurrent layers' input.
        dg_key: a key of `DIRECTION_GETTERS`.
        dg_args: the direction getter's options, see `make_direction_getter`: `dropout`, `add_eos`, ...

    Raises:
        ValueError: an argument is out of range, or belongs to another embedding or direction getter.

    Example:
        >>> model = Learn2Track(28, rnn_layer_sizes=(16, 12), nb_previous_dirs=1)
        >>> [name for name, _ in model.named_parameters()][-2:]
        ['direction_getter.layers.1.weight', 'direction_getter.layers.1.bias']
    """

    def __init__(
        self,
        nb_features: int,
        *,
        neighborhood: Neighborhood | None = None,
        input_embedding_key: str = "no_embedding",
        input_embedded_size: int | None = None,
        nb_cnn_filters: Sequence[int] | None = None,
        kernel_size: Sequence[int] | None = None,
        nb_previous_dirs: int = 0,
        prev_dirs_embedding_key: str = "no_embedding",
        prev_dirs_embedded_size: int | None = None,
        normalize_prev_dirs: bool = False,
        rnn_key: str = "lstm",
        rnn_layer_sizes: Sequence[int] = (100, 100),
        use_skip_connection: bool = False,
        use_layer_normalization: bool = False,
        dropout: float = 0.0,
        dg_key: str = "cosine-regression",
        dg_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_number("nb_features", nb_features, at_least=1)
        check_number("nb_previous_dirs", nb_previous_dirs, at_least=0)
        self.nb_features = nb_features
        self.input_size = nb_features * (neighborhood.num_points if neighborhood else 1)
        self.nb_previous_dirs = nb_previous_dirs
        self.normalize_prev_dirs = normalize_prev_dirs
        self.dropout = dropout
        # In dwi_ml's order: the inputs' embedding, that of the previous directions, recurrent layers, getter.
        self.input_embedding_layer = make_input_embedding(
            input_embedding_key,
            nb_features,
            neighborhood,
            embedded_size=input_embedded_size,
            nb_cnn_filters=nb_cnn_filters,
            kernel_size=kernel_size,
        )
        rnn_input_size = self.input_embedding_layer.output_size
        self.prev_dirs_embedding = None
        if nb_previous_dirs > 0:
            self.prev_dirs_embedding = make_embedding(
                "prev_dirs", prev_dirs_embedding_key, 3 * nb_previous_dirs, prev_dirs_embedded_size
            )
            rnn_input_size += self.prev_dirs_embedding.output_size
        elif prev_dirs_embedding_key != "no_embedding" or prev_dirs_embedded_size is not None or normalize_prev_dirs:
            raise ValueError(
                "prev_dirs_embedding_key, prev_dirs_embedded_size and normalize_prev_dirs: require nb_previous_dirs of "
                "at least 1, received 0."
            )
        self._drops_inputs = nb_previous_dirs > 0 or input_embedding_key != "no_embedding"
        self.rnn_model = StackedRNN(
            rnn_key,
            rnn_input_size,
            rnn_layer_sizes,
            dropout,
            use_skip_connection=use_skip_connection,
            use_layer_normalization=use_layer_normalization,
        )
        self.direction_getter = make_direction_getter(dg_key, self.rnn_model.output_size, **(dg_args or {}))

    def forward(self, batch: StreamlineBatch) -> Tensor:
        """Predict at every point of the batch's inputs, from the streamline up to that point.

        Args:
            batch: S streamlines, with inputs at N points: those that have a next direction, or with `add_eos` all.

        Returns:
            (N, K), in the order of `batch.inputs`: the direction getter's outputs (for cosine regression directions in
            along the voxel axes).

        Raises:
            ValueError: the batch has another number of features than the model, inputs at other points, or none.

        Example:
            >>> one = torch.zeros(1, dtype=torch.int64)
            >>> batch = StreamlineBatch(
            ...     points=torch.rand(5, 3), offsets=torch.tensor([0, 5]), subject=one, ids=one, inputs=torch.rand(4, 6)
            ... )
            >>> Learn2Track(6, nb_previous_dirs=2)(batch).shape
            torch.Size([4, 3])
        """
        self.check_batch(batch)
        offsets = batch.input_offsets
        previous = None
        if self.nb_previous_dirs > 0:
            # With EOS the last points have rows too. No point follows them, so the zeros there are never read.
            dirs = batch.at_inputs(directions(batch.forward_points, batch.offsets))
            previous = previous_directions(self._normalized(dirs), offsets, self.nb_previous_dirs)
        if torch.compiler.is_compiling() or batch.padded_length is None:
            layout = packed_layout(offsets, batch.num_points)
        else:
            layout = padded_layout(offsets, batch.num_points, batch.padded_length)
        features = self.rnn_model(layout.pack(self._embedded(batch.inputs, previous)), layout.batch_sizes)
        return layout.unpack(self.direction_getter(features))

    def run_step(
        self, inputs: Tensor, dirs: Tensor, state: Sequence[tuple[Tensor, ...]] | StepMemory | None = None
    ) -> tuple[Tensor, Sequence[tuple[Tensor, ...]]]:
        """Predict at the next point of S streamlines, for tracking.

        Args:
            inputs: (S, input_size) float, the input volume at (and around) the streamlines' newest points.
            dirs: (S, 3 * nb_previous_dirs) float, along the voxel axes, the previous directions, the latest first,
                zeros where there is none.
            state: the recurrent state returned by the previous step; None at the streamlines' first points. To drop
                streamlines, index the rows of all of its tensors.

        Returns:
            The direction getter's outputs (S, K), and the new state: tensors of S rows for each recurrent layer.

        Example:
            >>> model = Learn2Track(6, rnn_layer_sizes=(4,)).eval()
            >>> outputs, state = model.run_step(torch.zeros(2, 6), torch.zeros(2, 0))
            >>> outputs, state = model.run_step(torch.zeros(2, 6), torch.zeros(2, 0), state)
            >>> outputs.shape
            torch.Size([2, 3])
        """
        if isinstance(state, StepMemory):
            state = state.state
        features, state = self.rnn_model.run(self._step_input(inputs, dirs), [len(inputs)], state)
        return self.direction_getter(features), state

    def run_step_in_place(
        self, inputs: Tensor, dirs: Tensor, state: Sequence[tuple[Tensor, ...]] | StepMemory | None = None
    ) -> tuple[Tensor, Sequence[tuple[Tensor, ...]] | StepMemory]:
        """What `run_step` does, to rounding, without gradients, writing into the memory of the last step's state.

        On the CPU the state holds the parameters too, as a step reads them fastest; later changes of them do not count.
        """
        if self.training or inputs.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return self.run_step(inputs, dirs, state)
        with torch.no_grad():
            memory = state if isinstance(state, StepMemory) else self.rnn_model.step_memory(len(inputs), state)
            features, memory = self.rnn_model.run_step(self._step_input(inputs, dirs), memory)
            return self.direction_getter(features), memory

    def _step_input(self, inputs: Tensor, dirs: Tensor) -> Tensor:
        previous = self._normalized(dirs.reshape(-1, 3)).reshape(dirs.shape) if self.nb_previous_dirs > 0 else None
        return self._embedded(inputs, previous)

    def _embedded(self, inputs: Tensor, previous: Tensor | None) -> Tensor:
        x = self.input_embedding_layer(inputs)
        if previous is not None and self.prev_dirs_embedding is not None:
            x = torch.cat([x, self.prev_dirs_embedding(previous)], dim=1)
        return dropout(x, self.dropout, self.training) if self._drops_inputs else x

    def _normalized(self, dirs: Tensor) -> Tensor:
        if not self.normalize_prev_dirs:
            return dirs
        return dirs / dirs.norm(dim=-1, keepdim=True).clamp(min=_LEAST_LENGTH)


def compute_batch_loss(model: TractographyModel, batch: StreamlineBatch) -> tuple[Tensor, int | Tensor, dict[str, Any]]:
    """The loss of a batch, in the form that `module_loss` takes.

    Args:
        model: the model, in training or in evaluation mode.
        batch: S streamlines, with inputs at N of their P points.

    Returns:
        The mean over the N points of the direction getter's loss; its weight N; and `{"angular_error": ...}`, the mean
        angle in degrees between predicted and true directions at the P - S points that have a next direction, without
        gradient. With EOS, where N is P, it is a pair: the mean, and its own weight P - S. Where the batch has
        `is_real`, only real points count, and weights are () int64 tensors.

    Example:
        >>> one = torch.zeros(1, dtype=torch.int64)
        >>> batch = StreamlineBatch(
        ...     points=torch.rand(5, 3), offsets=torch.tensor([0, 5]), subject=one, ids=one, inputs=torch.rand(4, 6)
        ... )
        >>> loss, weight, aux = compute_batch_loss(Learn2Track(6), batch)
        >>> loss.shape, weight, list(aux)
        (torch.Size([]), 4, ['angular_error'])
    """
    outputs = model(batch)
    getter = model.direction_getter
    true_directions = directions(batch.target_points, batch.offsets)
    losses = getter.losses(outputs, batch.at_inputs(true_directions), batch.is_last)
    loss, weight = _mean(losses, batch.is_real)
    predicted = getter.directions(batch.at_directions(outputs.detach()))
    error = _mean(angular_error(predicted, true_directions), batch.has_direction)
    return loss, weight, {"angular_error": error if batch.has_last_points else error[0]}


def _mean(values: Tensor, is_real: Tensor | None) -> tuple[Tensor, int | Tensor]:
    """The mean of values (N,) at rows that are real, and the number of these."""
    if is_real is None:
        return values.mean(), len(values)
    weight = is_real.sum()
    return torch.where(is_real, values, 0.0).sum() / weight, weight
