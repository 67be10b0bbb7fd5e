"""What is measured of pairs of checkpoints: its law by chance, and that it does not depend on how files are read."""

import numpy as np
import pytest
from numpy.random import default_rng
from scipy.stats import kstest

from natfp_jax import likeness
from natfp_jax.kinship import beyond
from natfp_jax.likeness import measured
from natfp_jax.published import opened
from tests.references import write


def folder(path, tensors):
    return opened(write(path, {}, tensors))


def shapes(folder):
    return {name: tensor.shape for name, tensor in folder.tensors.items()}


def structured(random, rows, columns):
    """As trained weights are: low rank on top of noise, some rows large, some empty, and a common mean."""
    value = random.standard_normal((rows, columns)) + np.outer(random.standard_normal(rows), random.standard_normal(columns))
    value[: rows // 10] *= 20
    value[-rows // 5 :] = 0
    return (value + 0.5).astype(np.float32)


def test_z_of_independent_starts_is_standard_normal_whatever_the_checkpoint(tmp_path):
    random, draws = default_rng(4), 150
    trained = folder(tmp_path / "w", {"a": structured(random, 60, 40), "b": structured(random, 50, 30)})
    drawn = []
    for n in range(draws):
        # Of another scale from row to row, the last of them empty: padding.
        a = random.standard_normal((60, 40)) * np.linspace(0.1, 3, 60)[:, None] * (np.arange(60) < 48)[:, None]
        b = random.uniform(-1, 1, (50, 30))
        drawn.append(folder(tmp_path / str(n), {"a": a.astype(np.float32), "b": b.astype(np.float32)}))
    found = measured([trained, *drawn], shapes(trained), range(1, draws + 1))
    assert found.drawn_TS.all()
    z, _ = found.descent(range(1, draws + 1))
    assert kstest(z[0], "norm").pvalue > 0.01
    assert np.abs(z[0]).max() < beyond(draws)
    between = z[1:][~np.eye(draws, dtype=bool)]
    assert kstest(between[:: draws + 1], "norm").pvalue > 0.01
    assert np.abs(between).max() < beyond(between.size)
    # What a coefficient of correlation makes of it.
    a, w = (np.stack([one.read("a") for one in some]).reshape(len(some), -1) for some in (drawn, [trained]))
    r = (a @ w[0]) / np.linalg.norm(a, axis=1) / np.linalg.norm(w)
    assert kstest(r * np.sqrt(a.shape[1]), "norm").pvalue < 1e-3


def test_z_finds_what_is_left_of_a_start_after_much_training(tmp_path):
    random = default_rng(5)
    start = random.standard_normal((300, 300)).astype(np.float32)
    other = random.standard_normal((300, 300)).astype(np.float32)
    trained = 0.5 * start + structured(random, 300, 300)
    folders = [folder(tmp_path / name, {"a": value}) for name, value in (("s", start), ("t", other), ("w", trained))]
    z, cosine = measured(folders, shapes(folders[0]), [0, 1]).descent([0, 1])
    assert z[2, 0] > beyond(6) > abs(z[2, 1])
    assert 0 < cosine[2, 0] < 0.1


def test_tensors_that_are_no_draw_of_a_start_alone_do_not_count(tmp_path):
    random = default_rng(6)
    shared = random.standard_normal((40, 30)).astype(np.float32)
    folders = []
    for name in "ab":
        own = random.standard_normal((40, 30)).astype(np.float32)
        tensors = {"own": own, "tied": own, "shared": shared, "norms": np.ones((4, 30), np.float32), "zero": 0 * own}
        folders.append(folder(tmp_path / name, tensors))
    found = measured(folders, shapes(folders[0]), [0, 1])
    z, cosine = found.descent([0, 1])
    assert cosine[0, 0] == pytest.approx(1)
    assert abs(z[0, 1]) < 4
    alone = measured(folders, {"own": (40, 30)}, [0, 1]).descent([0, 1])[0]
    assert z == pytest.approx(alone)
    nothing = measured(folders, {"shared": (40, 30), "zero": (40, 30)}, [0, 1])
    assert np.isnan(nothing.descent([0, 1])[0]).all()


def test_what_is_measured_does_not_depend_on_how_it_is_read(tmp_path, monkeypatch):
    random = default_rng(7)
    sizes = {"experts": (3, 20, 8), "matrix": (70, 9), "vector": (11,), "number": (), "empty": (0, 4)}
    folders = []
    for name in "abc":
        tensors = {key: np.asarray(random.standard_normal(size), np.float32) for key, size in sizes.items()}
        folders.append(folder(tmp_path / name, tensors))
    monkeypatch.setattr(likeness, "_BLOCK", 1 << 25)
    whole = measured(folders, sizes, [0, 2])
    monkeypatch.setattr(likeness, "_BLOCK", 3 * 16)
    parts = measured(folders, sizes, [0, 2])
    assert whole.digests == parts.digests
    for name in ("inner_PCC", "rest_CC", "shown_TCS", "squares_TCS", "norms_TC"):
        assert getattr(whole, name) == pytest.approx(getattr(parts, name)), name
    flat = np.stack([np.concatenate([one.read(name).ravel() for name in sizes if name != "empty"]) for one in folders]).astype(
        np.float64
    )
    assert whole.distance_CC == pytest.approx(np.linalg.norm(flat[:, None] - flat, axis=2))
