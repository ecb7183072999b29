"""How much work a step is: arithmetic of the transformer from its sizes, and what the hardware could do.

Matrix products only, two operations per multiply-add, as is usual for model FLOPs utilisation (Chowdhery et al. 2022,
PaLM, appendix B): work that is done twice to save memory counts once.
"""

import math

from kavatar_jax.config import DiTConfig, UMT5Config, VAEConfig
from kavatar_jax.models.audio_adapter import slice_table

# dense bfloat16 FLOP/s of one JAX device: Google's TPU system pages; NVIDIA's data sheets
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def video_tokens(config: DiTConfig, grid: tuple[int, int, int]) -> int:
    """Tokens of a clip with latents of size (T, h, w)."""
    return math.prod(n // p for n, p in zip(grid, config.patch, strict=True))


def forward(config: DiTConfig, grid: tuple[int, int, int], *, image_tokens: int = 0, speech_tokens: int = 0) -> float:
    """FLOPs of one clip through the transformer and its audio adapter."""
    c, d, S, T = config, config.width, video_tokens(config, grid), grid[0] // config.patch[0]
    context = c.text_length + (image_tokens if c.image_width is not None else 0)
    heard = slice_table(speech_tokens, 4 * (grid[0] - 1) + 1).shape[1] if c.audio else 0
    block = 8 * S * d * d + 4 * S * S * d  # self-attention: projections, products
    block += 4 * S * d * d + 4 * S * (context + heard) * d  # cross-attention: query and output, products
    block += 4 * (context + heard * T) * d * d  # its keys and values
    block += 4 * S * d * c.mlp
    patch = math.prod(c.patch)
    ends = 2 * S * d * (patch * (c.in_channels + c.out_channels) + c.skip * c.out_channels)
    return c.layers * block + ends + _adapter(c, S, T, heard, speech_tokens)


def attention(config: DiTConfig, grid: tuple[int, int, int], *, image_tokens: int = 0) -> float:
    """Of `forward`, the products of queries, keys and values in the attentions that a TPU's kernel does."""
    context = config.text_length + (image_tokens if config.image_width is not None else 0)
    return self_attention(config, grid) + 4.0 * config.layers * video_tokens(config, grid) * context * config.width


def self_attention(config: DiTConfig, grid: tuple[int, int, int]) -> float:
    """Of `attention`, the products of the tokens with each other."""
    return 4.0 * config.layers * video_tokens(config, grid) ** 2 * config.width


def read(config: UMT5Config, tokens: int) -> float:
    """FLOPs of one text of so many tokens, padding and all, through its encoder."""
    inner = config.heads * config.head_width
    return config.layers * tokens * (8 * config.width * inner + 4 * tokens * inner + 6 * config.width * config.mlp)


def decode(config: VAEConfig, grid: tuple[int, int, int]) -> float:
    """FLOPs from latents of size (T, h, w) to pixels, none of them a video's first."""
    places, C = math.prod(grid), config.width * config.multipliers[-1]
    total = 2 * config.latent_channels * (config.latent_channels + 27 * C) * places
    total += 4 * 54 * C * C * places + 8 * C * C * places + 4 * places * grid[1] * grid[2] * C
    for level, multiplier in enumerate(reversed(config.multipliers)):
        features = config.width * multiplier
        total += 54 * C * features * places + (C != features) * 2 * C * features * places
        total += (2 * config.blocks + 1) * 54 * features * features * places
        C = features
        if level < len(config.temporal):
            if config.temporal[-1 - level]:
                total += 12 * C * C * places
                places *= 2
            places *= 4
            total += 9 * C * C * places
            C //= 2
    return total + 54 * C * 3 * config.patch**2 * places


def train(forward_flops: float, learning: float) -> float:
    """Of a training step: forward, backward to the activations, and backward to the share of weights that learns."""
    return forward_flops * (2 + learning)


def peak(device) -> float:
    """FLOP/s of a device by its name; 0 if it is not known, as for a CPU."""
    kind = device.device_kind
    names = [name for name in PEAKS if kind == name or (name.startswith("NVIDIA") and kind.startswith(name))]
    return PEAKS[names[0]] if names else 0.0


def _adapter(c: DiTConfig, S: int, T: int, heard: int, speech_tokens: int) -> float:
    if c.audio is None:
        return 0.0
    d, A = c.width, heard * T
    widths = (c.audio.speech_width, *c.audio.projection)
    into = sum(2 * speech_tokens * a * b for a, b in zip(widths, widths[1:], strict=False))
    look = 4 * A * d * d + 4 * S * d * d + 4 * A * (S // T) * d if c.audio.looking else 0
    block = look + 4 * A * d * c.audio.mlp
    pack = 2 * T * d * (c.audio.pack * c.audio.speech_width + (1 + c.layers) * d) if c.audio.pack else 0
    return into + c.audio.layers * block + 2 * A * d * d + pack
