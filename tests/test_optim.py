"""Claims about `dwiml_func.optim`: torch.optim's arithmetic bitwise, out of place unless donated, differentiable."""

import re
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map

from dwiml_func.optim import _foreach, accumulate, chain, ema, lion, schedule_free_adamw, schedule_free_sgd
from dwiml_func.optim._foreach import _one_by_one, arithmetic_for
from dwiml_func.optim.optimizers import adam, adamw, radam, sgd
from dwiml_func.optim.state_check import check_opt_state
from dwiml_func.types import Optimizer

SHAPES = {"weight": (3, 2), "bias": (3,), "scale": ()}
KINDS = ["sgd", "momentum", "nesterov", "adam", "adamw", "radam"]


def some_tensors(seed: int, dtype: torch.dtype, size: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=dtype) * size for name, shape in SHAPES.items()}


def make_pair(kind, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay: float | Tensor = 0.0) -> tuple[Optimizer, partial]:
    if kind in ("sgd", "momentum", "nesterov"):
        momentum = 0.0 if kind == "sgd" else beta1 or 0.5
        options = {"momentum": momentum, "weight_decay": weight_decay, "nesterov": kind == "nesterov"}
        return sgd(**options), partial(torch.optim.SGD, **options)
    ours, theirs = {
        "adam": (adam, torch.optim.Adam),
        "adamw": (adamw, torch.optim.AdamW),
        "radam": (radam, torch.optim.RAdam),
    }[kind]
    return (
        ours(beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay),
        partial(theirs, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay),
    )


def torch_params(optimizer: partial, rates: list[float], dtype: torch.dtype, foreach: bool) -> dict[str, Tensor]:
    params = {name: torch.nn.Parameter(value) for name, value in some_tensors(0, dtype).items()}
    reference = optimizer(list(params.values()), lr=rates[0], foreach=foreach)
    for step, lr in enumerate(rates):
        reference.param_groups[0]["lr"] = lr
        for name, grad in some_tensors(step + 1, dtype, 10.0 ** (step % 4 - 2)).items():
            params[name].grad = grad
        reference.step()
    return {name: parameter.detach() for name, parameter in params.items()}


def our_params(optimizer: Optimizer, rates: list[float], dtype: torch.dtype, donate: bool) -> dict[str, Tensor]:
    params = some_tensors(0, dtype)
    opt_state = optimizer.init(params)
    for step, lr in enumerate(rates):
        grads = some_tensors(step + 1, dtype, 10.0 ** (step % 4 - 2))
        params, opt_state = optimizer.update(grads, opt_state, params, lr=lr, step=step, donate=donate)
    return params


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize("kind", KINDS)
def test_updates_have_the_bits_of_torch_optim_with_every_combination_of_options(kind, weight_decay):
    rates = [0.1, 0.03, 0.01, 0.1, 0.2, 0.1, 0.05, 0.1]  # radam adapts from its sixth step on
    ours, theirs = make_pair(kind, weight_decay=weight_decay)
    # Torch's own RAdam rounds differently with foreach, whose formula is rearranged; on a CPU it is not the default.
    for dtype, foreach in product([torch.float32, torch.float64], [False] if kind == "radam" else [False, True]):
        expected = torch_params(theirs, rates, dtype, foreach)
        for donate in (False, True):
            actual = our_params(ours, rates, dtype, donate)
            for name in SHAPES:
                assert actual[name].dtype == dtype
                assert torch.equal(actual[name], expected[name]), (name, dtype, foreach, donate)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12)
@given(
    beta1=st.floats(0, 0.99),
    beta2=st.floats(0.5, 0.9999),
    eps=st.sampled_from([1e-8, 1e-3]),
    weight_decay=st.sampled_from([0.0, 0.01, 0.5]),
    rates=st.lists(st.floats(1e-5, 0.5), min_size=1, max_size=12),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    donate=st.booleans(),
    foreach=st.booleans(),
)
def test_updates_have_the_bits_of_torch_optim_for_any_numbers(
    kind, beta1, beta2, eps, weight_decay, rates, dtype, donate, foreach
):
    ours, theirs = make_pair(kind, beta1, beta2, eps, weight_decay)
    expected = torch_params(theirs, rates, dtype, foreach and kind != "radam")
    actual = our_params(ours, rates, dtype, donate)
    for name in SHAPES:
        assert actual[name].dtype == dtype
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_an_update_changes_nothing_that_came_in(kind, weight_decay):
    optimizer, _ = make_pair(kind, weight_decay=weight_decay)
    params = some_tensors(0, torch.float32)
    params, opt_state = optimizer.update(some_tensors(9, torch.float32), optimizer.init(params), params, lr=0.1, step=0)
    grads = some_tensors(1, torch.float32)
    tensors = [*params.values(), *grads.values(), *(t for by_name in opt_state.values() for t in by_name.values())]
    before = [(tensor._version, tensor.clone()) for tensor in tensors]
    results = [optimizer.update(grads, opt_state, params, lr=0.1, step=1) for _ in range(2)]
    for tensor, (version, value) in zip(tensors, before, strict=True):
        assert tensor._version == version
        assert torch.equal(tensor, value)
    old = {tensor.data_ptr() for tensor in tensors}
    for (first, first_state), (second, second_state) in [results]:
        assert all(torch.equal(first[name], second[name]) for name in SHAPES)
        assert first_state.keys() == second_state.keys() == opt_state.keys()
        for part, tensors in first_state.items():
            assert all(torch.equal(tensors[name], second_state[part][name]) for name in SHAPES)
            assert not old & {tensor.data_ptr() for tensor in tensors.values()}
        assert not old & {tensor.data_ptr() for tensor in first.values()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_donated_update_reuses_the_memory_and_leaves_the_gradients(kind):
    optimizer, _ = make_pair(kind, weight_decay=0.1)
    params = some_tensors(0, torch.float32)
    params, opt_state = optimizer.update(some_tensors(9, torch.float32), optimizer.init(params), params, lr=0.1, step=0)
    grads = some_tensors(1, torch.float32)
    before = {name: (grad._version, grad.clone()) for name, grad in grads.items()}
    new_params, new_state = optimizer.update(grads, opt_state, params, lr=0.1, step=1, donate=True)
    for name in SHAPES:
        assert new_params[name].data_ptr() == params[name].data_ptr()
        assert (grads[name]._version, True) == (before[name][0], torch.equal(grads[name], before[name][1]))
        for kind_of_moment in opt_state:
            assert new_state[kind_of_moment][name].data_ptr() == opt_state[kind_of_moment][name].data_ptr()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_an_update_can_be_differentiated_through(kind, weight_decay):
    # Finite differences of the new parameters with respect to the old ones and the gradients, steps 0 and 6.
    optimizer, _ = make_pair(kind, weight_decay=weight_decay)

    def after_two_updates(params: Tensor, first: Tensor, second: Tensor) -> Tensor:
        values, opt_state = optimizer.update({"w": first}, optimizer.init({"w": params}), {"w": params}, lr=0.1, step=0)
        return optimizer.update({"w": second}, opt_state, values, lr=0.1, step=6)[0]["w"]

    inputs = [some_tensors(seed, torch.float64)["weight"].requires_grad_() for seed in (3, 4, 5)]
    assert torch.autograd.gradcheck(after_two_updates, inputs)


def test_sgd_follows_its_closed_form():
    params, grads = {"w": torch.tensor([1.0, -2.0]).double()}, {"w": torch.tensor([0.5, 0.25]).double()}
    plain, _ = sgd().update(grads, {}, params, lr=0.1, step=0)
    torch.testing.assert_close(plain["w"], params["w"] - 0.1 * grads["w"])

    optimizer, values = sgd(momentum=0.5), params
    opt_state = optimizer.init(values)
    for step in range(4):
        values, opt_state = optimizer.update(grads, opt_state, values, lr=0.1, step=step)
    # The running sum after update k is grad * (2 - 2**-k); the four of them add up to 8 - 15/8.
    torch.testing.assert_close(values["w"], params["w"] - 0.1 * (8 - 15 / 8) * grads["w"])


@pytest.mark.parametrize("optimizer", [adam(), adamw(weight_decay=0.0)])
def test_a_constant_gradient_moves_adam_by_the_learning_rate(optimizer):
    params, grads = {"w": torch.zeros(3).double()}, {"w": torch.tensor([1e-3, -5.0, 70.0]).double()}
    values, opt_state = params, optimizer.init(params)
    for step in range(7):
        values, opt_state = optimizer.update(grads, opt_state, values, lr=0.01, step=step)
    torch.testing.assert_close(values["w"], -7 * 0.01 * grads["w"].sign(), rtol=1e-4, atol=0)


def test_radam_is_momentum_without_adaptation_for_its_first_five_steps():
    params, grads = {"w": torch.zeros(2).double()}, {"w": torch.tensor([3.0, -100.0]).double()}
    optimizer, values = radam(), params
    opt_state = optimizer.init(params)
    for step in range(5):
        values, opt_state = optimizer.update(grads, opt_state, values, lr=0.1, step=step)
    torch.testing.assert_close(values["w"], -5 * 0.1 * grads["w"])  # bias-corrected mean of a constant is the constant
    adapted, _ = optimizer.update(grads, opt_state, values, lr=0.1, step=5)
    changes = adapted["w"] - values["w"]
    torch.testing.assert_close(
        changes[0], -changes[1]
    )  # from the sixth step on the size of the gradient is divided out


@pytest.mark.parametrize(("beta2", "rho"), [(0.83, 4.936), (0.84, 5.002)])
def test_radam_adapts_from_where_torch_does(beta2, rho):
    # rho, the length of the average in the paper, is just below or just above its limit of 5 at the sixth step.
    assert 2 / (1 - beta2) - 1 - 2 * 6 * beta2**6 / (1 - beta2**6) == pytest.approx(rho, abs=1e-3)
    ours, theirs = make_pair("radam", beta2=beta2)
    expected, actual = (
        torch_params(theirs, [0.1] * 6, torch.float64, foreach=False),
        our_params(ours, [0.1] * 6, torch.float64, donate=False),
    )
    assert all(torch.equal(actual[name], expected[name]) for name in SHAPES)


def test_adamw_decays_the_parameters_and_adam_the_gradient():
    params, nothing = {"w": torch.tensor([2.0]).double()}, {"w": torch.zeros(1).double()}
    decoupled, _ = adamw(weight_decay=0.5).update(nothing, adamw().init(params), params, lr=0.1, step=0)
    torch.testing.assert_close(decoupled["w"], params["w"] * (1 - 0.1 * 0.5))
    coupled, _ = adam(weight_decay=0.5).update(nothing, adam().init(params), params, lr=0.1, step=0)
    torch.testing.assert_close(coupled["w"], params["w"] - 0.1)  # the penalty's gradient, normalised to its sign


@pytest.mark.parametrize("kind", KINDS)
def test_the_sign_of_a_zero_gradient_is_kept_as_torch_keeps_it(kind):
    ours, theirs = make_pair(kind)
    parameter = torch.nn.Parameter(torch.tensor([0.0, -0.0, 1.0]))
    params = {"w": parameter.detach().clone()}
    reference = theirs([parameter], lr=0.1)
    opt_state = ours.init(params)
    for step in range(3):
        parameter.grad = torch.tensor([-0.0, 0.0, -0.0])
        reference.step()
        params, opt_state = ours.update({"w": parameter.grad.clone()}, opt_state, params, lr=0.1, step=step)
    assert torch.equal(params["w"].view(torch.int32), parameter.detach().view(torch.int32))
    if kind == "momentum":
        expected = reference.state[parameter]["momentum_buffer"]
        assert torch.equal(opt_state["momentum_buffer"]["w"].view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_is_one_number_expanded_is_no_trap(kind, donate):
    optimizer, _ = make_pair(kind, weight_decay=0.0)
    results = []
    for grad in (torch.ones(()).expand(3, 2), torch.ones(3, 2)):
        params = {"w": some_tensors(0, torch.float32)["weight"]}
        opt_state = optimizer.init(params)
        for step in range(3):
            params, opt_state = optimizer.update({"w": grad}, opt_state, params, lr=0.1, step=step, donate=donate)
        assert torch.equal(grad, torch.ones(3, 2))
        results.append(params["w"])
    assert torch.equal(*results)


@pytest.mark.parametrize("kind", KINDS)
def test_names_decide_and_not_the_order_of_a_dict(kind):
    optimizer, _ = make_pair(kind)
    params, grads = some_tensors(0, torch.float32), some_tensors(1, torch.float32)
    backwards = dict(reversed(list(grads.items())))
    first, _ = optimizer.update(grads, optimizer.init(params), params, lr=0.1, step=0)
    second, _ = optimizer.update(backwards, optimizer.init(backwards), params, lr=0.1, step=0)
    assert list(first) == list(second) == list(params)
    assert all(torch.equal(first[name], second[name]) for name in params)


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("sgd", []),
        ("momentum", ["momentum_buffer"]),
        ("adam", ["exp_avg", "exp_avg_sq"]),
        ("radam", ["exp_avg", "exp_avg_sq"]),
    ],
)
def test_an_optimizer_state_is_tensors_only(kind, parts):
    params = some_tensors(0, torch.float64)
    opt_state = make_pair(kind)[0].init(params)
    assert list(opt_state) == parts
    for tensors in opt_state.values():
        assert {name: (t.shape, t.dtype, int(t.count_nonzero())) for name, t in tensors.items()} == {
            name: (p.shape, p.dtype, 0) for name, p in params.items()
        }


@pytest.mark.parametrize("make", [adam, adamw, radam])
@pytest.mark.parametrize(
    "options",
    [{"beta1": 1.0}, {"beta1": -0.1}, {"beta2": 1.0}, {"eps": -1e-8}, {"eps": float("inf")}, {"weight_decay": -1.0}],
)
def test_a_value_out_of_range_is_named(make, options):
    [(name, value)] = options.items()
    with pytest.raises(ValueError, match=f"Expected {name} with .*Received: {name}={value}"):
        make(**options)


@pytest.mark.parametrize("options", [{"momentum": -0.5}, {"momentum": float("nan")}, {"weight_decay": float("inf")}])
def test_sgd_names_a_value_out_of_range(options):
    [(name, value)] = options.items()
    with pytest.raises(ValueError, match=f"Expected {name} with .*Received: {name}={value}"):
        sgd(**options)


def test_nesterov_needs_momentum():
    with pytest.raises(ValueError, match="Expected a momentum above 0 with nesterov=True"):
        sgd(nesterov=True)


def run_steps(optimizer: Optimizer, lr, steps, dtype=torch.float64):
    params = some_tensors(0, dtype)
    opt_state = optimizer.init(params)
    for number, step in enumerate(steps):
        params, opt_state = optimizer.update(some_tensors(number + 1, dtype), opt_state, params, lr=lr, step=step)
    return params, opt_state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_for_numbers_change_rounding_only(kind, dtype):
    numbers, opt_state = run_steps(make_pair(kind, weight_decay=0.1)[0], 0.05, range(8), dtype)
    decay, rate = torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.05, dtype=torch.float64)
    tensors, tensor_opt_state = run_steps(make_pair(kind, weight_decay=decay)[0], rate, torch.arange(8), dtype)
    torch.testing.assert_close(tensors, numbers)
    torch.testing.assert_close(tensor_opt_state, opt_state)
    for name in SHAPES:
        assert tensors[name].dtype == dtype


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own forward mode uses it
@pytest.mark.parametrize("kind", KINDS)
def test_learning_rate_and_weight_decay_have_gradients(kind):
    def params_after(lr: Tensor, weight_decay: Tensor) -> Tensor:
        params, _ = run_steps(make_pair(kind, weight_decay=weight_decay)[0], lr, range(7))
        return torch.cat([tensor.flatten() for tensor in params.values()])

    numbers = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.05, 0.1)]
    assert torch.autograd.gradcheck(params_after, numbers)
    # The tensors of a test come from a generator: the same for each direction.
    forwards = torch.func.jacfwd(params_after, argnums=(0, 1), randomness="same")(*numbers)
    backwards = torch.autograd.functional.jacobian(params_after, tuple(numbers))
    torch.testing.assert_close(forwards, backwards)


@pytest.mark.parametrize("kind", KINDS)
def test_updates_can_be_mapped_over_learning_rates_weight_decays_and_parameters(kind):
    start, factors = some_tensors(0, torch.float32), [some_tensors(step + 1, torch.float32) for step in range(7)]

    def params_after(lr, weight_decay, scale):
        optimizer = make_pair(kind, weight_decay=weight_decay)[0]
        params = {name: tensor * scale for name, tensor in start.items()}
        opt_state = optimizer.init(params)
        for step in range(7):
            grads = {name: params[name] * tensor for name, tensor in factors[step].items()}
            params, opt_state = optimizer.update(grads, opt_state, params, lr=lr, step=step)
        return params

    values = (0.05, 0.01), (0.1, 0.0), (1.0, 2.0)
    mapped = torch.func.vmap(params_after)(*(torch.tensor(each) for each in values))
    for number, arguments in enumerate(zip(*values, strict=True)):
        one = {name: tensor[number] for name, tensor in mapped.items()}
        torch.testing.assert_close(one, params_after(*arguments))


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_compiles_once_for_all_steps_and_learning_rates(kind):
    optimizer, _ = make_pair(kind, weight_decay=0.1)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(optimizer.update, fullgraph=True, backend=count)
    params = some_tensors(0, torch.float64)
    opt_state = optimizer.init(params)
    for step in range(8):
        lr = torch.tensor(0.05 / (step + 1), dtype=torch.float64)
        arguments = (some_tensors(step + 1, torch.float64), opt_state, params)
        expected = optimizer.update(*arguments, lr=float(lr), step=step)
        actual = compiled(*arguments, lr=lr, step=torch.tensor(step))
        torch.testing.assert_close(actual, expected)
        params, opt_state = actual
    assert len(graphs) == 1


@pytest.mark.parametrize("make", [adam, adamw, radam])
def test_a_gradient_of_zero_can_be_differentiated_through(make):
    # The root of the second moment has an infinite slope at zero; a ReLU that is off gives gradients of zero.
    def step(grad: Tensor) -> Tensor:
        optimizer, params = make(), {"w": torch.ones(2, dtype=torch.float64)}
        return optimizer.update({"w": grad}, optimizer.init(params), params, lr=0.1, step=9)[0]["w"]

    grad = torch.tensor([0.0, 1.0], dtype=torch.float64)
    [slope] = torch.func.jacrev(step)(grad).diagonal()[:1]
    tiny = torch.tensor([1e-13, 0.0], dtype=torch.float64)  # far below eps
    expected = (step(grad + tiny) - step(grad - tiny))[0] / 2e-13
    torch.testing.assert_close(slope, expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_operations_with_tensors_for_numbers_have_the_bits_of_single_ones(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y, z = ([torch.randn(s, generator=generator).to(dtype) for s in [(), (3,), (5, 7)]] for _ in range(3))
    number = torch.tensor(0.123456789, dtype=torch.float64)
    fused = arithmetic_for(x, number)
    cases: Any = (
        *(("mul", [number], {}), ("div", [number], {}), ("mul", [y], {})),
        *(("add", [y], {"alpha": -number}), ("addcdiv", [y, z], {"value": number})),
    )
    for name, others, factors in cases:
        ours = fused(name, x, *others, **factors)
        assert fused is not _one_by_one
        for mine, theirs in zip(ours, _one_by_one(name, x, *others, **factors), strict=True):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs)
        with monkeypatch.context() as patch:
            patch.setattr(_foreach, "_one_by_one", None)  # in few kernels of a GPU
            assert len(fused(name, x, *others, **factors)) == len(x)


@pytest.mark.parametrize(
    ("optimizer", "other", "named"),
    [
        (adam(), sgd(momentum=0.9), "exp_avg, exp_avg_sq, momentum_buffer are in only one"),
        (sgd(), schedule_free_sgd(), "lr_max, weight_sum, z are in only one"),
        (ema(adam()), ema(lion()), "optimizer/exp_avg_sq is in only one"),
        (chain(accumulate(2), sgd()), sgd(), "0, 0/mean are in only one"),
    ],
)
def test_a_state_of_another_optimizer_is_told_by_the_branches_that_differ(
    optimizer: Optimizer, other: Optimizer, named: str
) -> None:
    params = {"w": torch.ones(2, 3), "b": torch.ones(())}
    for _ in range(2):  # it is not taken for checked
        with pytest.raises(ValueError, match=f"another optimizer: of their trees, {named}"):
            check_opt_state(optimizer, other.init(params), params)
    check_opt_state(optimizer, {**optimizer.init(params), "missed": {"w": torch.ones(())}}, params)
    check_opt_state(optimizer, {}, params)  # no longer looked at


@pytest.mark.parametrize("is_stacked", [False, True])
def test_a_state_of_other_shapes_is_told_by_its_first_leaf(is_stacked: bool) -> None:
    params = {"w": torch.ones(2, 3), "b": torch.ones(())}
    state = schedule_free_adamw().init(params)
    for path, shape, expected in (
        ("exp_avg_sq/w", (3, 2), (2, 3)),
        ("z/w", (1, 3), (2, 3)),
        ("z/b", (1,), ()),
        ("lr_max", (2,), ()),
    ):
        kind, _, name = path.partition("/")
        changed = {**state, kind: {**state[kind], name: torch.ones(shape)} if name else torch.ones(shape)}
        given = tree_map(lambda leaf: torch.stack([leaf, leaf]), (changed, params)) if is_stacked else (changed, params)
        with pytest.raises(
            ValueError, match=re.escape(f"{path} of shape {expected}, as the parameters have it")
        ) as error:
            check_opt_state(schedule_free_adamw(), *given, is_stacked=is_stacked)
        assert f"Received: {shape}. To reset it" in str(error.value)
