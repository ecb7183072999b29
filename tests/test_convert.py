"""From a released checkpoint tree to a weights directory: the same numbers, all of them, or an error that says why not."""

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
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from configs import stableavatar
from kavatar_jax.cascade.weights import SOURCES, check_complete, load_weights, read_configs
from kavatar_jax.checkpoint import weights as store
from kavatar_jax.checkpoint.bridge import flatten, placements, reference_shapes, to_torch
from kavatar_jax.checkpoint.files import SafetensorsWriter, Tensors
from kavatar_jax.checkpoint.manifest import verify
from kavatar_jax.checkpoint.shards import Lazy, open_tensors, write_tensors
from kavatar_jax.models.components import COMPONENTS, abstract
from kavatar_jax.models.names import ORIGINAL
from kavatar_jax.parallel.mesh import make_mesh
from tools import convert_checkpoint
from tools.convert_checkpoint import convert
from tools.export import export
from tools.layouts import CONFIGS, DIT, FILES, TRANSFORMERS, WEIGHTS
from tools.reference.e2e import TreeFile

ROOT = Path(__file__).parents[1]
REFERENCES = Path(os.environ.get("KAVATAR_REFERENCES", Path(__file__).parents[2] / "shared" / "golden"))
TINY = json.loads((Path(__file__).parent / "golden" / "checkpoint_tree_tiny.json").read_text())
HEADS = TINY["dims"]["clip"]["num_heads"]  # the tiny portrait encoder's, which its file does not tell
TOKENIZER = FILES["tokenizer"][0]
NAMES = {part: FILES[part][0] for part in COMPONENTS}
STORED = {"dit": "bfloat16", "vae": "float32", "text": "bfloat16", "image": "float32", "speech": "float32"}
GB = 10**9
# keys and parameters that the published networks use of the released files
PUBLISHED = {
    "dit": (1143, 1_747_426_112), "vae": (194, 126_892_531), "text": (242, 5_680_910_336),
    "image": (392, 632_076_800), "speech": (210, 94_371_712 - 768),
}  # fmt: skip


def plain(path):
    return str(Path(path).with_suffix(".safetensors"))


@pytest.fixture(scope="module")
def without_torch():
    """The tree's files are looked for as safetensors, which need no torch."""
    with pytest.MonkeyPatch.context() as patch:
        for part, path in NAMES.items():
            patch.setitem(FILES, part, [plain(path)])
        for name, path in TRANSFORMERS.items():
            patch.setitem(TRANSFORMERS, name, plain(path))
        yield


@pytest.fixture(scope="module")
def values():
    """part -> the tensors of its file: every key of the released layout, small."""
    dtypes = {part: np.dtype(getattr(ml_dtypes, name, name)) for part, name in STORED.items()}
    trees = {part: TreeFile(TINY, path, "checkpoint-tree") for part, path in NAMES.items()}
    return {part: {key: np.asarray(x, dtypes[part]) for key, x in trees[part].items()} for part in trees}


@pytest.fixture(scope="module")
def released(tmp_path_factory, without_torch, values):
    """A miniature of the released tree."""
    folder = tmp_path_factory.mktemp("released")
    for path in [*NAMES.values(), TOKENIZER]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
    for part, tensors in values.items():
        save_file(tensors, folder / plain(NAMES[part]))
    for path, content in TINY["json"].items():
        (folder / path).write_text(json.dumps(content))
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder, path=TOKENIZER):
    """What the converter looks for, and what makes it one of plain bytes, so that no vocabulary is needed."""
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_text("{}")
    (folder / path).with_name("config.json").write_text('{"kind": "bytes"}')


def as_torch(torch, x):
    return torch.from_numpy(x.astype(np.float32)).to(torch.bfloat16 if x.dtype != np.float32 else torch.float32)


@pytest.fixture
def tree(released, tmp_path):
    """A copy of the tree to break: files are linked, so write new ones."""
    return Path(shutil.copytree(released, tmp_path / "tree", copy_function=os.link))


def rewrite(path, tensors):
    path.unlink()
    save_file(tensors, path)


@pytest.fixture(scope="module")
def converted(released, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "new" / "tiny"
    convert(released, folder, image_heads=HEADS)
    return folder


def refusal(*arguments, **options):
    with pytest.raises(ValueError) as caught:
        convert(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
    assert query.sharding.spec == up.sharding.spec == P(None, "fsdp", "tensor")
    assert query.shape == (2, 64, 64) and {s.data.shape for s in query.addressable_shards} == {(2, 32, 32)}
    assert max(map(max, read.values())) < query.nbytes * 8  # the largest is a piece of the VAE's
    assert [query.nbytes // 4] * 4 in read.values()
    assert loaded.dit["blocks"]["down"]["kernel"].sharding.spec == P(None, "tensor", "fsdp")
    assert loaded.text["embedding"].sharding.spec == P("tensor", "fsdp")
    assert loaded.vae["encoder"]["conv_in"]["kernel"].sharding.is_fully_replicated
    ids, mask = loaded.tokenizer(["é"], 4)
    assert ids.tolist() == [[0xC3 + 3, 0xA9 + 3, 1, 0]] and mask.sum() == 3

    for name, component in COMPONENTS.items():
        back, source = dict(to_torch(getattr(loaded, name), component.model.TORCH)), values[name]
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


# --- other layouts


def plain_wan(values, kind):
    """The miniature's transformer without its audio adapter, as one of Wan's own."""
    tensors = {key: x for key, x in values["dit"].items() if "vocal" not in key}
    if kind == "flf2v":
        tensors["img_emb.emb_pos"] = np.ones((1, 514, TINY["dims"]["image_dim"]), tensors["head.modulation"].dtype)
    if kind == "t2v":
        tensors = {key: x for key, x in tensors.items() if "img" not in key}
        tensors["patch_embedding.weight"] = tensors["patch_embedding.weight"][:, :16]
    return {key: np.ascontiguousarray(x) for key, x in tensors.items()}


def write_wan(folder, values, kind, *, shards=1):
    """Its transformer's files and config.json, as Wan-AI/Wan2.1-* has them."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = plain_wan(values, kind)
    said = TINY["json"][CONFIGS["dit"]] | {"model_type": kind, "in_dim": tensors["patch_embedding.weight"].shape[1]}
    (folder / "config.json").write_text(json.dumps(said))
    lazy = {key: Lazy(x.shape, x.dtype, lambda x=x: x) for key, x in tensors.items()}
    write_tensors(folder / DIT, lazy, shard_size=sum(x.nbytes for x in tensors.values()) // shards + 1)
    return tensors


@pytest.mark.parametrize("kind, shards", [("t2v", 1), ("i2v", 3), ("flf2v", 1)])
def test_wan_and_back(tmp_path, values, kind, shards, capsys):
    tensors = write_wan(tmp_path / "wan", values, kind, shards=shards)
    convert(tmp_path / "wan", tmp_path / "ours")
    assert f"wan: there is {DIT}\n" in capsys.readouterr().err
    config = store.read_config(tmp_path / "ours" / "dit", *COMPONENTS["dit"].kinds)
    assert config.audio is None and (config.image_width is None) == (kind == "t2v")
    export(tmp_path / "ours", tmp_path / "back", "wan", shard_size=200_000 if shards > 1 else GB)
    back, said = open_tensors(tmp_path / "back" / DIT), json.loads((tmp_path / "back" / "config.json").read_text())
    assert said.pop("_class_name") == "WanModel" and said == json.loads((tmp_path / "wan" / "config.json").read_text())
    assert back.keys() == tensors.keys() and all(back[key].tobytes() == x.tobytes() for key, x in tensors.items())
    assert len(list((tmp_path / "back").glob("*.safetensors"))) == (1 if shards == 1 else 2)


def test_export_is_all_or_nothing(converted, tmp_path, monkeypatch, capsys):
    """Every part is checked before one is written, and the folder bears its name when the last is whole."""

    def refusal(layout, source=converted, folder="out", **options):
        with pytest.raises(ValueError) as caught:
            export(source, tmp_path / folder, layout, shard_size=options.pop("shard_size", GB), **options)
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    said = refusal("diffusers", only=["dit", "vae"])
    assert said.startswith("dit: it listens to speech, and diffusers has no class for that") and "vae" not in said
    assert "dit: it listens to speech, and plain Wan has no such part" in refusal("wan", only=["dit"])
    assert "diffusers has no speech; it has dit, vae, text, image, tokenizer" in refusal("diffusers", only=["speech"])
    assert "speech: " in refusal("stableavatar") and "image: " in refusal("stableavatar")
    assert "shard-size of 0 bytes" in refusal("diffusers", only=["vae"], shard_size=0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    assert "name a folder that is new" in refusal("diffusers", folder="full", only=["vae"])
    write = SafetensorsWriter.write

    def fail(self, name, values, row=None):
        if name == "proj_out.bias" or name == "encoder.final_layer_norm.weight":
            raise OSError(28, "No space left on device")
        write(self, name, values, row)

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(SafetensorsWriter, "write", fail)
        export(converted, tmp_path / "out", "diffusers", shard_size=GB, only=["vae", "text"])
    assert os.listdir(tmp_path) == ["full"]
    weights = Path(shutil.copytree(converted, tmp_path / "weights"))
    (weights / "text" / "model.safetensors").unlink()
    shutil.copy(weights / "image" / "model.safetensors", weights / "text" / "model.safetensors")
    assert "text does not fit its config.json" in refusal("diffusers", source=weights, only=["vae", "text"])
    assert "make a weights directory of ours of it first" in refusal("wan", source=write_wan_folder(tmp_path))
    capsys.readouterr()


def write_wan_folder(folder):
    """What is taken for Wan's."""
    (folder / "wan").mkdir()
    (folder / "wan" / DIT).write_bytes(b"")
    return folder / "wan"


def test_what_a_folder_is(converted, tmp_path):
    message = refusal(tmp_path, tmp_path / "out")
    for looked in ("dit/model.safetensors", "StableAvatar-1.3B/", DIT, "transformer/", "Wan2.1_VAE.pth", "whisper"):
        assert looked in message
    assert "say what to make of it: --to diffusers, wan, stableavatar" in refusal(converted, tmp_path / "out")
    assert "wan has no speech; it has dit, vae, text, image, tokenizer" in refusal(
        write_wan_folder(tmp_path), tmp_path / "out", only=["speech"]
    )
    assert f"wan has not all of --only; missing: vae ({tmp_path / 'wan' / WEIGHTS['vae']})" in refusal(
        tmp_path / "wan", tmp_path / "out", only=["vae"]
    )


def test_a_wan_folder_that_does_not_fit(tmp_path, values):
    write_wan(tmp_path / "wan", values, "i2v", shards=3)
    index = tmp_path / "wan" / f"{DIT}.index.json"
    index.write_text(index.read_text().replace('"diffusion', '"../diffusion'))
    assert "a shard is a .safetensors file beside it" in refusal(tmp_path / "wan", tmp_path / "out")
    shutil.rmtree(tmp_path / "wan")
    write_wan(tmp_path / "wan", {"dit": {**values["dit"], "blocks.0.x_vocal.weight": np.ones(3)}}, "t2v")
    said = json.loads((tmp_path / "wan" / "config.json").read_text())
    (tmp_path / "wan" / "config.json").write_text(json.dumps(said | {"dim": 65, "ffn_dim": 111}))
    assert "dim 65 (not 64), ffn_dim 111 (not 112)" in refusal(tmp_path / "wan", tmp_path / "out")
    (tmp_path / "wan" / DIT).unlink()
    save_file(values["dit"], tmp_path / "wan" / DIT)
    message = refusal(tmp_path / "wan", tmp_path / "out")
    assert f"{sum('vocal' in key for key in values['dit'])} left over: " in message and "missing" not in message
    assert not (tmp_path / "out").exists()


def test_broken_numbers_are_flagged(tmp_path, values, monkeypatch, capsys):
    tensors = write_wan(tmp_path / "wan", values, "t2v")
    tensors["head.head.bias"][0] = np.nan
    rewrite(tmp_path / "wan" / DIT, tensors)
    convert(tmp_path / "wan", tmp_path / "ours")
    words = [
        "convert_checkpoint",
        str(tmp_path / "ours"),
        str(tmp_path / "back"),
        "--to",
        "wan",
        "--shard-size",
        "0.0001",
    ]
    monkeypatch.setattr(sys, "argv", words)
    assert convert_checkpoint.main() == 0
    assert len(list((tmp_path / "back").glob("*-of-*.safetensors"))) > 1
    said = capsys.readouterr().err
    assert "has NaN or Inf in head/out/bias\n" in said and "has NaN or Inf in head.head.bias\n" in said


@pytest.mark.torch
def test_all_of_wan(tmp_path, values):
    torch = pytest.importorskip("torch")
    tensors = write_wan(tmp_path / "wan", values, "i2v")
    for part, path in WEIGHTS.items():
        if part == "tokenizer":
            write_tokenizer(tmp_path / "wan", path)
        else:
            torch.save({key: as_torch(torch, x) for key, x in values[part].items()}, tmp_path / "wan" / path)
    convert(tmp_path / "wan", tmp_path / "ours", image_heads=HEADS)
    assert sorted(os.listdir(tmp_path / "ours")) == ["dit", "image", "kavatar.json", "text", "tokenizer", "vae"]
    with pytest.raises(ValueError, match=r"image: .* has more tensors than ours keeps .*--rest"):
        export(tmp_path / "ours", tmp_path / "back", "wan", shard_size=GB)
    assert not (tmp_path / "back").exists()
    export(tmp_path / "ours", tmp_path / "back", "wan", shard_size=GB, rest=tmp_path / "wan")
    for part, path in {"dit": DIT, **WEIGHTS}.items():
        if part != "tokenizer":
            file, wanted = Tensors(tmp_path / "back" / path), tensors if part == "dit" else values[part]
            assert file.keys() == wanted.keys() and all(file[key].tobytes() == x.tobytes() for key, x in wanted.items())
    assert sorted(os.listdir(tmp_path / "back")) == sorted(["config.json", "google", "kavatar.json", DIT, *(
        path for part, path in WEIGHTS.items() if part != "tokenizer"
    )])  # fmt: skip


@pytest.mark.parametrize("parametrized", [False, True])
def test_a_speech_encoder_alone(tmp_path, values, parametrized):
    """wav2vec 2.0 as transformers names it with its head, or without it and with the newer names of a norm."""
    kept, said = dict(values["speech"]), TINY["json"][CONFIGS["speech"]]
    if parametrized:
        newer = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
        kept = {key.removeprefix("wav2vec2."): x for key, x in kept.items() if "lm_head" not in key}
        kept = {
            key.replace(old, newer[old]) if (old := key.split(".")[-1]) in newer else key: x for key, x in kept.items()
        }
    (tmp_path / "one").mkdir()
    save_file(kept, tmp_path / "one" / "model.safetensors")
    (tmp_path / "one" / "config.json").write_text(json.dumps(said))
    convert(tmp_path / "one", tmp_path / "ours")
    stored = Tensors(tmp_path / "ours" / "speech" / "model.safetensors")
    wanted = values["speech"]["wav2vec2.encoder.pos_conv_embed.conv.weight_v"]
    assert stored["positions/v"].tobytes() == wanted.transpose(2, 1, 0).tobytes()
    assert store.read_config(tmp_path / "ours" / "speech", *COMPONENTS["speech"].kinds).heads == 4
    (tmp_path / "one" / "config.json").write_text(json.dumps(said | {"num_hidden_layers": 3}))
    assert "num_hidden_layers 3 (not 2)" in refusal(tmp_path / "one", tmp_path / "ours")


# --- what is not there


def test_every_missing_file_is_named(tree, tmp_path):
    for path in (CONFIGS["dit"], plain(NAMES["vae"]), plain(NAMES["speech"]), TOKENIZER):
        (tree / path).unlink()
    message = refusal(tree, tmp_path / "out", image_heads=HEADS)
    for path in (CONFIGS["dit"], plain(NAMES["vae"]), plain(NAMES["speech"]), TOKENIZER):
        assert message.count(str(tree / path)) == 1
    assert plain(NAMES["text"]) not in message and "To convert the rest: --only text image" in message
    assert not (tmp_path / "out").exists()
    convert(tree, tmp_path / "out", only=["text", "image"], image_heads=HEADS)
    with pytest.raises(ValueError) as caught:
        check_complete(tmp_path / "out")
    said = str(caught.value)
    assert all(f"{part} (from {SOURCES[part]})" in said for part in ("dit", "vae", "speech", "tokenizer"))
    assert "text (" not in said and f"SRC {tmp_path / 'out'} --only dit vae speech tokenizer" in said
    assert "there is no folder" in refusal(tmp_path / "nowhere", tmp_path / "out")


def test_sources_name_the_released_files():
    for part, path in [*NAMES.items(), ("tokenizer", TOKENIZER)]:
        assert path.startswith(SOURCES[part].split(" or ")[0])


def test_a_transformer_of_ones_own(tree, tmp_path, values):
    mine = {key: (2 * x).astype(x.dtype) for key, x in values["dit"].items()}
    save_file(mine, tmp_path / "finetuned.safetensors")
    convert(tree, tmp_path / "out", only=["dit"], transformer=str(tmp_path / "finetuned.safetensors"))
    stored = load_file(tmp_path / "out" / "dit" / "model.safetensors")
    np.testing.assert_array_equal(stored["patch/bias"], mine["patch_embedding.bias"])
    message = refusal(tree, tmp_path / "out", transformer="rectangle")
    assert "--transformer rectangle is neither a file nor square or rec-vec" in message
    message = refusal(tree, tmp_path / "out", only=["dit"], transformer="rec-vec")
    assert f"missing: dit ({tree / plain(TRANSFORMERS['rec-vec'])})" in message


# --- what does not fit


@pytest.mark.parametrize(
    "part, dropped, added",
    [  # among them tensors that sizes, layers and kinds are read off
        ("dit", ["blocks.1.norm3.bias"], []),
        ("dit", ["patch_embedding.weight", "vocal_projector.blocks.1.modulation"], ["blocks.7.extra.weight"]),
        ("dit", ["vocal_projector.proj_model.proj.weight", "head.head.weight"], []),
        ("vae", ["encoder.downsamples.9.residual.6.weight"], ["decoder.extra"]),
        ("text", ["token_embedding.weight", "blocks.1.ffn.gate.0.weight"], ["blocks.2.norm1.weight"]),
        ("image", ["visual.transformer.0.mlp.0.weight", "visual.head"], ["visual.head.bias"]),
        ("speech", ["wav2vec2.feature_extractor.conv_layers.3.conv.weight"], ["lm_heads.bias", "extra"]),
    ],
)
def test_every_missing_and_left_over_key_is_named(tree, tmp_path, values, part, dropped, added):
    path = tree / plain(NAMES[part])
    kept = {key: x for key, x in values[part].items() if key not in dropped}
    rewrite(path, kept | {key: np.zeros(3, np.float32) for key in added})
    message = refusal(tree, tmp_path / "out", only=[part], image_heads=HEADS)
    groups = [("missing", dropped), ("left over", added)]
    expected = [(f"{len(keys)} {what}", sorted(keys)) for what, keys in groups if keys]
    lists = [text.split(": ") for text in message.split(f"does not hold {COMPONENTS[part].role}: ")[1].split("; ")]
    assert [(what, sorted(keys.split(", "))) for what, keys in lists] == expected and str(path) in message
    assert not (tmp_path / "out").exists()


def test_a_wan_transformer_is_not_ours(tree, tmp_path, values):
    rewrite(tree / plain(NAMES["dit"]), {key: x for key, x in values["dit"].items() if "vocal" not in key})
    message = refusal(tree, tmp_path / "out", only=["dit"])
    vocal = [key for key in values["dit"] if "vocal" in key]
    assert f"{len(vocal)} missing: " in message and all(key in message for key in vocal) and "left over" not in message


def test_one_bad_part_and_nothing_is_written(tree, tmp_path, values):
    out = tmp_path / "out"
    text, speech = (tree / plain(NAMES[part]) for part in ("text", "speech"))
    changed = dict(values["text"])
    changed["blocks.0.attn.k.weight"], changed["norm.weight"] = np.zeros((3, 3), np.float32), np.zeros(40, np.int32)
    rewrite(text, changed)
    blob = speech.read_bytes()
    speech.unlink()
    speech.write_bytes(blob[:-1])
    with pytest.raises(ValueError) as caught:
        convert(tree, out, only=["image", "text", "speech", "tokenizer"], image_heads=HEADS)
    one, two = sorted(str(caught.value).splitlines())
    assert one.startswith(
        f"{text} does not hold the text encoder: 1 of another shape: blocks.0.attn.k.weight is (3, 3), "
    )
    assert two.startswith(f"{speech} is not a readable safetensors file")
    assert not out.exists()
    rewrite(text, changed | {"blocks.0.attn.k.weight": values["text"]["blocks.0.attn.k.weight"]})
    assert "norm.weight is int32; weights are float32, bfloat16" in refusal(tree, out, only=["text"])
    length = struct.unpack("<Q", blob[:8])[0]
    lying = blob[8 : 8 + length].replace(b'"F32"', b'"F16"', 1)
    speech.write_bytes(blob[:8] + lying + blob[8 + length :])
    assert "not a readable safetensors file" in refusal(tree, out, only=["speech"])
    assert not out.exists()


@pytest.mark.torch
def test_a_pickle_with_code_is_not_run(tree, tmp_path):
    torch = pytest.importorskip("torch")

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"state_dict": {"patch_embedding.weight": Code()}}, tmp_path / "mine.pt")
    message = refusal(tree, tmp_path / "out", only=["dit"], transformer=str(tmp_path / "mine.pt"))
    assert "mine.pt holds code (posix.mkdir)" in message
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_sizes_of_the_published_network_tell_which_tensor_is_wrong():
    """A tensor that sizes are read off must not accuse all the others."""
    config = stableavatar.config().text
    shapes = reference_shapes(COMPONENTS["text"].model.TORCH, abstract("text", config))
    tensors = Tensors()
    tensors.shapes = shapes | {"token_embedding.weight": (256384, 4000)}
    misled = COMPONENTS["text"].model.config_of(tensors.shapes, {})
    with pytest.raises(ValueError) as caught:
        placements(tensors.shapes, COMPONENTS["text"].model.TORCH, abstract("text", misled))
    assert len(caught.value.wrong) > 100  # type: ignore
    said = str(convert_checkpoint._amiss("text", ORIGINAL["text"], tensors, caught.value))
    assert said == "1 of another shape: token_embedding.weight is (256384, 4000), expected (256384, 4096)"


def test_what_the_config_files_say(tree, tmp_path):
    def say(path, content):
        (tree / path).unlink()
        (tree / path).write_text(content)

    assert "needs num_heads" in refusal(tree, tmp_path / "out", only=["image"])
    message = refusal(tree, tmp_path / "out", only=["image"], image_heads=7)
    assert "a number of heads of 7 does not divide its width 48" in message
    for content, words in (
        ("{}", "config.json has no num_heads"),
        ("[]", "holds a list where an object was expected"),
        ('{"num_heads"', "config.json is not JSON"),
        ('{"num_heads": "four"}', "heads of 'four' does not divide its width 64"),
        ('{"num_heads": 5}', "heads of 5 does not divide"),
    ):
        say(CONFIGS["dit"], content)
        assert words in refusal(tree, tmp_path / "out", only=["dit"])
    say(CONFIGS["speech"], json.dumps({"do_stable_layer_norm": True}))
    assert "neither a base nor a stable" in refusal(tree, tmp_path / "out", only=["speech"])
    say(TOKENIZER, "version https://git-lfs.github.com/spec/v1\n")
    assert "tokenizer.json is not JSON, perhaps a pointer" in refusal(tree, tmp_path / "out", only=["tokenizer"])
    assert not (tmp_path / "out").exists()


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


# --- a weights directory that is not what it should be


def test_read_configs_refuses(converted, tmp_path):
    folder = Path(shutil.copytree(converted, tmp_path / "weights"))
    config = stableavatar.config()
    stored = store.read_config(folder / "speech", *COMPONENTS["speech"].kinds)
    store.write_config(folder / "speech", dataclasses.replace(stored, width=64))
    with pytest.raises(ValueError, match="not made for each other: speech of width 64, expected 32"):
        read_configs(folder, config)
    (folder / "vae" / "config.json").write_text('{"width": 8}')
    with pytest.raises(
        ValueError,
        match="vae/config.json does not describe a VAEConfig: it has no latent_channels, .*convert vae again",
    ):
        read_configs(folder, config)
    (folder / "vae" / "config.json").unlink()
    (folder / "image" / "model.safetensors").unlink()
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(
        ValueError, match="incomplete; missing: vae .*, image .*, tokenizer .*--only vae image tokenizer"
    ):
        read_configs(folder, config)
    with pytest.raises(ValueError, match="there is no weights directory"):
        check_complete(folder / "dit" / "deeper")


def test_how_a_network_is_run_stays_the_runs(converted):
    config = stableavatar.config()
    run = dataclasses.replace(config.dit, remat="everything", dtype="float16")
    read = read_configs(converted, dataclasses.replace(config, dit=run)).dit
    assert (read.remat, read.dtype, read.param_dtype, read.width) == ("everything", "float16", "bfloat16", 64)


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
import resource
from pathlib import Path
from tools.convert_checkpoint import convert
folder = Path({str(tmp_path)!r})
convert(folder, folder / "out", only=["dit"], transformer=str(folder / "dit.safetensors"))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True)
    size = (tmp_path / "out" / "dit" / "model.safetensors").stat().st_size
    (tmp_path / "out" / "dit" / "model.safetensors").unlink()
    assert end < size < end + 2**20
    assert int(done.stdout) < 1.5 * 2**20  # KiB
