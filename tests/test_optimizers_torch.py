"""Claims: rmsprop, nadam and muon are bitwise those of torch.optim over 50 steps, with every option."""

import inspect
from functools import partial

import pytest
import torch
from optimizer_cases import assert_same_bits, gradient, run_torch, run_updates, some_tensors
from torch import Tensor

from dwiml_func.optim import adam, adamw, by_name, muon, nadam, radam, rmsprop, sgd

RMSPROP = [
    {},
    {"alpha": 0.5, "eps": 1e-3},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"centered": True, "eps": 1e-2},
    {"momentum": 0.5, "weight_decay": 0.1, "centered": True, "eps": 1e-2},
]
NADAM = [
    {},
    {"beta1": 0.5, "beta2": 0.9, "eps": 1e-3},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": True},
    {"momentum_decay": 0.1},
]
MUON = [
    {},
    {"weight_decay": 0.0, "momentum": 0.5},
    {"nesterov": False},
    {"ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 3, "eps": 1e-3},
    {"adjust_lr_fn": "original"},
    {"adjust_lr_fn": "match_rms_adamw"},
]


def for_torch(options: dict) -> dict:
    options = dict(options)
    if "beta1" in options:
        options["betas"] = (options.pop("beta1"), options.pop("beta2"))
    return options


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize(
    ("dtype", "foreach"),  # foreach=False adds the weight decay to complex gradients in other arithmetic
    [(torch.float32, False), (torch.float32, True), (torch.float64, False), (torch.complex64, True)],
)
@pytest.mark.parametrize("options", RMSPROP, ids=str)
def test_rmsprop(options, foreach, dtype, donate):
    expected = run_torch(lambda p: [torch.optim.RMSprop(p.values(), foreach=foreach, **options)], dtype=dtype)
    assert_same_bits(run_updates(rmsprop(**options), dtype=dtype, donate=donate)[0], expected)


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("options", NADAM, ids=str)
def test_nadam(options, dtype, donate):
    expected = run_torch(lambda p: [torch.optim.NAdam(p.values(), **for_torch(options))], dtype=dtype)
    assert_same_bits(run_updates(nadam(**options), dtype=dtype, donate=donate)[0], expected)


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", MUON, ids=str)
def test_muon_for_matrices_and_another_optimizer_for_the_rest(options, dtype, donate):
    def make(params: dict[str, torch.nn.Parameter]) -> list[torch.optim.Optimizer]:
        matrices = [param for param in params.values() if param.dim() == 2]
        rest = [param for param in params.values() if param.dim() != 2]
        groups = [{"params": rest, "lr_factor": 0.1}]
        return [torch.optim.Muon(matrices, **options), torch.optim.AdamW(groups, weight_decay=0.3)]

    optimizer = muon(**options, others=by_name(adamw, {}, lr=0.1, weight_decay=0.3))
    assert_same_bits(run_updates(optimizer, dtype=dtype, donate=donate)[0], run_torch(make, dtype=dtype))


def test_muon_leaves_matrices_that_it_is_told_to_exclude_to_the_other_optimizer():
    def make(params: dict[str, torch.nn.Parameter]) -> list[torch.optim.Optimizer]:
        rest = [param for name, param in params.items() if name not in ("a.weight", "empty")]
        return [torch.optim.Muon([params["a.weight"], params["empty"]]), torch.optim.AdamW(rest)]

    optimizer = muon(others=adamw(), exclude="b.*")
    assert_same_bits(run_updates(optimizer)[0], run_torch(make))


def test_muon_moves_a_matrix_in_all_its_directions_alike():
    # 5 iterations bring all singular values into about [0.7, 1.2], whatever those of the gradient.
    left, right = (torch.linalg.qr(some_tensors(seed, torch.float64)["b.weight"])[0] for seed in (0, 1))
    params, optimizer = {"w": torch.zeros(5, 5).double()}, muon(weight_decay=0.0)
    grads = {"w": left @ torch.diag(torch.tensor([7.0, 0.7]).double()) @ right.T}
    params, _ = optimizer.update(grads, optimizer.init(params), params, lr=1.0, step=0)
    torch.testing.assert_close(params["w"], -left @ right.T, rtol=0, atol=0.3)


def sometimes_missing(step: int, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Gradients of which some are None: one name in the first steps, another in some later ones, then all."""
    grads: dict[str, Tensor | None] = dict(gradient(step, dtype))
    if step < 4:
        grads["a.weight"] = None
    if step % 5 == 3:
        grads["scale"] = grads["a.bias"] = None
    if step == 7:
        grads = dict.fromkeys(grads)
    return grads


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (rmsprop(momentum=0.9, weight_decay=0.1), partial(torch.optim.RMSprop, momentum=0.9, weight_decay=0.1)),
        (nadam(weight_decay=0.1), partial(torch.optim.NAdam, weight_decay=0.1)),
        (sgd(momentum=0.9, nesterov=True), partial(torch.optim.SGD, momentum=0.9, nesterov=True)),
        (adam(weight_decay=0.1), partial(torch.optim.Adam, weight_decay=0.1)),
        (adamw(weight_decay=0.1), partial(torch.optim.AdamW, weight_decay=0.1)),
        (radam(), torch.optim.RAdam),
    ],
    ids=["rmsprop", "nadam", "sgd", "adam", "adamw", "radam"],
)
def test_a_parameter_without_a_gradient_is_left_alone(ours, theirs, donate):
    expected = run_torch(lambda p: [theirs(p.values())], grads=sometimes_missing)
    assert_same_bits(run_updates(ours, grads=sometimes_missing, donate=donate)[0], expected)


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (sgd(momentum=0.9, weight_decay=0.1), partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1)),
        (adam(weight_decay=0.1), partial(torch.optim.Adam, weight_decay=0.1)),
        (adamw(weight_decay=0.1), partial(torch.optim.AdamW, weight_decay=0.1)),
        (radam(weight_decay=0.1), partial(torch.optim.RAdam, weight_decay=0.1)),
    ],
    ids=["sgd", "adam", "adamw", "radam"],
)
def test_complex_parameters_are_those_of_torch(ours, theirs, donate):
    # Among torch's own implementations, complex arithmetic differs by rounding.
    dtype, foreach = torch.complex64, theirs.func is not torch.optim.RAdam
    expected = run_torch(lambda p: [theirs(p.values(), foreach=foreach)], dtype=dtype)
    assert_same_bits(run_updates(ours, dtype=dtype, donate=donate)[0], expected)


@pytest.mark.parametrize(
    ("make", "options", "named"),
    [
        (rmsprop, {"alpha": 1.0}, "alpha"),
        (rmsprop, {"momentum": -0.5}, "momentum"),
        (rmsprop, {"eps": -1e-8}, "eps"),
        (nadam, {"beta2": 1.0}, "beta2"),
        (nadam, {"momentum_decay": -1.0}, "momentum_decay"),
        (nadam, {"weight_decay": float("nan")}, "weight_decay"),
        (muon, {"momentum": -1.0}, "momentum"),
        (muon, {"ns_steps": 100}, "ns_steps"),
        (muon, {"adjust_lr_fn": "adam"}, "adjust_lr_fn"),
    ],
)
def test_a_value_out_of_range_is_named(make, options, named):
    with pytest.raises(ValueError, match=f"Expected {named} .*Received: .*{next(iter(options.values()))}"):
        make(**options)


def test_muon_alone_refuses_what_is_no_matrix():
    params = some_tensors(0) | {f"{number}": torch.zeros(2) for number in range(3)}
    with pytest.raises(ValueError, match=r"Received: a.bias, scale, 0 and 2 more\. Give muon an optimizer for them"):
        muon().init(params)


def test_muon_refuses_complex_matrices():
    with pytest.raises(ValueError, match=r"Expected real matrices for Muon. Received: complex a.weight"):
        muon(others=adamw()).init(some_tensors(0, torch.complex64))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (sgd, torch.optim.SGD),
        (adam, torch.optim.Adam),
        (adamw, torch.optim.AdamW),
        (radam, torch.optim.RAdam),
        (nadam, torch.optim.NAdam),
        (rmsprop, torch.optim.RMSprop),
        (muon, torch.optim.Muon),
    ],
    ids=lambda made: made.__name__,
)
def test_defaults_are_those_of_torch(ours, theirs):
    defaults = {name: parameter.default for name, parameter in inspect.signature(theirs).parameters.items()}
    if "betas" in defaults:
        defaults["beta1"], defaults["beta2"] = defaults["betas"]
    own = {name: parameter.default for name, parameter in inspect.signature(ours).parameters.items()}
    shared = own.keys() & defaults.keys()
    assert {name: own[name] for name in shared} == {name: defaults[name] for name in shared}
    assert own.keys() - shared <= {"others", "exclude"}
