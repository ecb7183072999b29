"""From a director's hidden states, of any width and length, to context tokens for the DiT's cross-attention.

Kling-Avatar writes a text prompt only; feeding the director's own hidden states is the usual next step. The DiT adds the
attention to these tokens through a gate per head that starts at zero, so that an untrained projection changes nothing.
"""

import flax.linen as nn

from kavatar_jax.config import DiTConfig
from kavatar_jax.nn.layers import LayerNorm, Linear, gelu_tanh


class DirectorProjection(nn.Module):
    config: DiTConfig

    @nn.compact
    def __call__(self, hidden_BLD):
        """(B, L, director_width) -> (B, L, width)."""
        c = self.config
        x = LayerNorm(1e-5, c.dtype, c.param_dtype, name="norm_in")(hidden_BLD)
        x = gelu_tanh(Linear(c.width, c.dtype, c.param_dtype, name="in")(x))
        x = Linear(c.width, c.dtype, c.param_dtype, name="out")(x)
        return LayerNorm(1e-5, c.dtype, c.param_dtype, name="norm_out")(x)


AXES = {
    r"norm_(in|out)/(scale|bias)": (None,),
    r"in/kernel": (None, "embed"),
    r"out/kernel": (None, "embed"),
    r"(in|out)/bias": (None,),
}
