"""Claims about scheduled weight decays: torch's bits, compiled once, resumed exactly, in ensembles and chains."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dwiml_func import (
    adam,
    adamw,
    chain,
    cosine,
    ema,
    ensemble_step,
    init_state,
    jit_step,
    member,
    module_loss,
    per_epoch,
    per_step,
    reduce_on_plateau,
    sgd,
    stack_states,
    train_and_validate,
    train_and_validate_ensemble,
    train_step,
    warm_up,
    with_weight_decay,
)
from dwiml_func.checkpoint import state_digest
from dwiml_func.core.rng import Key, torch_rng
from dwiml_func.optim import clip_by_global_norm
from dwiml_func.writers import jsonl, log_steps, read_scalars

with torch_rng(Key(0)):
    MODEL = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
BATCHES = [torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
LOSS = module_loss(MODEL, lambda model, x: ((model(x) - 1).square().mean(), len(x)))
BY_STEP = per_step(warm_up(cosine(0.5, length=12), length=3))
TORCH: dict[Any, Any] = {
    sgd: partial(torch.optim.SGD),
    adam: partial(torch.optim.Adam, foreach=False),
    adamw: partial(torch.optim.AdamW, foreach=False),
}


def loop(step: Any, optimizer: Any, state: Any = None, **options: Any) -> Any:
    return train_and_validate(
        init_state(MODEL, optimizer, seed=0) if state is None else state,
        train=lambda key, epoch, start: BATCHES[start:],
        step=step,
        learning_rate=0.1,
        max_epochs=3,
        **options,
    )


@pytest.mark.parametrize("factory", TORCH)
@pytest.mark.parametrize("by_step", [True, False])
def test_the_parameters_are_bitwise_those_of_a_loop_of_torch(factory: Any, by_step: bool) -> None:
    schedule = BY_STEP if by_step else per_epoch([0.5, 0.1, 0.02])
    bound = with_weight_decay(partial(train_step, loss_fn=LOSS, optimizer=factory), schedule)
    *_, (state, _) = loop(bound, factory())

    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
    model.load_state_dict(MODEL.state_dict())
    optimizer = TORCH[factory](model.parameters(), lr=0.1)
    for epoch in range(3):
        for number, batch in enumerate(BATCHES):
            decay = BY_STEP.rate(5 * epoch + number) if by_step else (0.5, 0.1, 0.02)[epoch]
            optimizer.param_groups[0]["weight_decay"] = decay
            optimizer.zero_grad()
            (model(batch) - 1).square().mean().backward()
            optimizer.step()
    for name, param in model.named_parameters():
        assert torch.equal(state.params[name], param), name


def composed(weight_decay: Any) -> Any:
    return chain(clip_by_global_norm(1.0), ema(adamw(weight_decay=weight_decay), 0.9))


def test_a_chain_takes_it_and_a_run_stopped_at_any_batch_resumes_exactly() -> None:
    step = with_weight_decay(partial(train_step, loss_fn=LOSS, optimizer=composed), BY_STEP)
    states: list[Any] = []
    *_, (whole, _) = loop(step, composed(0.0), on_batch=lambda state, _: states.append(state))
    plain = partial(train_step, loss_fn=LOSS, optimizer=composed(0.0))
    *_, (without, _) = loop(plain, composed(0.0))
    assert state_digest(whole) != state_digest(without)
    for state in states:
        *_, (end, _) = loop(step, composed(0.0), state)
        assert state_digest(end) == state_digest(whole)


@pytest.mark.parametrize("factory", [adamw, composed])
def test_a_compiled_step_takes_all_its_values_in_one_graph(factory: Any) -> None:
    compiled = jit_step(loss_fn=LOSS, optimizer=factory, backend="eager")
    *_, (state, _) = loop(with_weight_decay(compiled, BY_STEP), factory(weight_decay=0.0))
    assert (compiled.num_compilations, compiled.eager_reason) == (1, None)
    eager = with_weight_decay(partial(train_step, loss_fn=LOSS, optimizer=factory), BY_STEP)
    *_, (expected, _) = loop(eager, factory(weight_decay=0.0))
    for name, param in expected.params.items():
        torch.testing.assert_close(state.params[name], param, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("factory", [adamw, composed])
def test_the_members_of_an_ensemble_share_it(factory: Any) -> None:
    start = init_state(MODEL, factory(weight_decay=0.0), seed=0)
    *_, (ensemble, report) = train_and_validate_ensemble(
        stack_states([start, start]),
        train=lambda key, epoch, first: BATCHES[first:],
        step=with_weight_decay(partial(ensemble_step, loss_fn=LOSS, optimizer=factory), BY_STEP),
        learning_rate=[0.1, 0.05],
        max_epochs=3,
    )
    used = [BY_STEP.rate(number) for number in range(10, 15)]
    assert report.members[1].train["weight_decay"] == pytest.approx(sum(used) / 5, rel=1e-12)
    single = with_weight_decay(partial(train_step, loss_fn=LOSS, optimizer=factory), BY_STEP)
    *_, (state, _) = loop(single, factory(weight_decay=0.0))
    for name, param in state.params.items():
        torch.testing.assert_close(member(ensemble, 0).params[name], param, rtol=1e-4, atol=1e-6)


def test_reports_and_logs_of_steps_show_the_weight_decays_that_were_used(tmp_path: Any) -> None:
    bound = with_weight_decay(partial(train_step, loss_fn=LOSS, optimizer=adamw), BY_STEP)
    reports = [report for _, report in loop(bound, adamw(), on_batch=log_steps(jsonl(tmp_path), every=1))]
    used = [BY_STEP.rate(number) for number in range(15)]
    assert [row["weight_decay"] for row in read_scalars(tmp_path)] == pytest.approx(used, rel=1e-12)
    means = [sum(used[5 * epoch : 5 * epoch + 5]) / 5 for epoch in range(3)]
    assert [report.train["weight_decay"] for report in reports] == pytest.approx(means, rel=1e-12)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_gradient_goes_through_the_decay_of_a_step(is_compiled: bool) -> None:
    state, batch = init_state(MODEL, sgd(), seed=0), BATCHES[0]
    compiled = jit_step(loss_fn=LOSS, optimizer=sgd, backend="aot_eager")
    step = compiled if is_compiled else partial(train_step, loss_fn=LOSS, optimizer=sgd)
    step(state, batch, lr=0.1, weight_decay=0.1)  # from now on, a graph is called directly

    def loss(decay: Tensor) -> Tensor:
        new, _ = step(state, batch, lr=0.1, weight_decay=decay)
        return new.params["0.weight"].square().sum()

    decay = torch.tensor(0.1, dtype=torch.float64)
    up, down = (float(loss(decay + shift)) for shift in (1e-2, -1e-2))
    assert float(torch.func.grad(loss)(decay)) == pytest.approx((up - down) / 2e-2, rel=1e-3)
    (gradient,) = torch.autograd.grad(loss(decay.requires_grad_()), decay)
    assert float(gradient) == pytest.approx((up - down) / 2e-2, rel=1e-3)
    assert (compiled.num_compilations, compiled.eager_reason) == (int(is_compiled), None)


def test_what_does_not_fit_is_refused_with_a_sentence() -> None:
    state, batch = init_state(MODEL, adamw(), seed=0), BATCHES[0]
    with pytest.raises(ValueError, match="weight_decay requires an optimizer factory"):
        train_step(state, batch, loss_fn=LOSS, optimizer=adamw(), lr=0.1, weight_decay=0.1)
    with pytest.raises(TypeError, match=r"Expected an optimizer, such as adamw\(\), or its factory and weight_decay"):
        train_step(state, batch, loss_fn=LOSS, optimizer=adamw, lr=0.1)
    with pytest.raises(ValueError, match="Received: one of reduce_on_plateau"):
        with_weight_decay(partial(train_step, loss_fn=LOSS, optimizer=adamw), reduce_on_plateau(0.1))
    with pytest.raises(TypeError, match=r"Expected weight_decay: a function \(count\).*missing .* 'b'"):
        with_weight_decay(train_step, lambda a, b: 0.1)  # type: ignore[arg-type]
    step = with_weight_decay(partial(train_step, loss_fn=LOSS, optimizer=adamw), lambda epoch: -0.1)
    with pytest.raises(ValueError, match=r"finite and at least 0. Received: -0.1"):
        step(state, batch, lr=0.1)
