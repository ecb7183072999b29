"""Wan2.1's causal 3D VAE: video in and latents out, and back; 8x smaller in space, 4x in time.

Squares of `patch` pixels may be folded into channels first and last, as in Wan2.2's VAE, which takes twice two: 16x. A
small network that has little time to learn gets a `bypass` as well, so that it need not find by itself what is linear; where
it has not learnt anything else the bypass is all there is.

The first frame becomes the first latent frame, every further group of four frames one more. Encoder and decoder take one
chunk and what the chunks before left behind, so a video of any length goes through one compiled program.
Source: Wan 2.1, arXiv 2503.20314, section 4.1; Wan-Video/Wan2.1, wan/modules/vae.py; Wan2.2, wan/modules/vae2_2.py.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kavatar_jax.checkpoint.bridge import Row, conv, flatten, parameter_shapes, table, unflatten
from kavatar_jax.config import VAEConfig
from kavatar_jax.models.vae_layers import ChannelNorm, Downsample, Middle, ResBlock, Upsample, layout, spread, thread
from kavatar_jax.nn.conv import CausalConv
from kavatar_jax.nn.layers import Linear
from kavatar_jax.parallel.mesh import current, picture_mesh
from kavatar_jax.parallel.programs import program
from kavatar_jax.parallel.sharding import constrain, filled, replicated
from kavatar_jax.types import Params

TRUNCATED_STD = 0.87962566  # of a normal cut at two standard deviations

# of the released weights, Wan-Video/Wan2.1 wan/modules/vae.py
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


def encode(params: Params, video_BFHWC, config: VAEConfig, *, chunk: int | None = 1):
    """Video in [-1, 1] -> mean and log variance of its latents, (B, T, H / side, W / side, C) float32 each.

    The mean is normalised by the config's latent statistics, the log variance is not. The first 1 + 4n frames are used,
    what is left over is not. Traceable and differentiable; `chunk` latent frames are worked on at a time (None: all at
    once, which compiles in half the time and needs memory in proportion). ValueError unless config.side divides the size.
    """
    _check_size(video_BFHWC.shape, config)
    stride = config.stride
    groups = (video_BFHWC.shape[1] - 1) // stride
    call = functools.partial(Encoder(config).apply, {"params": params["encoder"]})
    moments = _in_chunks(call, video_BFHWC[:, : 1 + groups * stride], chunk and chunk * stride)
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return (mean - np.float32(config.latent_mean)) / np.float32(config.latent_std), logvar


def decode(params: Params, latents_BTHWC, config: VAEConfig, *, chunk: int | None = 1):
    """Normalised latents -> video (B, 1 + 4 (T - 1), side H, side W, 3) float32, about [-1, 1] and not clamped.

    Traceable and differentiable; `chunk` as in `encode`.
    """
    call = functools.partial(Decoder(config).apply, {"params": params["decoder"]})
    return _in_chunks(call, _denormalise(latents_BTHWC, config), chunk).astype(jnp.float32)


def decode_stream(
    params: Params, latents, config: VAEConfig, *, chunk: int = 1, pixels: str = "uint8"
) -> Iterator[np.ndarray]:
    """Frames (F, H, W, 3) of a video without end, chunk by chunk: first 1, then 4 * chunk at a time, then what is left.

    latents: (T, H, W, C) on the host, or an iterable of such pieces of any length. pixels: "uint8", or "float32" as
    `decode` returns. Two programs are compiled whatever the length, device memory does not grow with it, and a chunk is
    fetched while the next is computed, unless that waits for the next piece.
    """
    if pixels not in ("uint8", "float32"):
        raise ValueError(f"pixels is {pixels!r}; choose 'uint8' or 'float32'")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1")
    state, before, mesh = None, None, current()
    for piece, count, at_hand in _regroup(latents, chunk):
        real = 1 if state is None else count * config.stride
        with jax.set_mesh(picture_mesh(mesh, config.side * piece.shape[1], config.side * piece.shape[2])):
            # placed by hand: left to the compiler, it may lie in parts that no mesh has
            piece = jax.device_put(piece[None], replicated(current()))
            frames, state = decode_chunk(params, piece, state, config=config, pixels=pixels)
        frames.copy_to_host_async()
        if before is not None:
            yield np.asarray(before[0])[0, : before[1]]
        before = frames, real
        if not at_hand:
            yield np.asarray(frames)[0, :real]
            before = None


@program(static_argnames=("config", "pixels"), donate_argnames="state")
def decode_chunk(params: Params, latents_BTHWC, state, *, config: VAEConfig, pixels: str):
    """(frames, state): the frames of the next latents of a video, in uint8 or float32, and what those after them look back
    on. state: None for the first latent alone, which is one frame; each later one is `stride` frames.
    """
    latents = _denormalise(latents_BTHWC, config)
    frames, state = Decoder(config).apply({"params": params["decoder"]}, latents, state)
    frames = frames.astype(jnp.float32)
    if pixels == "uint8":
        frames = jnp.round(jnp.clip(frames / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)
    # whole on every host, for whoever fetches them, but not before they are finished
    frames = constrain(spread(frames), None, None, None, None, None)
    return frames, jax.tree.map(_keep, state)  # laid out the same after every chunk, or the next compiles anew


def init(config: VAEConfig, key) -> Params:
    """{"encoder": ..., "decoder": ...} in config.param_dtype."""
    return _init(config, key)


class Encoder(nn.Module):
    """Frames (B, F, H, W, 3) and the state of those before -> moments (B, T, H / side, W / side, 2 C), and the new state.

    state: None at the start of a video, where F is 1 + 4n; F is 4n later.
    """

    config: VAEConfig

    @nn.compact
    def __call__(self, x_BFHWC, state):
        c = self.config
        types = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        run, kept = thread(state)
        moments = self._look(run, types, x_BFHWC) if c.blocks else 0
        if c.bypass:
            cells = gather(x_BFHWC, c, starts=state is None)
            moments = moments + Linear(2 * c.latent_channels, **types, name="bypass")(cells)
        return moments, kept

    def _look(self, run, types, x_BFHWC):
        c = self.config
        x = run(CausalConv(c.width, **types, name="conv_in"), spread(fold(x_BFHWC, c.patch)))
        for level, multiplier in enumerate(c.multipliers):
            for block in range(c.blocks):
                x = run(ResBlock(c, c.width * multiplier, name=f"level_{level}_block_{block}"), x)
            if level < len(c.temporal):
                x = run(Downsample(c, c.temporal[level], name=f"level_{level}_down"), x)
        x = run(Middle(c, name="middle"), x)
        x = nn.silu(ChannelNorm(c.param_dtype, name="norm_out")(x))
        x = run(CausalConv(2 * c.latent_channels, **types, name="conv_out"), x)
        return Linear(2 * c.latent_channels, **types, name="quant")(x)


class Decoder(nn.Module):
    """Latents as the encoder's mean (B, T, H, W, C), and the state -> frames (B, F, side H, side W, 3), and the new state.

    state: None at the start of a video, where F is 1 + 4 (T - 1); F is 4 T later.
    """

    config: VAEConfig

    @nn.compact
    def __call__(self, x_BTHWC, state):
        c = self.config
        types = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        run, kept = thread(state)
        frames = self._draw(run, types, x_BTHWC) if c.blocks else 0
        if c.bypass:
            cells = Linear(3 * c.side**2 * c.stride, **types, name="bypass")(x_BTHWC)
            frames = frames + scatter(cells, c, starts=state is None)
        return frames, kept

    def _draw(self, run, types, x_BTHWC):
        c = self.config
        x = Linear(c.latent_channels, **types, name="quant")(spread(x_BTHWC))
        x = run(CausalConv(c.width * c.multipliers[-1], **types, name="conv_in"), x)
        x = run(Middle(c, name="middle"), x)
        for level, multiplier in enumerate(reversed(c.multipliers)):
            for block in range(c.blocks + 1):
                x = run(ResBlock(c, c.width * multiplier, name=f"level_{level}_block_{block}"), x)
            if level < len(c.temporal):
                x = run(Upsample(c, c.temporal[-1 - level], name=f"level_{level}_up"), x)
        x = nn.silu(ChannelNorm(c.param_dtype, name="norm_out")(x))
        return unfold(run(CausalConv(3 * c.patch**2, **types, name="conv_out"), x), c.patch)


def fold(x_BFHWC, patch: int):
    """Squares of patch x patch pixels -> channels, (B, F, H / patch, W / patch, patch * patch * C)."""
    B, F, H, W, C = x_BFHWC.shape
    squares = x_BFHWC.reshape(B, F, H // patch, patch, W // patch, patch, C)
    return squares.transpose(0, 1, 2, 4, 3, 5, 6).reshape(B, F, H // patch, W // patch, patch * patch * C)


def unfold(x_BFHWC, patch: int):
    """The inverse of `fold`."""
    B, F, H, W, C = x_BFHWC.shape
    squares = x_BFHWC.reshape(B, F, H, W, patch, patch, C // patch**2)
    return squares.transpose(0, 1, 2, 4, 3, 5, 6).reshape(B, F, H * patch, W * patch, C // patch**2)


def gather(x_BFHWC, config: VAEConfig, *, starts: bool):
    """All pixels of each latent: (B, F, H, W, 3) -> (B, T, H / side, W / side, stride * side * side * 3).

    starts: whether the first frame is a video's first, which has a latent to itself: it stands for all frames of it.
    """
    if starts:
        first = jnp.repeat(x_BFHWC[:, :1], config.stride - 1, axis=1)
        x_BFHWC = jnp.concatenate([first, x_BFHWC], axis=1)
    x = fold(x_BFHWC, config.side)
    B, F, H, W, C = x.shape
    x = x.reshape(B, F // config.stride, config.stride, H, W, C)
    return jnp.moveaxis(x, 2, 4).reshape(B, F // config.stride, H, W, config.stride * C)


def scatter(x_BTHWC, config: VAEConfig, *, starts: bool):
    """The inverse of `gather`; of a video's first latent the last frame is kept."""
    B, T, H, W, C = x_BTHWC.shape
    x = jnp.moveaxis(x_BTHWC.reshape(B, T, H, W, config.stride, C // config.stride), 4, 2)
    x = unfold(x.reshape(B, T * config.stride, H, W, C // config.stride), config.side)
    return x[:, config.stride - 1 :] if starts else x


@functools.partial(jax.jit, static_argnums=0)
def _init(config, key):
    """What the layers' own initialisers would give, from a single draw: XLA takes a minute to compile a hundred."""

    flat = flatten(
        {
            "encoder": _shapes(Encoder(config), (1, 1 + config.stride, 2 * config.side, 2 * config.side, 3)),
            "decoder": _shapes(Decoder(config), (1, 2, 2, 2, config.latent_channels)),
        }
    )
    drawn = {path: math.prod(leaf.shape) for path, leaf in flat.items() if path.endswith("kernel")}
    normal = jax.random.truncated_normal(key, -2, 2, (sum(drawn.values()),)) / TRUNCATED_STD
    normal = jax.lax.optimization_barrier(normal)  # or it is drawn again inside every part
    parts = dict(zip(drawn, jnp.split(normal, np.cumsum(list(drawn.values()))[:-1]), strict=True))
    for path, leaf in flat.items():
        if path.endswith(("attention/project/kernel", "bypass/kernel", "bias")):
            flat[path] = jnp.zeros(leaf.shape, leaf.dtype)
        elif path.endswith("scale"):
            flat[path] = jnp.ones(leaf.shape, leaf.dtype)
        else:
            fan_in = math.prod(leaf.shape[:-1])
            flat[path] = (parts[path].reshape(leaf.shape) * fan_in**-0.5).astype(leaf.dtype)
    return unflatten(flat)


def _shapes(module: nn.Module, shape: tuple[int, ...]):
    return jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros(shape), None)["params"])


def _in_chunks(call, x_BFHWC, size: int | None):
    """call(chunk, state) on the first frame, then `size` frames at a time under a scan, then what is left; joined."""
    if size is None:
        return call(x_BFHWC, None)[0]
    first, state = call(x_BFHWC[:, :1], None)
    outputs, rest = [first], x_BFHWC[:, 1:]
    B, count = rest.shape[0], rest.shape[1] // size
    if count:
        chunks = jnp.moveaxis(rest[:, : count * size].reshape(B, count, size, *rest.shape[2:]), 1, 0)
        state, later = jax.lax.scan(lambda state, chunk: call(chunk, state)[::-1], state, chunks)
        outputs.append(jnp.moveaxis(later, 0, 1).reshape(B, -1, *later.shape[3:]))
    if rest.shape[1] % size:
        outputs.append(call(rest[:, count * size :], state)[0])
    return jnp.concatenate(outputs, axis=1)


def _regroup(latents, size: int) -> Iterator[tuple[np.ndarray, int, bool]]:
    """The first latent frame, then `size` at a time, the last filled up with zeros; with each, how many are real, and
    whether the next one can be had without asking for another piece."""
    pieces: Iterable = [latents] if hasattr(latents, "shape") else latents
    waiting, wanted = None, 1
    for piece in pieces:
        waiting = np.asarray(piece) if waiting is None else np.concatenate([waiting, piece])
        while len(waiting) >= wanted:
            taken, waiting = waiting[:wanted], waiting[wanted:]
            yield taken, wanted, len(waiting) >= size
            wanted = size
    if waiting is not None and len(waiting):
        yield np.pad(waiting, ((0, wanted - len(waiting)), (0, 0), (0, 0), (0, 0))), len(waiting), False


def _denormalise(latents_BTHWC, config: VAEConfig):
    return latents_BTHWC * np.float32(config.latent_std) + np.float32(config.latent_mean)


def _keep(state_BFHWC):
    return filled(state_BFHWC, *layout(len(state_BFHWC)))


def _check_size(shape, config: VAEConfig):
    if shape[1] < 1 or shape[2] % config.side or shape[3] % config.side:
        raise ValueError(
            f"a video of {shape[1]} frames of {shape[3]}x{shape[2]}: width and height must be multiples of "
            f"{config.side}"
        )


def config_of(shapes: Mapping[str, tuple[int, ...]], released: Mapping) -> VAEConfig:
    """Widths and strides from the shapes of a checkpoint in the published naming.

    released: `latents_mean` and `latents_std`, if they are not those of the published weights.
    """
    found = parameter_shapes(TORCH, shapes)
    width, channels = found["encoder/conv_in/kernel"][-1], found["decoder/quant/kernel"][0]
    levels = [n for n in range(LEVELS) if f"encoder/level_{n}_block_0/conv2/kernel" in found]
    mean, std = released.get("latents_mean", LATENT_MEAN), released.get("latents_std", LATENT_STD)
    if not len(mean) == len(std) == channels:
        raise ValueError(
            f"the VAE has {channels} latent channels, and latents_mean {len(mean)}, latents_std {len(std)}"
        )
    return VAEConfig(
        width=width,
        latent_channels=channels,
        latent_mean=tuple(mean),
        latent_std=tuple(std),
        multipliers=tuple(found[f"encoder/level_{n}_block_0/conv2/kernel"][-1] // width for n in levels),
        temporal=tuple(f"encoder/level_{n}_down/time/kernel" in found for n in levels[:-1]),
    )


AXES = {  # half a gigabyte at the published width, and whole on every device
    r".*/(conv1|conv2|conv_in|conv_out)/kernel": (None, None, None, None, None),
    r".*_(down|up)/conv/kernel": (None, None, None, None),
    r".*_(down|up)/time/kernel": (None, None, None),
    r".*/(shortcut|qkv|project|quant|bypass)/kernel": (None, None),
    r".*/bias": (None,),
    r".*/scale": (None,),
}


LEVELS = 4


def _pointwise(key: str, path: str, ones: str) -> list[Row]:
    return [Row(f"{key}.weight", f"{path}/kernel", f"oi{ones}->io"), Row(f"{key}.bias", f"{path}/bias", "d->d")]


def _gain(key: str, path: str, ones: str = "111") -> list[Row]:
    return [Row(f"{key}.gamma", f"{path}/scale", f"c{ones}->c")]


def _block(key: str, path: str, *, shortcut: bool = False) -> list[Row]:
    return table(
        _gain(f"{key}.residual.0", f"{path}/norm1"),
        conv(f"{key}.residual.2", f"{path}/conv1", letters="thw"),
        _gain(f"{key}.residual.3", f"{path}/norm2"),
        conv(f"{key}.residual.6", f"{path}/conv2", letters="thw"),
        _pointwise(f"{key}.shortcut", f"{path}/shortcut", "111") if shortcut else [],
    )


def _resample(key: str, path: str) -> list[Row]:
    time = [Row(f"{key}.time_conv.weight", f"{path}/time/kernel", "oit11->tio")]
    time += [Row(f"{key}.time_conv.bias", f"{path}/time/bias", "d->d")]
    return conv(f"{key}.resample.1", f"{path}/conv", letters="hw") + time


def _ends_and_middle(side: str) -> list[Row]:
    return table(
        conv(f"{side}.conv1", f"{side}/conv_in", letters="thw"),
        _block(f"{side}.middle.0", f"{side}/middle/block_0"),
        _gain(f"{side}.middle.1.norm", f"{side}/middle/attention/norm", "11"),
        _pointwise(f"{side}.middle.1.to_qkv", f"{side}/middle/attention/qkv", "11"),
        _pointwise(f"{side}.middle.1.proj", f"{side}/middle/attention/project", "11"),
        _block(f"{side}.middle.2", f"{side}/middle/block_1"),
        _gain(f"{side}.head.0", f"{side}/norm_out"),
        conv(f"{side}.head.2", f"{side}/conv_out", letters="thw"),
    )


def _levels(side: str, sequence: str, word: str, blocks: int) -> list[Row]:
    """The reference counts blocks and resamplings through: `blocks` blocks and one resampling a level."""
    rows = []
    for level in range(LEVELS):
        start, path = level * (blocks + 1), f"{side}/level_{level}"
        for block in range(blocks):
            may_widen = block == 0 and (side, level) != ("decoder", 0)
            rows += _block(f"{side}.{sequence}.{start + block}", f"{path}_block_{block}", shortcut=may_widen)
        if level < LEVELS - 1:
            rows += _resample(f"{side}.{sequence}.{start + blocks}", f"{path}_{word}")
    return rows


TORCH = table(
    _pointwise("conv1", "encoder/quant", "111"),
    _pointwise("conv2", "decoder/quant", "111"),
    _ends_and_middle("encoder"),
    _ends_and_middle("decoder"),
    _levels("encoder", "downsamples", "down", 2),
    _levels("decoder", "upsamples", "up", 3),
)

UNUSED = ()
