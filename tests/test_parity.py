"""tools/parity.py says no when it should."""

import json
import shutil
import sys

import numpy as np
import pytest
from conftest import GOLDEN

from tools import parity


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(GOLDEN / "solvers", tmp_path / "solvers")


def run(monkeypatch, *folders):
    monkeypatch.setattr(sys, "argv", ["parity.py", *map(str, folders)])
    return parity.main()


def change(folder, edit):
    arrays = dict(np.load(folder / "outputs.npz"))
    edit(arrays)
    np.savez(folder / "outputs.npz", **arrays)


def test_an_honest_fixture_passes(folder, monkeypatch, capsys):
    assert run(monkeypatch, folder) == 0
    assert "1 of 1 fixtures pass" in capsys.readouterr().out


def test_a_corrupted_fixture_fails(folder, monkeypatch, capsys):
    def corrupt(arrays):
        arrays["unipc_10_3.0/final"][0, 0, 0, 0, 0] += 1e-3

    change(folder, corrupt)
    assert run(monkeypatch, folder) == 1
    assert "OVER" in capsys.readouterr().out


def test_an_output_that_is_not_a_number_fails(folder, monkeypatch):
    def corrupt(arrays):
        arrays["unipc_10_3.0/final"][0, 0, 0, 0, 0] = np.nan

    change(folder, corrupt)
    assert run(monkeypatch, folder) == 1


def test_an_output_that_we_do_not_produce_fails(folder, monkeypatch, capsys):
    meta = json.loads((folder / "meta.json").read_text())
    meta["outputs"]["another/final"] = meta["outputs"]["unipc_10_3.0/final"]
    (folder / "meta.json").write_text(json.dumps(meta))
    assert run(monkeypatch, folder) == 1
    assert "not produced" in capsys.readouterr().out


def test_what_is_not_built_is_no_pass(folder, monkeypatch, capsys):
    meta = json.loads((folder / "meta.json").read_text())
    meta["fixture"] = "something_new"
    (folder / "meta.json").write_text(json.dumps(meta))
    assert run(monkeypatch, folder) == 1
    assert "not built" in capsys.readouterr().out


def test_nothing_to_check_is_no_pass(tmp_path, monkeypatch):
    assert run(monkeypatch, tmp_path) == 1
