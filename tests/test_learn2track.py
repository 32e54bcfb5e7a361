"""Learn2Track: against dwi_ml's numbers, and what its predictions may depend on."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value

from dwiml_func.data.batch import StreamlineBatch
from dwiml_func.data.hdf5.read import open_dataset
from dwiml_func.data.loader import BatchRequest, LoaderSpec, load_batch
from dwiml_func.data.streamlines import directions, input_offsets, offsets_of
from dwiml_func.models.direction_getters import DIRECTION_GETTERS
from dwiml_func.models.learn2track import Learn2Track, compute_batch_loss

DATA = Path(__file__).parent / "data"
F = 4
LENGTHS = [5, 2, 9, 2, 7]  # points of each streamline


def _batch(lengths: list[int] = LENGTHS, dtype: torch.dtype = torch.float32) -> StreamlineBatch:
    generator = torch.Generator().manual_seed(sum(lengths))
    num_points, num = sum(lengths), len(lengths)
    return StreamlineBatch(
        points=torch.randn(num_points, 3, generator=generator, dtype=dtype),
        offsets=offsets_of(torch.tensor(lengths)),
        subject=torch.zeros(num, dtype=torch.int64),
        ids=torch.arange(num),
        inputs=torch.randn(num_points - num, F, generator=generator, dtype=dtype),
    )


def _chosen(batch: StreamlineBatch, numbers: list[int]) -> StreamlineBatch:
    """The batch of some of a batch's streamlines, in the order given."""
    lengths = batch.offsets.diff()
    points = batch.points.split(lengths.tolist())
    inputs = batch.inputs.split((lengths - 1).tolist())
    return StreamlineBatch(
        points=torch.cat([points[number] for number in numbers]),
        offsets=offsets_of(lengths[numbers]),
        subject=batch.subject[numbers],
        ids=batch.ids[numbers],
        inputs=torch.cat([inputs[number] for number in numbers]),
    )


def _by_streamline(predictions: Tensor, batch: StreamlineBatch) -> list[Tensor]:
    return list(predictions.split(input_offsets(batch.offsets).diff().tolist()))


def _model(nb_previous_dirs: int = 2, **options: Any) -> Learn2Track:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Learn2Track(F, rnn_layer_sizes=(8, 6), nb_previous_dirs=nb_previous_dirs, **options)  # pyright: ignore[reportArgumentType]


def test_the_loss_of_a_model_that_dwi_ml_trained_is_the_one_that_it_reported() -> None:
    facts = json.loads((DATA / "cos" / "parameters.json").read_text())
    model = Learn2Track(
        facts["nb_features"],
        rnn_key=facts["rnn_key"],
        rnn_layer_sizes=facts["rnn_layer_sizes"],
        nb_previous_dirs=facts["nb_previous_dirs"],
        dropout=facts["dropout"],
        dg_key=facts["dg_key"],
        dg_args=facts["dg_args"],
    )
    model.load_state_dict(torch.load(DATA / "cos" / "model_state.pkl", weights_only=True), strict=True)
    dataset = open_dataset(DATA / "phantom.hdf5", "validation")
    everyone = BatchRequest(np.arange(dataset.index.num_total), None, epoch=0, batch=0)
    batch = load_batch(everyone, dataset=dataset, spec=LoaderSpec(interpolation="trilinear-corner"))

    loss, weight, _ = compute_batch_loss(model.eval(), batch)

    expected = json.loads((DATA / "expected_losses.json").read_text())["cos"]
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert weight == len(dataset.streamlines.points) - len(dataset.streamlines)


@pytest.mark.parametrize("rnn_key", ["lstm", "gru"])
def test_predictions_do_not_depend_on_the_order_of_the_streamlines(rnn_key: str) -> None:
    model, batch = _model(rnn_key=rnn_key), _batch()
    order = [3, 0, 4, 2, 1]
    shuffled = _chosen(batch, order)
    before = _by_streamline(model(batch), batch)
    after = _by_streamline(model(shuffled), shuffled)
    for position, number in enumerate(order):
        torch.testing.assert_close(after[position], before[number])


@pytest.mark.parametrize("number", range(len(LENGTHS)))
def test_predictions_do_not_depend_on_the_other_streamlines(number: int) -> None:
    model, batch = _model(), _batch()
    alone = _chosen(batch, [number])
    torch.testing.assert_close(model(alone), _by_streamline(model(batch), batch)[number])


def test_a_prediction_depends_on_the_streamline_up_to_its_point_and_on_nothing_later() -> None:
    model, batch = _model(), _batch([9])
    before = model(batch)
    for changed_input in range(8):
        inputs = batch.inputs.clone()
        inputs[changed_input] += 1
        same = (model(replace(batch, inputs=inputs)) == before).all(dim=1)
        assert same[:changed_input].all()
        assert not same[changed_input:].any()
    for changed_point in range(9):
        points = batch.points.clone()
        points[changed_point] += 1
        same = (model(replace(batch, points=points)) == before).all(dim=1)
        assert same[:changed_point].all()  # a point's own coordinates are known when its direction is predicted
        assert not same[max(changed_point, 1) :].any()  # the first point has no previous direction to show its place


def test_previous_directions_follow_the_inputs_nearest_first_without_normalisation() -> None:
    model, batch = _model(nb_previous_dirs=2), _batch([4])
    dirs = directions(batch.points, batch.offsets)
    zero = torch.zeros(3)
    previous = torch.stack(
        [torch.cat([zero, zero]), torch.cat([dirs[0], zero]), torch.cat([dirs[1], dirs[0]])],
    )
    x = torch.cat([batch.inputs, previous], dim=1)
    torch.testing.assert_close(model(batch), model.direction_getter(model.rnn_model(x, [1, 1, 1])))


def test_normalised_previous_directions_have_unit_length_and_those_without_length_stay_zero() -> None:
    model, batch = _model(nb_previous_dirs=1, normalize_prev_dirs=True), _batch([5])
    points = batch.points.clone()
    points[2] = points[1]  # a step without length
    batch = replace(batch, points=points)
    dirs = directions(points, batch.offsets)[:3].double()
    units = torch.stack([torch.zeros(3), dirs[0] / dirs[0].norm(), torch.zeros(3), dirs[2] / dirs[2].norm()]).float()
    x = torch.cat([batch.inputs, units], dim=1)
    torch.testing.assert_close(model(batch), model.direction_getter(model.rnn_model(x, [1, 1, 1, 1])))


@pytest.mark.parametrize("rnn_key", ["lstm", "gru"])
@pytest.mark.parametrize("normalize", [False, True])
def test_one_step_after_the_other_gives_what_the_whole_streamlines_give(rnn_key: str, normalize: bool) -> None:
    model = _model(nb_previous_dirs=2, normalize_prev_dirs=normalize, rnn_key=rnn_key).eval()
    batch = _batch([6, 6])
    expected = torch.stack(_by_streamline(model(batch), batch))
    inputs = torch.stack(list(batch.inputs.split(5)))
    dirs = torch.stack(list(directions(batch.points, batch.offsets).split(5)))
    dirs = torch.cat([torch.zeros(2, 2, 3), dirs], dim=1)  # dirs[:, t + 1] led to point t
    state = None
    for step in range(5):
        previous = torch.cat([dirs[:, step + 1], dirs[:, step]], dim=1)
        outputs, state = model.run_step(inputs[:, step], previous, state)
        torch.testing.assert_close(outputs, expected[:, step])


@pytest.mark.parametrize("rnn_key", ["lstm", "gru"])
@pytest.mark.parametrize(
    "options", [{}, {"use_skip_connection": True, "use_layer_normalization": True}], ids=["plain", "skips"]
)
def test_a_step_in_place_is_that_of_run_step(rnn_key: str, options: dict[str, Any]) -> None:
    model = _model(nb_previous_dirs=1, rnn_key=rnn_key, **options).eval().double()
    generator = torch.Generator().manual_seed(0)
    state: Any = None
    memory: Any = None
    inputs, dirs = (torch.randn(6, 9, n, generator=generator).double() for n in (model.input_size, 3))
    with torch.no_grad():
        for step in range(6):
            outputs, state = model.run_step(inputs[step], dirs[step], state)
            in_place, memory = model.run_step_in_place(inputs[step], dirs[step], memory)
            torch.testing.assert_close(in_place, outputs, rtol=1e-13, atol=1e-13)
            if step in (1, 2):  # new streamlines in some rows; the memory that they are forgotten from stays as it was
                is_new = torch.arange(9) % (step + 1) == 0
                before = memory.state
                kept, memory = memory, memory.forget(is_new)
                state = [tuple(part.masked_fill(is_new[:, None], 0) for part in layer) for layer in state]
                torch.testing.assert_close(kept.state, before, rtol=0, atol=0)
                torch.testing.assert_close(memory.state, tuple(state), rtol=1e-13, atol=1e-13)
        from_memory, _ = model.run_step(inputs[0], dirs[0], memory)
        from_state, _ = model.run_step(inputs[0], dirs[0], state)
        torch.testing.assert_close(from_memory, from_state, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("reason", ["training", "autocast"])
def test_a_step_in_place_is_run_step_itself_in_training_and_under_autocast(reason: str) -> None:
    model = _model(nb_previous_dirs=1, dropout=0.5).train(reason == "training")
    found = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=reason == "autocast"):
        for step in (model.run_step, model.run_step_in_place):
            torch.manual_seed(0)
            found.append(step(torch.ones(9, model.input_size), torch.ones(9, 3)))
    (outputs, state), (in_place, memory) = found
    assert type(memory) is type(state)
    assert torch.equal(outputs, in_place)


def test_without_previous_directions_the_points_are_not_looked_at() -> None:
    model, batch = _model(nb_previous_dirs=0), _batch()
    assert torch.equal(model(batch), model(replace(batch, points=torch.zeros_like(batch.points))))


def test_a_streamline_of_one_point_takes_part_without_a_prediction() -> None:
    model, batch = _model(), _batch([3, 1, 4])
    predictions = _by_streamline(model(batch), batch)
    assert [len(part) for part in predictions] == [2, 0, 3]
    torch.testing.assert_close(predictions[2], model(_chosen(batch, [2])))


def test_dropout_acts_only_in_training() -> None:
    batch = _batch()
    model, without = _model(dropout=0.5, dg_args={"dropout": 0.5}), _model()
    assert torch.equal(model.eval()(batch), without(batch))
    model.train()
    assert not torch.equal(model(batch), model(batch))


@pytest.mark.parametrize(
    ("options", "acts"),
    [
        ({}, False),
        ({"nb_previous_dirs": 1}, True),
        ({"input_embedding_key": "nn_embedding", "input_embedded_size": 30}, True),
    ],
)
def test_the_recurrent_input_is_dropped_only_where_there_are_previous_directions_or_an_embedding(
    options: dict[str, Any], acts: bool
) -> None:
    model = Learn2Track(F, rnn_layer_sizes=(8,), dropout=0.5, **options).train()
    batch = _batch()
    assert torch.equal(model(batch), model(batch)) is not acts


def test_the_loss_is_the_mean_over_all_points() -> None:
    model, batch = _model(), _batch()
    loss, weight, _ = compute_batch_loss(model, batch)
    total, total_weight = 0.0, 0
    for number in range(len(batch)):
        part_loss, part_weight, _ = compute_batch_loss(model, _chosen(batch, [number]))
        total += part_loss.item() * part_weight
        total_weight += part_weight
    assert weight == total_weight == batch.num_points
    assert loss.item() == pytest.approx(total / total_weight, rel=1e-6)


def test_the_angular_error_is_the_mean_angle_in_degrees_and_carries_no_gradient() -> None:
    model, batch = _model(), _batch()
    predictions = model(batch).detach().double()
    targets = directions(batch.points, batch.offsets).double()
    cosines = (predictions * targets).sum(1) / (predictions.norm(dim=1) * targets.norm(dim=1))
    error = compute_batch_loss(model, batch)[2]["angular_error"]
    assert error.item() == pytest.approx(torch.rad2deg(cosines.acos()).mean().item(), rel=1e-5)
    assert not error.requires_grad


@pytest.mark.parametrize("rnn_key", ["lstm", "gru"])
def test_functional_gradients_equal_autograds(rnn_key: str) -> None:
    model, batch = _model(rnn_key=rnn_key), _batch()
    parameters = dict(model.named_parameters())
    targets = directions(batch.points, batch.offsets)

    def loss_of(values: Mapping[str, Tensor]) -> Tensor:
        return model.direction_getter.losses(functional_call(model, dict(values), (batch,)), targets).mean()

    gradients, loss = grad_and_value(loss_of)(parameters)
    expected_loss, _, _ = compute_batch_loss(model, batch)
    expected = torch.autograd.grad(expected_loss, list(parameters.values()))
    assert torch.equal(loss, expected_loss)
    for ours, theirs in zip(gradients.values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_model_runs_in_double_precision() -> None:
    model, batch = _model().double(), _batch(dtype=torch.float64)
    loss, _, _ = compute_batch_loss(model, batch)
    assert loss.dtype == torch.float64
    single, _, _ = compute_batch_loss(
        _model(), replace(batch, points=batch.points.float(), inputs=batch.inputs.float())
    )
    assert loss.item() == pytest.approx(single.item(), rel=1e-5)


def test_training_on_one_batch_learns_it() -> None:
    model, batch = _model(), _batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    before, _, _ = compute_batch_loss(model, batch)
    for _ in range(100):
        optimizer.zero_grad()
        compute_batch_loss(model, batch)[0].backward()
        optimizer.step()
    after, _, _ = compute_batch_loss(model, batch)
    assert after.item() < 0.3 * before.item()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nb_features": 0}, "nb_features: expected .* received 0."),
        (
            {"nb_previous_dirs": -1},
            "nb_previous_dirs: expected .* received -1.",
        ),
        ({"rnn_key": "rnn"}, "rnn_key: expected one of lstm, gru, received 'rnn'."),
        ({"rnn_layer_sizes": ()}, "rnn_layer_sizes: expected 1 to 1000 layers, received 0."),
        (
            {"rnn_layer_sizes": (0,)},
            "rnn_layer_sizes: expected .* received 0.",
        ),
        ({"dropout": 1.0}, "dropout: expected .* received 1.0."),
        ({"dg_args": {"dropout": -0.5}}, "dropout: expected .* received -0.5."),
        ({"dg_key": "cosine"}, f"dg_key: expected one of {', '.join(DIRECTION_GETTERS)}, received 'cosine'."),
    ],
)
def test_wrong_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Learn2Track(**{"nb_features": F, **options})


def test_a_batch_with_other_features_is_refused_in_one_line() -> None:
    model, batch = _model(), _batch()
    with pytest.raises(ValueError, match=r"Expected a batch with 4 input features.*Received: 6") as error:
        model(replace(batch, inputs=torch.zeros(batch.num_points, 6)))
    assert "\n" not in str(error.value)


def test_a_batch_without_directions_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected a batch with streamlines of two points or more"):
        _model()(_batch([1, 1]))


@pytest.mark.parametrize(
    "options",
    [{"prev_dirs_embedding_key": "nn_embedding"}, {"prev_dirs_embedded_size": 4}, {"normalize_prev_dirs": True}],
)
def test_options_of_previous_directions_need_previous_directions(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="require nb_previous_dirs of at least 1, received 0"):
        Learn2Track(6, **options)


def test_options_of_the_recurrent_layers_reach_them() -> None:
    layers = _model(0, use_skip_connection=True, use_layer_normalization=True, dropout=0.25).rnn_model
    assert (layers.use_skip_connection, layers.dropout, layers.output_size) == (True, 0.25, F + 8 + 6)
    assert sum("norm" in name for name, _ in layers.named_parameters()) == 4


def test_a_short_previous_direction_is_normalised_too() -> None:
    model = _model(nb_previous_dirs=1, normalize_prev_dirs=True)
    inputs, short = torch.randn(1, model.input_size), torch.tensor([[0.0, 1.2e-8, 0.0]])
    outputs, long_outputs = (model.run_step(inputs, dirs)[0] for dirs in (short, short * 1e8))
    torch.testing.assert_close(outputs, long_outputs)


def test_the_model_sees_the_noisy_points_and_the_loss_the_noisy_targets() -> None:
    model, batch = _model(nb_previous_dirs=2), _batch()
    noisy, targets = batch.points + 0.5 * torch.randn_like(batch.points), batch.points.flip(1)
    both = replace(batch, noisy_points=noisy, noisy_targets=targets)
    assert torch.equal(model(both), model(replace(batch, points=noisy)))
    assert not torch.equal(model(both), model(batch))
    expected = model.direction_getter.loss(model(both), directions(targets, batch.offsets))[0]
    assert torch.equal(compute_batch_loss(model, both)[0], expected)
    assert not torch.equal(compute_batch_loss(model, replace(both, noisy_targets=None))[0], expected)
