"""Claims about weights from elsewhere: what fits by name and shape is loaded, and the rest is reported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from experiment_cases import CONFIG, PHANTOM, trained
from torch import nn

from dwiml_func import adam, init_state, list_checkpoints, load_pretrained, restore, save
from dwiml_func.checkpoint import state_digest
from dwiml_func.experiment.folder import read_config
from dwiml_func.experiment.model_store import load_model
from dwiml_func.experiment.setup import make_model, prepare


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(3, 3), nn.Linear(3, 3)
        self.decode.weight = self.encode.weight
        self.norm = nn.BatchNorm1d(3)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("trained"), CONFIG)


@pytest.mark.parametrize("source", ["experiment", "model directory", "checkpoint"])
def test_what_this_package_wrote_is_loaded_whole(experiment, source):
    best = load_model(experiment / "best_model")
    epoch = str(best.facts["epoch"])
    folder = {"experiment": ".", "model directory": "best_model", "checkpoint": f"checkpoint/{epoch}"}[source]
    module = make_model(CONFIG, best.facts["nb_features"])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(7)
    report = load_pretrained(module, experiment / folder)
    assert (report.missing, report.unexpected, report.other_shape) == ((), (), {})
    assert {name: tensor.tolist() for name, tensor in module.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in best.module.state_dict().items()
    }


def test_a_run_of_a_script_is_read_from_its_newest_checkpoint(tmp_path):
    state = init_state(nn.Linear(2, 2), adam(), seed=0, params={"weight": torch.full((2, 2), 3.0)})
    save(tmp_path, state)
    module = nn.Linear(2, 2)
    assert load_pretrained(module, tmp_path).loaded == ("weight", "bias")
    assert torch.equal(module.weight, state.params["weight"])


@pytest.mark.parametrize("wrap", [lambda tensors: tensors, lambda tensors: {"state_dict": tensors, "epoch": 3}])
def test_an_encoder_with_a_new_head_is_told_apart(tmp_path, wrap):
    old = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 8), nn.Linear(8, 1)).double()
    torch.save(wrap(old.state_dict()), tmp_path / "old.pth")
    module = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 5))
    head = module[1].bias.clone()  # type: ignore
    report = load_pretrained(module, tmp_path / "old.pth")
    assert report.loaded == ("0.weight", "0.bias")
    assert report.other_shape == {"1.weight": ((8, 4), (5, 4)), "1.bias": ((8,), (5,))}
    assert report.unexpected == ("2.weight", "2.bias")
    assert module[0].weight.dtype == torch.float32
    assert torch.equal(module[0].weight, old[0].weight.float())  # type: ignore
    assert torch.equal(module[1].bias, head)  # type: ignore
    load_pretrained(old, tmp_path / "old.pth")


def test_tied_weights_and_buffers_are_loaded_and_stay_tied(tmp_path):
    old, new = Tied(), Tied()
    old.norm.running_mean.fill_(5)  # type: ignore
    torch.save({name: t for name, t in old.state_dict().items() if name != "encode.weight"}, tmp_path / "a.pt")
    report = load_pretrained(new, tmp_path / "a.pt")
    assert report.missing == ()
    assert new.decode.weight is new.encode.weight
    assert torch.equal(new.encode.weight, old.encode.weight)
    assert torch.equal(new.norm.running_mean, old.norm.running_mean)  # type: ignore


def test_the_digest_is_of_the_loaded_values(tmp_path):
    old = nn.Linear(2, 2)
    torch.save(old.state_dict(), tmp_path / "a.pt")
    torch.save(old.state_dict() | {"more": torch.ones(1)}, tmp_path / "b.pt")
    torch.save({name: t + 1 for name, t in old.state_dict().items()}, tmp_path / "c.pt")
    a, b, c = (load_pretrained(nn.Linear(2, 2), tmp_path / f"{name}.pt").digest for name in "abc")
    assert a == b != c


def test_what_cannot_be_written_whole_is_refused_and_nothing_is_written(tmp_path):
    torch.save({"bias": torch.ones(2), "weight": torch.ones(2, 2) * 1j}, tmp_path / "a.pt")
    module = nn.Linear(2, 2)
    before = module.bias.tolist()
    with pytest.raises(ValueError, match=r"Nothing was loaded from .*: weight would lose its imaginary part"):
        load_pretrained(module, tmp_path / "a.pt")
    assert module.bias.tolist() == before
    with torch.device("meta"):
        empty = nn.Linear(2, 2)
    torch.save(module.state_dict(), tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"is on the meta device: call module\.to_empty first"):
        load_pretrained(empty, tmp_path / "b.pt")


def test_when_nothing_fits_nothing_is_written(tmp_path):
    torch.save({"weight": torch.ones(3), "other": torch.ones(2)}, tmp_path / "a.pt")
    module = nn.Linear(2, 2)
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(ValueError, match=r"Nothing in .*: loaded: none; missing: bias; unexpected: other; of another"):
        load_pretrained(module, tmp_path / "a.pt")
    assert all(torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True))


def test_what_is_no_state_dict_is_refused_and_nothing_is_executed(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("no model")
    torch.save({"weight": 1j * torch.ones(2, 2)}, tmp_path / "complex.pt")
    cases = (
        ("complex", "weight would lose its imaginary part"),
        ("module", "hold a whole module, or other Python objects. W"),
    )
    for name, text in (*cases, ("module", "state_dict()"), ("list", "expected a state dict"), ("text", "state_dict()")):
        with pytest.raises(ValueError) as raised:  # noqa: PT011
            load_pretrained(nn.Linear(2, 2), tmp_path / f"{name}.pt")
        assert text in str(raised.value)
        assert "\n" not in str(raised.value)
    with pytest.raises(FileNotFoundError):
        load_pretrained(nn.Linear(2, 2), tmp_path / "gone.pt")
    with pytest.raises(ValueError, match="neither a model directory"):
        load_pretrained(nn.Linear(2, 2), tmp_path)


def test_a_run_may_start_from_given_parameters_and_wrong_ones_are_named():
    module = nn.BatchNorm1d(3).bfloat16()
    given = {"weight": torch.full((3,), 2.0, requires_grad=True), "running_mean": torch.full((3,), 4.0)}
    state = init_state(module, adam(), seed=0, params=given)
    assert (state.params["weight"].tolist(), state.params["bias"].tolist()) == ([2.0] * 3, [0.0] * 3)
    assert state.buffers["running_mean"].tolist() == [4.0] * 3
    assert state.params["weight"].dtype == torch.bfloat16
    assert not state.params["weight"].requires_grad
    with pytest.raises(ValueError, match=r"unexpected gain; weight of shape \(2,\), expected \(3,\)\.$"):
        init_state(module, adam(), seed=0, params={"weight": torch.ones(2), "gain": torch.ones(3)})
    with pytest.raises(ValueError, match=r"bias of shape \(3, 1\), expected \(3,\)\.$"):
        init_state(module, adam(), seed=0, params={"bias": torch.ones(3, 1)})
    with pytest.raises(ValueError, match=r"weight of type list, expected a tensor; bias is complex, expected real"):
        init_state(module, adam(), seed=0, params={"weight": [1.0] * 3, "bias": 1j * torch.ones(3)})  # type: ignore[dict-item]


def test_train_init_from_starts_from_the_weights_and_records_their_digest(cli, experiment, tmp_path, monkeypatch):
    arguments = ("second", PHANTOM, "--config", experiment / "config.json", "--rng", 8, "--init-from", experiment)
    done = cli("train", tmp_path, *arguments, "--max-epochs", 1)
    assert done.code == 0, done.err
    config, best = read_config(tmp_path / "second"), load_model(experiment / "best_model").module
    assert config.origin is not None
    module = make_model(config, load_model(experiment / "best_model").facts["nb_features"])
    assert config.origin.digest == load_pretrained(module, experiment).digest
    assert (config.origin.experiment, config.origin.checkpoint) == (str(experiment.absolute()), "0")
    monkeypatch.chdir(experiment.parent)
    again = cli("train", tmp_path, *arguments[:-1], experiment.name, "--max-epochs", 1)
    assert "exists, with this config" in again.out  # by a relative path, too
    first = restore(tmp_path / "second", prepare(config).first_state(), name="0").state
    assert {name: tensor.tolist() for name, tensor in first.params.items()} == {
        name: tensor.tolist() for name, tensor in best.named_parameters()
    }
    assert state_digest(first) == config.origin.start_digest
    assert cli("train", tmp_path, *arguments, "--max-epochs", 1).code == 0  # the same command again
    for other in (arguments[:-2], (*arguments[:-1], experiment / "best_model")):
        assert "exists in" in cli("train", tmp_path, *other, "--max-epochs", 1).err
    assert cli("resume", tmp_path, "second", "--new-max-epochs", 3).code == 0
    assert "0" in list_checkpoints(tmp_path / "second")
    assert cli("verify", tmp_path / "second", "--epoch", 1).code == 0
    for several in (("--num-models", 2), ("--sweep", "rng=1,2")):
        cli("train", tmp_path, *("third", *arguments[1:]), *several).check_refusal("--init-from: expected one model")
    assert cli("train", tmp_path, *("third", *arguments[1:-1], tmp_path / "gone")).code == 2
    assert not (tmp_path / "third").exists()


def test_a_source_that_is_not_there_is_told_from_one_that_holds_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No model at .*gone\. Expected a torch\.save file, a model directory"):
        load_pretrained(nn.Linear(2, 2), tmp_path / "gone")
