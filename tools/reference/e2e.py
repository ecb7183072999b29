"""The whole pipeline on a tiny checkpoint tree, with the released sampler's indexing."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from configs import stableavatar
from kavatar_jax.cascade.blueprint import tell_windows
from kavatar_jax.cascade.denoise import branch_velocities, denoise, step_weights
from kavatar_jax.cascade.encode import encode
from kavatar_jax.cascade.weights import Weights
from kavatar_jax.checkpoint.bridge import to_kavatar, unflatten
from kavatar_jax.config import Config, set_fields
from kavatar_jax.diffusion import guidance
from kavatar_jax.diffusion.flow import TRAIN_STEPS, sampling_sigmas
from kavatar_jax.diffusion.solver import euler
from kavatar_jax.diffusion.windows import fuse
from kavatar_jax.models import vae
from kavatar_jax.models.components import COMPONENTS, abstract
from kavatar_jax.types import Request, Shot, Speech, Storyline, silent
from tools.reference.synthetic_weights import Fixture, synthesize_tensor

FIXTURES = ("e2e_",)
BASE = "Wan2.1-Fun-V1.1-1.3B-InP"
FILES = {
    "vae": f"{BASE}/Wan2.1_VAE.pth",
    "text": f"{BASE}/models_t5_umt5-xxl-enc-bf16.pth",
    "image": f"{BASE}/models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    "speech": "wav2vec2-base-960h/model.safetensors",
}
CONFIGS = {"dit": f"{BASE}/config.json", "speech": "wav2vec2-base-960h/config.json"}


class TreeFile(Mapping):
    """The tensors that one file of a synthesised checkpoint tree would hold, as float32 after its rounding."""

    def __init__(self, spec: dict, path: str, tag: str):
        entry = spec["files"][path]
        listed = entry["tensors"] if "tensors" in entry else spec["files"][entry["like"]]["tensors"]
        self.shapes = {k: tuple(s) for k, s in listed if entry.get("exclude", "\0") not in k}
        self._tag, self._bfloat16 = f"{tag}/{entry['seed']}", entry["dtype"] == "bfloat16"

    def __getitem__(self, key: str) -> np.ndarray:
        value = synthesize_tensor(key, self.shapes[key], self._tag)
        return value.astype(ml_dtypes.bfloat16).astype(np.float32) if self._bfloat16 else value

    def __iter__(self):
        return iter(self.shapes)

    def __len__(self):
        return len(self.shapes)


def run(fixture: Fixture) -> Iterator[tuple[str, Any]]:
    case, arrays = fixture.meta["cases"]["run"], fixture.inputs("run")
    config, params = _networks(fixture, case)
    texts = {"positive": arrays["positive_ids"], "negative": arrays["negative_ids"]}
    weights = Weights(**params, tokenizer=lambda names, length: _padded([texts[name] for name in names], length))
    request = Request(portrait=arrays["reference_image"].astype(np.uint8), speech=Speech(samples=arrays["waveform"]))
    shot = Shot(start=0.0, end=request.speech.seconds, prompt="positive")
    conditions = encode(request, Storyline(summary="", shots=(shot,)), weights, config, silent)
    windows, told, shared = tell_windows(conditions, weights, config)

    yield "clip_features", conditions.face
    for name, row in (("positive", conditions.prompts[0]), ("negative", conditions.negatives[0])):
        yield f"text_{name}", conditions.texts[row, : len(texts[name])]
    yield "audio_first_window", told.speech[:1, : case["calls_first_step"][0]["audio_tokens"]]
    yield "y", np.moveaxis(shared.condition[0], -1, 0)

    noise = np.moveaxis(arrays["noise"][0], 0, -1)
    noise = np.pad(noise, ((0, windows.padded_total - len(noise)), (0, 0), (0, 0), (0, 0)))
    yield "velocity_first_call", _first_call(weights, windows.split(noise), told, shared, config)
    latents = denoise(
        weights.dit, windows.split(noise), told, shared, windows, config.dit, config.sampling, stage="", report=silent
    )
    latents = windows.join(latents)
    yield "latents_fp32", np.moveaxis(latents, -1, 0)[None]
    video = vae.decode(weights.vae, jnp.asarray(latents)[None], config.vae)
    yield "video", np.moveaxis(np.clip(np.asarray(video) / 2 + 0.5, 0, 1), -1, 1)
    rounded = _sample_rounded(weights, windows.split(noise), told, shared, windows, config)
    yield "latents_bf16_store", np.moveaxis(windows.join(rounded), -1, 0)[None]


def _networks(fixture: Fixture, case: dict) -> tuple[Config, dict]:
    tree = fixture.meta["checkpoint_tree"]
    spec = json.loads((Path(fixture.folder).parent / tree["spec"]).read_text())
    files = {"dit": tree["transformer"], **FILES}
    configs, params = {}, {}
    for name, component in COMPONENTS.items():
        tensors = TreeFile(spec, files[name], tree["tag"])
        released = spec["json"][CONFIGS[name]] if name in CONFIGS else {}
        if name == "image":  # the number of heads is on no file; the spec has it
            released = spec["dims"]["clip"]
        if name == "text":
            released = spec["dims"]["umt5"]
        configs[name] = component.model.config_of(tensors.shapes, released)
        wanted = abstract(name, configs[name])
        flat = to_kavatar(tensors, component.model.TORCH, wanted, unused=component.model.UNUSED)
        params[name] = jax.tree.map(jnp.asarray, unflatten(flat))
    config = dataclasses.replace(stableavatar.released(), width=case["width"], height=case["height"], **configs)
    settings = {
        "steps": case["steps"], "text_scale": case["text_scale"], "audio_scale": case["audio_scale"],
        "window_frames": case["clip_frames"], "overlap": case["overlap"], "fusion": case["scheme"],
        "windows_per_batch": 2,
    }  # fmt: skip
    config = set_fields(config, [f"sampling.{name}={value!r}" for name, value in settings.items()])
    return dataclasses.replace(config, negative_prompt="negative"), params


def _padded(texts: list[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    padded = np.stack([np.pad(ids, (0, length - len(ids))) for ids in texts]).astype(np.int32)
    return padded, np.arange(length) < np.array([[len(ids)] for ids in texts])


def _first_call(weights: Weights, x, told, shared, config: Config) -> np.ndarray:
    branches = guidance.text_and_audio(config.sampling.text_scale, config.sampling.audio_scale)
    first = jax.tree.map(lambda leaf: jnp.asarray(leaf[:1]), told)
    shared = jax.tree.map(jnp.asarray, shared)
    velocity = branch_velocities(
        weights.dit, jnp.float32(TRAIN_STEPS), shared, config.dit, branches, jnp.asarray(x[:1]), first
    )
    return np.moveaxis(np.asarray(velocity[:, 0]), -1, 1)


def _sample_rounded(weights: Weights, x, told, shared, windows, config: Config):
    """The same loop with the reference's rounding of the state to bfloat16 after every step."""
    branches = guidance.text_and_audio(config.sampling.text_scale, config.sampling.audio_scale)
    sigmas = sampling_sigmas(config.sampling.steps, config.sampling.shift, double_shift=True)
    fusion = step_weights(windows, config.sampling)
    told, shared = jax.tree.map(jnp.asarray, (told, shared))
    x = jnp.asarray(x)
    for i in range(config.sampling.steps):
        timestep = jnp.float32(sigmas[i] * TRAIN_STEPS)
        velocity = branch_velocities(weights.dit, timestep, shared, config.dit, branches, x, told)
        x = euler(x, guidance.combine(velocity, branches), sigmas[i], sigmas[i + 1])
        x = fuse(x, fusion[min(i, 1)], windows.stride).astype(jnp.bfloat16).astype(jnp.float32)
    return np.asarray(x)
