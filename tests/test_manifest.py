"""Claims about manifests: what is not as a save writes it is refused in one line that names it."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dwiml_func import adam, init_state
from dwiml_func.checkpoint.arrays import load_leaves, save_leaves
from dwiml_func.checkpoint.digest import combine_digests, leaf_digest, state_leaves, state_numbers
from dwiml_func.checkpoint.history import history_to_json
from dwiml_func.checkpoint.manifest import (
    FORMAT,
    CheckpointError,
    CorruptError,
    manifest_checksum,
    manifest_text,
    read_manifest,
    report_text,
)
from dwiml_func.core.early_stopping import Best
from dwiml_func.core.report import EpochReport
from dwiml_func.types import Sum

LEAF = {"name": "a", "shape": [2], "dtype": "torch.float32", "sha256": "0" * 64}
REPORT = EpochReport(
    epoch=1,
    learning_rate=0.1,
    train={"loss": 0.5, "angle": math.nan},
    valid={"loss": math.inf},
    num_batches=3,
    num_points=30.0,
    best=Best(),
    is_best=False,
    stop=None,
    train_minutes=0.1,
    valid_minutes=0.0,
)


def make() -> dict[str, Any]:
    """A manifest with all that a checkpoint has, before its digest."""
    state = init_state(torch.nn.Linear(2, 2), adam(), seed=7).replace(
        epoch=1, step=3, batch=1, sums={"loss": Sum(math.nan, 2.0)}
    )
    leaves = state_leaves(state)
    return {
        "format": FORMAT,
        "environment": {"torch": torch.__version__, "num_threads": 1, "devices": ["cpu"]},
        "numbers": state_numbers(state),
        "history": history_to_json([REPORT]),
        "config": {"a": [1, {"b": None}], "rate": math.inf},
        "data": {"sha256": "0" * 64, "size": 3},
        "leaves": [
            {"name": name, "shape": list(leaf.shape), "dtype": str(leaf.dtype), "sha256": leaf_digest(leaf)}
            for name, leaf in leaves.items()
        ],
    }


def signed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with digest and checksum made right again, as another program might write it."""
    try:
        digests = {row["name"]: row["sha256"] for row in manifest["leaves"]}
        digest = combine_digests(digests, manifest.get("numbers") or {})
    except (KeyError, TypeError):
        digest = "0" * 64
    manifest = json.loads(json.dumps({"digest": digest, **manifest}))
    return manifest | {"checksum": manifest_checksum(manifest)}


def write(folder: Path, manifest: dict[str, Any]) -> Path:
    (folder / "manifest.json").write_text(json.dumps(signed(manifest)))
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(CorruptError) as raised:
        read_manifest(folder)
    message = str(raised.value)
    assert message.startswith(f"{folder} is corrupt: ")
    assert "\n" not in message
    assert len(message) < len(str(folder)) + 250
    return message


def test_a_manifest_of_a_checkpoint_is_taken_as_it_is(tmp_path):
    manifest = make()
    assert json.dumps(read_manifest(write(tmp_path, manifest)) | {"digest": 0}, sort_keys=True) == json.dumps(
        manifest | {"digest": 0}, sort_keys=True
    )


def test_what_is_written_is_what_is_read(tmp_path):
    manifest: dict[str, Any] = make() | {"fact": {"1": [True, "é", 2**63]}}
    digests = {row["name"]: row["sha256"] for row in manifest["leaves"]}
    manifest["digest"] = combine_digests(digests, manifest["numbers"])
    (tmp_path / "manifest.json").write_text(manifest_text(manifest))
    assert json.dumps(read_manifest(tmp_path)) == json.dumps(manifest)


def edit(*path: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        part: Any = manifest
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = to

    return change


def drop(*path: str | int) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        part: Any = manifest
        for key in path[:-1]:
            part = part[key]
        del part[path[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (drop("environment"), "environment"),
        (drop("leaves"), "leaves"),
        (edit("digest", to="0" * 64), "its digest is not that of its leaves and numbers"),
        (edit("digest", to=["0"]), "digest"),
        (edit("digest", to="Z" * 64), "should match pattern"),
        (edit("leaves", to={}), "leaves"),
        (edit("leaves", 0, to="weight"), "leaves.0"),
        (lambda manifest: manifest["leaves"].append(manifest["leaves"][-1]), "its digest is not that of its leaves"),
        (edit("leaves", 0, to=LEAF | {"colour": 1}), "leaves.0.colour"),
        (drop("leaves", 1, "sha256"), "leaves.1.sha256"),
        (edit("leaves", 0, "name", to=None), "leaves.0.name"),
        (edit("leaves", 0, "sha256", to="0" * 63), "should match pattern"),
        (edit("leaves", 0, "dtype", to="torch.float"), "dtype"),
        (edit("leaves", 0, "dtype", to="torch.load"), "dtype"),
        (edit("leaves", 0, "dtype", to="float32"), "dtype"),
        (edit("leaves", 0, "shape", to=[-1, 2]), "shape"),
        (edit("leaves", 0, "shape", to=[2.0]), "shape"),
        (edit("leaves", 0, "shape", to=[True]), "shape"),
        (edit("leaves", 0, "shape", to=["2"]), "shape"),
        (edit("leaves", 0, "dim_order", to=[0, 2]), "dim_order"),
        (edit("leaves", 0, "dim_order", to=[0, 0]), "dim_order"),
        (edit("leaves", 0, "dim_order", to="10"), "dim_order"),
        (edit("numbers", to=3), "numbers"),
        (drop("numbers", "key"), "numbers.key"),
        (edit("numbers", "colour", to=3), "numbers.colour"),
        (edit("numbers", "step", to=-1), "step"),
        (edit("numbers", "step", to=1.0), "step"),
        (edit("numbers", "step", to=math.nan), "step"),
        (edit("numbers", "batch", to=True), "batch"),
        (edit("numbers", "key", "seed", to="1"), "seed"),
        (edit("numbers", "key", "way", to=[1]), "way"),
        (edit("numbers", "sums", to=[1]), "sums"),
        (edit("numbers", "sums", to={"loss": [1.0]}), "sums.loss"),
        (edit("numbers", "sums", to={"loss": [1.0, 2.0, 3.0]}), "sums.loss"),
        (edit("numbers", "sums", to={"loss": "nan"}), "sums.loss"),
        (edit("history", to={}), "history"),
        (edit("history", 0, to=None), "history.0"),
        (drop("history", 0, "learning_rate"), "learning_rate"),
        (edit("history", 0, "colour", to=1), "colour"),
        (edit("history", 0, "best", "colour", to=1), "colour"),
        (lambda manifest: manifest["history"].append(manifest["history"][0] | {"colour": 1}), "no key 'colour'"),
        (edit("history", 0, "epoch", to=1.5), "epoch"),
        (edit("history", 0, "train", to={"loss": "low"}), "train.loss"),
        (edit("history", 0, "stop", to="soon"), "stop"),
        (edit("history", 0, "is_best", to=1), "is_best"),
        (edit("config", to=[]), "config"),
        (edit("environment", to="linux"), "environment"),
        (edit("data", to="file"), "data"),
    ],
)
def test_what_does_not_fit_the_schema_is_refused_by_name(tmp_path, change, named):
    manifest = make()
    change(manifest)
    assert named in refused(write(tmp_path, manifest))


@pytest.mark.parametrize("key", ["numbers", "history", "config"])
@pytest.mark.parametrize(
    "change", [lambda manifest, key: manifest.pop(key), lambda manifest, key: manifest.update({key: None})]
)
def test_what_a_reader_needs_must_be_there(tmp_path, key, change):
    manifest = make()
    change(manifest, key)
    read_manifest(write(tmp_path, manifest))
    with pytest.raises(CorruptError, match=f"expected {key}, received nothing"):
        read_manifest(tmp_path, needs=("numbers", "history", "config"))


def test_no_more_than_a_manifest_can_have_is_read_and_none_that_is_larger_written(tmp_path):
    (tmp_path / "manifest.json").write_bytes(b'{"format": 2, "a": "' + b"x" * 100_000_000 + b'"}')
    tracemalloc.start()
    message = refused(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "manifest.json is larger than any manifest" in message
    assert peak < 80_000_000


@pytest.mark.parametrize(
    "content", [b'{"a":' * 100_000, b"[" * 100_000 + b"]" * 100_000, b'{"format": 1' + b"0" * 5000 + b"}"]
)
def test_what_no_parser_takes_is_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    assert "manifest.json is not JSON" in refused(tmp_path)


def test_another_format_is_no_corruption_but_a_corrupt_format_is(tmp_path):
    for other in (1, 3):
        (tmp_path / "manifest.json").write_text(json.dumps(signed(make() | {"format": other})))
        with pytest.raises(CheckpointError, match=rf"has format {other}\. Expected format 2\. Read it with") as raised:
            read_manifest(tmp_path)
        assert not isinstance(raised.value, CorruptError)
        (tmp_path / "manifest.json").write_text(json.dumps(signed(make()) | {"format": other}))
        with pytest.raises(CorruptError, match=rf"has format {other}\. Expected format 2\. It may be corrupt"):
            read_manifest(tmp_path)


def test_what_would_not_be_read_is_not_written(tmp_path):
    leaves = {"a": torch.ones(2)}
    for facts, named in [
        ({"config": [1]}, "config: input should be an object"),
        ({"history": [{"epoch": 1}]}, "history.0"),
        ({"note": "x" * (1 << 25)}, "expected at most 33554432 bytes"),
    ]:
        with pytest.raises(ValueError, match=f"Cannot be recorded: .*{named}"):
            save_leaves(tmp_path / "a", leaves, facts)
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_would_not_be_read_is_not_recorded():
    with pytest.raises(ValueError, match=r"Cannot be recorded: history: .*field required"):
        report_text({"epoch": 1})


def test_a_manifest_of_another_store_does_not_match_the_files(tmp_path):
    save_leaves(tmp_path / "a", {"a": torch.arange(4.0)}, {})
    save_leaves(tmp_path / "b", {"a": torch.arange(5.0)}, {})
    own, other = read_manifest(tmp_path / "a"), read_manifest(tmp_path / "b")
    mixed = {key: other[key] for key in ("leaves", "digest")}
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(signed(own | mixed)))
    with pytest.raises(CorruptError, match="a does not have the shape and dtype that were saved"):
        load_leaves(tmp_path / "a")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300)
@given(data=st.data())
def test_any_value_in_any_place_is_taken_whole_or_refused_in_one_line(data, tmp_path_factory):
    manifest = make()
    part: Any = manifest
    while True:
        keys = list(part) if isinstance(part, dict) else list(range(len(part)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(part[key], dict | list) or not part[key] or data.draw(st.booleans()):
            break
        part = part[key]
    part[key] = data.draw(JSON)
    folder = tmp_path_factory.mktemp("any")
    write(folder, manifest)
    try:
        read = read_manifest(folder)
    except CheckpointError as error:
        message = str(error)
    else:
        message = ""
        written = {key: value for key, value in signed(manifest).items() if key != "checksum"}
        assert json.dumps(read, sort_keys=True) == json.dumps(written, sort_keys=True)
    assert "\n" not in message
