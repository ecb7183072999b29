"""Tensors between PyTorch's names and ours, in files and on the mesh: nothing lost, nothing half done, no code run."""

import dataclasses
import json
import os
import pickle
import re
import struct
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from kavatar_jax.checkpoint import bridge, files, weights
from kavatar_jax.checkpoint.bridge import Mismatch, Row, placements, to_kavatar, to_torch, unflatten
from kavatar_jax.checkpoint.files import SafetensorsWriter, Tensors
from kavatar_jax.checkpoint.shards import Lazy, open_tensors, write_tensors
from kavatar_jax.config import AudioAdapterConfig, CLIPConfig, DiTConfig
from kavatar_jax.parallel.mesh import make_mesh

ROWS = [
    Row("in.weight", "in/kernel", "oithw->thwio"),
    Row("layers.{}.qkv.weight", "blocks/{q,k}/kernel", "oi->io"),
    Row("layers.{}.norm.weight|h.{}.ln.weight", "blocks/norm/scale", "d->d"),
    Row("layers.{}.modulation", "blocks/modulation", "1nd->nd"),
    Row("scale", "scale", "->"),
    Row("maybe.weight", "maybe", "d->d"),
]
BF16 = np.dtype(ml_dtypes.bfloat16)


def reference(layers=3, dtype=BF16):
    """Reference tensors for ROWS without the optional one; every bit pattern's worth of values."""
    rng = np.random.default_rng(0)
    shapes = {"in.weight": (4, 3, 1, 2, 2), "scale": ()}
    for n in range(layers):
        shapes |= {
            f"layers.{n}.qkv.weight": (8, 6),
            f"layers.{n}.norm.weight": (4,),
            f"layers.{n}.modulation": (1, 2, 4),
        }
    return {key: np.asarray(rng.standard_normal(shape), dtype) for key, shape in shapes.items()}


def wanted(layers=3):
    flat = {"in/kernel": (1, 2, 2, 3, 4), "blocks/q/kernel": (layers, 6, 4), "blocks/k/kernel": (layers, 6, 4)}
    flat |= {"blocks/norm/scale": (layers, 4), "blocks/modulation": (layers, 2, 4), "scale": ()}
    return unflatten({path: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for path, shape in flat.items()})


def same_bits(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@dataclasses.dataclass(frozen=True)
class Something:
    """A stand-in for a network's config."""

    width: int
    means: tuple[float, ...] = (1.0, 0.5)
    audio: AudioAdapterConfig | None = None


# --- bridge


def test_layouts_move_axes():
    tensors = reference()
    flat = to_kavatar(tensors, ROWS, wanted())
    np.testing.assert_array_equal(flat["in/kernel"][0, 1, 0], tensors["in.weight"][:, :, 0, 1, 0].T)
    np.testing.assert_array_equal(flat["blocks/q/kernel"][2], tensors["layers.2.qkv.weight"][:4].T)
    np.testing.assert_array_equal(flat["blocks/k/kernel"][1], tensors["layers.1.qkv.weight"][4:].T)
    np.testing.assert_array_equal(flat["blocks/modulation"][1], tensors["layers.1.modulation"][0])
    assert flat["scale"].shape == () and flat["scale"] == tensors["scale"]


def test_there_and_back_is_exact():
    tensors = reference()
    back = dict(to_torch(unflatten(to_kavatar(tensors, ROWS, wanted())), ROWS))
    assert back.keys() == tensors.keys()
    assert all(same_bits(back[key], tensors[key]) and back[key].flags.c_contiguous for key in tensors)


def test_mismatch_lists_everything():
    shapes = {key: tensor.shape for key, tensor in reference().items()}
    del shapes["layers.1.norm.weight"], shapes["scale"]
    shapes |= {"extra.one": (2,), "extra.two": (2,), "in.weight": (4, 3, 1, 2, 3), "layers.0.modulation": (2, 2, 4)}
    with pytest.raises(Mismatch) as caught:
        placements(shapes, ROWS, wanted())
    found = caught.value
    assert (found.missing, found.left_over) == (["layers.1.norm.weight", "scale"], ["extra.one", "extra.two"])
    assert found.wrong == [
        "in.weight is (4, 3, 1, 2, 3), expected (4, 3, 1, 2, 2)",
        "layers.0.modulation is (2, 2, 4), expected (1, 2, 4)",
    ]
    assert "2 missing: layers.1.norm.weight, scale; 2 left over: extra.one, extra.two; 2 of another shape: " in str(
        found
    )
    assert "\n" not in str(found)
    with pytest.raises(Mismatch, match=r"^2 left over: scaled, unscale$"):
        whole = {key: tensor.shape for key, tensor in reference().items()}
        placements(
            whole | dict.fromkeys(["scaled", "unscale", "unused.7"], (1,)), ROWS, wanted(), unused=[r"unused\.\d"]
        )


def test_two_spellings_of_one_key():
    tensors = reference()
    respelled = {key.replace("layers.1.norm", "h.1.ln"): tensor for key, tensor in tensors.items()}
    flat, same = to_kavatar(respelled, ROWS, wanted()), to_kavatar(tensors, ROWS, wanted())
    assert all(same_bits(flat[path], same[path]) for path in same)
    both = tensors | {"h.1.ln.weight": tensors["layers.1.norm.weight"]}
    with pytest.raises(Mismatch, match="layers.1.norm.weight and h.1.ln.weight .one of them only"):
        to_kavatar(both, ROWS, wanted())


def test_sizes_are_read_in_spite_of_holes():
    """How deep a stack is does not hang on one key that is missing or too many."""
    shapes = {key: tensor.shape for key, tensor in reference(layers=4).items()}
    depth = {"blocks/q/kernel": (4, 6, 4), "blocks/norm/scale": (4, 4)}
    for change in (
        dict.fromkeys(["layers.0.qkv.weight", "layers.3.norm.weight"]),
        {"layers.7.norm.weight": (4,), "layers.99999999999.other": (1,)},
    ):
        changed = {key: shape for key, shape in (shapes | change).items() if shape is not None}
        assert bridge.parameter_shapes(ROWS, changed).items() >= depth.items()
        assert bridge.layers_as_in(changed, ROWS, wanted(1))["blocks/q/kernel"].shape == (4, 6, 4)
    with pytest.raises(ValueError, match=r"in.weight is \(4, 3\), expected 5 axes"):
        bridge.parameter_shapes(ROWS, shapes | {"in.weight": (4, 3)})
    with pytest.raises(ValueError, match="no tensor for 'maybe'"):
        bridge.parameter_shapes(ROWS, shapes)["maybe"]


# --- safetensors


def test_the_library_reads_what_we_write_and_we_what_it_writes(tmp_path):
    rng = np.random.default_rng(1)
    dtypes = [np.float32, BF16, np.float16, np.float64, np.int64, np.uint8, np.bool_]
    arrays = {f"t{i}": (rng.standard_normal((3, 1 + i)) * 9).astype(dtype) for i, dtype in enumerate(dtypes)}
    arrays |= {"scalar": np.array(3.5, np.float32), "none": np.empty((0, 4), BF16)}
    with SafetensorsWriter(tmp_path / "a.safetensors", {n: (a.shape, a.dtype) for n, a in arrays.items()}) as writer:
        for name, array in reversed(arrays.items()):
            rows = range(len(array)) if name == "t1" else [None]
            for row in rows:
                writer.write(name, array if row is None else array[row], row)
        assert not (tmp_path / "a.safetensors").exists()
    save_file(arrays, tmp_path / "b.safetensors")
    theirs = load_file(tmp_path / "a.safetensors")
    for ours in (Tensors(tmp_path / "a.safetensors"), Tensors(tmp_path / "b.safetensors")):
        assert set(ours) == set(theirs) == set(arrays)
        for name, array in arrays.items():
            assert same_bits(ours[name], array) and same_bits(theirs[name], array)
            assert ours.shapes[name] == array.shape and ours.dtypes[name] == array.dtype
    assert same_bits(ours.part("t4", (slice(1, 3), slice(2, 4))), arrays["t4"][1:3, 2:4])
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "b.safetensors"]


def test_transposed_values_are_written_in_order(tmp_path):
    values = np.arange(12, dtype=np.float32).reshape(3, 4).T
    with SafetensorsWriter(tmp_path / "a.safetensors", {"x": ((2, 4, 3), BF16)}) as writer:
        writer.write("x", values + 1, 1)
        writer.write("x", values, 0)
    np.testing.assert_array_equal(load_file(tmp_path / "a.safetensors")["x"], np.stack([values, values + 1]))


def test_a_file_that_was_not_finished_has_no_name(tmp_path):
    for mistake in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(mistake), SafetensorsWriter(tmp_path / "a.safetensors", {"x": ((2,), BF16)}):
            raise mistake
    with pytest.raises(AssertionError, match="2 bytes .* not written"):
        with SafetensorsWriter(tmp_path / "b.safetensors", {"x": ((2, 1), BF16)}) as writer:
            writer.write("x", np.ones(1, BF16), 1)
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".safetensors")]


def header(entries: dict, data: bytes = bytes(8)) -> bytes:
    blob = json.dumps(entries).encode()
    return struct.pack("<Q", len(blob)) + blob + data


def entry(dtype="F32", shape=(2,), span=(0, 8)):
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": span}}


DAMAGED = {
    "empty": b"",
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 377607901\n",
    "cut_header": header(entry())[:20],
    "cut_data": header(entry())[:-1],
    "longer": header(entry(), bytes(12)),
    "larger_than_it_is": header(entry(shape=(3,))),
    "another_dtype": header(entry(dtype="BF16")),
    "beyond_the_end": header(entry(span=(0, 16), shape=(4,))),
    "overlapping": header(entry() | {"y": entry()["x"]}),
    "overflowing": header(entry(shape=(2**62, 2**62))),
    "negative": header(entry(shape=(-2,))),
    "huge_header": struct.pack("<Q", 2**60) + bytes(8),
    "unknown_dtype": header(entry(dtype="F7")),
    "not_ours": header(entry(dtype="F8_E4M3", shape=(8,))),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_safetensors(tmp_path, kind):
    path = tmp_path / "model.safetensors"
    path.write_bytes(DAMAGED[kind])
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        Tensors(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_no_such_file(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"x")
    for name, words in (("a.safetensors", "no file"), ("a.pt", "no file"), ("model.ckpt", "neither"), ("", "no file")):
        with pytest.raises(ValueError, match=words):
            Tensors(tmp_path / name)


def test_shards_are_one(tmp_path):
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "1.safetensors")
    save_file({"b": np.zeros(3, np.float32)}, tmp_path / "2.safetensors")
    both = Tensors(tmp_path / "1.safetensors", tmp_path / "2.safetensors")
    assert both.shapes == {"a": (2,), "b": (3,)} and both["b"].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="a stands in two files"):
        Tensors(tmp_path / "1.safetensors", tmp_path / "1.safetensors")


def mapped_bytes(path):
    """How much of a file this process has in memory through mappings."""
    if not os.path.exists("/proc/self/smaps"):
        pytest.skip("needs /proc/self/smaps to see what is in memory")
    blocks = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    return sum(1024 * int(re.search(r"Rss: +(\d+)", block)[1]) for block in blocks if f"{path}\n" in block)


def test_what_was_read_can_leave_memory(tmp_path):
    """A part of a tensor takes its own bytes to read, and neither it nor a tensor let go of holds on to the file."""
    path = tmp_path / "a.safetensors"
    with SafetensorsWriter(path, {"x": ((64, 2**18), np.dtype(np.float32))}) as writer:
        writer.write("x", np.broadcast_to(np.arange(64, dtype=np.float32)[:, None], (64, 2**18)))
    tensors = Tensors(path)
    part = tensors.part("x", (slice(3, 5), slice(0, 10)))
    assert part.base is None and part.tolist() == [[3] * 10, [4] * 10] and mapped_bytes(path) == 0
    row = tensors["x"][7]
    assert (row == 7).all() and 2**20 <= mapped_bytes(path) < 2**24
    del row
    assert mapped_bytes(path) == 0


# --- torch files


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.mark.torch
def test_torch_files(torch, tmp_path, monkeypatch):
    base = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    state = {
        "bf16": base.bfloat16(), "half": base.half(), "full": base, "double": base.double(), "ids": torch.arange(3),
        "turned": base.bfloat16().T, "part": base.bfloat16()[1:3, 2:], "scalar": torch.tensor(1.5), "flag": base > 0,
        "trained": torch.nn.Parameter(base.bfloat16()), "none": torch.empty(0, 3),
    }  # fmt: skip
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"state_dict": {"state_dict": state}, "step": 3}, tmp_path / "nested.pth")
    torch.save(state, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    monkeypatch.setattr(files, "REMAP_AFTER", 100)
    for name in ("plain.pt", "nested.pth", "old.bin"):
        tensors = Tensors(tmp_path / name)
        for _ in range(2):
            for key, tensor in state.items():
                expected = tensor.detach().to(torch.float64).numpy()
                assert tensors[key].dtype == tensors.dtypes[key] and tensors[key].shape == tensors.shapes[key]
                np.testing.assert_array_equal(tensors[key].astype(np.float64), expected)
        assert tensors.dtypes["bf16"] == BF16
        assert same_bits(tensors.part("turned", (slice(1, 4), slice(0, 2))), tensors["turned"][1:4, :2])


@pytest.mark.torch
def test_what_was_read_of_a_torch_file_can_leave_memory(torch, tmp_path, monkeypatch):
    path, size = tmp_path / "a.pt", 2**22
    torch.save({f"x{i}": torch.full((size,), i, dtype=torch.uint8) for i in range(12)}, path)
    monkeypatch.setattr(files, "REMAP_AFTER", 2 * size)
    tensors, most = Tensors(path), 0
    for i, name in enumerate(tensors):
        tensor = tensors[name]
        assert (tensor == i).all()
        most = max(most, mapped_bytes(path))
    assert size <= most <= 5 * size


@pytest.mark.torch
def test_torch_file_with_code(torch, tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"a": torch.zeros(2), "b": Code()}, tmp_path / "zip.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps({"a": Code()}, protocol=2))
    for name in ("zip.pt", "bare.pt"):
        with pytest.raises(ValueError, match=rf"{name} holds code \(posix.mkdir\) and is not loaded") as caught:
            Tensors(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.torch
def test_damaged_torch_files(torch, tmp_path):
    torch.save({"a": torch.ones(1000), "b": torch.zeros(7, 3)}, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "whole.pt") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (name for name in records if name.endswith("data.pkl"))
    with zipfile.ZipFile(tmp_path / "pickle.pt", "w", zipfile.ZIP_STORED) as archive:
        for record, content in records.items():
            archive.writestr(record, content[: len(content) // 2] if record == name else content)
    with zipfile.ZipFile(tmp_path / "shape.pt", "w", zipfile.ZIP_STORED) as archive:  # 1000 numbers said to be 50,000
        for record, content in records.items():
            archive.writestr(record, content.replace(b"M\xe8\x03\x85", b"MP\xc3\x85") if record == name else content)
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_bytes(DAMAGED["text"])
    for name in ("pickle.pt", "shape.pt", "cut.pt", "empty.pt", "text.pt"):
        with pytest.raises(ValueError, match=f"{name} is not a readable torch file") as caught:
            Tensors(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.torch
def test_torch_files_of_other_things(torch, tmp_path):
    for value, words in (
        ([torch.zeros(1)], "it holds list"),
        ({"epoch": 3, "lr": 0.1, "w": torch.zeros(1)}, "it holds epoch, lr"),
        ({"w": torch.eye(3).to_sparse()}, "it holds w"),
        ({"w": torch.zeros(3, dtype=torch.complex64)}, "w is torch.complex64"),
        ({"w": torch.zeros(3).to(torch.float8_e4m3fn)}, "w is torch.float8_e4m3fn"),
    ):
        torch.save(value, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=words):
            Tensors(tmp_path / "a.pt")


# --- shards


def cut(folder, limit=200):
    """reference() in shards; their index, and where it lies."""
    tensors = {key: Lazy(x.shape, x.dtype, lambda x=x: x) for key, x in reference().items()}
    assert write_tensors(folder / "net.safetensors", tensors, shard_size=limit) == set()
    index = folder / "net.safetensors.index.json"
    return json.loads(index.read_text()), index


def test_shards(tmp_path):
    index, _ = cut(tmp_path)
    opened, whole = open_tensors(tmp_path / "net.safetensors"), reference()
    assert opened.keys() == whole.keys() and all(same_bits(opened[key], whole[key]) for key in whole)
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in whole.values())
    names = sorted(set(index["weight_map"].values()))
    assert names == [f"net-{n + 1:05}-of-{len(names):05}.safetensors" for n in range(len(names))] and len(names) > 1
    assert sorted(os.listdir(tmp_path)) == [*names, "net.safetensors.index.json"]
    for name in names:  # none larger than told, and none that its neighbour had room for
        held = sum(x.nbytes for x in load_file(tmp_path / name).values())
        assert held <= 200
    whole_file = {key: Lazy(x.shape, x.dtype, lambda x=x: x) for key, x in whole.items()}
    write_tensors(tmp_path / "one.safetensors", whole_file, shard_size=10**6)
    assert (tmp_path / "one.safetensors").is_file() and not (tmp_path / "one.safetensors.index.json").exists()


@pytest.mark.parametrize(
    "name", ["../net.safetensors", "/etc/net.safetensors", "a/net.safetensors", "..", "", "net.bin", 3]
)
def test_an_index_stays_in_its_folder(tmp_path, name):
    index, path = cut(tmp_path)
    index["weight_map"]["scale"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match=f"{path} names '{re.escape(str(name))}'; a shard is a .safetensors file beside it"
    ):
        open_tensors(tmp_path / "net.safetensors")


def test_an_index_that_does_not_fit(tmp_path):
    def refusal(change):
        index, path = cut(tmp_path)
        change(index["weight_map"])
        path.write_text(json.dumps(index))
        with pytest.raises(ValueError) as caught:
            open_tensors(tmp_path / "net.safetensors")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    index, path = cut(tmp_path)
    first, second = sorted(set(index["weight_map"].values()))[:2]
    assert "do not agree on where scale is" in refusal(lambda homes: homes.pop("scale"))
    assert "do not agree on where more is" in refusal(lambda homes: homes.update(more=first))
    assert "do not agree on where in.weight is" in refusal(lambda homes: homes.update({"in.weight": second}))
    absent = "net-9.safetensors"
    assert f"names shards that are not there: {absent}" in refusal(lambda homes: homes.update(scale=absent))
    assert "has no weight_map" in refusal(lambda homes: homes.clear())
    index, path = cut(tmp_path)
    (tmp_path / second).write_bytes((tmp_path / first).read_bytes())
    with pytest.raises(ValueError, match="in.weight stands in two files"):
        open_tensors(tmp_path / "net.safetensors")
    path.write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    with pytest.raises(ValueError, match="index.json is not JSON.*it says twice what a is"):
        open_tensors(tmp_path / "net.safetensors")


def test_a_header_that_says_a_tensor_twice(tmp_path):
    entry = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    blob = f"{{{entry}, {entry}}}".encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(blob)) + blob + b"\0" * 4)
    with pytest.raises(ValueError, match="a.safetensors"):
        Tensors(tmp_path / "a.safetensors")


def test_broken_numbers_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PIECE", 3)
    tensors = reference()
    tensors["layers.1.norm.weight"][3], tensors["scale"][...] = np.nan, -np.inf
    lazy = {key: Lazy(x.shape, x.dtype, lambda x=x: x) for key, x in tensors.items()}
    assert write_tensors(tmp_path / "a.safetensors", lazy, shard_size=100) == {"layers.1.norm.weight", "scale"}
    opened = open_tensors(tmp_path / "a.safetensors")
    broken = weights.convert_component(opened, ROWS, wanted(), Something(width=1), tmp_path / "net")
    assert broken == {"blocks/norm/scale", "scale"}
    back = weights.as_reference(tmp_path / "net", Tensors(tmp_path / "net" / "model.safetensors"), ROWS)
    assert back.keys() == tensors.keys()
    assert all(same_bits(back[key].read(), tensors[key]) and back[key].dtype == BF16 for key in tensors)
    with pytest.raises(ValueError, match="cannot be written so: 1 have no name there: scale"):
        weights.as_reference(tmp_path / "net", Tensors(tmp_path / "net" / "model.safetensors"), ROWS[:4])


# --- components


@pytest.fixture
def source(tmp_path):
    save_file(reference(), tmp_path / "source.safetensors")
    return Tensors(tmp_path / "source.safetensors")


def test_convert_component(source, tmp_path):
    told = []
    config, folder = Something(width=4), tmp_path / "net"
    weights.convert_component(source, ROWS, wanted(), config, folder, source="a.pt", report=lambda *a: told.append(a))
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    stored = load_file(folder / "model.safetensors")
    expected = to_kavatar(reference(), ROWS, wanted())
    assert stored.keys() == expected.keys() and all(same_bits(stored[path], expected[path]) for path in expected)
    assert weights.read_config(folder, Something) == config
    assert told[-1] == ("net", 14, 14) and len(told) == 14  # qkv is two slots
    assert b'"source": "a.pt"' in (folder / "model.safetensors").read_bytes()[:200]


def test_layers_of_two_dtypes_become_float32(tmp_path):
    tensors = reference()
    tensors["layers.1.modulation"] = np.full((1, 2, 4), 1 + 2**-20, np.float32)
    save_file(tensors, tmp_path / "source.safetensors")
    source = Tensors(tmp_path / "source.safetensors")
    weights.convert_component(source, ROWS, wanted(), Something(width=4), tmp_path / "net")
    stored = load_file(tmp_path / "net" / "model.safetensors")
    assert stored["blocks/modulation"].dtype == np.float32 and stored["blocks/norm/scale"].dtype == BF16
    for layer in range(3):
        np.testing.assert_array_equal(stored["blocks/modulation"][layer], tensors[f"layers.{layer}.modulation"][0])


def test_numbers_that_are_no_weights(tmp_path):
    tensors = reference() | {"scale": np.array(3), "layers.1.norm.weight": np.ones(4)}
    save_file(tensors | {"step": np.array(3)}, tmp_path / "source.safetensors")
    source = Tensors(tmp_path / "source.safetensors")
    with pytest.raises(
        ValueError, match="layers.1.norm.weight is float64, scale is int64; weights are float32, bfloat16"
    ):
        weights.convert_component(source, ROWS, wanted(), Something(width=4), tmp_path / "net", unused=["step"])
    assert os.listdir(tmp_path) == ["source.safetensors"]


def test_nothing_is_written_if_keys_do_not_fit(source, tmp_path):
    with pytest.raises(Mismatch, match="3 missing: layers.3"):
        weights.convert_component(source, ROWS[:-1], wanted(4), Something(width=4), tmp_path / "deep" / "net")
    assert not (tmp_path / "deep").exists()


def test_an_older_component_stays_until_the_new_one_is_whole(source, tmp_path, monkeypatch):
    folder = tmp_path / "net"
    weights.convert_component(source, ROWS, wanted(), Something(width=1), folder)
    write, calls = SafetensorsWriter.write, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        write(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SafetensorsWriter, "write", interrupted)
        weights.convert_component(source, ROWS, wanted(), Something(width=2), folder)
    assert sorted(os.listdir(tmp_path)) == ["net", "source.safetensors"]
    assert weights.read_config(folder, Something).width == 1 and len(load_file(folder / "model.safetensors")) == 6

    for leftover in (".net.partial", ".net.old"):  # of a run that was killed
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "junk").write_text("x")
    weights.convert_component(source, ROWS, wanted(), Something(width=3), folder)
    assert sorted(os.listdir(tmp_path)) == ["net", "source.safetensors"]
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    assert weights.read_config(folder, Something).width == 3


def test_save_and_load_on_a_mesh(tmp_path, monkeypatch):
    """Sharded as told, cast to what is wanted; each part is read once, by the devices that hold it."""
    params = unflatten(to_kavatar(reference(), ROWS, wanted()))
    params["in"]["bias"] = jnp.arange(4, dtype=jnp.float32)  # as in training: arrays on a device
    weights.save_component(params, Something(width=4), tmp_path / "net")
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), params)
    mesh = make_mesh(2, 2, 1, 2)
    flat = {"blocks/q/kernel": P(None, "fsdp", "tensor"), "blocks/modulation": P(None, None, ("fsdp", "tensor"))}
    places = unflatten({path: NamedSharding(mesh, flat.get(path, P())) for path in bridge.flatten(abstract)})
    read = {}
    part = Tensors.part

    def counted(self, name, index):
        values = part(self, name, index)
        read.setdefault(name, []).append(values.size)
        return values

    monkeypatch.setattr(Tensors, "part", counted)
    monkeypatch.setattr(Tensors, "__getitem__", None)  # no tensor is read whole
    loaded = bridge.flatten(weights.load_component(tmp_path / "net", abstract, places))
    for path, leaf in bridge.flatten(params).items():
        assert loaded[path].dtype == jnp.float32 and loaded[path].sharding.spec == flat.get(path, P())
        np.testing.assert_array_equal(np.asarray(loaded[path]), np.asarray(leaf).astype(np.float32))
        shards = 4 if path in flat else 1
        assert read[path] == [leaf.size // shards] * shards, path


def test_load_names_what_does_not_fit(source, tmp_path):
    weights.convert_component(source, ROWS, wanted(), Something(width=4), tmp_path / "net")
    other = bridge.flatten(wanted(4)) | {"extra": jax.ShapeDtypeStruct((2,), jnp.float32)}
    del other["scale"]
    places = dict.fromkeys(other, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    with pytest.raises(
        ValueError, match="1 missing: extra; 1 left over: scale; 4 of another shape: .*; convert it again"
    ):
        weights.load_component(tmp_path / "net", unflatten(other), unflatten(places))


# --- config.json


DIT = DiTConfig(
    width=8, heads=2, layers=1, mlp=16, in_channels=36, out_channels=16, time_width=8, text_width=4, text_length=5,
    image_width=None, image_positions=0,
    audio=AudioAdapterConfig(speech_width=6, projection=(8,), heads=1, mlp=8, layers=1),
)  # fmt: skip


def test_config_round_trip(tmp_path):
    for config in (DIT, dataclasses.replace(DIT, audio=None, image_width=7, patch=(2, 1, 1)), Something(3, (0.1, 2.0))):
        weights.write_config(tmp_path, config)
        assert weights.read_config(tmp_path, type(config)) == config


@pytest.mark.parametrize(
    "change, words",
    [
        ({"width": None, "heads": None}, "it has no heads, width"),
        ({"colour": "red"}, "it has an unknown colour"),
        ({"audio": {"heads": 1, "depth": 3}}, "audio has no layers, mlp, .*; audio has an unknown depth"),
        ({"heads": "two"}, "heads is 'two', not int"),
        ({"heads": True}, "heads is True, not int"),
        ({"layers": 1.5}, "layers is 1.5, not int"),
        ({"patch": [1, 2]}, r"patch is \[1, 2\], not"),
        ({"patch": [1, 2, "x"]}, "patch is 'x', not int"),
        ({"audio": [1]}, r"audio is \[1\], not AudioAdapterConfig"),
    ],
)
def test_config_of_another_version(tmp_path, change, words):
    fields = dataclasses.asdict(DIT) | change
    gone = [name for name in ("width", "heads") if fields[name] is None]
    text = json.dumps({name: value for name, value in fields.items() if name not in gone})
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"config.json does not describe a DiTConfig: {words}") as caught:
        weights.read_config(tmp_path, DiTConfig)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"3", b"\xff\xfe\x00"])
def test_config_that_is_none(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match="config.json does not describe a CLIPConfig"):
        weights.read_config(tmp_path, CLIPConfig)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="there is no .*config.json"):
        weights.read_config(tmp_path, CLIPConfig)


@pytest.mark.parametrize("shape", [(5, 70), (33, 1), (0, 4), (7,), (2, 3, 40), ()])
@pytest.mark.parametrize("dtype", [BF16, np.float32, np.int8])
def test_axes_in_another_order(shape, dtype):
    values = np.arange(int(np.prod(shape))).reshape(shape).astype(dtype)
    found = bridge.contiguous(values.T)
    assert found.flags.c_contiguous and found.dtype == dtype and found.shape == shape[::-1]
    assert found.tobytes() == np.array(values.T, order="C").tobytes()
