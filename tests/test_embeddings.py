"""Embeddings: against plain formulas in numpy and scipy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dwiml_func.core.rng import Key, torch_rng
from dwiml_func.data.neighborhood import Neighborhood, neighborhood_vectors
from dwiml_func.models.embeddings import CNNEmbedding, NNEmbedding, NoEmbedding, make_embedding, make_input_embedding

RNG = np.random.default_rng(2)


def cnn(nb_features: int, radius: int, nb_filters: tuple[int, ...], kernel_sizes: tuple[int, ...]) -> CNNEmbedding:
    with torch_rng(Key(0)):
        return CNNEmbedding(nb_features, radius=radius, nb_cnn_filters=nb_filters, kernel_size=kernel_sizes).double()


def test_no_embedding_gives_back_its_inputs_and_has_no_parameters():
    embedding, x = NoEmbedding(5), torch.ones(2, 5)
    assert embedding(x) is x
    assert embedding.output_size == 5
    assert embedding.state_dict() == {}


def test_nn_embedding_is_a_linear_layer_and_relu():
    with torch_rng(Key(0)):
        embedding = NNEmbedding(4, 7).double()
    x = RNG.normal(size=(9, 4))
    weight, bias = (tensor.detach().numpy() for tensor in (embedding.linear.weight, embedding.linear.bias))
    expected = np.maximum(x @ weight.T + bias, 0)
    np.testing.assert_allclose(embedding(torch.from_numpy(x)).detach(), expected, rtol=1e-12, atol=1e-12)
    assert (expected == 0).any()
    assert (expected > 0).any()
    assert list(embedding.state_dict()) == ["linear.weight", "linear.bias"]


@pytest.mark.parametrize(
    ("nb_features", "radius", "nb_filters", "kernel_sizes"),
    [(1, 1, (2,), (3,)), (3, 1, (4,), (2,)), (2, 1, (3, 5), (2, 2)), (2, 2, (3, 4), (3, 2)), (2, 1, (2,), (1,))],
)
def test_cnn_embedding_correlates_the_grid_with_each_filter(nb_features, radius, nb_filters, kernel_sizes):
    from scipy.signal import correlate  # takes a second to import

    embedding = cnn(nb_features, radius, nb_filters, kernel_sizes)
    vectors = neighborhood_vectors(Neighborhood(type="grid", radius=radius, resolution=0.5))
    flat = RNG.normal(size=(4, len(vectors), nb_features))
    # Each neighbour at its place on the grid, by its vector.
    side = 2 * radius + 1
    image = np.full((4, nb_features, side, side, side), np.nan)
    for number, (x, y, z) in enumerate((vectors / 0.5).round().long().add(radius).tolist()):
        image[:, :, x, y, z] = flat[:, number]
    for layer in range(len(nb_filters)):
        parameters = [embedding.state_dict()[f"cnn_{layer}.{kind}"].numpy() for kind in ("weight", "bias")]
        image = np.stack(
            [
                [
                    np.maximum(correlate(row, kernel, mode="valid")[0] + bias, 0)
                    for kernel, bias in zip(*parameters, strict=True)
                ]
                for row in image
            ]
        )
    expected = np.moveaxis(image, 1, -1).reshape(4, -1)  # by x, y, z, channels last
    found = embedding(torch.from_numpy(flat.reshape(4, -1))).detach()
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
    assert found.shape == (4, embedding.output_size)


@pytest.mark.parametrize("embedding", [NNEmbedding(27, 4).double(), cnn(1, 1, (2, 3), (2, 2))], ids=["nn", "cnn"])
def test_gradients_agree_with_finite_differences(embedding):
    x = torch.from_numpy(RNG.normal(size=(3, 27))).requires_grad_()
    parameters = list(embedding.parameters())

    def outputs(x: torch.Tensor, *values: torch.Tensor) -> Any:
        named = dict(zip(embedding.state_dict(), values, strict=True))
        return torch.func.functional_call(embedding, named, (x,))

    assert torch.autograd.gradcheck(outputs, (x, *parameters))


def test_no_rows_give_no_rows():
    assert cnn(2, 1, (4,), (3,))(torch.zeros(0, 54, dtype=torch.float64)).shape == (0, 4)
    assert NNEmbedding(3, 2)(torch.zeros(0, 3)).shape == (0, 2)


def test_a_key_makes_its_embedding():
    assert isinstance(make_embedding("input", "no_embedding", 3, None), NoEmbedding)
    made = make_embedding("input", "nn_embedding", 3, 5)
    assert isinstance(made, NNEmbedding)
    assert made.output_size == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("cnn_embedding", 3, None),
            "^prev_dirs_embedding_key: expected one of no_embedding, nn_embedding, received 'cnn",
        ),
        (
            ("nn_embedding", 3, None),
            "^prev_dirs_embedding_key: nn_embedding requires prev_dirs_embedded_size, received",
        ),
        (("nn_embedding", 3, 0), "^prev_dirs_embedded_size: expected a finite number at least 1 .* received 0.$"),
        (
            ("no_embedding", 3, 4),
            "^prev_dirs_embedded_size: requires prev_dirs_embedding_key nn_embedding, received no",
        ),
    ],
)
def test_what_makes_no_embedding_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_embedding("prev_dirs", *arguments)


@pytest.mark.parametrize(
    ("nb_filters", "kernel_sizes", "message"),
    [
        ((), (), r"requires both, one of each for every layer, received \[\] and \[\]\.$"),
        ((4,), (3, 2), r"received \[4\] and \[3, 2\]\.$"),
        ((0,), (3,), r"^nb_cnn_filters: .* received 0\.$"),
        ((4,), (0,), r"^kernel_size: .* received 0\.$"),
        ((4,), (4,), r"grid of 3 points a side, received \[4\]\."),
        ((4, 4), (3, 2), r"received \[3, 2\]\. Use smaller kernels or a larger neighborhood_radius\.$"),
    ],
)
def test_convolutions_that_do_not_fit_are_refused(nb_filters, kernel_sizes, message):
    with pytest.raises(ValueError, match=message):
        cnn(2, 1, nb_filters, kernel_sizes)


def test_cnn_embedding_needs_a_grid_and_takes_its_radius():
    options = {"embedded_size": None, "nb_cnn_filters": (2,), "kernel_size": (3,)}
    grid = make_input_embedding("cnn_embedding", 2, Neighborhood(type="grid", radius=2), **options)
    assert grid(torch.zeros(1, 2 * 125)).shape == (1, grid.output_size)
    assert grid.output_size == 2 * 27  # a kernel of 3 leaves 3 of 5 places along each axis
    for neighborhood, kind in ((None, "none"), (Neighborhood(type="axes"), "axes")):
        with pytest.raises(ValueError, match=f"cnn_embedding requires neighborhood_type grid, received {kind}"):
            make_input_embedding("cnn_embedding", 2, neighborhood, **options)
