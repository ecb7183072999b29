"""The DiT with its audio adapter, and plain Wan's."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kavatar_jax.models import dit
from kavatar_jax.models.audio_adapter import SILENCE
from kavatar_jax.nn.layers import layer_norm
from tools import reference
from tools.reference.synthetic_weights import Fixture
from tools.reference.tables import released_slices

FIXTURES = ("dit_", "wan_")


def run(fixture: Fixture) -> Iterator[tuple[str, Any]]:
    config = dit.config_of(dict(fixture.shapes()), fixture.meta["config"])
    abstract = jax.eval_shape(lambda: dit.init(config, jax.random.key(0)))
    params = reference.load(fixture, dit.TORCH, abstract, unused=dit.UNUSED)
    for name, case in fixture.meta["cases"].items():
        inputs, frames = _inputs(case, fixture.inputs(name), config)
        model = dit.DiT(config, clip_level=case.get("clip_level", False))
        outputs = jax.jit(model.apply)({"params": params}, inputs)
        wanted = [key for key in fixture.meta["outputs"] if key.startswith(f"{name}/")]
        for key in wanted:
            yield key, _output(key.split("/")[1], outputs, inputs, frames, case, model, params)


def _inputs(case: dict, arrays: dict, config) -> tuple[dit.Inputs, int]:
    """The case's inputs in our layout; windows shorter than seq_len says are padded with frames that are not real."""
    batch = case["batch"]

    def repeated(x):
        return jnp.asarray(np.repeat(x, batch, axis=0) if len(x) == 1 else x)

    frames, height, width = case["latent"]
    # StableAvatar attends to its padding; Wan masks it, so that leaving it out gives the same numbers
    padded = case["seq_len"] // (height * width // 4) if config.audio else frames

    def channels_last(x):
        x = np.moveaxis(x, 1, -1)
        return repeated(np.pad(x, ((0, 0), (0, padded - frames), (0, 0), (0, 0), (0, 0))))

    text = np.zeros((batch, config.text_length, config.text_width), np.float32)
    for i in range(batch):
        words = arrays[f"context{i}"]
        text[i, : len(words)] = words
    image = speech = slices = heard = None
    if "clip_fea" in arrays:
        image = repeated(arrays["clip_fea"].reshape(-1, config.image_positions or 257, config.image_width))
    if "audio" in arrays:
        speech = repeated(arrays["audio"])
        slices = jnp.asarray(released_slices(case["audio_tokens"], case.get("video_frames", 81)))[None].repeat(batch, 0)
        heard = jnp.asarray([False, True, True]) if case.get("guidance") else None
    return dit.Inputs(
        latents=channels_last(arrays["x"]),
        timestep=jnp.broadcast_to(jnp.asarray(case["t"], jnp.float32), (batch,)),
        text=jnp.asarray(text),
        condition=channels_last(arrays["y"]) if "y" in arrays else None,
        image=image,
        speech=speech,
        slices=slices,
        heard=heard,
        frames=jnp.full((batch,), frames) if padded > frames else None,
    ), frames


def _output(name: str, outputs: dit.Outputs, inputs: dit.Inputs, frames: int, case: dict, model, params):
    context: Any = outputs.context
    if name == "out":
        return np.moveaxis(outputs.velocity[:, :frames], -1, 1)
    if name == "block0":
        one = dit.DiT(dataclasses.replace(model.config, layers=1), model.clip_level)
        first = {**params, "blocks": jax.tree.map(lambda leaf: leaf[:1], params["blocks"])}
        return jax.jit(one.apply)({"params": first}, inputs).last
    if name == "adapter":
        return context.audio[-1:] if case.get("guidance") else context.audio
    if name == "adapter_lengths":
        return np.sum(np.asarray(inputs.slices)[0] != SILENCE, axis=-1)
    if name == "audio_proj":
        return _project(inputs.speech, params["audio"], model.config)
    return {
        "image_tokens": lambda: context.image,
        "tokens": lambda: outputs.tokens,
        "e": lambda: outputs.time,
        "e0": lambda: context.modulation,
        "context": lambda: jnp.concatenate([context.image, context.text], axis=1),
        "vocal_context": lambda: context.audio,
        "last": lambda: outputs.last,
    }[name]()


def _project(speech, params, config):
    """The adapter's input layers alone."""
    x = speech
    for i in range(len(config.audio.projection)):
        x = x @ params[f"proj_{i}"]["kernel"]
        x = layer_norm(x, 1e-5) * params[f"norm_{i}"]["scale"] + params[f"norm_{i}"]["bias"]
    return x
