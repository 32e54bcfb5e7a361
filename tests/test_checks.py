"""Claims about `dwiml_func._checks` and `dwiml_func.files.json`: numbers in range, texts of one line, strict JSON."""

from __future__ import annotations

import codecs
import json
import math
import os
import re
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch
from pydantic import AfterValidator, TypeAdapter, ValidationError

from dwiml_func._checks import (
    GREATEST,
    LEAST,
    at_most_three,
    check_choice,
    check_number,
    check_takes,
    error_text,
    listed,
    one_line,
    truncated_repr,
)
from dwiml_func.files.json import (
    null_if_not_finite,
    parse_json,
    read_checked,
    read_config_file,
    to_json_data,
    write_checked,
)
from dwiml_func.files.paths import missing_text


@pytest.mark.parametrize(
    ("value", "bounds", "named"),
    [
        (0, {"at_least": 1}, "at least 1 and below 2147483648"),
        (0.0, {"above": 0}, "above 0"),
        (1.0, {"at_least": 0, "below": 1}, "at least 0 and below 1"),
        (math.nan, {"at_least": 0}, "at least 0"),
        (math.inf, {"at_least": 0}, "at least 0"),
        (-math.inf, {"below": 1}, "below 1"),
        (1 << 31, {"at_least": 1}, "at least 1 and below 2147483648"),
    ],
)
def test_a_number_out_of_range_is_refused_with_its_bounds(value: float, bounds: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=rf"^size: expected a finite number {named}, received {value}\.$"):
        check_number("size", value, **bounds)


def test_the_bounds_themselves_are_in_or_out() -> None:
    assert (torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max) == (LEAST, GREATEST)
    check_number("size", 1, at_least=1)
    check_number("size", (1 << 31) - 1, at_least=1)
    check_number("size", GREATEST, at_least=1)
    check_number("size", LEAST, above=0)
    for beyond in (1e39, 1e-39):
        with pytest.raises(
            ValueError, match=rf"^size: expected a number that float32 can hold. Received: {re.escape(str(beyond))}\.$"
        ):
            check_number("size", beyond, above=0)
    check_number("size", math.nextafter(1, 0), below=1)
    check_number("size", 1 << 31, below=1 << 40)  # a bound of one's own
    for value in (None, 0, -0.0, -5.0, -GREATEST):
        check_number("size", value)
    for value in (-1e-39, -1e39):
        with pytest.raises(ValueError, match="that float32 can hold"):
            check_number("size", value)


def test_a_choice_is_one_of_those_there_are() -> None:
    check_choice("mode", "min", ("min", "max"))
    with pytest.raises(ValueError, match=r"^mode: expected one of min, max, 3, received 'mid'\.$"):
        check_choice("mode", "mid", ("min", "max", 3))


def test_a_function_is_refused_that_cannot_be_called_as_it_will_be() -> None:
    def rate(step: int, *, lr: float) -> None: ...

    check_takes("rate", "(step, *, lr)", rate, 1, lr=0.5)
    check_takes("rate", "(step, *, lr)", max, 1, lr=0.5)  # of which nothing is known
    for function, named in (
        (rate, r"<function .* \(missing a required argument: 'lr'\)"),
        (3, "int"),
    ):
        with pytest.raises(TypeError, match=rf"^Expected rate: a function \(step, \*, lr\)\. Received: {named}\.$"):
            check_takes("rate", "(step, *, lr)", function, 1)
    with pytest.raises(TypeError, match="too many positional arguments"):
        check_takes("rate", "(step, *, lr)", rate, 1, 2, lr=0.5)


def test_texts_are_cut_and_on_one_line() -> None:
    assert truncated_repr("a" * 58) == f"'{'a' * 58}'"  # 60 characters
    assert truncated_repr("a" * 59) == f"'{'a' * 56}..."
    assert truncated_repr(np.eye(2)) == "array([[1., 0.], [0., 1.]])"
    assert truncated_repr(10**5000) == "a number that is too long to show"
    assert one_line(" a\n\tb\x1b[1m é ") == "a b\\x1b[1m é"
    assert [one_line("abcdef", max_length=length) for length in (6, 5)] == ["abcdef", "ab..."]
    assert at_most_three(["c", "b", "a"]) == "c; b; a"
    assert at_most_three(["d", "c", "b", "a"]) == "d; c; b and 1 more"
    assert at_most_three(["d", "c", "b", "a", "e"]) == "d; c; b and 2 more"
    assert (listed(["b", "a"]), listed([]), listed("dcba")) == ("a, b", "none", "a, b, c and 1 more")


def test_the_text_of_an_error_names_the_place_and_what_was_received() -> None:
    def refuse(value: int) -> int:
        raise ValueError(f"expected an even number, received {value}.")

    def refuse_by_name(value: int) -> int:
        raise ValueError(f"size of {value}:\nexpected an even one.")

    even, named = Annotated[int, AfterValidator(refuse)], Annotated[int, AfterValidator(refuse_by_name)]
    kinds: Any = (
        (dict[str, int], {"a": "x"}, "a: input should be a valid integer, received 'x'"),
        (int, "x", "input should be a valid integer, received 'x'"),
        (dict[str, even], {"size": 3}, "size: expected an even number, received 3"),
        (dict[str, list[even]], {"size": [3]}, "size.0: expected an even number, received 3"),
        (even, 3, "expected an even number, received 3"),
        (dict[str, dict[str, named]], {"a": {"size": 3}}, "size of 3: expected an even one"),
        (int, "x\ny", r"input should be a valid integer, received 'x\ny'"),
    )
    for kind, value, text in kinds:
        with pytest.raises(ValidationError) as error:
            TypeAdapter(kind).validate_python(value, strict=True)
        assert error_text(error.value) == text
    with pytest.raises(ValidationError) as error:
        TypeAdapter(list[int]).validate_python(list("abcde"))
    assert error_text(error.value).endswith(" and 2 more")
    assert error_text(OSError("no\nspace.")) == "no space"


def test_json_is_read_strictly(tmp_path: Path) -> None:
    assert parse_json('{"a": [1, 2.5, null]}', source="a.json") == {"a": [1, 2.5, None]}
    for text, named in (
        ('{"a": 1, "b": {"c": 1, "c": 2}}', r"^a\.json: duplicate key 'c'\.$"),
        ("{", r"^a\.json is not JSON: .*\.$"),
        ("[" * 100_000, r"^a\.json is not JSON: "),
    ):
        with pytest.raises(ValueError, match=named):
            parse_json(text, source="a.json")
    file = tmp_path / "a.json"
    file.write_bytes(b" " * (1 << 20))
    assert len(read_config_file(file, source="a.json")) == 1 << 20
    file.write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(ValueError, match=r"^a\.json: this file is larger than any config\.$"):
        read_config_file(file, source="a.json")
    file.write_bytes(codecs.BOM_UTF8 + b"{}")
    assert read_config_file(file, source="a.json") == b"{}"
    file.unlink()
    os.mkfifo(file)
    for place in (file, tmp_path):
        with pytest.raises(ValueError, match=r"^a\.json: Expected a file\. Received: a folder, a pipe or a device\.$"):
            read_config_file(place, source="a.json")


def test_a_path_that_is_not_there_is_told_with_the_link_that_is_broken(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "broken").symlink_to("gone")
    for path, text in (
        ("folder", f"is a folder: {tmp_path}/folder"),
        ("file", f"is a file: {tmp_path}/file"),
        ("link/a/b", f"does not exist: {tmp_path}/link/a/b"),
        ("broken", f"does not exist: {tmp_path}/broken. {tmp_path}/broken is a broken link, to gone"),
        ("broken/a", f"does not exist: {tmp_path}/broken/a. {tmp_path}/broken is a broken link, to gone"),
    ):
        assert missing_text(tmp_path / path) == text


def test_a_record_holds_what_was_written_or_is_corrupt(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    assert read_checked(file) is None
    write_checked(file, {"b": [1.5, math.nan], "a": {"d": 1, "c": "x"}})
    assert read_checked(file) == {"b": [1.5, None], "a": {"d": 1, "c": "x"}}
    written = json.loads(file.read_text())
    file.write_text(json.dumps(written, sort_keys=True))  # the order of keys says nothing
    assert read_checked(file) == {"a": {"c": "x", "d": 1}, "b": [1.5, None]}
    file.write_text(json.dumps(written | {"b": [1.6, None]}))
    with pytest.raises(ValueError, match=r"a\.json is corrupt: it does not hold what was written\.$"):
        read_checked(file)
    del written["checksum"]
    file.write_text(json.dumps(written))  # of an earlier version
    assert read_checked(file) == written
    file.write_text("[1]")
    with pytest.raises(ValueError, match=r"a\.json is corrupt\. Expected a JSON object\. Received: \[1\]\.$"):
        read_checked(file)


class _Number(int):
    pass


def test_data_become_plain_json_data_and_what_is_none_is_named() -> None:
    data = {"a": np.float32(0.5), 3: (torch.tensor(2), np.arange(2)), "path": Path("b"), "no": None, "yes": True}
    assert repr(to_json_data(data)) == "{'a': 0.5, 3: [2, [0, 1]], 'path': 'b', 'no': None, 'yes': True}"
    kinds = [np.float64(0.5), np.str_("a"), np.True_, _Number(7)]  # whose own repr is another
    assert repr(to_json_data(kinds)) == "[0.5, 'a', True, 7]"
    assert type(to_json_data(kinds)[3]) is int
    with pytest.raises(TypeError, match=r"^config\.a\.1: expected numbers, texts, lists and dicts\. Received: object "):
        to_json_data({"a": [0, object()]}, "config")
    with pytest.raises(TypeError, match=r"^config: expected texts as keys\. Received: \[1\]"):
        to_json_data({(1,): 0}, "config")
    values = {"a": [math.nan, (1.5, math.inf)], "b": {"c": -math.inf, "d": 1, "e": "nan"}}
    assert null_if_not_finite(values) == {"a": [None, [1.5, None]], "b": {"c": None, "d": 1, "e": "nan"}}
