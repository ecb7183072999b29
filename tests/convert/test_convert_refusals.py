"""What the converter refuses: one error that says why not, and nothing written."""

import dataclasses
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from released_tree import HEADS, NAMES, TOKENIZER, plain, refusal, rewrite
from safetensors.numpy import load_file, save_file

from configs import stableavatar
from kavatar_jax.cascade.weights import SOURCES, check_complete, read_configs
from kavatar_jax.checkpoint import weights as store
from kavatar_jax.checkpoint.bridge import placements, reference_shapes
from kavatar_jax.checkpoint.files import Tensors
from kavatar_jax.models.components import COMPONENTS, abstract
from kavatar_jax.models.names import ORIGINAL
from tools import convert_checkpoint
from tools.convert_checkpoint import convert
from tools.layouts import CONFIGS, TRANSFORMERS

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
