"""Claims about files and names of others: nothing is unpickled, nothing is led elsewhere, every refusal is one line."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from preloaded import run_program

import dwiml_func
from dwiml_func.checkpoint.manifest import manifest_checksum
from dwiml_func.data.creation.config import StreamlineGroup
from dwiml_func.data.creation.connectivity import load_connectivity
from dwiml_func.data.creation.files import GroupFiles, Source

ROOT = Path(dwiml_func.__file__).parent
DATA = Path(__file__).parent / "data"

# ---------------------------------------------------------------------------------------------- what the code may do

LOADERS: dict[str, tuple[str, str] | None] = {
    "torch": ("weights_only", "True"),
    "np": ("allow_pickle", "False"),
    "json": None,
    "nib": None,
    "nib.streamlines": None,
}
"""What may be called as `X.load(...)`, and the argument that keeps it from unpickling where it could."""

MODULES = {"_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "pandas", "pickle", "shelve", "yaml"}
BUILTINS = {"__import__", "compile", "eval", "exec"}


def dangers(source: str) -> list[str]:
    """Each place in a source that could run code out of a file, or would hide it from this search."""
    nodes = list(ast.walk(ast.parse(source)))
    safe = {id(node.func) for node in nodes if isinstance(node, ast.Call) and _is_safe_load(node)}
    return [text for node in nodes if id(node) not in safe and (text := _danger(node))]


def _is_safe_load(call: ast.Call) -> bool:
    if not isinstance(call.func, ast.Attribute) or ast.unparse(call.func.value) not in LOADERS:
        return False
    needed = LOADERS[ast.unparse(call.func.value)]
    return needed is None or needed in {(keyword.arg, ast.unparse(keyword.value)) for keyword in call.keywords}


def _danger(node: ast.AST) -> str | None:
    match node:
        case ast.Import(names=names):  # of pickle only the error, under its own name
            bad = any(
                alias.name.partition(".")[0] in MODULES and (alias.name != "pickle" or alias.asname) for alias in names
            )
        case ast.ImportFrom(module=module, names=names):
            bad = (module or "").partition(".")[0] in MODULES or any(alias.name == "load" for alias in names)
        case ast.Attribute(value=ast.Name(id="pickle"), attr=attr):
            bad = attr != "UnpicklingError"
        case ast.Attribute(attr=attr):
            bad = attr == "load" or attr.endswith("_pickle")
        case ast.Name(id=name, ctx=ast.Load()):  # a field of that name is no call
            bad = name in BUILTINS
        case ast.keyword(arg=arg, value=value):
            bad = (arg, ast.unparse(value)) in {("allow_pickle", "True"), ("weights_only", "False")}
        case _:
            return None
    return ast.unparse(node) if bad else None


def test_no_code_path_unpickles():
    files = sorted(ROOT.rglob("*.py"))
    assert len(files) > 60
    assert {file.relative_to(ROOT).as_posix(): dangers(file.read_text()) for file in files} == {
        file.relative_to(ROOT).as_posix(): [] for file in files
    }


@pytest.mark.parametrize(
    "source",
    [
        *("import dill", "import pickle as p", "from pickle import loads", "pickle.loads(b)", "import a, shelve"),
        *("torch.load(p)", "torch.load(p, weights_only=False)", "torch.jit.load(p)", "np.load(p)", "numpy.load(p)"),
        *("np.load(p, allow_pickle=True)", "f = torch.load", "from numpy import load", "pandas.read_pickle(p)"),
        *("eval(t)", "exec(t)", "f(eval)", "__import__(n)", "np.lib.format.read_array(f, allow_pickle=True)"),
        *("import yaml.loader", "from joblib import dump", "multiprocessing.pickle.load(p)"),
    ],
)
def test_the_search_finds_what_it_is_for(source):
    assert dangers(source) != []


def test_the_search_lets_pass_what_is_safe():
    safe = "import pickle\ntry: torch.load(p, weights_only=True)\nexcept pickle.UnpicklingError: pass\n"
    safe += "np.load(p, allow_pickle=False); json.load(f); re.compile(t); nib.load(p); model.eval()"
    assert dangers(safe) == []


WATCHED = """
import sys
seen = set()
sys.addaudithook(lambda event, args: seen.add(args) if event == "pickle.find_class" else None)
from dwiml_func.cli.main import main
folder, data, model = sys.argv[1:]
options = ["--rnn-layer-sizes", "4", "--max-epochs", "1", "--batch-size-training", "96"]
codes = [
    main(["train", folder, "run", data, *options]),
    main(["resume", folder, "run", "--new-max-epochs", "2"]),
    main(["verify", f"{folder}/run"]),
    main(["diff", f"{folder}/run", f"{folder}/run"]),
    main(["digest", f"{folder}/run"]),
    main(["evaluate", f"{folder}/run", data]),
    main(["info", data]),
    main(["import-dwi-ml", model, f"{folder}/imported"]),
]
print(codes, seen)
import pickle, pathlib
pickle.loads(pickle.dumps(pathlib.Path("/")))
print(len(seen) > 0)
"""
"""Runs the commands that read files, and prints every class and function that an unpickler looked up meanwhile."""


def test_the_commands_unpickle_nothing_while_they_run(tmp_path):
    out = run_program(WATCHED, tmp_path, DATA / "phantom.hdf5", DATA / "cos")
    assert out.splitlines()[-2:] == ["[0, 0, 0, 0, 0, 0, 0, 0] set()", "True"]


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.place),)


@pytest.fixture
def bomb(tmp_path: Path) -> Bomb:
    place = tmp_path / "went_off"
    pickle.loads(pickle.dumps(Bomb(place)))
    place.rmdir()  # it works
    return Bomb(place)


def test_a_pickle_in_the_place_of_a_models_tensors_does_not_go_off(cli, tmp_path, bomb):
    model = Path(shutil.copytree(DATA / "cos", tmp_path / "model"))
    torch.save({"weight": bomb}, model / "model_state.pkl")
    cli("import-dwi-ml", model, tmp_path / "out").check_refusal(str(model / "model_state.pkl"), "cannot be read")
    (model / "model_state.pkl").write_bytes(pickle.dumps(bomb))
    cli("import-dwi-ml", model, tmp_path / "out").check_refusal(str(model / "model_state.pkl"), "cannot be read")
    assert not bomb.place.exists()
    assert not (tmp_path / "out").exists()


def test_a_pickle_in_the_place_of_a_matrix_does_not_go_off(tmp_path, bomb):
    array = np.empty((1, 1), dtype=object)
    array[0, 0] = bomb
    np.save(tmp_path / "matrix.npy", array, allow_pickle=True)
    (tmp_path / "plain.npy").write_bytes(pickle.dumps(bomb))
    for name in ("matrix.npy", "plain.npy"):
        found = GroupFiles((), matrix=Source("s", "g", tmp_path / name))
        group = StreamlineGroup(files=("a.trk",), connectivity_matrix=name, connectivity_nb_blocs=(1, 1, 1))
        with pytest.raises(ValueError, match=f"{name}: cannot be read as a matrix"):
            load_connectivity(group, found, None)
    assert not bomb.place.exists()


def resign(manifest: Path, **changes: Any) -> None:
    """Rewrite a manifest, as one who means harm would: every digest in it fits."""
    content = json.loads(manifest.read_bytes()) | changes
    del content["checksum"]
    manifest.write_text(json.dumps(content | {"checksum": manifest_checksum(content)}))


def test_a_pickle_in_the_place_of_any_file_of_a_checkpoint_does_not_go_off(cli, experiments, bomb):
    checkpoint = experiments / "run" / "checkpoint" / "3"
    files = [file for file in checkpoint.rglob("*") if file.is_file()]
    assert len(files) > 5
    for file in files:
        content = file.read_bytes()
        file.write_bytes(pickle.dumps(bomb))
        outcome = cli("digest", experiments / "run")
        # Some of orbax's files say nothing that is needed; then the digest is that of the whole checkpoint.
        assert outcome.code in (0, 2), file
        file.write_bytes(content)
        assert not bomb.place.exists(), file
    assert cli("digest", experiments / "run").code == 0


# --------------------------------------------------------------------------------------------------- names of others

NAMES = [
    "",
    ".",
    "..",
    "../out",
    "a/b",
    "/out",
    "a\\b",
    ".hidden",
    "-dash",
    "--",
    "a\0b",
    "a\nb",
    "a\x1b[31mb",
    "\u202eb",
]


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.parametrize("command", ["train", "resume", "fork"])
def test_a_name_that_leads_elsewhere_is_refused_by_every_command_that_takes_one(cli, experiments, command, name):
    before = contents(experiments.parent)
    data = [DATA / "phantom.hdf5"] if command == "train" else []
    options = ["--new-patience", "9"] if command == "resume" else []
    place = experiments / "run" if command == "fork" else experiments
    outcome = cli(command, *options, "--", place, name, *data)
    outcome.check_refusal(f"dwiml-func {command}: ")
    assert ascii(name)[1:-1] in outcome.err
    assert outcome.err[:-1].isprintable()
    assert contents(experiments.parent) == before


@pytest.mark.parametrize("command", ["verify", "digest", "diff", "evaluate", "resume", "info", "export-dwi-ml"])
@pytest.mark.parametrize("place", ["no\0such", "no\nsuch\x1b[31m", "x" * 5000])
def test_a_place_with_any_character_is_refused_in_one_printable_line(cli, tmp_path, command, place):
    more = {
        "diff": [place],
        "evaluate": [DATA / "phantom.hdf5"],
        "resume": ["run"],
        "export-dwi-ml": [tmp_path / "o"],
    }
    outcome = cli(command, place, *more.get(command, []))
    outcome.check_refusal(f"dwiml-func {command}: ")
    assert outcome.err[:-1].isprintable()
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------- configs of others


def put(*path: str, to: Any) -> Callable[[bytes], bytes]:
    def change(config: bytes) -> bytes:
        data = json.loads(config)
        part = data
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = to
        return json.dumps(data).encode()

    return change


def literal(key: bytes, value: bytes) -> Callable[[bytes], bytes]:
    """Write something that no JSON encoder would."""

    def change(config: bytes) -> bytes:
        head, _, rest = config.partition(b'"' + key + b'": ')
        assert rest
        return head + b'"' + key + b'": ' + value + b"," + rest.partition(b",")[2]

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (put("training", "rng", to=10**400), "rng: expected a finite number at least 0 and below"),
        (literal(b"rng", b"1" + b"0" * 9000), "out of range"),
        (literal(b"weight_decay", b"1e999"), "weight_decay: expected a finite number"),
        (literal(b"weight_decay", b"NaN"), "weight_decay: expected a finite number"),
        (literal(b"weight_decay", b"-Infinity"), "weight_decay: expected a finite number"),
        (put("training", "num_threads", to=2**31 - 1), "num_threads: expected"),
        (put("training", "learning_rate", to=["1*" + "9" * 400]), "Learning rate"),
        (put("training", "learning_rate", to=["1*1000000"] * 100 + ["1"]), "Learning rate"),
        (put("training", "learning_rate", to=["x" * 100_000]), "Learning rate"),
        (put("model", "rnn_layer_sizes", to=[8] * 100_000), "rnn_layer_sizes"),
        (put("model", "rnn_layer_sizes", to=[2**31 - 1] * 2), "rnn_layer_sizes"),
        (put("data", "cache_size", to="9" * 400 + "GB"), "cache_size"),
        (put("checkpoints", "checkpoint_every", to="9" * 100_000 + "batches"), "checkpoint_every"),
        (put("training", to=[1]), "training: input should be an object, received [1]"),
        (put("training", "max_epochs", to=True), "training.max_epochs"),
        (put("training", "max_epochs", to="9"), "training.max_epochs"),
        (put("training", "__class__", to=1), "training.__class__: unexpected keyword argument"),
        (literal(b"patience", b"[" * 100_000 + b"]" * 100_000), "recursion limit exceeded"),
        (lambda config: b"[" * 100_000 + b"]" * 100_000, "recursion limit exceeded"),
        (lambda config: config.replace(b"{", b'{"hdf5_file": "other",', 1), "duplicate key 'hdf5_file'"),
        (literal(b"rng", b'1, "rng": 2'), "duplicate key 'rng'"),
        (lambda config: config.replace(b"lstm", b"\xff\xfe"), "invalid unicode"),
        (lambda config: config.replace(b"lstm", b"\\ud800"), "invalid JSON"),
        (lambda config: config.replace(b"lstm", b"\0"), "invalid JSON"),
        (put("hdf5_file", to="a\0b\n\x1b[31m"), "does not exist"),
        (put("hdf5_file", to="x" * 100_000_000), "larger than any config"),
        (lambda config: b" " * (1 << 20) + config, "larger than any config"),
    ],
    ids=range(27),
)
def test_a_hostile_config_is_refused_in_one_short_line(cli, experiments, change, named):
    config = experiments / "run" / "config.json"
    config.write_bytes(change(config.read_bytes()))
    before = contents(experiments)
    outcome = cli("resume", experiments, "run", "--new-patience", "9")
    outcome.check_refusal("dwiml-func resume: ", named)
    assert len(outcome.err) < 500 + len(str(config))
    assert outcome.err[:-1].isprintable()
    assert contents(experiments) == before


@pytest.mark.parametrize("command", ["verify", "diff"])
def test_a_hostile_config_is_refused_by_those_that_only_read(cli, experiments, command):
    config = experiments / "run" / "config.json"
    for content, named in [
        (b"[" * 100_000, "recursion limit"),
        (b"\xff", "invalid JSON"),
        (b" " * (1 << 21), "larger than"),
    ]:
        config.write_bytes(content)
        more = [experiments / "run"] if command == "diff" else []
        cli(command, experiments / "run", *more).check_refusal(str(config), named)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"numbers": {"step": "1"}}, "numbers"),
        ({"history": [{"epoch": 1, "colour": 2}]}, "history"),
        ({"leaves": "none"}, "leaves"),
        ({"digest": "\x1b[31m" * 1000}, "digest"),
    ],
    ids=["wrong number", "unknown key", "wrong type", "control characters"],
)
@pytest.mark.parametrize("command", ["digest", "verify", "diff", "resume"])
def test_a_hostile_manifest_is_refused_in_one_line_by_every_command_that_reads_it(
    cli, experiments, command, changes, named
):
    for checkpoint in (experiments / "run" / "checkpoint").iterdir():
        resign(checkpoint / "manifest.json", **changes)
    arguments = {
        "resume": [experiments, "run", "--new-patience", "9"],
        "diff": [experiments / "run", experiments / "run"],
    }
    outcome = cli(command, *arguments.get(command, [experiments / "run"]))
    outcome.check_refusal(str(experiments / "run" / "checkpoint"), named)
    assert outcome.err[:-1].isprintable()
