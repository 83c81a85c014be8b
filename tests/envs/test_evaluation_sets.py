"""What is evaluated is what the split says."""

from __future__ import annotations

import numpy as np
import pytest

from envs.domains import make_domain
from envs.evaluation_sets import CSR, evaluation_set
from metalearn.errors import InvalidArgumentError
from tests.envs.logs import hand_made, random_log


def test_evaluation_set_by_hand() -> None:
    domain = hand_made(
        [(0, 0, 1), (0, 3, 1), (1, 1, 2), (2, 4, 2), (2, 0, 2)],
        [(0, 1, 5), (2, 2, 5), (2, 1, 5)],
        [(2, 3, 9), (1, 0, 9)],
    )
    validation = evaluation_set(domain, "validation")
    assert validation.users.tolist() == [0, 2] and len(validation) == 2 and validation.num_items == 5
    assert (validation.seen.indptr.tolist(), validation.seen.indices.tolist()) == ([0, 2, 4], [0, 3, 0, 4])
    assert (validation.targets.indptr.tolist(), validation.targets.indices.tolist()) == ([0, 1, 3], [1, 1, 2])
    test = evaluation_set(domain, "test")
    assert test.users.tolist() == [1, 2]
    assert (test.seen.indptr.tolist(), test.seen.indices.tolist()) == ([0, 1, 5], [1, 0, 1, 2, 4])
    assert test.targets.indices.tolist() == [0, 3]
    assert (test.users.dtype, test.seen.indptr.dtype, test.seen.indices.dtype) == (np.int32, np.int64, np.int32)


def test_evaluation_set_samples_users_by_seed() -> None:
    domain = make_domain(random_log(), name="log")
    full = evaluation_set(domain, "test")
    some, again, other = (evaluation_set(domain, "test", max_users=10, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(some.users, again.users)
    assert len(some) == 10 and (np.diff(some.users) > 0).all() and set(some.users) <= set(full.users)
    assert set(some.users) != set(other.users)
    assert len(evaluation_set(domain, "test", max_users=10_000)) == len(full)
    for arguments in ({"split": "train"}, {"split": "test", "max_users": 0}):
        with pytest.raises(InvalidArgumentError):
            evaluation_set(domain, **arguments)


def test_csr_rows_and_lengths() -> None:
    csr = CSR(indptr=np.array([0, 2, 2, 3]), indices=np.array([5, 6, 7], dtype=np.int32))
    assert csr.lengths.tolist() == [2, 0, 1] and csr.rows.tolist() == [0, 0, 2]
