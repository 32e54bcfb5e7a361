"""Claims about Learn2Track in a compiled step: one graph for batches of any length, for each direction getter."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from dwiml_func import Key, init_state, module_loss, sgd, train_step
from dwiml_func.compiled.gradient import JitGradient
from dwiml_func.compiled.step import jit_step
from dwiml_func.core.gradients import value_and_grad
from dwiml_func.core.rng import torch_rng
from dwiml_func.data.batch import StreamlineBatch
from dwiml_func.data.streamlines import offsets_of
from dwiml_func.models.baselines import angular_error
from dwiml_func.models.direction_getters import DIRECTION_GETTERS, DirectionGetter, make_direction_getter
from dwiml_func.models.learn2track import Learn2Track, compute_batch_loss

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
NUM_FEATURES = 5


def some_batch(number: int, num_streamlines: int, *, add_eos: bool = False) -> StreamlineBatch:
    generator = torch.Generator().manual_seed(number)
    lengths = torch.randint(2, 12, (num_streamlines,), generator=generator)
    offsets = offsets_of(lengths)
    num_points = int(offsets[-1])
    steps = torch.randn(num_points, 3, generator=generator) * 0.3 + 1
    num_inputs = num_points if add_eos else num_points - num_streamlines
    return StreamlineBatch(
        points=steps.cumsum(0),
        offsets=offsets,
        subject=torch.zeros(num_streamlines, dtype=torch.int64),
        ids=torch.arange(num_streamlines),
        inputs=torch.randn(num_inputs, NUM_FEATURES, generator=generator),
    )


def compare(model: torch.nn.Module, compute_loss: Callable, batches: list[Any], *, backend: str = "eager") -> None:
    """Losses and gradients of batches of other sizes agree with eager ones, and one graph was compiled."""
    loss_fn = module_loss(model, compute_loss)
    params = {name: parameter.detach() for name, parameter in model.named_parameters()}
    gradient = JitGradient(loss_fn, dynamic=True, backend=backend)
    for number, batch in enumerate(batches):
        (out, grads), (expected, expected_grads) = (
            function(loss_fn, params, {}, batch, key=Key(3, (number,))) for function in (gradient, value_and_grad)
        )
        torch.testing.assert_close(out.loss, expected.loss)
        torch.testing.assert_close(out.aux, expected.aux, check_dtype=False)
        assert int(out.weight) == int(expected.weight)
        torch.testing.assert_close(grads, expected_grads)
    assert (gradient.graph.eager_reason, gradient.graph.num_compilations) == (None, 1)


@pytest.mark.compiles
@pytest.mark.parametrize("dg_key", DIRECTION_GETTERS)
def test_the_loss_of_every_direction_getter_is_traced_as_one_graph(dg_key):
    """As `compute_batch_loss` takes it of a model, of which the other parts are the same for all."""

    def loss(getter: DirectionGetter, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, int, Any]:
        features, directions = batch
        outputs = getter(features)
        error = angular_error(getter.directions(outputs.detach()), directions)
        return getter.losses(outputs, directions).mean(), len(features), {"angular_error": error.mean()}

    with torch_rng(Key(1)):
        getter = make_direction_getter(dg_key, NUM_FEATURES)
        compare(getter, loss, [(torch.randn(size, NUM_FEATURES), torch.randn(size, 3)) for size in (30, 9, 4)])


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("options", "backend"),
    [
        ({"rnn_key": "gru", "nb_previous_dirs": 2, "normalize_prev_dirs": True, "dropout": 0.3}, "aot_eager"),
        ({"dg_args": {"add_eos": True}, "use_skip_connection": True, "use_layer_normalization": True}, "eager"),
    ],
    ids=["gru", "eos"],
)
def test_the_options_of_the_model_compile(options, backend):
    add_eos = "add_eos" in options.get("dg_args", {})
    with torch_rng(Key(1)):
        model = Learn2Track(NUM_FEATURES, rnn_layer_sizes=(6, 4), **options)
    batches = [some_batch(number, size, add_eos=add_eos) for number, size in enumerate((6, 3, 1))]
    compare(model, compute_batch_loss, batches, backend=backend)


@pytest.mark.compiles
def test_code_made_by_inductor_trains_as_an_eager_step_does():
    """One layer, and dropout where a layer follows: each kernel more is a second of a C++ compiler."""
    with torch_rng(Key(1)):
        model = Learn2Track(NUM_FEATURES, rnn_layer_sizes=(6,), nb_previous_dirs=1, dg_args={"dropout": 0.2})
    options = {"loss_fn": module_loss(model, compute_batch_loss), "optimizer": sgd(), "clip_grad": 1.0}
    compiled, eager = jit_step(**options, dynamic=True), partial(train_step, **options)
    actual = expected = init_state(model, sgd(), seed=0)
    for number, size in enumerate((6, 3, 1, 20, 2)):
        batch = some_batch(number, size)
        actual, sums = compiled(actual, batch, lr=0.1)
        expected, expected_sums = eager(expected, batch, lr=0.1)
        assert sums.keys() == expected_sums.keys()
        for name in sums:
            assert sums[name] == pytest.approx(expected_sums[name], rel=1e-4)
    assert (compiled.eager_reason, compiled.num_compilations) == (None, 1)
    torch.testing.assert_close(actual.params, expected.params)


@pytest.mark.parametrize("rnn_key", ["lstm", "gru"])
def test_what_the_compiler_is_told_of_the_recurrent_operators_is_what_they_do(rnn_key):
    num_gates, num_states = {"lstm": (4, 2), "gru": (3, 1)}[rnn_key]
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    weights = [some(4 * num_gates, 3), some(4 * num_gates, 4), some(4 * num_gates), some(4 * num_gates)]
    lengths, state = torch.tensor([3, 3, 1]), [some(3, 4) for _ in range(num_states)]
    arguments = (rnn_key, some(7, 3), lengths, weights, state)
    torch.library.opcheck(torch.ops.dwiml_func.rnn_forward.default, arguments)
