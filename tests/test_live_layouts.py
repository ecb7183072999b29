"""Folders that diffusers and transformers wrote, to ours and back: the same bits, and they load them strictly."""

import json
import os

import numpy as np
import pytest

from kavatar_jax.checkpoint import weights as store
from kavatar_jax.checkpoint.files import Tensors
from kavatar_jax.checkpoint.shards import open_tensors
from kavatar_jax.models.components import COMPONENTS
from tools.convert_checkpoint import convert
from tools.export import export
from tools.inspect_checkpoint import main as inspect

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
load_file, save_file = (getattr(pytest.importorskip("safetensors.torch"), name) for name in ("load_file", "save_file"))
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
diffusers.logging.set_verbosity_error()  # it warns of what `fill` does on purpose

SEES = {"in_channels": 36, "image_dim": 10, "added_kv_proj_dim": 24}
KINDS = {"t2v": {"in_channels": 16}, "i2v": SEES, "flf2v": SEES | {"pos_embed_seq_len": 514}}
GB = 10**9
FOLDERS = {"dit": "transformer", "vae": "vae", "text": "text_encoder", "image": "image_encoder"}


def fill(model, dtype, seed=0):
    """Random numbers of unit gain in every parameter, biases and scales too."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            gain = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 1
            parameter.copy_(gain * torch.randn(parameter.shape, generator=draw))
    return model.to(dtype)


def make_dit(kind, layers=2):
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 8, "freq_dim": 8, "ffn_dim": 16}
    return diffusers.WanTransformer3DModel(**sizes, num_layers=layers, **KINDS[kind])


def make_others():
    vae = diffusers.AutoencoderKLWan(base_dim=4, z_dim=16)
    text = transformers.UMT5EncoderModel(
        transformers.UMT5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    )
    image = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=10, intermediate_size=16, projection_dim=4, num_hidden_layers=2, num_attention_heads=2,
            image_size=28, patch_size=14, hidden_act="gelu",
        )
    )  # fmt: skip
    return {"vae": (vae, torch.float32), "text": (text, torch.bfloat16), "image": (image, torch.float16)}


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    folder = tmp_path_factory.mktemp("others")
    for name, (model, dtype) in make_others().items():
        fill(model, dtype).save_pretrained(folder / FOLDERS[name])
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    return folder


def same(one: Tensors, two: Tensors):
    assert one.keys() == two.keys()
    for key in one:
        assert one.dtypes[key] == two.dtypes[key] and one.shapes[key] == two.shapes[key], key
        assert np.ascontiguousarray(one[key]).tobytes() == np.ascontiguousarray(two[key]).tobytes(), key


def load_strictly(model, folder, **options):
    loaded, said = model.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(said[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), said
    return loaded


@pytest.mark.parametrize("kind", KINDS)
def test_transformer(kind, tmp_path):
    """Each kind, in shards as diffusers cuts them and in one file; the network read back makes the same numbers."""
    model = fill(make_dit(kind), torch.bfloat16)
    model.save_pretrained(tmp_path / "one" / "transformer", max_shard_size="12KB")
    convert(tmp_path / "one", tmp_path / "ours")
    config = store.read_config(tmp_path / "ours" / "dit", *COMPONENTS["dit"].kinds)
    assert (config.layers, config.param_dtype) == (2, "bfloat16")
    assert (config.image_width, config.image_positions) == (10 if kind != "t2v" else None, 514 * (kind == "flf2v"))
    for size, name in ((GB, "whole"), (12_000, "cut")):
        export(tmp_path / "ours", tmp_path / name, "diffusers", shard_size=size)
        folder, file = tmp_path / name / "transformer", "diffusion_pytorch_model.safetensors"
        assert (folder / file).is_file() == (name == "whole") != (folder / f"{file}.index.json").is_file()
        same(open_tensors(tmp_path / "one" / "transformer" / file), open_tensors(folder / file))
        loaded = diffusers.WanTransformer3DModel.from_config(diffusers.WanTransformer3DModel.load_config(folder))
        state = {key: x for shard in folder.glob("*.safetensors") for key, x in load_file(shard).items()}
        loaded.to(torch.bfloat16).load_state_dict(state, strict=True)
        assert all(torch.equal(x, loaded.state_dict()[key]) for key, x in model.state_dict().items())
        written, theirs = (
            json.loads((at / "config.json").read_text()) for at in (folder, tmp_path / "one/transformer")
        )
        assert {k: v for k, v in written.items() if theirs.get(k) != v} == {}
        assert all(f.stat().st_size < 12_000 + 6_000 for f in folder.glob("*-of-*"))
        assert inspect([str(tmp_path / name), "--verify"]) == 0


def test_transformer_as_diffusers_opens_it(tmp_path):
    pytest.importorskip("accelerate", reason="diffusers opens a transformer with parts kept in float32 only with it")
    model = fill(make_dit("i2v"), torch.float32)
    model.save_pretrained(tmp_path / "one" / "transformer")
    convert(tmp_path / "one", tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back", "diffusers", shard_size=12_000)
    loaded = load_strictly(diffusers.WanTransformer3DModel, tmp_path / "back" / "transformer")
    assert all(torch.equal(x, loaded.state_dict()[key]) for key, x in model.state_dict().items())


def test_other_parts(others, tmp_path):
    convert(others, tmp_path / "ours")
    assert sorted(os.listdir(tmp_path / "ours")) == ["image", "kavatar.json", "text", "tokenizer", "vae"]
    export(tmp_path / "ours", tmp_path / "back", "diffusers", shard_size=GB)
    classes = {name: type(model) for name, (model, _) in make_others().items()}
    for name, kind in classes.items():
        file = "diffusion_pytorch_model.safetensors" if name == "vae" else "model.safetensors"
        same(*(open_tensors(top / FOLDERS[name] / file) for top in (others, tmp_path / "back")))
        loaded = load_strictly(kind, tmp_path / "back" / FOLDERS[name])
        theirs = kind.from_pretrained(others / FOLDERS[name])
        assert all(torch.equal(x, loaded.state_dict()[key]) for key, x in theirs.state_dict().items())
        assert {x.dtype for x in loaded.parameters()} == {make_others()[name][1]}
        if name != "vae":
            assert loaded.config.to_dict() | {"_name_or_path": ""} == theirs.config.to_dict() | {"_name_or_path": ""}
        convert(others / FOLDERS[name], tmp_path / "alone")  # the folder of one model
        same(*(Tensors(tmp_path / top / name / "model.safetensors") for top in ("ours", "alone")))
    assert (tmp_path / "back" / "tokenizer" / "tokenizer.json").read_text() == "{}"


def test_what_diffusers_cannot_hold_or_say(tmp_path):
    """Its own words for what does not fit; nothing is written."""
    model = fill(make_dit("i2v"), torch.float32)
    model.save_pretrained(tmp_path / "one" / "transformer")
    folder, file = tmp_path / "one" / "transformer", "diffusion_pytorch_model.safetensors"
    state, said = load_file(folder / file), json.loads((folder / "config.json").read_text())

    def refusal(change=None, **fields):
        (folder / "config.json").write_text(json.dumps(said | fields))
        changed = dict(state)
        if change:
            change(changed)
        save_file(changed, folder / file)
        with pytest.raises(ValueError) as caught:
            convert(tmp_path / "one", tmp_path / "ours")
        assert "\n" not in str(caught.value) and not (tmp_path / "ours").exists()
        return str(caught.value)

    assert "num_layers 3 (not 2), qk_norm None (not 'rms_norm_across_heads')" in refusal(num_layers=3, qk_norm=None)
    lost, more = "blocks.1.attn2.add_k_proj.bias", "blocks.1.attn3.to_q.bias"
    message = refusal(lambda state: (state.pop(lost), state.update({more: torch.zeros(3)})))
    assert f"1 missing: {lost}; 1 left over: {more}" in message
    assert "proj_out.bias is int32" in refusal(
        lambda state: state.update({"proj_out.bias": state["proj_out.bias"].int()})
    )
    assert f"{lost} is (7,), expected (24,)" in refusal(lambda state: state.update({lost: torch.zeros(7)}))


@pytest.mark.parametrize("stable", [False, True])
def test_wav2vec2(stable, tmp_path):
    """Base and stable, as transformers writes them: the same vectors of the same recording."""
    kinds = {"feat_extract_norm": "layer" if stable else "group", "do_stable_layer_norm": stable, "conv_bias": stable}
    config = transformers.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, conv_dim=[8] * 7,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, vocab_size=10, **kinds,
    )  # fmt: skip
    model = fill(transformers.Wav2Vec2Model(config), torch.float32).eval()
    model.save_pretrained(tmp_path / "one")
    listens_alike(model, tmp_path, np.random.default_rng(0).standard_normal((1, 4000), np.float32), lambda x: x)


def test_whisper(tmp_path):
    config = transformers.WhisperConfig(
        d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=24, decoder_layers=1, vocab_size=60,
        decoder_attention_heads=2, decoder_ffn_dim=24, max_source_positions=50, pad_token_id=0, num_mel_bins=80,
    )  # fmt: skip
    model = fill(transformers.WhisperModel(config), torch.float32).eval()
    model.save_pretrained(tmp_path / "one")
    samples = np.random.default_rng(0).standard_normal((1, 16000), np.float32)
    features = transformers.WhisperFeatureExtractor(feature_size=80, chunk_length=1)
    listens_alike(
        model.encoder, tmp_path, samples,
        lambda x: features(x.numpy()[0], sampling_rate=16000, return_tensors="pt").input_features,
    )  # fmt: skip


def listens_alike(model, folder, samples, prepare):
    """The folder `one`, converted, gives for these samples what the model gives, in float32."""
    convert(folder / "one", folder / "ours")
    config = store.read_config(folder / "ours" / "speech", *COMPONENTS["speech"].kinds)
    module = COMPONENTS["speech"].kinds[type(config)]
    params = store.unflatten(dict(Tensors(folder / "ours" / "speech" / "model.safetensors")))
    with torch.no_grad():
        wanted = model(prepare(torch.from_numpy(samples))).last_hidden_state.numpy()
    found = np.asarray(module.listen(params, samples, config))
    assert found.shape == wanted.shape and np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
