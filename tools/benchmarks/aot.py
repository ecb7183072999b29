"""One sampling step compiled for TPUs that are not there: which kernels and collectives it has, how much memory it needs.

Needs libtpu, which compiles for any slice on a host without one (the extra `aot`). What does not fit does not compile.
"""

import os
import re
import time

import jax
import jax.numpy as jnp
import numpy as np

from kavatar_jax.cascade.denoise import Shared, Told, group_size, step
from kavatar_jax.config import Config
from kavatar_jax.diffusion import guidance
from kavatar_jax.diffusion.solver import History, plan_of
from kavatar_jax.models import dit
from kavatar_jax.models.audio_adapter import slice_table
from kavatar_jax.models.components import abstract, model_of
from kavatar_jax.parallel.mesh import make_mesh
from kavatar_jax.parallel.sharding import batch_sharding, partition, replicated
from kavatar_jax.types import SAMPLE_RATE, Params

# no look-up of the cloud machine this is not, and no lock against another process that compiles
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def compile_step(config: Config, topology: str, *, mesh: tuple[int, ...], windows: int) -> dict:
    """Compile for a slice such as "v5e:2x2". mesh: sizes of data, fsdp, context, tensor. Bytes are per device."""
    from jax.experimental import topologies

    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"cannot compile for {topology!r}: {error}; pip install libtpu, and try v5e:2x2") from None
    weights = abstract("dit", config.dit)  # makes a random key, which those devices cannot
    with jax.set_mesh(make_mesh(*mesh, devices=described.devices)):
        started = time.perf_counter()
        lowered = _trace(weights, config, windows).lower(lowering_platforms=("tpu",))
        compiled = lowered.compile()
        seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    assert memory is not None, "the compiler gave no memory analysis"
    text = compiled.as_text()
    return {
        "topology": topology,
        "mesh": mesh,
        "windows": windows,
        "compile_seconds": seconds,
        "kernels": len(re.findall(r'custom_call_target="tpu_custom_call"', text)),
        "collectives": {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in COLLECTIVES},
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
    }


def _trace(weights: Params, config: Config, windows: int):
    mesh, sampling, net = jax.sharding.get_mesh(), config.sampling, config.dit
    batch, everywhere = batch_sharding(mesh), replicated(mesh)
    params = jax.tree.map(_place, weights, partition(weights, dit.AXES, mesh))
    group = group_size(windows, sampling)
    W, T = group * -(-windows // group), sampling.window_latents
    latent = (T, config.height // config.vae.side, config.width // config.vae.side)
    samples = round(sampling.window_frames * SAMPLE_RATE / config.fps)
    tokens = model_of("speech", config.speech).token_count(samples, config.speech)
    places = slice_table(tokens, sampling.window_frames).shape[1]

    def given(sharding, *shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    number = given(batch, W, dtype=jnp.int32)
    told = Told(
        speech=given(batch, W, tokens, config.speech.width),
        slices=given(batch, W, T, places, dtype=jnp.int32),
        prompt=number, negative=number, view=number, frames=None,
    )  # fmt: skip
    shared = Shared(
        text=given(everywhere, 2, net.text_length, net.text_width),
        image=None if net.image_width is None else given(everywhere, 1, 257, net.image_width),
        condition=given(everywhere, 1, *latent, net.in_channels - net.out_channels),
        director=None,
    )
    history = History(given(batch, W, *latent, net.out_channels), None, None, None)
    move = jax.tree.map(lambda row: jax.ShapeDtypeStruct(row.shape, np.float32), plan_of(sampling).moves[0])
    return step.trace(
        params, history, move, given(everywhere, W, T), told, shared,
        config=net, branches=guidance.branches_of(sampling), group=group,
        stride=T - sampling.overlap,
    )  # fmt: skip


def _place(leaf, sharding):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
