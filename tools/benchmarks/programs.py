"""The programs that a run compiles, traced from shapes alone on the entered mesh: read, denoise, decode, train.

Each comes with the mesh it is for, and the FLOPs that the model needs for it, over all devices: `flops` as a utilisation
counts them, `program` with what is done twice to save memory; and the bytes of weights that a device of the run keeps for
its other programs meanwhile.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kavatar_jax.cascade import encode
from kavatar_jax.cascade.denoise import Pictures, Shared, Told, group_size, step
from kavatar_jax.cascade.encode import TEXTS_AT_ONCE
from kavatar_jax.cascade.weights import describe_networks
from kavatar_jax.config import Config
from kavatar_jax.diffusion import guidance
from kavatar_jax.diffusion.solver import History, plan_of
from kavatar_jax.models import dit, vae
from kavatar_jax.models.audio_adapter import slice_table
from kavatar_jax.models.components import abstract, model_of
from kavatar_jax.models.vae_layers import layout
from kavatar_jax.parallel.mesh import AXES, current, picture_mesh
from kavatar_jax.parallel.sharding import batch_sharding, batch_slots, described, partition, place_of, replicated
from kavatar_jax.training import flops
from kavatar_jax.training.config import Bucket, TrainConfig, latent_size
from kavatar_jax.training.objective import Batch
from kavatar_jax.training.state import plan_state, split
from kavatar_jax.training.step import make_step
from kavatar_jax.training.tasks import dit_task
from kavatar_jax.types import SAMPLE_RATE, Params

BACKWARDS = 5 / 2  # attention's products backwards, two for its weights and three for gradients, to its two forwards


class Program(NamedTuple):
    traced: Any
    mesh: Mesh
    flops: float
    program: float
    kept: int


def read(config: Config, count: int | None) -> Program:
    """`count` texts through their encoder; None: as many as a run brings its weights for at a time."""
    mesh, net, count = current(), config.text, count or TEXTS_AT_ONCE
    networks, length = describe_networks(config), config.dit.text_length
    ids, mask = (_given(replicated(mesh), count, length, dtype=dtype) for dtype in (jnp.int32, bool))
    traced = encode.read.trace(net, networks["text"], ids, mask)
    work = count * flops.read(net, length)
    return Program(traced, mesh, work, work, _kept(networks, "text"))


def denoise(config: Config, count: int | None) -> Program:
    """A sampling step of `count` windows with all their branches; None: one for each slot of the mesh."""
    mesh, sampling, net = current(), config.sampling, config.dit
    count = count or batch_slots(mesh)
    networks = describe_networks(config)
    batch, everywhere = batch_sharding(mesh), replicated(mesh)
    group = group_size(count, sampling)
    W, T = group * -(-count // group), sampling.window_latents
    latent = (T, config.height // config.vae.side, config.width // config.vae.side)
    spoken, seen = _heard_and_seen(config, sampling.window_frames)
    places = slice_table(spoken, sampling.window_frames).shape[1]
    number = _given(batch, W, dtype=jnp.int32)
    told = Told(
        speech=_given(batch, W, spoken, config.speech.width),
        slices=_given(batch, W, T, places, dtype=jnp.int32),
        prompt=number, negative=number, view=number, frames=None,
    )  # fmt: skip
    pictures = Pictures(
        image=None if net.image_width is None else _given(everywhere, 1, seen, net.image_width),
        condition=_given(everywhere, 1, *latent, net.in_channels - net.out_channels),
    )
    text = _given(everywhere, 2, net.text_length, net.text_width)
    worn = pictures if sampling.frame_scale != 1 else None
    shared = Shared(text=text, image=pictures.image, condition=pictures.condition, director=None, worn=worn)
    history = History(_given(batch, W, *latent, net.out_channels), None, None, None)
    move = jax.tree.map(lambda row: jax.ShapeDtypeStruct(row.shape, np.float32), plan_of(sampling).moves[0])
    branches = guidance.branches_of(sampling)
    traced = step.trace(
        networks["dit"], history, {}, move, _given(everywhere, W, T), told, shared,
        config=net, branches=branches, group=group, stride=T - sampling.overlap,
    )  # fmt: skip
    work = W * len(branches) * flops.forward(net, latent, image_tokens=seen, speech_tokens=spoken)
    return Program(traced, mesh, work, work, _kept(networks, "dit"))


def decode(config: Config, count: int | None) -> Program:
    """`count` latent frames in the middle of a video to pixels, 4 each; None: one. The devices of the mesh cut pictures."""
    net, mesh = config.vae, picture_mesh(current(), config.height, config.width)
    kept = _kept(describe_networks(config), "vae")
    _, h, w = latent_size(1, config.height, config.width, net)
    params = described(abstract("vae", net), partition(abstract("vae", net), vae.AXES, mesh))
    piece = _given(replicated(mesh), 1, 1, h, w, net.latent_channels)
    later = _given(replicated(mesh), 1, count or 1, h, w, net.latent_channels)
    with jax.set_mesh(mesh):
        _, state = jax.eval_shape(lambda *x: vae.decode_chunk(*x, config=net, pixels="uint8"), params, piece, None)
        state = described(state, jax.tree.map(lambda leaf: place_of(leaf.shape, layout(1), mesh), state))
        traced = vae.decode_chunk.trace(params, later, state, config=net, pixels="uint8")
    work = flops.decode(net, (count or 1, h, w))
    return Program(traced, mesh, work, work, kept)


def train(config: TrainConfig, count: int | None) -> Program:
    """A step on `count` clips of the first bucket's size; None: one for each slot of the mesh."""
    mesh, model, net = current(), config.model, config.model.dit
    first = config.data.buckets[0]
    bucket = dataclasses.replace(first, batch=count or batch_slots(mesh))
    config = dataclasses.replace(config, weights="", fresh=(), data=dataclasses.replace(config.data, buckets=(bucket,)))
    task = dit_task(config, mesh)
    rows = {f"params/dit/{row}": axes for row, axes in dit.AXES.items()}
    whole = {"params": {"dit": abstract("dit", net)}, "lora": {}}
    placed = described(whole, partition(whole, rows, mesh))
    trained, frozen = split(placed, config.trained)
    trained = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding), trained)
    places = jax.tree.map(lambda leaf: leaf.sharding, trained)
    fresh, shardings = plan_state(trained, places, config.optimizer, config.steps, mesh)
    state = described(jax.eval_shape(fresh, trained), shardings)
    blank = _given(replicated(mesh), 1, net.text_length, net.text_width)
    votes = jax.ShapeDtypeStruct((mesh.size,), bool, sharding=jax.NamedSharding(mesh, jax.P(AXES)))
    traced = make_step(task.losses, task.draw, config, shardings, mesh).trace(
        state, {"weights": frozen, "blank": blank}, _batch(model, bucket), votes, False
    )
    grid = latent_size(bucket.frames, bucket.height, bucket.width, model.vae)
    spoken, seen = _heard_and_seen(model, bucket.frames)
    kernel = flops.attention(net, grid, image_tokens=seen)
    others = flops.forward(net, grid, image_tokens=seen, speech_tokens=spoken) - kernel
    share = sum(leaf.size for leaf in jax.tree.leaves(trained)) / sum(leaf.size for leaf in jax.tree.leaves(whole))
    again = 0 if net.remat == "none" else 1
    kept = flops.self_attention(net, grid) if net.remat == "attention" else 0
    model_flops = bucket.batch * flops.train(others + kernel, share)
    work = flops.train(others, share) + again * (others + kernel - kept) + (1 + BACKWARDS) * kernel
    return Program(traced, mesh, model_flops, bucket.batch * work, kept=0)


def _batch(model: Config, bucket: Bucket) -> Batch:
    grid, net, batch = (
        latent_size(bucket.frames, bucket.height, bucket.width, model.vae),
        model.dit,
        batch_sharding(current()),
    )
    spoken, seen = _heard_and_seen(model, bucket.frames)
    B, channels = bucket.batch, model.vae.latent_channels
    return Batch(
        latents=_given(batch, B, *grid, 2 * channels),
        condition=_given(batch, B, *grid, 2 * channels),
        given=_given(batch, B, grid[0], 4),
        face=_given(batch, B, *grid),
        lip=_given(batch, B, *grid),
        text=_given(batch, B, net.text_length, net.text_width),
        image=None if net.image_width is None else _given(batch, B, seen, net.image_width),
        speech=_given(batch, B, spoken, model.speech.width),
    )


def _kept(networks: dict[str, Params], used: str) -> int:
    """Bytes on a device of weights that a program does not use."""
    others = jax.tree.leaves({name: params for name, params in networks.items() if name != used})
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in others
        if leaf.sharding.memory_kind != "pinned_host"
    )


def _heard_and_seen(config: Config, frames: int) -> tuple[int, int]:
    """Tokens of speech beside so many video frames, and of a portrait."""
    spoken = model_of("speech", config.speech).token_count(round(frames * SAMPLE_RATE / config.fps), config.speech)
    return spoken, 1 + (config.image.image_size // config.image.patch) ** 2


def _given(sharding, *shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
