"""Depth: one block, scanned over stacked parameters and rematerialised in the backward pass."""

import flax.linen as nn
import jax

from kavatar_jax.nn.attention import keep_attention


def stack(block: type[nn.Module], *, layers: int, remat: str, broadcast: int):
    """A module of `layers` copies of `block`, whose call takes the carry and `broadcast` further arguments.

    block(...)(carry, *arguments) must return (carry, output); outputs come back with a leading layer axis, None where
    there are none. remat: "none" to keep every intermediate, "attention" for keep_attention, or the name of a
    policy in jax.checkpoint_policies.
    """
    if remat != "none":
        policy = keep_attention if remat == "attention" else getattr(jax.checkpoint_policies, remat, None)
        if policy is None:
            raise ValueError(
                f"remat is {remat!r}; use 'none', 'attention' or the name of a policy in jax.checkpoint_policies"
            )
        block = nn.remat(block, prevent_cse=False, policy=policy)
    return nn.scan(
        block,
        variable_axes={"params": 0, "lora": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast,) * broadcast,
        length=layers,
    )
