from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dwiml_func.data.dataset import DatasetIndex


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), max_size=6))
def test_ids_count_through_the_subjects_in_their_order(num_streamlines):
    subjects = tuple(f"subj{i}" for i in range(len(num_streamlines)))
    index = DatasetIndex(subjects, np.array(num_streamlines, dtype=np.int64))
    owners = [row for row, num in enumerate(num_streamlines) for _ in range(num)]
    assert index.num_total == len(owners)
    found = index.subject_of(np.arange(len(owners)))
    assert found.tolist() == owners
    assert found.dtype == np.int64
