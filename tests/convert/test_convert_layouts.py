"""Layouts other than the release's, to ours and back: Wan's own, one file, diffusers, a speech encoder alone."""

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from released_tree import GB, HEADS, TINY, as_torch, refusal, rewrite, write_tokenizer
from safetensors.numpy import save_file

from kavatar_jax.checkpoint import weights as store
from kavatar_jax.checkpoint.bridge import reference_shapes, to_torch
from kavatar_jax.checkpoint.files import SafetensorsWriter, Tensors
from kavatar_jax.checkpoint.manifest import verify
from kavatar_jax.checkpoint.shards import Lazy, open_tensors, write_tensors
from kavatar_jax.config import load_config
from kavatar_jax.models import dit
from kavatar_jax.models.components import COMPONENTS, abstract
from kavatar_jax.models.names import PLAIN_DIT
from tools import convert_checkpoint
from tools.convert_checkpoint import convert
from tools.export import export
from tools.layouts import CONFIGS, DIT, WEIGHTS

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
    tensors["head.head.bias"] = np.full_like(tensors["head.head.bias"], np.nan)
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


@pytest.mark.torch
def test_shards_of_torch_with_an_index(tmp_path, values):
    """pytorch_model.bin.index.json and its shards, as older folders of transformers have them."""
    torch = pytest.importorskip("torch")
    tensors = plain_wan(values, "i2v")
    (tmp_path / "wan").mkdir()
    said = TINY["json"][CONFIGS["dit"]]
    (tmp_path / "wan" / "config.json").write_text(json.dumps(said))
    keys, homes = sorted(tensors), {}
    for n in range(2):
        name = f"diffusion_pytorch_model-0000{n + 1}-of-00002.bin"
        torch.save({key: as_torch(torch, tensors[key]) for key in keys[n::2]}, tmp_path / "wan" / name)
        homes |= dict.fromkeys(keys[n::2], name)
    index = tmp_path / "wan" / "diffusion_pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": homes}))
    convert(tmp_path / "wan", tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back", "wan", shard_size=GB)
    back = Tensors(tmp_path / "back" / DIT)
    assert back.keys() == tensors.keys() and all(back[key].tobytes() == x.tobytes() for key, x in tensors.items())
    index.write_text(json.dumps({"weight_map": homes | {keys[0]: "elsewhere.safetensors"}}))
    assert "a shard is a .bin file beside it" in refusal(tmp_path / "wan", tmp_path / "none")


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
@pytest.mark.parametrize("speaks", [False, True])
def test_one_file_alone(tmp_path, values, prefix, speaks, capsys):
    """A repack, whose names may stand behind a prefix; heads are 128 wide, as no file says."""
    config = load_config("wan:tiny_i2v" if not speaks else "demo:tiny").dit
    wide = dataclasses.replace(config, width=256, heads=2, mlp=24, layers=2, predicts="velocity", reference="first")
    if wide.audio is not None:
        wide = dataclasses.replace(wide, audio=dataclasses.replace(wide.audio, projection=(256,), heads=8))
    shapes = reference_shapes(dit.TORCH, abstract("dit", wide))
    tensors = {key: np.full(shape, i, np.float16) for i, (key, shape) in enumerate(shapes.items())}
    save_file({prefix + key: x for key, x in tensors.items()}, tmp_path / "one.safetensors")
    convert(tmp_path / "one.safetensors", tmp_path / "ours")
    assert f"file: it has {prefix}patch_embedding.weight" in capsys.readouterr().err
    read = store.read_config(tmp_path / "ours" / "dit", *COMPONENTS["dit"].kinds)
    assert (read.heads, read.width, read.audio is not None) == (2, 256, speaks)
    stored = Tensors(tmp_path / "ours" / "dit" / "model.safetensors")
    back = dict(to_torch(store.unflatten(dict(stored)), dit.TORCH))
    assert back.keys() == tensors.keys() and all(back[key].tobytes() == x.tobytes() for key, x in tensors.items())
    assert verify(tmp_path / "ours") == []
    assert json.loads((tmp_path / "ours" / "kavatar.json").read_text())["sources"] == {"dit": "one.safetensors"}


def test_a_file_that_is_no_transformer(tmp_path):
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "one.safetensors")
    assert "no transformer of Wan" in refusal(tmp_path / "one.safetensors", tmp_path / "out")
    save_file({"x.a": np.zeros(3, np.float32), "a": np.zeros(3, np.float32)}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match="both with x. and without"):
        Tensors(tmp_path / "two.safetensors").stripped("x.")


@pytest.mark.parametrize("config", ["wan:i2v_480p", "stableavatar"])
def test_fun_inpainting_models(config):
    """Wan2.1-Fun-InP, 14B and 1.3B: the tensors of an image-to-video model of that size, told by their shapes alone."""
    published = dataclasses.replace(load_config(config).dit, audio=None)
    shapes = reference_shapes(PLAIN_DIT.rows, abstract("dit", published))
    assert shapes["patch_embedding.weight"][1] == 36 and "img_emb.proj.1.weight" in shapes
    assert len(shapes) == {"wan:i2v_480p": 1303, "stableavatar": 983}[config]  # as the released files have
    read = PLAIN_DIT.config_of(shapes, {"num_heads": published.heads})
    assert dataclasses.replace(read, dtype=published.dtype, param_dtype=published.param_dtype) == published


def test_fun_control_models_are_refused(tmp_path, values):
    """Which have a convolution for a reference besides, and are not inpainting models."""
    tensors = write_wan(tmp_path / "wan", values, "i2v")
    rewrite(tmp_path / "wan" / DIT, tensors | {"ref_conv.weight": np.zeros((64, 16, 2, 2), np.float32)})
    assert "1 left over: ref_conv.weight" in refusal(tmp_path / "wan", tmp_path / "out")


def test_another_pipeline_is_refused(tmp_path):
    for said, words in (
        ({"_class_name": "FluxPipeline"}, "is a FluxPipeline; read are WanPipeline and WanImageToVideoPipeline"),
        ({"_class_name": "WanPipeline", "transformer_2": ["diffusers", "WanTransformer3DModel"]}, "it is Wan2.2"),
    ):
        (tmp_path / "transformer").mkdir(exist_ok=True)
        (tmp_path / "transformer" / DIT).write_bytes(b"")
        (tmp_path / "model_index.json").write_text(json.dumps(said))
        assert words in refusal(tmp_path, tmp_path / "out")
