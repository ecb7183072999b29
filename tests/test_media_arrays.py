"""Numpy's own files: what comes back, and that threads take turns."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from kavatar_jax.media.arrays import load_arrays


def test_one_array_or_several_by_name(tmp_path):
    np.save(tmp_path / "one.npy", np.arange(6).reshape(2, 3))
    np.savez(tmp_path / "several.npz", a=np.float16([1, 2]), b=np.array("words"))
    np.testing.assert_array_equal(load_arrays(tmp_path / "one.npy"), [[0, 1, 2], [3, 4, 5]])
    several = load_arrays(tmp_path / "several.npz")
    assert set(several) == {"a", "b"} and several["a"].dtype == np.float16 and several["b"] == "words"


def test_threads_read_one_after_the_other(tmp_path, monkeypatch):
    np.save(tmp_path / "one.npy", np.zeros(2))
    load, inside, most = np.load, [], []

    def slow(path):
        inside.append(path)
        most.append(len(inside))
        time.sleep(0.05)
        inside.pop()
        return load(path)

    monkeypatch.setattr(np, "load", slow)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(load_arrays, [tmp_path / "one.npy"] * 4))
    assert most == [1, 1, 1, 1]
