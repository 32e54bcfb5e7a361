"""The recurrent layers' gradients by hand: through carried state, in parts, of higher order and under transforms."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, jacrev, jvp, vmap

from dwiml_func.models.rnn import step_loops, time_steps, torchscript
from dwiml_func.models.rnn.autograd import kernel_scan
from dwiml_func.models.rnn.cudnn import cudnn_scan
from dwiml_func.models.rnn.scan import plain_scan
from dwiml_func.models.rnn.stacked import RecurrentLayer, _scan_for

# torch 2.13 scripts some of its own formulas of forward mode when they are first used.
FORWARD_MODE = pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated:DeprecationWarning")
KEYS = ("lstm", "gru")
RAGGED = [4, 3, 3, 1]
NUM_INPUTS, SIZE = 3, 2
NAMES: tuple[str, ...] = ("x", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "hidden", "cell")


def _tensors(rnn_key: str, sizes: Sequence[int], *, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """x, the four weights and the state, all of which require gradients."""
    generator = torch.Generator().manual_seed(seed)
    num_rows = {"lstm": 4, "gru": 3}[rnn_key] * SIZE
    shapes = [(sum(sizes), NUM_INPUTS), (num_rows, NUM_INPUTS), (num_rows, SIZE), (num_rows,), (num_rows,)]
    shapes += [(sizes[0], SIZE)] * {"lstm": 2, "gru": 1}[rnn_key]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def _scan(scan: Callable, rnn_key: str, sizes: Sequence[int]) -> Callable[..., tuple[Tensor, ...]]:
    """Flat tensors to flat tensors: the outputs and the last state."""

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        outputs, last = scan(rnn_key, x, sizes, rest[:4], rest[4:])
        return outputs, *last

    return run


def _loss(results: Sequence[Tensor]) -> Tensor:
    """A number on which every value of every result has its own share."""
    factors = [torch.arange(1, 1 + y.numel(), dtype=y.dtype).reshape(y.shape).cos() for y in results]
    return sum(((y * factor).sum() for y, factor in zip(results, factors, strict=True)), start=torch.zeros(()))


def _assert_all_near(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float = 1e-10) -> None:
    for our, their in zip(ours, theirs, strict=True):
        assert our.shape == their.shape
        assert our.dtype == their.dtype
        assert (our - their).abs().max() <= tolerance * their.abs().max()


def _compare_with_torch(rnn_key: str, sizes: Sequence[int], dtype: torch.dtype, tolerance: float) -> None:
    tensors = _tensors(rnn_key, sizes, dtype=dtype)
    ours, theirs = (_scan(scan, rnn_key, sizes)(*tensors) for scan in (kernel_scan, cudnn_scan))
    _assert_all_near(ours, theirs, tolerance)
    our_gradients, their_gradients = (torch.autograd.grad(_loss(results), tensors) for results in (ours, theirs))
    _assert_all_near(our_gradients, their_gradients, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("rnn_key", KEYS)
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([7, 7, 5, 5, 4, 1], id="ragged"),
        pytest.param([1, 1, 1], id="batch of one"),
        pytest.param([5], id="sequences of one"),
        pytest.param([*range(90, 0, -1)], id="one ends at each step, 8 blocks"),
        pytest.param([700, 600, 2, 1, 1], id="steps larger than a block"),
    ],
)
def test_gradients_from_the_last_state_to_the_first_equal_torchs(
    rnn_key: str, sizes: list[int], dtype: torch.dtype, tolerance: float
) -> None:
    _compare_with_torch(rnn_key, sizes, dtype, tolerance)


@settings(max_examples=40)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=9), st.sampled_from(KEYS), st.integers(1, 12))
def test_blocks_of_any_size_give_torchs_gradients(sizes: list[int], rnn_key: str, block_rows: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time_steps, "_BLOCK_ROWS", block_rows)
        _compare_with_torch(rnn_key, sorted(sizes, reverse=True), torch.float64, 1e-10)


@pytest.mark.parametrize("rnn_key", KEYS)
@pytest.mark.parametrize("low", [False, True])
def test_loops_run_without_python_and_bitwise_as_in_it_where_torchscript_is_missing(
    rnn_key: str, low: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [*range(90, 0, -1)]
    tensors = _tensors(rnn_key, sizes, dtype=torch.float32)
    weights = [tensor.bfloat16() for tensor in tensors[1:3]] if low else tensors[1:3]

    def run() -> list[Tensor]:
        results = _scan(kernel_scan, rnn_key, sizes)(tensors[0], *weights, *tensors[3:])
        return [*results, *torch.autograd.grad(_loss(results), tensors)]

    steps = (getattr(step_loops, f"{rnn_key}_{way}_steps").__wrapped__ for way in ("forward", "backward"))
    assert all(isinstance(torchscript._scripted(each), torch.jit.ScriptFunction) for each in steps)
    ours = run()
    monkeypatch.delattr(torch.jit, "script")
    monkeypatch.setattr(torchscript, "_scripted", torchscript._scripted.__wrapped__)
    assert all(torch.equal(one, other) for one, other in zip(ours, run(), strict=True))


@pytest.mark.parametrize("rnn_key", KEYS)
def test_pieces_joined_by_the_state_have_the_gradients_of_the_whole(rnn_key: str) -> None:
    sizes, tensors = [3] * 6, _tensors(rnn_key, [3] * 6)
    whole = _scan(kernel_scan, rnn_key, sizes)(*tensors)
    outputs: list[Tensor] = []
    state: Sequence[Tensor] = tensors[5:]
    for start, end in pairwise([0, 3, 12, 18]):
        piece = [3] * ((end - start) // 3)
        results = _scan(kernel_scan, rnn_key, piece)(tensors[0][start:end], *tensors[1:5], *state)
        outputs.append(results[0])
        state = results[1:]
    pieces = (torch.cat(outputs), *state)
    _assert_all_near(pieces, whole)
    _assert_all_near(torch.autograd.grad(_loss(pieces), tensors), torch.autograd.grad(_loss(whole), tensors))


@pytest.mark.parametrize("rnn_key", KEYS)
@pytest.mark.parametrize("result", ["outputs", "hidden", "cell"])
def test_a_loss_of_one_result_alone_has_torchs_gradients(rnn_key: str, result: str) -> None:
    number = ["outputs", "hidden", "cell"].index(result)
    if rnn_key == "gru" and result == "cell":
        return
    tensors = _tensors(rnn_key, RAGGED)

    def gradients_of(scan: Callable) -> Sequence[Tensor]:
        return torch.autograd.grad(_loss([_scan(scan, rnn_key, RAGGED)(*tensors)[number]]), tensors)

    _assert_all_near(gradients_of(kernel_scan), gradients_of(cudnn_scan))


@pytest.mark.parametrize("rnn_key", KEYS)
@pytest.mark.parametrize("wanted", [["x"], ["hidden"], ["weight_ih"], ["bias_hh"], NAMES[1:5], ["x", "weight_hh"]])
def test_gradients_asked_for_alone_are_those_of_all_to_the_bit(rnn_key: str, wanted: Sequence[str]) -> None:
    tensors = dict(zip(NAMES, _tensors(rnn_key, RAGGED), strict=False))
    run = _scan(kernel_scan, rnn_key, RAGGED)
    every = dict(zip(tensors, torch.autograd.grad(_loss(run(*tensors.values())), list(tensors.values())), strict=True))
    some = {name: t if name in wanted else t.detach() for name, t in tensors.items()}
    alone = torch.autograd.grad(_loss(run(*some.values())), [some[name] for name in wanted])
    assert all(torch.equal(gradient, every[name]) for name, gradient in zip(wanted, alone, strict=True))
    assert all(gradient.is_contiguous() for gradient in every.values())


@FORWARD_MODE
@pytest.mark.parametrize("rnn_key", KEYS)
def test_first_and_second_gradients_agree_with_finite_differences(rnn_key: str) -> None:
    tensors, run = _tensors(rnn_key, [2, 1]), _scan(kernel_scan, rnn_key, [2, 1])
    assert gradcheck(run, tensors, check_forward_ad=True)
    assert gradgradcheck(run, tensors)


@FORWARD_MODE
@pytest.mark.parametrize("rnn_key", KEYS)
def test_forward_mode_agrees_with_backward_mode(rnn_key: str) -> None:
    primals = tuple(tensor.detach() for tensor in _tensors(rnn_key, RAGGED))
    tangents = tuple(tensor.detach() for tensor in _tensors(rnn_key, RAGGED, seed=2))

    def loss_of(*tensors: Tensor) -> Tensor:
        return _loss(_scan(kernel_scan, rnn_key, RAGGED)(*tensors))

    gradients = grad(loss_of, argnums=tuple(range(len(primals))))(*primals)
    expected = torch.stack([(g * t).sum() for g, t in zip(gradients, tangents, strict=True)]).sum()
    torch.testing.assert_close(jvp(loss_of, primals, tangents)[1], expected, rtol=1e-10, atol=0)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(primal, tangent) for primal, tangent in zip(primals, tangents, strict=True)]
        tangent = forward_ad.unpack_dual(loss_of(*duals)).tangent
    torch.testing.assert_close(tangent, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("rnn_key", KEYS)
@pytest.mark.parametrize("shared", [(), ("x",), ("x", "hidden", "cell"), NAMES[1:5]], ids=str)
def test_gradients_by_vmap_equal_a_loop_on_ragged_batches(rnn_key: str, shared: Sequence[str]) -> None:
    members = [[tensor.detach() for tensor in _tensors(rnn_key, RAGGED, seed=seed)] for seed in range(3)]
    names = NAMES[: len(members[0])]
    in_dims = tuple(None if name in shared else 0 for name in names)
    for member in members:
        member[:] = [members[0][i] if names[i] in shared else member[i] for i in range(len(names))]
    batched = [
        parts[0] if dim is None else torch.stack(parts)
        for parts, dim in zip(zip(*members, strict=True), in_dims, strict=True)
    ]

    def gradients_of(*tensors: Tensor) -> tuple[Tensor, ...]:
        return grad(lambda *t: _loss(_scan(kernel_scan, rnn_key, RAGGED)(*t)), argnums=tuple(range(len(names))))(
            *tensors
        )

    together = vmap(gradients_of, in_dims)(*batched)
    for number, member in enumerate(members):
        _assert_all_near([gradient[number] for gradient in together], gradients_of(*member))


@pytest.mark.parametrize("rnn_key", KEYS)
def test_jacobians_of_gradients_equal_the_plain_scans(rnn_key: str) -> None:
    tensors = [tensor.detach() for tensor in _tensors(rnn_key, [2, 1])]

    def hessian(scan: Callable) -> Tensor:
        def loss_of(weight: Tensor) -> Tensor:
            return _loss(_scan(scan, rnn_key, [2, 1])(*tensors[:2], weight, *tensors[3:])).square()

        return jacrev(grad(loss_of))(tensors[2])

    _assert_all_near([hessian(kernel_scan)], [hessian(plain_scan)])


@pytest.mark.parametrize("rnn_key", KEYS)
def test_inputs_and_gradients_that_are_not_contiguous_change_nothing(rnn_key: str) -> None:
    tensors = _tensors(rnn_key, RAGGED)
    results = _scan(kernel_scan, rnn_key, RAGGED)(*tensors)
    expected = torch.autograd.grad(results[0].sum(), tensors)  # a gradient that is one number, expanded
    transposed = [(t.detach().t().contiguous().t() if t.dim() == 2 else t.detach()).requires_grad_() for t in tensors]
    others = _scan(kernel_scan, rnn_key, RAGGED)(*transposed)
    ones = torch.ones(SIZE, sum(RAGGED), dtype=torch.float64).t()
    _assert_all_near(others, results)
    _assert_all_near(torch.autograd.grad(others[0], transposed, ones), expected)


@pytest.mark.parametrize("rnn_key", KEYS)
def test_nothing_that_came_in_is_changed_and_runs_repeat_to_the_bit(rnn_key: str) -> None:
    sizes = [*range(60, 0, -1)]
    tensors = _tensors(rnn_key, sizes, dtype=torch.float32)
    cotangents = _scan(kernel_scan, rnn_key, sizes)(*tensors)
    cotangents = [result.detach().sin() for result in cotangents]
    before = [tensor.detach().clone() for tensor in (*tensors, *cotangents)]
    versions = [tensor._version for tensor in (*tensors, *cotangents)]

    def run() -> list[Tensor]:
        results = _scan(kernel_scan, rnn_key, sizes)(*tensors)
        values = [result.detach().clone() for result in results]
        gradients = torch.autograd.grad(results, tensors, cotangents)
        assert all(torch.equal(result, value) for result, value in zip(results, values, strict=True))
        return [*values, *gradients]

    assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))
    assert versions == [tensor._version for tensor in (*tensors, *cotangents)]
    assert all(torch.equal(*pair) for pair in zip(before, (*tensors, *cotangents), strict=True))


@pytest.mark.parametrize("rnn_key", KEYS)
def test_a_graph_that_is_kept_gives_the_same_gradients_again(rnn_key: str) -> None:
    tensors = _tensors(rnn_key, RAGGED)
    loss = _loss(_scan(kernel_scan, rnn_key, RAGGED)(*tensors))
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    assert all(torch.equal(*pair) for pair in zip(first, torch.autograd.grad(loss, tensors), strict=True))


def test_the_device_decides_which_scan_runs() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert _scan_for(cpu) is kernel_scan
    assert _scan_for(cuda) is cudnn_scan
    with torch.backends.cudnn.flags(enabled=False):
        assert _scan_for(cuda) is kernel_scan
    chosen: list[Any] = []
    grad(lambda x: (chosen.append(_scan_for(cuda)), x.sum())[1])(torch.ones(2))
    assert chosen == [kernel_scan]  # cuDNN's runs under no transform


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rnn_key", KEYS)
def test_a_layer_on_a_gpu_equals_itself_on_the_cpu(rnn_key: str) -> None:
    torch.manual_seed(5)
    layer, sizes = RecurrentLayer(rnn_key, 4, 5).double(), [6, 5, 5, 3, 1, 1]
    x = torch.randn(sum(sizes), 4, dtype=torch.float64)
    state = tuple(torch.randn(6, 5, dtype=torch.float64) for _ in range(2 if rnn_key == "lstm" else 1))
    results = []
    for device in ("cpu", "cuda"):
        moved, layer_state = x.to(device).requires_grad_(), tuple(part.to(device) for part in state)
        outputs, last = layer.to(device).run(moved, sizes, layer_state)
        loss = outputs.square().sum() + sum(part.sin().sum() for part in last)
        results.append([outputs, *last, *torch.autograd.grad(loss, [moved, *layer.parameters()])])
    _assert_all_near([result.cpu() for result in results[1]], results[0])
