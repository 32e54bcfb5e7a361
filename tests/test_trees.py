"""Claims about `dwiml_func._trees.choose`."""

import torch

from dwiml_func._trees import choose

YES = {"a": torch.tensor([1.0, 2.0]), "deep": {"count": torch.tensor(3)}}
NO = {"a": torch.tensor([5.0, 6.0]), "b": torch.tensor(7.0)}


def test_a_bool_gives_one_of_the_trees_itself() -> None:
    assert choose(True, YES, NO) is YES
    assert choose(False, YES, NO) is NO


def test_a_leaf_that_one_tree_lacks_is_zero_there() -> None:
    for condition, a, b, count in ((True, [1.0, 2.0], 0.0, 3), (False, [5.0, 6.0], 7.0, 0)):
        chosen = choose(torch.tensor(condition), YES, NO)
        assert chosen["a"].tolist() == a
        assert (chosen["b"].item(), chosen["deep"]["count"].item()) == (b, count)


def test_a_condition_for_each_member_chooses_whole_members() -> None:
    members = choose(torch.tensor([True, False]), {"w": torch.ones(2, 3)}, {"w": torch.zeros(2, 3)})
    assert members["w"].tolist() == [[1.0] * 3, [0.0] * 3]
