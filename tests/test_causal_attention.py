"""Causal attention on flat rows: torch's own attention, finite differences and loops over calls are the truth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import scaled_dot_product_attention

from dwiml_func.core.rng import Key, torch_rng
from dwiml_func.data.streamlines import offsets_of
from dwiml_func.ensemble.rng import MemberGenerators, per_member_rng
from dwiml_func.models.transformers.attention import sequences_of
from dwiml_func.models.transformers.causal import causal_weights

LENGTHS = [0, 7, 0, 2, 12, 6, 1, 0]
SIZE, HEADS = 4, 2


@pytest.fixture(autouse=True)
def _several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of few queries and few weights, so that short sequences have several."""
    monkeypatch.setattr("dwiml_func.models.transformers.blocks._QUERIES", 5)
    monkeypatch.setattr("dwiml_func.models.transformers.blocks._WEIGHTS", 500)


def _heads(seed: int, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3))  # pyright: ignore[reportReturnType]


def _attend(query: Tensor, key: Tensor, value: Tensor, padded_length: int | None = None, rate: float = 0.0) -> Tensor:
    sequences = sequences_of(offsets_of(torch.tensor(LENGTHS)), sum(LENGTHS), padded_length)
    return sequences.attend(torch.cat([query, key, value], dim=1), num_heads=HEADS, dropout_rate=rate)


def _attend_with_dropout(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with torch_rng(Key(3)):
        return _attend(query, key, value, rate=0.3)


def _one_by_one(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Torch's attention of each sequence alone, with a mask that is written down."""
    results = []
    for rows in zip(*(tensor.split(LENGTHS) for tensor in (query, key, value)), strict=True):
        q, k, v = (part.unflatten(1, (HEADS, -1)).transpose(0, 1) for part in rows)
        mask = torch.ones(len(rows[0]), len(rows[0])).tril().bool()
        results.append(scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1).flatten(1))
    return torch.cat(results)


def test_rows_attend_to_the_earlier_rows_of_their_sequence() -> None:
    rows = _heads(0, sum(LENGTHS), SIZE)
    torch.testing.assert_close(_attend(*rows), _one_by_one(*rows), atol=1e-12, rtol=0)
    ours, theirs = (torch.autograd.grad(f(*rows).square().sum(), rows) for f in (_attend, _one_by_one))
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    for length in (max(LENGTHS), 15):
        torch.testing.assert_close(_attend(*rows, length), _one_by_one(*rows), atol=1e-12, rtol=0)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own forward mode uses it
@pytest.mark.parametrize("function", [_attend, _attend_with_dropout])
def test_first_and_second_derivatives_of_flat_rows_are_those_of_finite_differences(function: Any) -> None:
    rows = _heads(1, sum(LENGTHS), SIZE)
    assert gradcheck(function, rows, fast_mode=True, check_forward_ad=True)
    assert gradgradcheck(function, rows, fast_mode=True)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own forward mode uses it
def test_autocast_lowers_no_product_within_attention() -> None:
    rows = torch.cat(_heads(5, sum(LENGTHS), SIZE), 1).detach().float()
    sequences = sequences_of(offsets_of(torch.tensor(LENGTHS)), sum(LENGTHS))

    def attend(rows: Tensor) -> Tensor:
        return sequences.attend(rows, num_heads=HEADS, dropout_rate=0.0)

    def loss(rows: Tensor) -> Tensor:
        return attend(rows).float().square().sum()

    functions: tuple[Any, ...] = (
        attend,
        torch.func.grad(loss),
        lambda x: torch.func.jvp(attend, (x,), (x,))[1],
        lambda x: torch.func.vmap(torch.func.grad(loss))(x[None])[0],
        torch.func.grad(lambda x: torch.func.grad(loss)(x).float().square().sum()),
    )
    for function in functions:
        expected = function(rows)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            torch.testing.assert_close(function(rows), expected, rtol=0, atol=1e-6)
            low = function(rows.bfloat16()).float()
        exact = function(rows.bfloat16().float())
        assert (low - exact).norm() < 2**-7 * exact.norm()  # results and gradients are rounded, nothing within


def test_dropout_keeps_a_share_of_the_weights_and_scales_it() -> None:
    num, length, rate = 60, 24, 0.25
    sequences = sequences_of(offsets_of(torch.full((num,), length)), num * length)
    value = torch.eye(length, dtype=torch.float64).repeat(num, 1)  # with equal scores, results are the weights
    zeros = torch.zeros_like(value)
    with torch_rng(Key(1)):
        results = sequences.attend(torch.cat([zeros, zeros, value], 1), num_heads=1, dropout_rate=rate)
    weights = results.view(num, length, length) * torch.arange(1, length + 1)[:, None] * (1 - rate)
    kept = weights[:, torch.ones(length, length).tril().bool()]
    torch.testing.assert_close(kept, kept.round(), atol=1e-12, rtol=0)
    assert kept.unique().round().tolist() == [0, 1]
    assert abs(kept.mean().item() - (1 - rate)) < 4 * (rate * (1 - rate) / kept.numel()) ** 0.5
    assert not torch.equal(kept[0], kept[1])
    assert (
        len(weights[:, 4:, :5].round().transpose(0, 1).flatten(1).unique(dim=0)) == length - 4
    )  # rounding depends on the row
    almost_all = sequences.attend(torch.cat([zeros, zeros, value], 1), num_heads=1, dropout_rate=1 - 1e-9)
    assert almost_all.isfinite().all()


def test_members_drop_what_each_drops_alone() -> None:
    rows, keys = torch.cat(_heads(2, 3, sum(LENGTHS), SIZE), 2).detach(), [Key(1), Key(2), Key(1)]
    sequences = sequences_of(offsets_of(torch.tensor(LENGTHS)), sum(LENGTHS))

    def loss(own: Tensor) -> Tensor:
        return sequences.attend(own, num_heads=HEADS, dropout_rate=0.4).square().sum()

    def member(own: Tensor, index: Tensor) -> Tensor:
        with per_member_rng(MemberGenerators(keys), index):
            return loss(own)

    for of_member, alone in ((member, loss), (torch.func.grad(member), torch.func.grad(loss))):
        together = torch.func.vmap(of_member)(rows, torch.arange(3))
        for number, key in enumerate(keys):
            with torch_rng(key):
                torch.testing.assert_close(together[number], alone(rows[number]))


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (1, 2, 0), (None, 0, None)])
def test_mapped_attention_is_a_loop_over_calls_also_of_its_gradients(in_dims: tuple[int | None, ...]) -> None:
    rows = _heads(4, 3, sum(LENGTHS), SIZE)
    rows = [own if dim is not None else own[0] for own, dim in zip(rows, in_dims, strict=True)]
    moved = [own if dim is None else own.movedim(0, dim) for own, dim in zip(rows, in_dims, strict=True)]
    gradient = torch.func.grad(lambda q, k, v: _attend(q, k, v).square().sum(), argnums=(0, 1, 2))
    functions: tuple[Any, ...] = _attend, gradient
    for function in functions:
        mapped = torch.func.vmap(function, in_dims)(*moved)
        for number in range(3):
            own = [one if dim is None else one[number] for one, dim in zip(rows, in_dims, strict=True)]
            one = [part[number] for part in mapped] if isinstance(mapped, tuple) else mapped[number]
            torch.testing.assert_close(one, function(*own) if isinstance(one, Tensor) else [*function(*own)])


def test_weights_of_a_row_sum_to_one_over_the_rows_up_to_it() -> None:
    query, key, _ = _heads(3, 6, 4)
    weights = causal_weights(query, key)
    torch.testing.assert_close(weights.sum(-1), torch.ones(6, dtype=torch.float64))
    assert torch.equal(weights, weights.tril())
    assert (weights[torch.ones(6, 6).tril().bool()] > 0).all()


def test_a_bucket_of_a_traced_graph_has_at_least_the_two_rows_that_it_promises() -> None:
    padded, places = torch.ops.dwiml_func.one_bucket(offsets_of(torch.tensor([1, 0, 1])), 2)
    assert padded.tolist() == [[0, 0], [1, 1], [1, 1]]
    assert places.tolist() == [0, 4]
