"""The three transformers of dwi_ml: TTS reads the input; TTST input and target in one encoder; TTO in two halves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import dropout

from dwiml_func._checks import check_number, listed
from dwiml_func.data.batch import StreamlineBatch
from dwiml_func.data.neighborhood import Neighborhood
from dwiml_func.data.streamlines import directions, previous_directions
from dwiml_func.models.direction_getters import make_direction_getter
from dwiml_func.models.embeddings import make_embedding, make_input_embedding
from dwiml_func.models.tractography_model import TractographyModel
from dwiml_func.models.transformers.attention import Sequences, sequences_of
from dwiml_func.models.transformers.cache import CachedLine, CachedStep, CacheState, copied
from dwiml_func.models.transformers.layers import (
    Activation,
    Decoder,
    DecoderLayer,
    Encoder,
    EncoderDecoder,
    EncoderLayer,
    Rows,
)
from dwiml_func.models.transformers.tokens import TargetTokens, sinusoidal_encoding

__all__ = ["Kind", "Transformer"]

Kind = Literal["tts", "ttst", "tto"]
"""What a transformer reads: see `Transformer`."""

_LEAST_SIZE = 4  # dwi_ml requires more than 3 embedded features


class Transformer(TractographyModel):
    """Embeddings with positions, causal attention along the streamline, then a direction getter.

    Three kinds differ in what they read. "tts": an encoder over the embedded input. "ttst": an encoder over the
    embedded input and the embedded target, next to each other. "tto": an encoder over the embedded input, and a decoder
    over the embedded target that attends to the encoder. The target at a point is the direction that led to it, and at
    the first point SOS (start of sequence). No point sees what comes after it.

    Options and parameters have dwi_ml's names. The rows of a batch are used as they are; only for attention are
    streamlines of like lengths padded together.

    Args:
        nb_features: features of the input volume at a point.
        model: "tts", "ttst" or "tto".
        neighborhood: points around each point where the inputs are also read; None for the point alone.
        input_embedding_key, input_embedded_size, nb_cnn_filters, kernel_size: as for `Learn2Track`.
        sos_token_type: for ttst and tto: "as_label", a target of 4 numbers; or a sphere of dipy, whose vertices are the
            targets' classes.
        target_embedding_key: for ttst and tto: "no_embedding" or "nn_embedding" (a linear layer and ReLU).
        target_embedded_size: for ttst with nn_embedding: features of the embedded target. With tto they are those of
            the embedded input.
        max_len: the longest streamline, in points, that the model may read; None for any.
        nheads: attention heads; they divide the features of the model, those after embedding.
        n_layers_e, n_layers_d: layers of the encoder and, for tto, of the decoder (None: as many).
        ffnn_hidden_size: features between the two linear layers of a layer; None for half of the model's.
        dropout_rate: probability of dropping a value when training, 0 <= rate < 1, also of attention's weights.
        activation: "relu" or "gelu", between those two linear layers.
        norm_first: normalise before attention and linear layers instead of after them.
        dg_key, dg_args: as for `Learn2Track`.

    Raises:
        ValueError: an argument is out of range, or belongs to another kind.

    Source: Vaswani et al., "Attention Is All You Need", 2017; dwi_ml, `transformer_models.py`.

    Example:
        >>> model = Transformer(6, model="tts", input_embedded_size=16, nheads=4, n_layers_e=1)
        >>> one = torch.zeros(1, dtype=torch.int64)
        >>> batch = StreamlineBatch(
        ...     points=torch.rand(5, 3), offsets=torch.tensor([0, 5]), subject=one, ids=one, inputs=torch.rand(4, 6)
        ... )
        >>> model(batch).shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        nb_features: int,
        *,
        model: Kind,
        neighborhood: Neighborhood | None = None,
        input_embedding_key: str = "nn_embedding",
        input_embedded_size: int | None = None,
        nb_cnn_filters: Sequence[int] | None = None,
        kernel_size: Sequence[int] | None = None,
        sos_token_type: str = "as_label",
        target_embedding_key: str = "nn_embedding",
        target_embedded_size: int | None = None,
        max_len: int | None = None,
        nheads: int = 8,
        n_layers_e: int = 6,
        n_layers_d: int | None = None,
        ffnn_hidden_size: int | None = None,
        dropout_rate: float = 0.1,
        activation: Activation = "relu",
        norm_first: bool = False,
        dg_key: str = "cosine-regression",
        dg_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("nb_features", nb_features), ("nheads", nheads), ("n_layers_e", n_layers_e)):
            check_number(name, value, at_least=1)
        for name, optional in (
            ("max_len", max_len),
            ("n_layers_d", n_layers_d),
            ("ffnn_hidden_size", ffnn_hidden_size),
        ):
            if optional is not None:
                check_number(name, optional, at_least=1)
        check_number("dropout_rate", dropout_rate, at_least=0, below=1)
        _check_kind(model, n_layers_d, target_embedded_size)
        self.kind = model
        self.nb_features = nb_features
        self.input_size = nb_features * (neighborhood.num_points if neighborhood else 1)
        self.nb_previous_dirs = 0 if model == "tts" else 1
        self.max_len = max_len
        self.dropout_rate = dropout_rate
        self.input_embedding_layer = make_input_embedding(
            input_embedding_key,
            nb_features,
            neighborhood,
            embedded_size=input_embedded_size,
            nb_cnn_filters=nb_cnn_filters,
            kernel_size=kernel_size,
        )
        size = self.input_embedding_layer.output_size
        if size < _LEAST_SIZE:
            raise ValueError(
                f"input_embedded_size: expected at least {_LEAST_SIZE} embedded features, received {size}."
            )
        if model != "tts":
            self.tokens = TargetTokens(sos_token_type)
            target_size = size if model == "tto" and target_embedding_key == "nn_embedding" else target_embedded_size
            self.embedding_layer_t = make_embedding(
                "target", target_embedding_key, self.tokens.output_size, target_size
            )
            if model == "ttst":
                size += self.embedding_layer_t.output_size
            elif self.embedding_layer_t.output_size != size:
                raise ValueError(
                    f"target_embedding_key: expected as many features of the target as of the embedded input, {size}, "
                    f"received {self.embedding_layer_t.output_size} with no_embedding. Use nn_embedding."
                )
        _check_size(size, nheads)
        layer = size, nheads, ffnn_hidden_size or size // 2, dropout_rate, activation, norm_first
        encoder = Encoder(EncoderLayer(*layer) for _ in range(n_layers_e))
        self.modified_torch_transformer = encoder  # dwi_ml's name
        if model == "tto":
            decoder = Decoder(DecoderLayer(*layer) for _ in range(n_layers_d or n_layers_e))
            self.modified_torch_transformer = EncoderDecoder(encoder, decoder)
        self.direction_getter = make_direction_getter(dg_key, size, **(dg_args or {}))

    def forward(self, batch: StreamlineBatch) -> Tensor:
        """Predict at every point of the batch's inputs, from the streamline up to that point.

        Args:
            batch: S streamlines, with inputs at N points: those that have a next direction, or with `add_eos` all.

        Returns:
            (N, K), in the order of `batch.inputs`: the direction getter's outputs.

        Raises:
            ValueError: the batch has another number of features than the model, inputs at other points, or none; or a
                streamline has more rows than `max_len`.
        """
        return self.outputs(*self.rows(batch))

    def rows(self, batch: StreamlineBatch) -> tuple[Tensor, Tensor | None, Sequences]:
        """Rows of the encoder and, for tto, of the decoder, and how they attend; errors as in `forward`."""
        self.check_batch(batch)
        offsets = batch.input_offsets
        if self.max_len is not None and not torch.compiler.is_compiling():
            _check_lengths(offsets, self.max_len, batch.padded_length)
        sequences = sequences_of(offsets, batch.num_points, batch.padded_length)
        x, target = self.input_embedding_layer(batch.inputs), None
        if self.kind != "tts":
            dirs = batch.at_inputs(directions(batch.forward_points, batch.offsets))
            previous = previous_directions(dirs, offsets, 1)
            target = self.embedding_layer_t(self.tokens(previous, sequences.positions == 0))
        return *self._encoder_inputs(x, target, sequences.positions), sequences

    def run_step(self, inputs: Tensor, dirs: Tensor, state: CacheState | None = None, /) -> tuple[Tensor, CacheState]:
        """Predict at the next point of S streamlines, for tracking.

        Args:
            inputs: (S, input_size) float, the input volume at (and around) the streamlines' newest points.
            dirs: (S, 3) float, along the voxel axes, the previous direction, any at a streamline's first point; (S, 0)
                for tts.
            state: the state returned by the previous step; None at the streamlines' first points. In a row whose number
                of points read is 0 a new streamline begins.

        Returns:
            The direction getter's outputs (S, K), and the new state: the numbers of points read, and keys and values of
            all of them.

        Raises:
            ValueError: a streamline has more points than `max_len`.

        Example:
            >>> model = Transformer(6, model="tts", input_embedded_size=16, nheads=4, n_layers_e=1).eval()
            >>> outputs, state = model.run_step(torch.zeros(2, 6), torch.zeros(2, 0))
            >>> outputs, state = model.run_step(torch.zeros(2, 6), torch.zeros(2, 0), state)
            >>> outputs.shape, state.num_read.tolist()
            (torch.Size([2, 3]), [2, 2])
        """
        return self.run_step_in_place(inputs, dirs, None if state is None else copied(state))

    def run_step_in_place(
        self, inputs: Tensor, dirs: Tensor, state: CacheState | None = None, /
    ) -> tuple[Tensor, CacheState]:
        """What `run_step` does, writing into the memory of `state`, which is not used again."""
        if state is None:
            state = CacheState(torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device), ())
        if self.max_len is not None and int(state.num_read.max()) >= self.max_len:
            raise _too_long(self.max_len, int(state.num_read.max()) + 1)
        step = CachedStep(*state)
        return self.direction_getter(self._read(inputs, dirs, step)), step.state

    def prefill(self, inputs: Tensor, dirs: Tensor, state: CacheState, row: int, /) -> CacheState:
        """The state in which a new streamline in a row has been read at L points, as by L steps, in one forward pass.

        It writes into the memory of `state`, of a step before; `inputs` (L, input_size) and `dirs` (L, 3) are those of
        `run_step`, at one point after the other.
        """
        line = CachedLine(state, row, len(inputs))
        self._read(inputs, dirs, line)
        return line.state

    def _read(self, inputs: Tensor, dirs: Tensor, rows: CachedStep | CachedLine) -> Tensor:
        """The features of rows with these inputs and previous directions."""
        x, target = self.input_embedding_layer(inputs), None
        if self.kind != "tts":
            target = self.embedding_layer_t(self.tokens(dirs[:, :3], rows.positions == 0))
        return self._features(*self._encoder_inputs(x, target, rows.positions), rows)

    def outputs(self, x: Tensor, y: Tensor | None, rows: Rows) -> Tensor:
        """The direction getter's outputs from the rows of encoder and decoder."""
        return self.direction_getter(self._features(x, y, rows))

    def _features(self, x: Tensor, y: Tensor | None, rows: Rows) -> Tensor:
        layers = self.modified_torch_transformer
        return layers(x, rows) if y is None else layers(x, y, rows)

    def _encoder_inputs(self, x: Tensor, target: Tensor | None, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows of the encoder and, for tto, of the decoder, with their positions."""
        if self.kind == "ttst":
            assert target is not None
            x, target = torch.cat([x, target], dim=1), None
        # bfloat16 cannot tell position 300 from 301
        encoding = sinusoidal_encoding(positions, x.shape[1], torch.promote_types(x.dtype, torch.float32))
        if not torch.is_autocast_enabled(x.device.type):
            encoding = encoding.to(x.dtype)  # of a model that is itself in bfloat16
        x = dropout(x + encoding, self.dropout_rate, self.training)
        return x, None if target is None else dropout(target + encoding, self.dropout_rate, self.training)


def _check_kind(model: str, n_layers_d: int | None, target_embedded_size: int | None) -> None:
    kinds = ("tts", "ttst", "tto")
    if model not in kinds:
        raise ValueError(f"model: expected one of {listed(kinds)}, received {model!r}.")
    if n_layers_d is not None and model != "tto":
        raise ValueError(f"n_layers_d: requires model tto, which has a decoder, received {model}.")
    if target_embedded_size is not None and model != "ttst":
        raise ValueError(
            f"target_embedded_size: requires model ttst, received {model}. "
            + ("The target of tto has the size of the embedded input." if model == "tto" else "tts reads no target.")
        )


def _check_size(size: int, nheads: int) -> None:
    if size % nheads or size % 2:
        raise ValueError(
            f"nheads: expected heads that divide the model's features, an even number, received {nheads} heads and "
            f"{size} features (those of the embedded input, and with ttst those of the embedded target)."
        )


def _check_lengths(offsets: Tensor, max_len: int, padded_length: int | None) -> None:
    if padded_length is not None and padded_length <= max_len:
        return  # without waiting for an accelerator
    longest = int(offsets.diff().max())
    if longest > max_len:
        raise _too_long(max_len, longest)


def _too_long(max_len: int, longest: int) -> ValueError:
    return ValueError(
        f"max_len: expected streamlines of at most {max_len} points, received one with {longest}. Train with a larger "
        "max_len, or resample the streamlines with a larger step size."
    )
