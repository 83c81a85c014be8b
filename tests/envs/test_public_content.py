"""Item vectors are stable, of unit length, and near where texts are alike."""

from __future__ import annotations

import subprocess
import sys
import zlib

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from envs.public.content import NUM_BUCKETS, NUM_FEATURES, item_vectors

TEXTS = ["red mug", "Red, MUG!", "blue mug", "", "garden chair", "—", "garden table of red wood"]


def test_vectors_by_hand() -> None:
    # Two items with one token each: every weight is 1 · (1 + log(3 / 2)), so the unit vector is the projection's row.
    entries = np.random.default_rng(0).integers(0, 6, size=(NUM_BUCKETS, NUM_FEATURES), dtype=np.int8)
    rows = np.where(entries == 0, 1.0, np.where(entries == 1, -1.0, 0.0))
    vectors = item_vectors(["mug", "chair"])
    for vector, token in zip(vectors, (b"mug", b"chair"), strict=True):
        row = rows[zlib.crc32(token) % NUM_BUCKETS]
        np.testing.assert_allclose(vector, row / np.linalg.norm(row), rtol=1e-6)


def test_rare_tokens_weigh_more() -> None:
    # "mug" is in 3 of 4 texts, "red" and "chair" in one: a = 1 + log(5 / 4), b = 1 + log(5 / 2).
    vectors = item_vectors(["red mug", "mug", "mug mug", "chair"])
    raw = {token: np.sign(item_vectors([token])[0]) for token in ("mug", "red")}
    expected = (1 + np.log(5 / 4)) * raw["mug"] + (1 + np.log(5 / 2)) * raw["red"]
    np.testing.assert_allclose(vectors[0], expected / np.linalg.norm(expected), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(vectors[1], vectors[2], rtol=1e-6)  # only one token: its count does not turn it


def test_vectors_are_of_unit_length_or_zero() -> None:
    vectors = item_vectors(TEXTS)
    assert vectors.shape == (7, NUM_FEATURES) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1, 1, 1, 0, 1, 0, 1], rtol=1e-6)
    np.testing.assert_array_equal(vectors[0], vectors[1])
    assert vectors[0] @ vectors[2] > vectors[0] @ vectors[4]


def test_vectors_do_not_depend_on_the_process() -> None:
    code = f"from envs.public.content import item_vectors; print(item_vectors({TEXTS!r}).tobytes().hex())"
    for seed in ("1", "2"):  # of Python's own hash
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": "."}
        found = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
        )
        assert found.stdout.strip() == item_vectors(TEXTS).tobytes().hex()


def test_cosines_are_those_of_tf_idf_up_to_the_projection() -> None:
    rng = np.random.default_rng(0)
    words = np.array([f"w{number}" for number in range(400)])
    drawn = [rng.choice(400, size=25) % 60 + start for start in rng.integers(0, 340, 200)]
    vectors = item_vectors([" ".join(words[row]) for row in drawn])
    counts = np.stack([np.bincount(row, minlength=400) for row in drawn])
    weights = counts * (1 + np.log(201 / (1 + (counts > 0).sum(axis=0))))
    weights = weights / np.linalg.norm(weights, axis=1, keepdims=True)
    upper = np.triu_indices(200, 1)
    error = (vectors @ vectors.T - weights @ weights.T)[upper]
    # The standard deviation of a projected cosine is at most √(2 / C) = 0.25, and 1/√C = 0.18 where it is near 0.
    assert abs(error.mean()) < 0.02 and error.std() < 0.2


@given(st.lists(st.text(max_size=20), min_size=1, max_size=30), st.randoms(use_true_random=False))
@settings(max_examples=30)
def test_the_order_of_items_does_not_matter(texts: list[str], random) -> None:
    order = list(range(len(texts)))
    random.shuffle(order)
    np.testing.assert_allclose(
        item_vectors([texts[index] for index in order]), item_vectors(texts)[order], rtol=1e-5, atol=1e-6
    )


def test_many_items_are_done_in_parts() -> None:
    texts = [f"common w{number % 7}" for number in range(9001)]
    vectors = item_vectors(texts)
    np.testing.assert_array_equal(vectors, vectors[np.arange(9001) % 7])
    assert (np.linalg.norm(vectors, axis=1) > 0.99).all()
