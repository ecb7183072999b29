"""What tools/inspect_checkpoint.py says of tensors whose numbers are known, and of what it cannot read."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from kavatar_jax.checkpoint.manifest import note
from kavatar_jax.checkpoint.weights import save_component
from kavatar_jax.config import load_config
from kavatar_jax.models import umt5
from tools import inspect_checkpoint


def run(capsys, *words):
    code = inspect_checkpoint.main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out + said.err


@pytest.fixture
def folder(tmp_path):
    """Two shards of a network in one folder, and another network beside it."""
    shards = {"one": {"a/kernel": np.full((3, 4), -2, np.float16)}, "two": {"b": np.arange(5, dtype=np.float32)}}
    for place, name in (("net", "one"), ("net", "two")):
        (tmp_path / place).mkdir(exist_ok=True)
        save_file(shards[name], tmp_path / place / f"{name}.safetensors")
    (tmp_path / "other").mkdir()
    save_file({"c": np.array([1, np.nan, np.inf, -7], np.float32)}, tmp_path / "other" / "model.safetensors")
    return tmp_path


def test_numbers():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((7, 11)).astype(np.float32)
    found = inspect_checkpoint.measure(values)
    assert found.rms == pytest.approx(np.sqrt(np.mean(values.astype(np.float64) ** 2)))
    assert (found.largest, found.broken) == (np.abs(values).max(), 0)
    values[2, 3], values[4, 5] = np.nan, -np.inf
    found = inspect_checkpoint.measure(values)
    assert found.broken == 2 and found.rms == pytest.approx(np.sqrt(np.mean(values[np.isfinite(values)] ** 2)))


def test_everything_is_listed_and_what_is_broken_is_flagged(folder, capsys, monkeypatch):
    monkeypatch.setattr(inspect_checkpoint, "PIECE", 3)
    code, said = run(capsys, folder)
    assert code == 0
    rows = {line.split()[1]: line for line in said.splitlines() if line.startswith("│")}
    assert "3 x 4" in rows["a/kernel"] and "float16" in rows["a/kernel"]
    assert "2.449" in rows["b"]  # the root of 30 / 5
    assert "2 NaN or Inf" in rows["c"] and "7" in rows["c"]
    assert "17" in rows["net"] and "float16, float32" in rows["net"]
    assert "a/kernel" not in run(capsys, folder, "--match", "^other/")[1]
    assert "a/kernel" not in run(capsys, folder, "--summary")[1]


def test_differences(folder, tmp_path, capsys):
    assert run(capsys, folder / "net", folder / "net") == (0, "no difference\n")
    assert run(capsys, folder / "other", folder / "other")[0] == 0  # NaN equals NaN
    second = tmp_path / "second.safetensors"
    tensors = {"a/kernel": np.full((4, 3), -2, np.float16), "b": np.arange(5, dtype=np.float32), "d": np.zeros(1)}
    tensors["b"][4] += 0.5
    save_file(tensors, second)
    (folder / "first").mkdir()
    save_file(
        {"b": np.arange(5, dtype=np.float32), "a/kernel": np.zeros((3, 4), np.float16)},
        folder / "first" / "x.safetensors",
    )
    code, said = run(capsys, folder / "first" / "x.safetensors", second)
    rows = {line.split()[1]: line for line in said.splitlines() if line.startswith("│")}
    assert code == 1 and rows.keys() == {"a/kernel", "b", "d"}
    assert "(3, 4) and (4, 3)" in rows["a/kernel"] and "only in the second" in rows["d"]
    assert "0.5" in rows["b"] and f"{0.5 / np.sqrt(30):.3g}" in rows["b"]


def test_how_parameters_lie_on_a_mesh(tmp_path, capsys):
    config = load_config("demo").text
    params = umt5.init(config, inspect_checkpoint.jax.random.key(0))
    save_component(params, config, tmp_path / "text")
    code, said = run(capsys, tmp_path, "--mesh", 1, 2, 1, 4)
    rows = {line.split()[1]: line for line in said.splitlines() if line.startswith("│")}
    assert code == 0 and "-, fsdp, tensor" in rows["blocks/attn/q/kernel"]
    assert f"{2 * 64 * 64 * 4 / 8 / 2**20:.3f} MiB" in rows["blocks/attn/q/kernel"]
    code, said = run(capsys, tmp_path / "text", "--mesh", 1, 2, 1, 4)
    assert code == 2 and "weights directory" in said
    save_file({"embedding": np.zeros((3, 4), np.float32)}, tmp_path / "text" / "model.safetensors")
    code, said = run(capsys, tmp_path, "--mesh", 1, 2, 1, 4)
    assert code == 2 and "config.json describes" in said


def test_mistakes(folder, capsys):
    (folder / "broken.safetensors").write_bytes(b"\xff" * 40)
    for words in ([folder / "nowhere"], [folder / "broken.safetensors"], [folder / "net", "--match", "("]):
        code, said = run(capsys, *words)
        assert code == 2 and said.startswith("inspect_checkpoint: ") and said.count("\n") == 1
    (folder / "empty").mkdir()
    assert "holds no file of tensors" in run(capsys, folder / "empty")[1]


def test_verify(folder, capsys):
    code, said = run(capsys, folder, "--verify")
    assert code == 2 and "there is no file" in said
    note(folder, "kavatar", {"net": "a.pt"}, [file for file in folder.rglob("*") if file.is_file()])
    assert run(capsys, folder, "--verify") == (0, "every file is as it was written\n")
    one = (folder / "net" / "one.safetensors").read_bytes()
    (folder / "net" / "one.safetensors").write_bytes(one[:-1] + b"?")
    (folder / "net" / "two.safetensors").unlink()
    (folder / "net" / "three.safetensors").write_bytes(one)
    code, said = run(capsys, folder, "--verify")
    assert code == 1 and said.splitlines() == [
        "net/two.safetensors is missing",
        "net/three.safetensors is not in kavatar.json",
        "net/one.safetensors has changed",
    ]
    (folder / "kavatar.json").write_text('{"layout": "kavatar", "sources": {}}')  # of an older version
    code, said = run(capsys, folder, "--verify")
    assert code == 2 and "has no hashes; convert again" in said
