"""The host's search for one threshold: what it keeps is what a sort keeps, after few passes."""

from collections.abc import Sequence
from typing import Any

import hypothesis.extra.numpy as stnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpai_jax import searching
from dpai_jax.searching import line_length, search
from dpai_jax.selection import Cut, kept_by_numpy


def by_sorting(scores: Sequence[np.ndarray], number: int) -> np.ndarray:
    """The mask of the highest magnitudes, flat; ties go to the first."""
    magnitudes = np.abs(np.concatenate([s.ravel() for s in scores]).astype(np.float64))
    mask = np.zeros(magnitudes.size, bool)
    mask[np.argsort(-magnitudes, kind="stable")[:number]] = True
    return mask


class Counted:
    """Counts the magnitudes of each line that reach ranks, and the passes."""

    def __init__(self, scores: Sequence[np.ndarray]):
        self.lines = [np.abs(s).reshape(-1, line_length(s.shape)) for s in scores]
        self.passes = 0

    def __call__(self, probes: np.ndarray) -> np.ndarray:
        assert probes.shape == (searching.PROBES,)
        assert probes.dtype == np.int32
        self.passes += 1
        ranks = [x.view(np.int32) for x in self.lines]
        return np.concatenate([(x[None] >= probes[:, None, None]).sum(2) for x in ranks], 1)


def kept(scores: Sequence[np.ndarray], cut: Cut) -> np.ndarray:
    firsts = np.cumsum([0, *(s.size for s in scores)])[:-1].tolist()
    return np.concatenate([mask.ravel() for mask in kept_by_numpy(scores, firsts, cut)])


VALUES = {
    "floats": st.floats(allow_nan=False, width=32),
    "few": st.sampled_from([-np.inf, -1.0, -0.0, 0.0, 0.5, 2.0**-140, np.inf]),
    "equal": st.just(-2.5),
}


@pytest.mark.parametrize("few", [0, 8, 2**21])
@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
@given(data=st.data())
def test_what_is_kept_is_what_a_sort_keeps(few: int, values: Any, data: st.DataObject) -> None:
    shapes = [(3, 4), (5,), (2, 2, 3)]
    scores = [data.draw(stnp.arrays(np.float32, shape, elements=values)) for shape in shapes]
    number = data.draw(st.integers(0, 29))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(searching, "_FEW", few)  # how many scores are read, at most
        patch.setattr(searching, "_LINE", 3)
        cut = search(scores, number, Counted(scores))
        np.testing.assert_array_equal(kept(scores, cut), by_sorting(scores, number))


@pytest.mark.parametrize("share", [1e-5, 0.01, 0.3, 0.9, 0.9999])
@pytest.mark.parametrize("kind", ["normal", "skewed", "periodic", "in layers"])
def test_two_passes_find_the_threshold_of_many_scores(kind: str, share: float) -> None:
    rng, shapes = np.random.default_rng(0), [(700, 768), (3, 3, 256, 256), (1024, 10)]
    scores = [rng.standard_normal(shape, np.float32) for shape in shapes]
    if kind == "skewed":
        scores = [np.exp(8 * s) for s in scores]
    elif kind == "periodic":  # as where a score goes by its feature
        scores = [s * np.float32(1e-3) + rng.random(s.shape[-1], np.float32) for s in scores]
    elif kind == "in layers":
        scores = [s * np.float32(100.0**i) for i, s in enumerate(scores)]
    count, number = Counted(scores), round(share * sum(s.size for s in scores))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(searching, "_FEW", 2**17)
        patch.setattr(searching, "_SAMPLE", 2**14)
        cut = search(scores, number, count)
    assert count.passes <= 3
    np.testing.assert_array_equal(kept(scores, cut), by_sorting(scores, number))


def test_equal_scores_are_divided_without_reading_more_than_a_line() -> None:
    scores = [np.ones((64, 300), np.float32), np.full((40, 256), -1.0, np.float32)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(searching, "_FEW", 0)
        for number in (1, 300, 301, 64 * 300 + 1, 64 * 300 + 40 * 256 - 1):
            cut = search(scores, number, Counted(scores))
            np.testing.assert_array_equal(np.flatnonzero(kept(scores, cut)), np.arange(number))


def test_a_search_among_scores_that_are_no_numbers_ends() -> None:
    scores = [np.full((8, 256), np.nan, np.float32), np.zeros((4, 256), np.float32)]
    scores[0][0] = np.asarray(0x7FFF_FFFF).astype(np.int32).view(np.float32)
    for few in (0, 2**21):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(searching, "_FEW", few)
            assert kept(scores, search(scores, 300, Counted(scores))).sum() == 300


@pytest.mark.parametrize(
    ("shape", "length"),
    [((3, 3, 512, 512), 512), ((768, 12, 64), 768), ((5, 7), 35), ((50257, 768), 768), ((9,), 9)],
)
def test_lines_go_along_the_last_axes(shape: tuple[int, ...], length: int) -> None:
    assert line_length(shape) == length
