"""Claims about tensors on disk: they come back as they were, or not at all."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dwiml_func.checkpoint.arrays import _quiet, load_leaves, save_leaves
from dwiml_func.checkpoint.digest import combine_digests, leaf_digest
from dwiml_func.checkpoint.manifest import CheckpointError, CorruptError, manifest_checksum, read_manifest

ODD = {
    "number": torch.tensor(2.5),
    "count": torch.tensor(2**62 + 1),
    "empty": torch.zeros(0),
    "empty_rows": torch.zeros(0, 3, dtype=torch.int64),
    "empty_columns": torch.zeros(3, 0, dtype=torch.bfloat16),
    "bfloat16": torch.tensor([1e38, -0.0, float("nan")], dtype=torch.bfloat16),
    "bfloat16_number": torch.tensor(3.0, dtype=torch.bfloat16),
    "float16": torch.tensor([6e-8, 65504], dtype=torch.float16),
    "float8": torch.tensor([1.0, 448.0]).to(torch.float8_e4m3fn),
    "float64": torch.tensor([0.1, 5e-324, float("-inf")], dtype=torch.float64),
    "int8": torch.tensor([-128, 127], dtype=torch.int8),
    "uint8": torch.tensor([[0, 255]], dtype=torch.uint8),
    "int64": torch.tensor([-(2**63), 2**63 - 1]),
    "bool": torch.tensor([[True], [False]]),
    "complex64": torch.tensor([1 + 2j]),
    "transposed": torch.arange(12.0).reshape(3, 4).T,
    "strided": torch.arange(12.0)[::3],
    "expanded": torch.tensor(2.0).expand(4, 2),
    "nan_with_payload": torch.tensor([0x7FC01234, -1], dtype=torch.int32).view(torch.float32),
    "many_axes": torch.arange(64.0).reshape(2, 2, 2, 2, 2, 2),
}
"""A leaf of every kind that a store may get wrong."""

COLLIDING = ("a", "a.b", "a/b", "a/b/c", "a%2Fb", "a%2Eb", "a%", ".", "..", "/", "%2F", " ", "", "é", "0", "a.0", "A")
"""Names that orbax or a file system may take for one another, or for a structure."""


NUMBERS = {
    "key": {"seed": 1, "path": []},
    "step": 7,
    "epoch": 3,
    "batch": 0,
    "sums": {},
    "best": {"value": 0.5, "epoch": 2, "num_bad_epochs": 1},
}


def same(loaded: dict[str, Tensor], saved: dict[str, Tensor]) -> bool:
    return list(loaded) == list(saved) and all(
        loaded[name].dtype == leaf.dtype
        and loaded[name].shape == leaf.shape
        and leaf_digest(loaded[name]) == leaf_digest(leaf)
        for name, leaf in saved.items()
    )


def edit_manifest(path: Path, edit: Callable[[dict], object], name: str = "manifest.json") -> None:
    """Change a manifest as one who means it: with the right digest and checksum."""
    manifest = read_manifest(path, name)
    edit(manifest)
    digests = {row["name"]: row["sha256"] for row in manifest["leaves"]}
    manifest["digest"] = combine_digests(digests, manifest.get("numbers", {}))
    (path / name).write_text(json.dumps(manifest | {"checksum": manifest_checksum(manifest)}))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "leaves_of_a_run"
    save_leaves(path, {"weight": torch.arange(1000.0), "bias": torch.zeros(3)}, {"epoch": 3}, numbers=NUMBERS)
    return path


@pytest.fixture
def corrupt(saved: Path, tmp_path: Path) -> Path:
    """A copy to corrupt."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_every_odd_leaf_comes_back_as_it_was(tmp_path):
    save_leaves(tmp_path / "odd", ODD, {})
    assert same(load_leaves(tmp_path / "odd"), ODD)


@pytest.mark.parametrize(
    "leaf",
    [
        torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
        torch.randn(4, 3, 1, 1).to(memory_format=torch.channels_last),  # both contiguous and channels last
        torch.randn(1, 3, 2, 4).to(torch.bfloat16).to(memory_format=torch.channels_last),
        torch.randn(2, 3, 4, 4, 5).to(memory_format=torch.channels_last_3d),
        torch.randn(3, 4, 5).permute(2, 0, 1),
        torch.randn(4, 3, 1, 1),
        torch.zeros(0, 3, 2, 2).to(memory_format=torch.channels_last),
        torch.tensor(1.0),
    ],
)
def test_the_memory_format_comes_back_and_the_digest_is_that_of_the_contiguous_tensor(tmp_path, leaf):
    save_leaves(tmp_path / "odd", {"leaf": leaf}, {})
    loaded = load_leaves(tmp_path / "odd")["leaf"]
    assert loaded.stride() == leaf.stride()
    assert torch.equal(loaded, leaf)
    assert read_manifest(tmp_path / "odd")["leaves"][0]["sha256"] == leaf_digest(leaf.contiguous())


def test_names_that_look_alike_stay_apart(tmp_path):
    leaves = {name: torch.tensor([float(number)]) for number, name in enumerate(COLLIDING)}
    save_leaves(tmp_path / "names", leaves, {})
    assert same(load_leaves(tmp_path / "names"), leaves)


@settings(max_examples=5)
@given(names=st.lists(st.text(), min_size=1, max_size=20, unique=True))
def test_any_text_is_a_name(names, tmp_path_factory):
    path = tmp_path_factory.mktemp("any") / "names"
    leaves = {name: torch.tensor([float(number)]) for number, name in enumerate(names)}
    save_leaves(path, leaves, {})
    assert same(load_leaves(path), leaves)


@pytest.mark.parametrize("name", ["[ab]", "a*", "a?", "a\\b", "a\udcff"])
def test_a_folder_may_have_a_name_that_is_a_pattern_or_no_text(tmp_path, name):
    (tmp_path / name).mkdir()
    save_leaves(tmp_path / name / "store", {"w": torch.ones(3)}, {})
    assert load_leaves(tmp_path / name / "store")["w"].tolist() == [1, 1, 1]
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("leaves", [{}, {"a": torch.zeros(0, 2)}], ids=["none", "empty"])
def test_a_store_without_any_value_is_whole(tmp_path, leaves):
    save_leaves(tmp_path / "empty", leaves, {"fact": 1})
    assert same(load_leaves(tmp_path / "empty"), leaves)
    assert read_manifest(tmp_path / "empty")["fact"] == 1


def test_what_is_loaded_is_ones_own_memory(saved):
    first, second = load_leaves(saved), load_leaves(saved)
    first["weight"].add_(1)
    assert torch.equal(second["weight"], torch.arange(1000.0))
    assert same(load_leaves(saved), second)


def test_the_manifest_tells_what_is_stored(saved):
    manifest = read_manifest(saved)
    assert manifest["epoch"] == 3
    assert manifest["leaves"][1] == {
        "name": "bias",
        "shape": [3],
        "dtype": "torch.float32",
        "sha256": leaf_digest(torch.zeros(3)),
    }
    assert manifest["environment"]["torch"] == torch.__version__
    assert len(manifest["digest"]) == 64


def test_the_digest_is_of_leaves_and_numbers_not_of_facts(saved, tmp_path):
    leaves = {"bias": torch.zeros(3), "weight": torch.arange(1000.0)}
    save_leaves(tmp_path / "same", leaves, {"epoch": 4, "more": None}, numbers=NUMBERS)
    save_leaves(tmp_path / "other", leaves, {"epoch": 3}, numbers=NUMBERS | {"step": 8})
    digests = [read_manifest(path)["digest"] for path in (saved, tmp_path / "same", tmp_path / "other")]
    assert digests[0] == digests[1] != digests[2]


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def is_noticed(path: Path, leaves: dict[str, Tensor]) -> bool:
    """Whether corruption is noticed; else the leaves must be as they were saved."""
    try:
        found = load_leaves(path)
    except CorruptError as error:
        message = str(error)
    else:
        assert same(found, leaves)
        return False
    assert message.startswith(f"{path} is corrupt: ") or "It may be corrupt" in message
    assert "\n" not in message
    return True


def test_corruption_of_any_file_is_noticed_or_harmless(saved, corrupt, capfd):
    leaves, noticed = load_leaves(saved), set()
    assert len(files_of(corrupt)) > 5
    for file in files_of(corrupt):
        content = file.read_bytes()
        places = sorted({0, len(content) // 2, len(content) - 1} if content else ())
        variants = [content[:k] + bytes([content[k] ^ 1]) + content[k + 1 :] for k in places]
        for variant in [*variants, content[:-1], b"", None]:
            if variant is None:
                file.unlink()
            else:
                file.write_bytes(variant)
            if is_noticed(corrupt, leaves):
                noticed.add(file.name)
            else:
                assert file.name != "_METADATA"  # not read here, but by other programs
        file.write_bytes(content)
    assert {"manifest.json", "_METADATA", "manifest.ocdbt"} < noticed  # and the data
    shutil.rmtree(corrupt / "leaves")
    with pytest.raises(CorruptError, match="has no file leaves/_METADATA"):
        load_leaves(corrupt)
    assert capfd.readouterr().err == ""  # tensorstore's threads would print tracebacks


def test_a_flipped_bit_of_any_value_is_noticed(corrupt):
    (file,) = (file for file in files_of(corrupt) if torch.arange(1000.0).numpy().tobytes() in file.read_bytes())
    content = file.read_bytes()
    start = content.index(torch.arange(1000.0).numpy().tobytes())
    for place in range(start, start + 4000, 97):
        file.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(CorruptError, match="corrupt"):
            load_leaves(corrupt)


def test_files_of_another_store_are_noticed(corrupt, tmp_path):
    save_leaves(tmp_path / "other", {"weight": torch.ones(1000), "bias": torch.zeros(3)}, {"epoch": 3})
    shutil.rmtree(corrupt / "leaves")
    shutil.copytree(tmp_path / "other" / "leaves", corrupt / "leaves")
    with pytest.raises(CorruptError, match="corrupt"):
        load_leaves(corrupt)


@pytest.mark.parametrize("field", ["shape", "dtype", "sha256"])
def test_what_is_read_is_checked_against_the_table(corrupt, field):
    wrong = {"shape": [1000, 1], "dtype": "torch.int32", "sha256": "0" * 64}
    edit_manifest(corrupt, lambda manifest: manifest["leaves"][0].update({field: wrong[field]}))
    with pytest.raises(CorruptError, match=r"weight does not have the (bytes|shape and dtype) that were saved"):
        load_leaves(corrupt)


def test_a_leaf_that_is_not_stored_is_an_error(corrupt):
    edit_manifest(corrupt, lambda manifest: manifest["leaves"][0].update(name="wait"))
    with pytest.raises(CorruptError, match="tensorstore cannot read its leaves: NOT_FOUND"):
        load_leaves(corrupt)


@pytest.mark.parametrize("later", [3, 1, "2", None, 1.5])
def test_another_format_is_refused_with_both_numbers(corrupt, later):
    edit_manifest(corrupt, lambda manifest: manifest.update(format=later))
    with pytest.raises(CheckpointError, match=rf"has format {later!r}\. Expected format 2"):
        load_leaves(corrupt)


def test_a_later_format_is_refused_whatever_else_it_holds(corrupt):
    (corrupt / "manifest.json").write_text('{"format": 3}')
    with pytest.raises(CheckpointError, match=r"has format 3\. Expected format 2"):
        read_manifest(corrupt)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"{}", b'{"format": 2}', b"\xff\xfe", b"[" * 100_000, b"1" * 5000, b'"text"'],
    ids=["empty", "half", "list", "null", "nothing", "format_only", "not_text", "deep", "huge_number", "text"],
)
def test_what_is_no_manifest_is_refused_in_one_line(corrupt, content):
    (corrupt / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"corrupt: manifest\.json") as raised:
        read_manifest(corrupt)
    assert "\n" not in str(raised.value)


def test_a_changed_fact_is_noticed(corrupt):
    text = (corrupt / "manifest.json").read_text()
    (corrupt / "manifest.json").write_text(text.replace('"epoch": 3', '"epoch": 4'))
    with pytest.raises(CheckpointError, match=r"manifest\.json does not hold what was written"):
        read_manifest(corrupt)
    (corrupt / "manifest.json").write_text(json.dumps(json.loads(text)))  # the same in another layout
    assert read_manifest(corrupt)["epoch"] == 3


def test_a_directory_without_its_manifest_is_corrupt_and_a_missing_one_is_missing(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "nothing", tmp_path / "file"):
        with pytest.raises(FileNotFoundError, match=r"No model\.json in "):
            read_manifest(path, "model.json")
    with pytest.raises(CorruptError, match=r"corrupt: it has no model\.json"):
        read_manifest(tmp_path, "model.json")


def test_a_store_replaces_an_older_one(corrupt):
    save_leaves(corrupt, {"a": torch.ones(1)}, {})
    assert same(load_leaves(corrupt), {"a": torch.ones(1)})
    assert len(list(corrupt.parent.iterdir())) == 1


@pytest.mark.parametrize("broken", ["os.fsync", "os.posix_fallocate", "pathlib.Path.write_text"])
def test_a_write_that_fails_leaves_what_was_there(saved, corrupt, monkeypatch, broken):
    def fail(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    before = sys.excepthook, sys.unraisablehook
    with monkeypatch.context() as patch:
        patch.setattr(broken, fail)
        with pytest.raises(OSError, match="No space left"):
            save_leaves(corrupt, {"a": torch.ones(1)}, {})
        with pytest.raises(OSError, match="No space left"):
            save_leaves(corrupt.parent / "new", {"a": torch.ones(1)}, {})
    assert [entry.name for entry in corrupt.parent.iterdir()] == ["copy"]
    assert same(load_leaves(corrupt), load_leaves(saved))
    assert (sys.excepthook, sys.unraisablehook) == before
    assert not any(logging.getLogger(name).disabled for name in ("absl", "asyncio"))


def test_while_arrays_are_written_only_errors_of_others_are_shown(monkeypatch):
    shown: list[str] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: shown.append(str(error)))
    logs = [logging.getLogger(name) for name in ("absl", "asyncio")]
    with _quiet():
        assert [log.disabled for log in logs] == [True, True]
        for text in ("Event loop is closed", "No module named 'a'"):
            sys.excepthook(RuntimeError, RuntimeError(text), None)
        sys.unraisablehook(MagicMock())
    assert shown == ["No module named 'a'"]
    monkeypatch.setattr(logs[0], "disabled", True)  # by the user
    with _quiet():
        pass
    assert [log.disabled for log in logs] == [True, False]


@pytest.mark.parametrize("leaves", [{}, {"a": torch.zeros(300_000), "b": torch.ones(2)}])
def test_as_much_space_is_reserved_as_the_files_take(tmp_path, monkeypatch, leaves):
    reserved, reserve = [], os.posix_fallocate

    def fallocate(descriptor: int, start: int, size: int) -> None:
        reserved.append(size)
        reserve(descriptor, start, size)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    save_leaves(tmp_path / "a", leaves, {"fact": "x" * 200_000})
    taken = sum(file.stat().st_size for file in (tmp_path / "a").rglob("*") if file.is_file())
    assert len(reserved) == 1
    assert taken <= reserved[0] <= 1.1 * taken + (1 << 17)


def test_an_error_of_the_disk_keeps_its_number(tmp_path, monkeypatch):
    """Orbax and tensorstore wrap it in errors of their own."""
    for text, number in (("x [os_error_code='28']", errno.ENOSPC), ("no number", errno.EIO)):

        def fail(*_: object, text: str = text, **__: object) -> None:
            raise ValueError(text)

        monkeypatch.setattr("orbax.checkpoint.Checkpointer.save", fail)
        with pytest.raises(OSError, match="cannot write") as raised:
            save_leaves(tmp_path / "a", {"a": torch.ones(1)}, {})
        assert raised.value.errno == number
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_that_cannot_reserve_space_is_written_to(tmp_path, monkeypatch, number):
    def cannot(*_: object) -> None:
        raise OSError(number, "cannot")

    monkeypatch.setattr("os.posix_fallocate", cannot)
    save_leaves(tmp_path / "a", {}, {"fact": 1})
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["manifest.json"]


def test_facts_that_are_no_json_leave_nothing(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_leaves(tmp_path / "a", {"a": torch.ones(1)}, {"fact": object()})
    assert list(tmp_path.iterdir()) == []


def test_tensors_of_which_hardly_anything_is_stored_are_not_made(corrupt):
    import tensorstore

    size = 1 << 20  # 4 MB of zeros, of which 4 kB are stored: with the right digest nothing else would notice
    kvstore = {"driver": "ocdbt", "base": f"file://{corrupt}/leaves", "path": "weight/"}
    store: Any = tensorstore.open({"driver": "zarr", "kvstore": kvstore}, open=True).result()
    store.resize(exclusive_max=[size]).result()
    digest = leaf_digest(torch.cat([torch.arange(1000.0), torch.zeros(size - 1000)]))
    rows = {"weight": {"shape": [size], "sha256": digest}}
    edit_manifest(corrupt, lambda manifest: [row.update(rows.get(row["name"], {})) for row in manifest["leaves"]])
    with pytest.raises(CorruptError, match=f"its leaves have [0-9]+ bytes for tensors of {4 * size + 12} bytes"):
        load_leaves(corrupt)
