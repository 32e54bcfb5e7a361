"""Recurrent layers on the packed layout, against torch's own."""

import copy
import pickle
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call, grad, grad_and_value, vmap
from torch.nn.utils.rnn import PackedSequence

from dwiml_func.models.rnn.stacked import RecurrentLayer, StackedRNN

KEYS = ("lstm", "gru")
TORCH_LAYERS = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
RAGGED = [6, 5, 5, 3, 1, 1]  # rows of each time step


def _assert_near(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert (ours - theirs).abs().max().item() <= tolerance * theirs.abs().max().item()


def _data(batch_sizes: Sequence[int], num_columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(sum(batch_sizes), num_columns, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _seeded(rnn_key: str, *args: object, dtype: torch.dtype = torch.float32, **options: float) -> StackedRNN:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return StackedRNN(rnn_key, *args, **options).to(dtype)  # pyright: ignore[reportArgumentType]


def _compare_layer_with_torch(rnn_key: str, batch_sizes: list[int], dtype: torch.dtype) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        layer = RecurrentLayer(rnn_key, 4, 5).to(dtype)
    torch_layer = TORCH_LAYERS[rnn_key](4, 5).to(dtype)
    torch_layer.load_state_dict(layer.state_dict())
    x = _data(batch_sizes, 4, dtype).requires_grad_()
    weights = _data(batch_sizes, 5, dtype, seed=1)

    ours = layer(x, batch_sizes)
    theirs = torch_layer(PackedSequence(x, torch.tensor(batch_sizes)))[0].data

    _assert_near(ours, theirs, TOLERANCE[dtype])
    our_gradients = torch.autograd.grad((ours * weights).sum(), [x, *layer.parameters()])
    their_gradients = torch.autograd.grad((theirs * weights).sum(), [x, *torch_layer.parameters()])
    for our_gradient, their_gradient in zip(our_gradients, their_gradients, strict=True):
        _assert_near(our_gradient, their_gradient, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rnn_key", KEYS)
@pytest.mark.parametrize(
    "batch_sizes",
    [
        pytest.param(RAGGED, id="ragged"),
        pytest.param([4, 4, 4], id="equal lengths"),
        pytest.param([1, 1, 1, 1, 1], id="batch of one"),
        pytest.param([5], id="sequences of one"),
        pytest.param([1], id="one row"),
        pytest.param([3, *[1] * 60], id="one long sequence"),
    ],
)
def test_a_layer_equals_torchs_in_values_and_gradients(
    rnn_key: str, dtype: torch.dtype, batch_sizes: list[int]
) -> None:
    _compare_layer_with_torch(rnn_key, batch_sizes, dtype)


@settings(max_examples=25)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=12), st.sampled_from(KEYS))
def test_a_layer_equals_torchs_on_any_batch(sizes: list[int], rnn_key: str) -> None:
    _compare_layer_with_torch(rnn_key, sorted(sizes, reverse=True), torch.float64)


@pytest.mark.parametrize("rnn_key", KEYS)
def test_a_stack_is_torchs_layers_with_relu_between_them(rnn_key: str) -> None:
    rnn = _seeded(rnn_key, 4, (7, 3, 5))
    x = _data(RAGGED, 4)
    expected = x
    for number, (input_size, size) in enumerate([(4, 7), (7, 3), (3, 5)]):
        layer = TORCH_LAYERS[rnn_key](input_size, size)
        layer.load_state_dict(rnn.get_submodule(f"rnn_{number}").state_dict())
        expected = expected.relu() if number > 0 else expected
        expected = layer(PackedSequence(expected, torch.tensor(RAGGED)))[0].data
    assert rnn.output_size == 5
    _assert_near(rnn(x, RAGGED), expected, 1e-5)


@pytest.mark.parametrize("rnn_key", KEYS)
def test_a_seed_gives_torchs_initial_values(rnn_key: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(11)
        rnn = StackedRNN(rnn_key, 6, (9, 4))
        torch.manual_seed(11)
        torch_layers = [TORCH_LAYERS[rnn_key](6, 9), TORCH_LAYERS[rnn_key](9, 4)]
    for number, torch_layer in enumerate(torch_layers):
        ours = dict(rnn.get_submodule(f"rnn_{number}").named_parameters())
        assert list(ours) == [name for name, _ in torch_layer.named_parameters()]
        assert all(torch.equal(ours[name], theirs) for name, theirs in torch_layer.named_parameters())


@pytest.mark.parametrize("rnn_key", KEYS)
def test_gradients_agree_with_finite_differences(rnn_key: str) -> None:
    rnn = _seeded(rnn_key, 2, (3, 2), dtype=torch.float64)
    parameters = dict(rnn.named_parameters())

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(rnn, dict(zip(parameters, values, strict=True)), (x, [3, 2, 1]))

    x = _data([3, 2, 1], 2, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *parameters.values()))


@pytest.mark.parametrize("rnn_key", KEYS)
def test_functional_gradients_equal_autograds(rnn_key: str) -> None:
    rnn = _seeded(rnn_key, 4, (6, 5))
    x, weights = _data(RAGGED, 4), _data(RAGGED, 5, seed=1)
    parameters = dict(rnn.named_parameters())

    def loss_of(values: Mapping[str, Tensor]) -> Tensor:
        return (functional_call(rnn, dict(values), (x, RAGGED)) * weights).mean()

    gradients, loss = grad_and_value(loss_of)(parameters)
    expected_loss = (rnn(x, RAGGED) * weights).mean()
    expected = torch.autograd.grad(expected_loss, list(parameters.values()))
    assert torch.equal(loss, expected_loss)
    for ours, theirs in zip(gradients.values(), expected, strict=True):
        _assert_near(ours, theirs, 1e-6)


@pytest.mark.parametrize("rnn_key", KEYS)
def test_gradients_of_each_sequence_by_vmap_equal_a_loop(rnn_key: str) -> None:
    rnn = _seeded(rnn_key, 4, (6, 5), dtype=torch.float64)
    parameters = {name: parameter.detach() for name, parameter in rnn.named_parameters()}
    sequences = _data([7] * 3, 4, torch.float64).reshape(3, 7, 4)

    def loss_of(values: dict[str, Tensor], sequence: Tensor) -> Tensor:
        return functional_call(rnn, values, (sequence, [1] * 7)).square().mean()

    together = vmap(grad(loss_of), in_dims=(None, 0))(parameters, sequences)
    for number, sequence in enumerate(sequences):
        for name, alone in grad(loss_of)(parameters, sequence).items():
            _assert_near(together[name][number], alone, 1e-10)


@pytest.mark.parametrize("rnn_key", KEYS)
def test_an_ensemble_by_vmap_over_parameters_equals_a_loop(rnn_key: str) -> None:
    members = [StackedRNN(rnn_key, 4, (6,)).double() for _ in range(3)]
    x = _data(RAGGED, 4, torch.float64)
    stacked = {
        name: torch.stack([member.get_parameter(name).detach() for member in members])
        for name, _ in members[0].named_parameters()
    }
    together = vmap(lambda values: functional_call(members[0], values, (x, RAGGED)))(stacked)
    for outputs, member in zip(together, members, strict=True):
        _assert_near(outputs, member(x, RAGGED), 1e-10)


def test_dropout_acts_between_layers_and_only_in_training() -> None:
    x = _data(RAGGED, 4)
    stack, single = _seeded("lstm", 4, (50, 5), dropout=0.5), _seeded("lstm", 4, (5,), dropout=0.5)
    without = _seeded("lstm", 4, (50, 5))
    assert torch.equal(stack.eval()(x, RAGGED), without(x, RAGGED))
    assert torch.equal(single.train()(x, RAGGED), single.eval()(x, RAGGED))  # its one layer is the last
    stack.train()
    assert not torch.equal(stack(x, RAGGED), stack(x, RAGGED))


def test_dropout_scales_what_it_keeps() -> None:
    rnn = _seeded("gru", 4, (6, 5), dropout=0.75).train()
    x = _data(RAGGED, 4)
    first, second = rnn.get_submodule("rnn_0"), rnn.get_submodule("rnn_1")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        outputs = rnn(x, RAGGED)
        torch.manual_seed(3)
        kept = torch.nn.functional.dropout(torch.ones(sum(RAGGED), 6), 0.75)
    assert set(kept.unique().tolist()) == {0.0, 4.0}
    _assert_near(outputs, second((first(x, RAGGED) * kept).relu(), RAGGED), 1e-6)


def test_a_stack_can_be_copied_and_pickled() -> None:
    rnn = _seeded("gru", 4, (6, 5))
    x = _data(RAGGED, 4)
    for copied in (copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn))):
        assert torch.equal(copied(x, RAGGED), rnn(x, RAGGED))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rnn", 4, (5,)), "rnn_key: expected one of lstm, gru, received 'rnn'."),
        (("lstm", 4, ()), "rnn_layer_sizes: expected 1 to 1000 layers, received 0."),
        (("lstm", 4, (5,) * 1001), "rnn_layer_sizes: expected 1 to 1000 layers, received 1001."),
        (("lstm", 4, (5, 0)), "rnn_layer_sizes: expected .* received 0."),
        (("lstm", 4, (-5,)), "rnn_layer_sizes: expected .* received -5."),
        (("lstm", 0, (5,)), "input_size: expected .* received 0."),
        (("lstm", 4, (5,), 1.0), "dropout: expected .* received 1.0."),
        (("lstm", 4, (5,), -0.1), "dropout: expected .* received -0.1."),
        (("lstm", 4, (5,), float("nan")), "dropout: expected .* received nan."),
    ],
)
def test_wrong_options_are_named(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        StackedRNN(*arguments)


@pytest.mark.parametrize(
    ("shape", "batch_sizes", "message"),
    [
        ((5, 3), [5], "Expected x of shape (P, 4). Received: (5, 3)"),
        ((5, 1, 4), [5], "Expected x of shape (P, 4). Received: (5, 1, 4)"),
        ((5, 4, 1), [5], "Expected x of shape (P, 4). Received: (5, 4, 1)"),
        ((5, 4), [3, 1], "Received: [3, 1]"),
        ((5, 4), [2, 3], "Received: [2, 3]"),
        ((5, 4), [5, 0], "Received: [5, 0]"),
        ((0, 4), [], "Received: []"),
    ],
)
def test_input_that_does_not_fit_is_refused(shape: tuple[int, ...], batch_sizes: list[int], message: str) -> None:
    with pytest.raises(ValueError, match="Expected") as error:
        StackedRNN("lstm", 4, (5,))(torch.zeros(shape), batch_sizes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", [torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("rnn_key", KEYS)
def test_inputs_and_states_of_another_dtype_than_the_parameters_are_refused(rnn_key: str, wrong: torch.dtype) -> None:
    rnn = StackedRNN(rnn_key, 4, (5,))
    with pytest.raises(ValueError, match=f"^Expected x of torch.float32, as the parameters. Received: {wrong}."):
        rnn(torch.zeros(5, 4).to(wrong), [3, 2])
    _, state = rnn.run(torch.zeros(3, 4), [3])
    wrong_state = [tuple(part.to(wrong) for part in layer) for layer in state]
    with pytest.raises(ValueError, match=f"^Expected a state of torch.float32, as the parameters. Received: {wrong}."):
        rnn.run(torch.zeros(3, 4), [3], wrong_state)
