"""The encoders beside transformers' own, with the same random weights."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kavatar_jax.checkpoint.bridge import to_kavatar, unflatten
from kavatar_jax.models import clip, umt5, wav2vec2, whisper

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch


def weights_of(network, seed):
    """The network with every parameter drawn anew, biases and norms included, and its state dict."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 0
            drawn = torch.randn(parameter.shape, generator=generator)
            gain = re.search(r"norm\w*\.weight$|gamma$|original0$", name)
            parameter.copy_(1 + 0.1 * drawn if gain else drawn * (fan_in**-0.5 if fan_in else 0.1))
    return network.eval(), {key: tensor.detach().numpy() for key, tensor in network.state_dict().items()}


def params_of(module, config, weights, rows=None):
    abstract = jax.eval_shape(lambda key: module.init(config, key), jax.random.key(0))
    return unflatten(to_kavatar(weights, rows or module.TORCH, abstract, unused=module.UNUSED))


def assert_close(ours, theirs):
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    assert np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max() < 1e-4


@pytest.mark.parametrize("buckets, max_distance", [(32, 128), (12, 40)])
def test_umt5(buckets, max_distance):
    described = transformers.UMT5Config(
        vocab_size=120,
        d_model=48,
        d_kv=12,
        d_ff=80,
        num_layers=3,
        num_heads=4,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=max_distance,
    )
    network, weights = weights_of(transformers.UMT5EncoderModel(described), 0)
    released = {"relative_attention_max_distance": max_distance}
    config = umt5.config_of({key: x.shape for key, x in weights.items()}, released)
    assert config.buckets == buckets and config.layers == 3
    ids = np.random.default_rng(0).integers(2, 120, (2, 300))
    mask = np.arange(300) < np.array([[300], [170]])
    params = params_of(umt5, config, weights)
    ours = jax.jit(umt5.UMT5(config).apply)({"params": params}, jnp.asarray(ids, jnp.int32), mask)
    theirs = network(torch.tensor(ids), attention_mask=torch.tensor(mask.astype(np.int64))).last_hidden_state
    for b, length in enumerate(mask.sum(axis=1)):
        assert_close(ours[b, :length], theirs[b, :length])


def test_clip():
    described = transformers.CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        projection_dim=20,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=56,
        patch_size=14,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
    )
    network, weights = weights_of(transformers.CLIPVisionModelWithProjection(described), 1)
    weights = _wan_names(weights)
    config = clip.config_of({key: x.shape for key, x in weights.items()}, {"num_heads": 3})
    pixels = np.random.default_rng(1).standard_normal((2, 56, 56, 3)).astype(np.float32)
    ours = jax.jit(clip.CLIP(config).apply)({"params": params_of(clip, config, weights)}, pixels)
    theirs = network(torch.tensor(pixels.transpose(0, 3, 1, 2).copy()), output_hidden_states=True)
    assert_close(ours.tokens, theirs.hidden_states[-2])
    assert_close(ours.embedding, theirs.image_embeds)


def _wan_names(weights):
    """transformers' visual tower under the names of Wan2.1: query, key, value as one tensor, the projection turned."""
    named = {
        "visual.cls_embedding": weights["vision_model.embeddings.class_embedding"][None, None],
        "visual.pos_embedding": weights["vision_model.embeddings.position_embedding.weight"][None],
        "visual.patch_embedding.weight": weights["vision_model.embeddings.patch_embedding.weight"],
        "visual.head": weights["visual_projection.weight"].T,
    }
    layer, ours = "vision_model.encoder.layers.{}.", "visual.transformer.{}."
    names = {"layer_norm1": "norm1", "self_attn.out_proj": "attn.proj", "layer_norm2": "norm2"}
    names |= {"mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"}
    for leaf in ("weight", "bias"):
        named[f"visual.pre_norm.{leaf}"] = weights[f"vision_model.pre_layrnorm.{leaf}"]
        named[f"visual.post_norm.{leaf}"] = weights[f"vision_model.post_layernorm.{leaf}"]
        for i in range(4):
            parts = [weights[f"{layer}self_attn.{part}_proj.{leaf}".format(i)] for part in "qkv"]
            named[f"{ours}attn.to_qkv.{leaf}".format(i)] = np.concatenate(parts)
            for theirs, name in names.items():
                named[f"{ours}{name}.{leaf}".format(i)] = weights[f"{layer}{theirs}.{leaf}".format(i)]
    return named


@pytest.mark.parametrize("kind", ["base", "stable", "stable_without_bias"])
@pytest.mark.parametrize("taps", [16, 15])
def test_wav2vec2(kind, taps):
    stable = kind != "base"
    described = transformers.Wav2Vec2Config(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=80,
        conv_dim=(24,) * 7,
        conv_bias=kind == "stable",
        feat_extract_norm="layer" if stable else "group",
        do_stable_layer_norm=stable,
        num_conv_pos_embeddings=taps,
        num_conv_pos_embedding_groups=4,
        apply_spec_augment=False,
    )
    network, weights = weights_of(transformers.Wav2Vec2Model(described), 2)
    config = wav2vec2.config_of({key: x.shape for key, x in weights.items()}, described.to_dict())
    assert (config.stable, config.conv_bias, config.position_kernel) == (stable, kind == "stable", taps)
    samples = np.random.default_rng(2).standard_normal((2, 9000)).astype(np.float32)
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=False)
    normalised = extractor(list(samples), sampling_rate=16000, return_tensors="np").input_values
    np.testing.assert_allclose(wav2vec2.normalise(samples), normalised, atol=1e-5)
    ours = jax.jit(wav2vec2.Wav2Vec2(config).apply)({"params": params_of(wav2vec2, config, weights)}, normalised)
    theirs = network(torch.tensor(normalised), output_hidden_states=True)
    assert_close(ours.last, theirs.last_hidden_state)
    assert_close(ours.features, theirs.extract_features)
    # the last of theirs is normed or not, as their version has it; ours is always `last`
    assert len(theirs.hidden_states) == len(ours.hidden) == 4
    assert_close(ours.hidden[:-1], torch.stack(theirs.hidden_states[:-1]))
    assert ours.last.shape[1] == wav2vec2.token_count(9000, config)


@pytest.mark.parametrize("bands, prefixed", [(80, False), (24, True)])
def test_whisper(bands, prefixed):
    described = transformers.WhisperConfig(
        d_model=48,
        encoder_layers=3,
        encoder_attention_heads=4,
        encoder_ffn_dim=80,
        num_mel_bins=bands,
        max_source_positions=150,
        decoder_layers=1,
        decoder_attention_heads=4,
        vocab_size=60,
        pad_token_id=0,
    )
    network, weights = weights_of(transformers.WhisperForConditionalGeneration(described), 3)
    if not prefixed:
        weights = {key.removeprefix("model.encoder."): x for key, x in weights.items() if "encoder." in key}
    config = whisper.config_of({key: x.shape for key, x in weights.items()}, described.to_dict())
    assert (config.bands, config.positions, config.layers, config.heads) == (bands, 150, 3, 4)
    samples = 0.1 * np.random.default_rng(3).standard_normal((2, 30000)).astype(np.float32)
    samples[1] *= np.linspace(0, 1, 30000) ** 4
    extractor = transformers.WhisperFeatureExtractor(feature_size=bands, chunk_length=3)
    energies = extractor(list(samples), sampling_rate=16000, return_tensors="pt").input_features
    theirs = network.model.encoder(energies).last_hidden_state
    ours = jax.jit(lambda params: whisper.listen(params, samples, config))(params_of(whisper, config, weights))
    assert ours.shape[1] == whisper.token_count(30000, config) == 93
    assert_close(ours, theirs[:, :93])
    silent = whisper.log_mel(np.pad(samples, ((0, 0), (0, 18000))), bands)
    assert_close(silent.swapaxes(1, 2), energies)
    with pytest.raises(ValueError, match="3.0 s; use shorter windows"):
        whisper.listen({}, np.zeros((1, 48320), np.float32), config)
