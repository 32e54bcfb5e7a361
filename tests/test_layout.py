"""Claims about `dwiml_func.core.layout`: tensors that share memory are found, and only these."""

from __future__ import annotations

import pytest
import torch

from dwiml_func.core.layout import memory_problems, overlapping

BASE = torch.arange(24.0)
MATRIX = BASE.view(4, 6)
PAIRS = {
    "one tensor": (BASE, BASE, True, True),
    "one element": (BASE[:4], BASE[3:6], True, True),
    "neighbours": (BASE[:3], BASE[3:6], False, False),
    "the last of a row": (MATRIX[:1], BASE[5:7], True, True),
    "rows": (MATRIX[:2], MATRIX[2:], False, False),
    "columns": (MATRIX[:, :2], MATRIX[:, 2:4], True, False),
    "every second": (BASE[::2], BASE[1::2], True, False),
    "a transposed one and its last element": (MATRIX.t(), BASE[-1:], True, True),
    "an expanded one": (BASE[:1].expand(5), BASE[1:3], False, False),
    "nothing of one": (BASE[3:3], BASE, False, False),
    "without memory": (BASE.to("meta"), BASE.to("meta"), False, False),
    "another dtype": (BASE, BASE.view(torch.int32), True, True),
    "a number": (BASE[0], BASE[0], True, True),
}


@pytest.mark.parametrize(("one", "other", "is_near", "is_shared"), PAIRS.values(), ids=PAIRS)
def test_tensors_overlap_from_first_to_last_element_and_share_only_what_both_hold(one, other, is_near, is_shared):
    for pair in ({"a": one, "b": other}, {"b": other, "a": one}):
        assert list(map(sorted, overlapping(pair))) == [["a", "b"]] * is_near
        problems = list(memory_problems({"c": torch.ones(3), **pair}))
        assert len(problems) == is_shared
        assert all("overlap in memory" in problem for problem in problems)


def test_tensors_between_two_that_share_memory_do_not_hide_it():
    columns = {"even": MATRIX[:, ::2], "odd": MATRIX[:, 1::2], "third": MATRIX[:, 2]}
    (problem,) = memory_problems(columns)
    assert problem.startswith("even and third overlap")


def test_sparse_tensors_are_named_and_not_looked_into():
    sparse = torch.eye(2).to_sparse()
    assert list(overlapping({"a": sparse, "b": sparse})) == []
    assert list(memory_problems({"a": sparse, "b": torch.ones(2)})) == ["a is torch.sparse_coo"]
