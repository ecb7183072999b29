"""Plain videos beside diffusers' own pipelines: the whole sampling loop with UniPC, same weights, same noise, to the frames.

Two things of the pipelines are Wan2.1's here, because diffusers has its own: the noise levels of the scheduler (another grid
since huggingface/diffusers 12109) and the pixels that the image encoder is shown (resized without antialiasing).
"""

import dataclasses
import types

import jax
import numpy as np
import pytest
from PIL import Image
from test_live_encoders import _wan_names, params_of, weights_of

from configs import wan
from kavatar_jax.cascade.denoise import denoise
from kavatar_jax.cascade.encode import to_signed
from kavatar_jax.cascade.film import pictures_wanted, tell_scene
from kavatar_jax.cascade.weights import Weights
from kavatar_jax.checkpoint.bridge import reference_shapes
from kavatar_jax.config import set_fields
from kavatar_jax.media.text import BYTE_VOCABULARY, ByteTokenizer
from kavatar_jax.models import clip, dit, umt5, vae
from kavatar_jax.models.components import abstract
from kavatar_jax.types import Scene, silent
from tools.reference.vae import diffusers_key

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

# of the largest value. One pass of the networks agrees to 2e-6 in float32; guidance multiplies that by up to
# 2 GUIDANCE - 1 in each step, and each step passes it on. Measured: 6e-6.
TOLERANCE = 1e-4
STEPS, GUIDANCE, SHIFT = 5, 5.0, 3.0
WIDTH, IMAGE_WIDTH, TEXT_WIDTH = 48, 48, 32
SEES = {"in_channels": 36, "image_dim": IMAGE_WIDTH, "added_kv_proj_dim": WIDTH}
KINDS = {"t2v": {"in_channels": 16}, "i2v": SEES, "flf2v": SEES | {"pos_embed_seq_len": 10}}
# diffusers' names of the transformer's parts, in this order, and Wan2.1's
NAMES = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
    "attn1": "self_attn",
    "attn2": "cross_attn",
    "to_out.0": "o",
    "to_": "",
    "norm_added_k": "norm_k_img",
    "add_k_proj": "k_img",
    "add_v_proj": "v_img",
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "proj_out": "head.head",
    "scale_shift_table": "modulation",
}


class Tokenizer:
    """Bytes, called as the tokenizers of transformers are."""

    def __call__(self, texts, *, max_length, **_):
        ids, mask = ByteTokenizer()(texts, max_length)
        return types.SimpleNamespace(input_ids=torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long())


class Scheduler(diffusers.UniPCMultistepScheduler):
    """At the noise levels of Wan2.1."""

    def set_timesteps(self, num_inference_steps, device=None):
        levels = np.linspace(float(np.float32(0.999)), 0, num_inference_steps + 1)[:-1]
        super().set_timesteps(device=device, sigmas=levels)


@pytest.fixture(scope="module")
def encoders():
    """Their autoencoder, text encoder and image encoder; ours; and our configs of them."""
    autoencoder, state = weights_of(diffusers.AutoencoderKLWan(base_dim=8, z_dim=16), 0)
    keys = reference_shapes(vae.TORCH, abstract("vae", wan.tiny().vae))
    autoencoder_weights = {key: state[diffusers_key(key)] for key in keys}
    reader, reader_weights = weights_of(
        transformers.UMT5EncoderModel(
            transformers.UMT5Config(
                vocab_size=BYTE_VOCABULARY, d_model=TEXT_WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=4
            )
        ),
        1,
    )
    viewer, viewer_weights = weights_of(
        transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(
                hidden_size=IMAGE_WIDTH, intermediate_size=96, projection_dim=20, num_hidden_layers=4,
                num_attention_heads=3, image_size=28, patch_size=14, hidden_act="gelu",
            )
        ),
        2,
    )  # fmt: skip
    viewer_weights = _wan_names(viewer_weights)
    configs = {
        "vae": vae.config_of(shapes_of(autoencoder_weights), autoencoder.config),
        "text": umt5.config_of(shapes_of(reader_weights), {}),
        "image": clip.config_of(shapes_of(viewer_weights), {"num_heads": 3}),
    }
    params = {
        "vae": params_of(vae, configs["vae"], autoencoder_weights),
        "text": params_of(umt5, configs["text"], reader_weights),
        "image": params_of(clip, configs["image"], viewer_weights),
    }
    return (autoencoder, reader, viewer), params, configs


def shapes_of(weights):
    return {key: tensor.shape for key, tensor in weights.items()}


def wan_key(key):
    """A name of diffusers' transformer as Wan2.1 has it."""
    for theirs, ours in NAMES.items():
        key = key.replace(theirs, ours)
    return f"head.{key}" if key == "modulation" else key


def make_transformer(kind):
    """Theirs, our parameters and our config."""
    transformer, state = weights_of(
        diffusers.WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=WIDTH // 2, text_dim=TEXT_WIDTH, freq_dim=32, ffn_dim=64,
            num_layers=2, **KINDS[kind],
        ),
        3,
    )  # fmt: skip
    weights = {wan_key(key): tensor for key, tensor in state.items()}
    config = dit.config_of(shapes_of(weights), {"num_heads": 2})
    return transformer, params_of(dit, config, weights), config


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_whole_loop_and_its_frames(kind, encoders, monkeypatch):
    # the image pipeline's own cleaning fails where ftfy is not installed, the text pipeline's does not
    pipelines = diffusers.pipelines.wan
    monkeypatch.setattr(pipelines.pipeline_wan_i2v, "prompt_clean", pipelines.pipeline_wan.prompt_clean)
    (autoencoder, reader, viewer), params, configs = encoders
    transformer, params_of_dit, config_of_dit = make_transformer(kind)
    fields = [f"sampling.steps={STEPS}", f"sampling.shift={SHIFT}", f"sampling.text_scale={GUIDANCE}"]
    config = set_fields(dataclasses.replace(wan.tiny(), dit=config_of_dit, **configs), fields)
    weights = Weights(dit=params_of_dit, **params, tokenizer=ByteTokenizer())

    rng, shape = np.random.default_rng(0), (config.height, config.width, 3)
    pictures = [rng.integers(0, 256, shape, np.uint8) for _ in range(pictures_wanted(config.dit))]
    scene = Scene(instruction="a cat & a dog", **dict(zip(("first", "last"), pictures, strict=False)))
    windows, told, shared = tell_scene(scene, weights, config, silent)
    noise = rng.standard_normal((1, windows.length, config.height // 8, config.width // 8, 16), np.float32)
    drawn = denoise(
        weights.dit,
        jax.numpy.asarray(noise),
        told,
        shared,
        windows,
        config.dit,
        config.sampling,
        stage="",
        report=silent,
    )
    video = np.concatenate(list(vae.decode_stream(weights.vae, drawn[0], config.vae, pixels="float32")))

    def show(images, **_):
        images = images if isinstance(images, list) else [images]
        pixels = [clip.preprocess(to_signed(np.asarray(image))[None], config.image)[0] for image in images]
        return transformers.BatchFeature({"pixel_values": torch.tensor(np.moveaxis(np.stack(pixels), -1, 1))})

    scheduler = Scheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT)
    parts = {"vae": autoencoder, "text_encoder": reader, "tokenizer": Tokenizer(), "transformer": transformer}
    if pictures:
        pipeline = diffusers.WanImageToVideoPipeline(
            **parts, scheduler=scheduler, image_encoder=viewer, image_processor=show
        )
        given = dict(zip(("image", "last_image"), map(Image.fromarray, pictures), strict=False))
    else:
        pipeline, given = diffusers.WanPipeline(**parts, scheduler=scheduler), {}
    pipeline.set_progress_bar_config(disable=True)
    latents = []
    frames = pipeline(
        prompt=scene.instruction, negative_prompt=config.negative_prompt, height=config.height, width=config.width,
        num_frames=config.sampling.window_frames, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        latents=torch.tensor(np.moveaxis(noise, -1, 1)), output_type="np", **given,
        callback_on_step_end=lambda _, i, t, state: latents.append(state["latents"]) or state,
    ).frames[0]  # fmt: skip
    assert len(latents) == STEPS and np.std(frames) > 0.05
    for ours, theirs in ((drawn, np.moveaxis(latents[-1].numpy(), 1, -1)), (np.clip(video / 2 + 0.5, 0, 1), frames)):
        assert ours.shape == theirs.shape
        error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        print(f"{kind}: {error:.1e}")
        assert error < TOLERANCE
