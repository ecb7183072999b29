"""One block of the 1.3B transformer: ours beside diffusers' WanTransformerBlock, same weights, same inputs."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from kavatar_jax.checkpoint.bridge import reference_shapes, to_kavatar, unflatten
from kavatar_jax.config import DiTConfig
from kavatar_jax.models import dit
from kavatar_jax.nn.layers import matmul
from tools.benchmarks.paired import paired
from tools.reference.synthetic_weights import synthesize

GRIDS = {1560: (1, 30, 52), 4680: (3, 30, 52)}  # tokens of one and of three latent frames at 832 x 480
DTYPES = ("float32", "bfloat16")
# largest deviation in units of the output's standard deviation; bfloat16 keeps 8 bits, and the paths round at other places
AGREEMENT = {"float32": 1e-4, "bfloat16": 0.1}


def transformer_block(*, rounds: int, grids=GRIDS, dtypes=DTYPES) -> Iterator[dict]:
    """One row for each number of tokens and dtype. Needs torch and diffusers.

    product: the same ratio for the block's largest product alone, which is the two libraries' own affair
    """
    import torch

    for dtype in dtypes:
        config = _config(dtype)
        weights = _weights(config)
        block = _reference(config, weights)
        params = _params(config, weights)
        for tokens, grid in grids.items():
            x, text, modulation = _inputs(tokens, config)
            tables = dit.rope(grid, config)
            context = dit.Context(jnp.asarray(modulation), tables, jnp.asarray(text, dtype), None, None, None, None)
            mine = jnp.asarray(x, dtype)
            ours = partial(_run, config, params, mine, context)
            theirs = partial(_run_reference, block, x, text, modulation, tables)
            result = np.asarray(ours(), np.float32)
            difference = float(np.abs(result - theirs().float().numpy()).max() / result.std())
            timed = paired(ours, theirs, rounds=rounds)
            yield {
                "tokens": tokens,
                "dtype": dtype,
                "threads": torch.get_num_threads(),
                "product": _product(tokens, config, rounds=rounds).ratio,
                **timed._asdict(),
                "difference": difference,
                "agree": difference <= AGREEMENT[dtype],
            }


def _product(tokens: int, config: DiTConfig, *, rounds: int):
    """The feed-forward layer's first product, by XLA and by torch."""
    import torch

    x, w = (jnp.ones(shape, config.dtype) for shape in ((tokens, config.width), (config.width, config.mlp)))
    multiply = jax.jit(partial(matmul, dtype=config.dtype))
    theirs_x, theirs_w = (torch.ones(shape, dtype=getattr(torch, config.dtype)) for shape in (x.shape, w.shape))
    with torch.inference_mode():
        return paired(lambda: jax.block_until_ready(multiply(x, w)), lambda: theirs_x @ theirs_w, rounds=rounds)


def _config(dtype: str) -> DiTConfig:
    return DiTConfig(
        width=1536, heads=12, layers=1, mlp=8960, in_channels=16, out_channels=16, time_width=256, text_width=4096,
        text_length=512, image_width=None, image_positions=0, audio=None, dtype=dtype, param_dtype=dtype,
    )  # fmt: skip


def _weights(config: DiTConfig) -> dict[str, np.ndarray]:
    """The block's part of a synthesised checkpoint, by its published names."""
    return synthesize(list(reference_shapes(dit.TORCH, _abstract(config)).items()), "bench/block")


def _abstract(config: DiTConfig):
    return {"blocks": jax.eval_shape(partial(dit.init, config), jax.random.key(0))["blocks"]}


def _params(config: DiTConfig, weights: dict[str, np.ndarray]):
    stacked = unflatten(to_kavatar(weights, dit.TORCH, _abstract(config)))["blocks"]
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[0], config.param_dtype), stacked)


def _inputs(tokens: int, config: DiTConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x (1, S, D), text (1, L, D), modulation (1, 6, D)."""
    rng = np.random.default_rng(0)
    shapes = ((1, tokens, config.width), (1, config.text_length, config.width), (1, 6, config.width))
    x, text, modulation = (rng.standard_normal(shape, np.float32) for shape in shapes)
    return x, text, 0.1 * modulation


@partial(jax.jit, static_argnums=0)
def _apply(config: DiTConfig, params, x_BSD, context: dit.Context):
    return dit.Block(config, clip_level=False).apply({"params": params}, x_BSD, context)[0]


def _run(config: DiTConfig, params, x_BSD, context: dit.Context):
    return jax.block_until_ready(_apply(config, params, x_BSD, context))


def _reference(config: DiTConfig, weights: dict[str, np.ndarray]):
    """diffusers' block with these weights; in bfloat16 it keeps its modulation and norms in float32, as published."""
    import torch
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    block = WanTransformerBlock(config.width, config.mlp, config.heads, cross_attn_norm=True)
    dtype = getattr(torch, config.dtype)
    block.load_state_dict({_diffusers_key(key): torch.from_numpy(value).to(dtype) for key, value in weights.items()})
    block.to(dtype)
    block.scale_shift_table.data = block.scale_shift_table.data.float()
    block.norm2.float()
    return block.eval()


def _run_reference(block, x, text, modulation, tables):
    import torch

    dtype = block.attn1.to_q.weight.dtype
    x, text = (torch.from_numpy(array).to(dtype) for array in (x, text))
    tables = tuple(torch.from_numpy(np.repeat(np.asarray(table), 2, axis=-1)[:, :, None]) for table in tables)
    with torch.inference_mode():
        return block(x, text, torch.from_numpy(modulation), tables)


def _diffusers_key(key: str) -> str:
    """A published checkpoint's blocks.0.* as diffusers (0.42) spells it inside one block."""
    key = key.removeprefix("blocks.0.")
    spellings = {
        "self_attn.": "attn1.", "cross_attn.": "attn2.", ".q.": ".to_q.", ".k.": ".to_k.", ".v.": ".to_v.",
        ".o.": ".to_out.0.", "norm3.": "norm2.", "ffn.0.": "ffn.net.0.proj.", "ffn.2.": "ffn.net.2.",
        "modulation": "scale_shift_table",
    }  # fmt: skip
    for theirs, ours in spellings.items():
        key = key.replace(theirs, ours)
    return key
