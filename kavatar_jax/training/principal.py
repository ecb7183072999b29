"""Where an autoencoder with a bypass may begin: as the best linear one, which is found in closed form.

The bypass becomes the principal components of the pixels of a latent, cells with lips in them counted more; the networks
beside it begin at zero output, and so learn what is not linear from the first step on.
"""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from kavatar_jax.config import VAEConfig
from kavatar_jax.models import vae
from kavatar_jax.types import Params


def principal_autoencoder(
    records: Iterable[dict[str, Any]], config: VAEConfig, *, lip_weight: float, seed: int
) -> Params:
    """Parameters of an autoencoder that keeps, of each cell, the components along which such cells differ most.

    records: as sources give them; lip_weight: of cells in which there are lips. Latents have a deviation of about one.
    ValueError if the config has no bypass.
    """
    if not config.bypass:
        raise ValueError("the autoencoder has no bypass to begin from; set model.vae.bypass")
    size = 3 * config.side**2 * config.stride
    total, mean, square = 0.0, np.zeros(size), np.zeros((size, size))
    for record in records:
        cells = _cells(record["video"], config) / 127.5 - 1
        lips = _cells(np.repeat(record["lip"][..., None], 3, axis=-1), config).max(axis=-1) > 0
        weights = np.where(lips, lip_weight, 1.0).astype(np.float32)
        total += weights.sum(dtype=np.float64)
        mean += weights @ cells
        square += (cells * weights[:, None]).T @ cells
    mean /= total
    values, vectors = np.linalg.eigh(square / total - np.outer(mean, mean))
    axes = vectors[:, ::-1][:, : config.latent_channels]
    length = np.sqrt(values[::-1][: config.latent_channels])

    params = jax.tree.map(np.array, jax.device_get(vae.init(config, jax.random.key(seed))))
    inwards, outwards = params["encoder"]["bypass"], params["decoder"]["bypass"]
    inwards["kernel"][:, : config.latent_channels] = (
        axes / length
    )  # the other half is the log variance, which stays zero
    inwards["bias"][: config.latent_channels] = -mean @ axes / length
    outwards["kernel"][...], outwards["bias"][...] = (axes * length).T, mean
    for network, last in (("encoder", "quant"), ("decoder", "conv_out")) if config.blocks else ():
        params[network][last] = jax.tree.map(np.zeros_like, params[network][last])
    return params


def _cells(video_FHWC: np.ndarray, config: VAEConfig) -> np.ndarray:
    """The pixels of every latent of a clip, one to a row, float32."""
    cells = vae.gather(video_FHWC[None], config, starts=True)
    return np.asarray(cells, np.float32).reshape(-1, cells.shape[-1])
