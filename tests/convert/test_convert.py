"""From a released checkpoint tree to a weights directory: the same numbers, all of them, whatever happens on the way."""

import dataclasses
import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from released_tree import (
    GB,
    HEADS,
    NAMES,
    PUBLISHED,
    REFERENCES,
    ROOT,
    STORED,
    TINY,
    TOKENIZER,
    as_torch,
    plain,
    write_tokenizer,
)
from safetensors.numpy import load_file

from configs import stableavatar
from kavatar_jax.cascade.weights import check_complete, load_weights, read_configs
from kavatar_jax.checkpoint import weights as store
from kavatar_jax.checkpoint.bridge import flatten, placements, reference_shapes, to_torch
from kavatar_jax.checkpoint.files import SafetensorsWriter, Tensors
from kavatar_jax.checkpoint.manifest import verify
from kavatar_jax.models.components import COMPONENTS, abstract
from kavatar_jax.parallel.mesh import make_mesh
from tools import convert_checkpoint
from tools.convert_checkpoint import convert
from tools.export import export
from tools.layouts import CONFIGS, FILES, TRANSFORMERS
from tools.reference.e2e import TreeFile

# --- the whole way


def test_all_of_the_tree(converted):
    assert sorted(os.listdir(converted)) == sorted([*COMPONENTS, "tokenizer", "kavatar.json"])
    check_complete(converted)
    for part, component in COMPONENTS.items():
        assert sorted(os.listdir(converted / part)) == ["config.json", "model.safetensors"]
        assert store.read_config(converted / part, *component.kinds).param_dtype == STORED[part]
    manifest = json.loads((converted / "kavatar.json").read_text())
    assert manifest["sources"] == {part: plain(path) for part, path in NAMES.items()} | {"tokenizer": TOKENIZER}
    dims, config = TINY["dims"], read_configs(converted, stableavatar.config())
    assert (config.dit.text_width, config.dit.image_width) == (dims["text_dim"], dims["image_dim"])
    assert config.dit.audio and config.dit.audio.speech_width == dims["audio_dim"] and config.dit.heads == 4
    assert (config.vae.width, config.image.heads, config.text.layers) == (dims["vae_dim"], HEADS, 2)
    assert (config.dit.dtype, config.vae.dtype, config.width) == ("bfloat16", "float32", 512)


def test_onto_a_mesh_and_back(converted, values, monkeypatch):
    """Sharded by the models' tables, each part of a file read once, and the released tensors come back to the bit."""
    config = read_configs(converted, stableavatar.config())
    read, part = {}, Tensors.part

    def counted(self, name, index):
        found = part(self, name, index)
        read.setdefault((id(self), name), []).append(found.nbytes)
        return found

    monkeypatch.setattr(Tensors, "part", counted)
    monkeypatch.setattr(Tensors, "__getitem__", None)  # no tensor is read whole
    with jax.set_mesh(make_mesh(2, 2, 1, 2)):
        loaded = load_weights(converted, config)
    assert sum(map(sum, read.values())) == sum(
        leaf.nbytes for name in COMPONENTS for leaf in flatten(getattr(loaded, name)).values()
    )
    query, up = loaded.dit["blocks"]["self_attn"]["q"]["kernel"], loaded.text["blocks"]["up"]["kernel"]
    assert query.sharding.spec == P(None, "fsdp", "tensor")
    assert up.sharding.memory_kind == "pinned_host" and up.addressable_shards[0].data.size == up.size // 8
    assert query.shape == (2, 64, 64) and {s.data.shape for s in query.addressable_shards} == {(2, 32, 32)}
    assert max(map(max, read.values())) < query.nbytes * 8  # the largest is a piece of the VAE's
    assert [query.nbytes // 4] * 4 in read.values()
    assert loaded.dit["blocks"]["down"]["kernel"].sharding.spec == P(None, "tensor", "fsdp")
    assert loaded.text["embedding"].sharding.memory_kind == "pinned_host"
    assert loaded.vae["encoder"]["conv_in"]["kernel"].sharding.is_fully_replicated
    ids, mask = loaded.tokenizer(["é"], 4)
    assert ids.tolist() == [[0xC3 + 3, 0xA9 + 3, 1, 0]] and mask.sum() == 3

    for name, component in COMPONENTS.items():
        back, source = dict(to_torch(jax.device_get(getattr(loaded, name)), component.model.TORCH)), values[name]
        for key, tensor in back.items():
            assert tensor.dtype == source[key].dtype and tensor.shape == source[key].shape
            assert tensor.tobytes() == source[key].tobytes(), key
        assert len(source) - len(back) == {"image": 84 - 44, "speech": 3}.get(name, 0)  # words, and a recogniser's head


@pytest.mark.torch
def test_the_released_file_formats(values, tmp_path, monkeypatch):
    """.pt and .pth as torch writes them, the transformer wrapped as training scripts do; rec-vec is another file."""
    torch = pytest.importorskip("torch")
    for part, path in NAMES.items():
        monkeypatch.setitem(FILES, part, [path])
    released = {name: f"StableAvatar-1.3B/transformer3d-{name}.pt" for name in TRANSFORMERS}
    for name, path in released.items():
        monkeypatch.setitem(TRANSFORMERS, name, path)

    tree, folder = tmp_path / "tree", tmp_path / "weights"
    write_tokenizer(tree)
    for part, path in NAMES.items():
        state = {key: as_torch(torch, x) for key, x in values[part].items()}
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"state_dict": state} if part == "dit" else state, (tree / path).with_suffix(Path(path).suffix))
        if part == "dit":
            torch.save({key: -x for key, x in state.items()}, tree / released["rec-vec"])
        if part == "speech":  # the older name, taken where there are no safetensors
            (tree / path).rename(tree / "wav2vec2-base-960h" / "pytorch_model.bin")
    monkeypatch.setitem(FILES, "speech", [NAMES["speech"], "wav2vec2-base-960h/pytorch_model.bin"])
    for path, content in TINY["json"].items():
        (tree / path).write_text(json.dumps(content))
    convert(tree, folder, image_heads=HEADS)
    check_complete(folder)
    for part, component in COMPONENTS.items():
        stored = load_file(folder / part / "model.safetensors")
        back = dict(to_torch(store.unflatten(stored), component.model.TORCH))
        assert all(back[key].tobytes() == values[part][key].tobytes() for key in back)

    export(folder, tmp_path / "back", "stableavatar", shard_size=GB, rest=tree)
    for part, path in NAMES.items():
        file = Tensors(tmp_path / "back" / path)
        assert file.keys() == values[part].keys()
        assert all(
            file[key].tobytes() == x.tobytes() and file.dtypes[key] == x.dtype for key, x in values[part].items()
        )
        flat = torch.load(tmp_path / "back" / path, weights_only=True) if path.endswith(("pt", "pth")) else {}
        assert all(torch.equal(flat[key], as_torch(torch, values[part][key])) for key in flat)
    for path, content in TINY["json"].items():
        said = json.loads((tmp_path / "back" / path).read_text())
        assert {key: said[key] for key in content} == content
    assert (tmp_path / "back" / TOKENIZER).read_text() == "{}"
    assert verify(tmp_path / "back") == []

    convert(tree, folder, only=["dit"], transformer="rec-vec")
    export(folder, tmp_path / "other", "stableavatar", shard_size=GB, only=["dit"], transformer="rec-vec")
    assert Tensors(tmp_path / "other" / released["rec-vec"]).keys() == values["dit"].keys()
    bias = load_file(folder / "dit" / "model.safetensors")["patch/bias"]
    np.testing.assert_array_equal(bias, -values["dit"]["patch_embedding.bias"])


# --- half done


def test_killed_in_the_middle(released, tmp_path, without_torch):
    """What was whole before is whole after, what was being written has no name, and the next run mends it."""
    script = f"""
import os, sys
from tools import convert_checkpoint as tool
from kavatar_jax.checkpoint.files import SafetensorsWriter
write, calls = SafetensorsWriter.write, []
def killed(*arguments):
    write(*arguments)
    calls.append(0)
    if len(calls) == 60:  # text has 22 pieces, speech 50
        os.kill(os.getpid(), 9)
SafetensorsWriter.write = killed
tool.FILES["text"] = {FILES["text"]!r}
sys.argv = ["convert_checkpoint", {str(released)!r}, {str(tmp_path)!r}, "--only", "text", "speech"]
tool.main()
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert sorted(os.listdir(tmp_path)) == [".speech.partial", "kavatar.json", "text"]
    assert sorted(os.listdir(tmp_path / "text")) == ["config.json", "model.safetensors"]
    assert os.listdir(tmp_path / ".speech.partial") == [".model.safetensors.partial"]
    with pytest.raises(ValueError, match="missing: dit .*speech "):
        check_complete(tmp_path)
    convert(released, tmp_path, only=["speech"])
    assert sorted(os.listdir(tmp_path)) == ["kavatar.json", "speech", "text"]
    assert json.loads((tmp_path / "kavatar.json").read_text())["sources"].keys() == {"text", "speech"}


def test_tokenizer_is_copied_whole_or_not_at_all(tree, tmp_path, monkeypatch):
    out = tmp_path / "out"
    convert(tree, out, only=["tokenizer"])

    def half(source, folder, **_):
        (folder / "tokenizer.json").write_text("{")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(shutil, "copytree", half)
        convert(tree, out, only=["tokenizer"])
    assert sorted(os.listdir(out)) == ["kavatar.json", "tokenizer"]
    assert (out / "tokenizer" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize(
    "error, code, words",
    [
        (None, 0, ""),
        (ValueError("no such part"), 2, "convert_checkpoint: no such part\n"),
        (OSError(28, "No space left on device"), 1, "convert_checkpoint: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, "convert_checkpoint: interrupted; "),
    ],
)
def test_command_line(released, tmp_path, monkeypatch, capsys, error, code, words):
    """One line and an exit code; a disk that is full leaves nothing under a part's name."""
    write = SafetensorsWriter.write

    def fail(self, name, values, row=None):
        if error is not None and name == "blocks/down/kernel":
            raise error
        write(self, name, values, row)

    monkeypatch.setattr(SafetensorsWriter, "write", fail)
    out = tmp_path / "out"
    monkeypatch.setattr(
        sys, "argv", ["convert_checkpoint", str(released), str(out), "--only", "text", "--to", "kavatar"]
    )
    assert convert_checkpoint.main() == code
    said = capsys.readouterr().err.splitlines(keepends=True)
    assert said[0] == "stableavatar: there is StableAvatar-1.3B/\n"
    assert said[-1].startswith(words) and len(said) == 2
    assert sorted(os.listdir(out)) == ([] if error else ["kavatar.json", "text"])


# --- full size, without the numbers


@pytest.mark.parametrize("part", COMPONENTS)
def test_published_sizes(part):
    """Every key of the published networks: how many, how large, and that their shapes tell the config."""
    published, model = getattr(stableavatar.config(), part), COMPONENTS[part].model
    wanted = abstract(part, published)
    shapes = reference_shapes(model.TORCH, wanted)
    assert (len(shapes), sum(map(math.prod, shapes.values()))) == PUBLISHED[part]
    placed = placements(shapes, model.TORCH, wanted)
    assert {slot.path for slots in placed.values() for slot in slots} == set(flatten(wanted))
    read = model.config_of(shapes, {"num_heads": 12} if part == "dit" else {})
    assert dataclasses.replace(read, dtype=published.dtype, param_dtype=published.param_dtype) == published


@pytest.mark.parametrize("part", COMPONENTS)
def test_key_list_of_the_released_files(part):
    """The same against the recorded key lists, with what the files hold besides."""
    if not (REFERENCES / "checkpoint_tree_full.json").is_file():
        pytest.skip(f"no checkpoint_tree_full.json in {REFERENCES}; set KAVATAR_REFERENCES")
    full = json.loads((REFERENCES / "checkpoint_tree_full.json").read_text())
    shapes, model = TreeFile(full, NAMES[part], "").shapes, COMPONENTS[part].model
    config = model.config_of(shapes, full["json"].get(CONFIGS.get(part), {}))
    published = getattr(stableavatar.config(), part)
    assert dataclasses.replace(config, dtype=published.dtype, param_dtype=published.param_dtype) == published
    placed = placements(shapes, model.TORCH, abstract(part, published), unused=model.UNUSED)
    assert len(placed) == PUBLISHED[part][0]


@pytest.mark.slow
def test_memory_stays_small(tmp_path):
    """3.5 GB of transformer through less than 1.5: the source is a file of holes, so that only the result takes disk."""
    shapes = reference_shapes(COMPONENTS["dit"].model.TORCH, abstract("dit", stableavatar.config().dit))
    header, end = {}, 0
    for key, shape in shapes.items():
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + 2 * math.prod(shape)]}
        end += 2 * math.prod(shape)
    blob = json.dumps(header).encode()
    with open(tmp_path / "dit.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(blob)) + blob)
        file.truncate(8 + len(blob) + end)
    (tmp_path / CONFIGS["dit"]).parent.mkdir()
    (tmp_path / CONFIGS["dit"]).write_text('{"num_heads": 12}')
    script = f"""
from pathlib import Path
from tools.convert_checkpoint import convert
folder = Path({str(tmp_path)!r})
convert(folder, folder / "out", only=["dit"], transformer=str(folder / "dit.safetensors"))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""  # not getrusage, which counts what the process that started this one had
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True)
    size = (tmp_path / "out" / "dit" / "model.safetensors").stat().st_size
    (tmp_path / "out" / "dit" / "model.safetensors").unlink()
    assert end < size < end + 2**20
    assert int(done.stdout) < 1.5 * 2**20  # KiB
