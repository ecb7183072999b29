"""What the training tests share: a model, a source of puppets, batches of it, and two shapes of the eight devices."""

from functools import partial

import jax

from configs import train_tiny
from kavatar_jax.media.text import ByteTokenizer
from kavatar_jax.training import data
from kavatar_jax.training.config import (
    Bucket,
    DataConfig,
)

SIZES = {"data": 2, "fsdp": 2, "context": 2, "tensor": 1}
OTHER_SIZES = {"data": 1, "fsdp": 4, "context": 1, "tensor": 2}
MODEL = train_tiny.model()
PUPPETS = DataConfig(source="puppets", buckets=(Bucket(width=32, height=32, frames=5, batch=8),), first_last=0.5)


def puppet_row():
    return partial(data.clip_row, model=MODEL, tokenizer=ByteTokenizer())


def take(loader, count):
    return [jax.device_get(next(loader)) for _ in range(count)]
