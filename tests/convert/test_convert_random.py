"""Layouts at random sizes: into ours and back is the same bits, whatever the depth, the widths and the dtypes."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from kavatar_jax.checkpoint import weights as store
from kavatar_jax.checkpoint.bridge import reference_shapes, to_kavatar, to_torch, unflatten
from kavatar_jax.checkpoint.files import Tensors
from kavatar_jax.checkpoint.shards import Lazy, open_tensors, write_tensors
from kavatar_jax.config import WhisperConfig, load_config
from kavatar_jax.models.components import COMPONENTS, abstract
from kavatar_jax.models.names import DIFFUSERS, ORIGINAL, PLAIN_DIT, SPEECH

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)
TINY = load_config("demo:tiny")


def random_dit(draw, names):
    heads = int(draw.integers(1, 4))
    sees = names is ORIGINAL["dit"] or draw.random() < 0.5
    speaks = names is ORIGINAL["dit"]
    width = 12 * heads * 2
    audio = TINY.dit.audio
    assert audio is not None
    return dataclasses.replace(
        TINY.dit, heads=heads, width=width, layers=int(draw.integers(1, 13)), mlp=int(draw.integers(1, 40)),
        text_width=int(draw.integers(1, 20)), time_width=2 * int(draw.integers(1, 9)), predicts="velocity",
        reference="first", in_channels=36 if sees else 16, image_width=int(draw.integers(1, 20)) if sees else None,
        image_positions=int(draw.choice([0, 514])) if sees and not speaks else 0,
        audio=dataclasses.replace(audio, projection=(width,), heads=8, layers=int(draw.integers(1, 3))) if speaks else None,
    )  # fmt: skip


def random_vae(draw, _):
    return dataclasses.replace(TINY.vae, width=int(draw.integers(1, 5)), multipliers=(1, 2, 4, 4), blocks=2)


def random_text(draw, _):
    heads, head = int(draw.integers(1, 4)), int(draw.integers(1, 9))
    return dataclasses.replace(
        TINY.text, width=int(draw.integers(1, 30)), heads=heads, head_width=head, mlp=int(draw.integers(1, 30)),
        layers=int(draw.integers(1, 12)), vocabulary=int(draw.integers(2, 50)),
    )  # fmt: skip


def random_image(draw, _):
    heads = int(draw.integers(1, 3))
    return dataclasses.replace(
        TINY.image, width=8 * heads, heads=heads, layers=int(draw.integers(1, 11)), mlp=int(draw.integers(1, 30)),
        image_size=14 * int(draw.integers(1, 5)), patch=14, embedding=int(draw.integers(1, 12)),
    )  # fmt: skip


CASES = [("dit", ORIGINAL["dit"], random_dit), ("dit", PLAIN_DIT, random_dit), ("dit", DIFFUSERS["dit"], random_dit)]
CASES += [("text", table["text"], random_text) for table in (ORIGINAL, DIFFUSERS)]
CASES += [("image", table["image"], random_image) for table in (ORIGINAL, DIFFUSERS)]
CASES += [("vae", table["vae"], random_vae) for table in (ORIGINAL, DIFFUSERS)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("part, names, make", CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_there_and_back(tmp_path, part, names, make, seed):
    """In shards of random size; the config is read off the shapes again, and a shard's border changes nothing."""
    draw = np.random.default_rng(seed)
    config = make(draw, names)
    wanted = abstract(part, config)
    tensors = {}
    for key, shape in reference_shapes(names.rows, wanted).items():
        tensors[key] = draw.standard_normal(shape).astype(DTYPES[draw.integers(3)] if seed % 2 else DTYPES[seed // 2])
    size = sum(x.nbytes for x in tensors.values())
    lazy = {key: Lazy(x.shape, x.dtype, lambda x=x: x) for key, x in tensors.items()}
    write_tensors(tmp_path / "a.safetensors", lazy, shard_size=int(draw.integers(size // 5 + 1, size + 2)))
    opened = open_tensors(tmp_path / "a.safetensors")
    store.convert_component(opened, names.rows, wanted, config, tmp_path / part)
    ours = Tensors(tmp_path / part / "model.safetensors")
    back = store.as_reference(tmp_path / part, ours, names.rows)
    assert back.keys() == tensors.keys()
    for key, found in back.items():
        values, given = np.asarray(found.read(), found.dtype), tensors[key]
        if values.dtype != given.dtype:  # layers in several dtypes stack as float32, which holds them
            assert values.dtype == np.float32 and seed % 2
        assert values.astype(given.dtype).tobytes() == given.tobytes(), key
    assert store.read_config(tmp_path / part, *COMPONENTS[part].kinds) == config


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", SPEECH)
def test_speech_encoders(kind, seed):
    """In memory: every tensor comes back, and a lost one is named."""
    draw, names = np.random.default_rng(seed), SPEECH[kind]
    layers, mlp = int(draw.integers(1, 12)), int(draw.integers(1, 20))
    if kind == "whisper":
        known = WhisperConfig(width=8, heads=2, layers=layers, mlp=mlp, bands=8, positions=10)
    else:
        known = dataclasses.replace(TINY.speech, layers=layers, mlp=mlp)
    wanted = abstract("speech", known)
    shapes = reference_shapes(names.rows, wanted)
    tensors = {key: draw.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
    back = dict(to_torch(unflatten(to_kavatar(tensors, names.rows, wanted)), names.rows))
    assert back.keys() == tensors.keys() and all(back[key].tobytes() == x.tobytes() for key, x in tensors.items())
    lost = sorted(tensors)[int(draw.integers(len(tensors)))]
    with pytest.raises(ValueError, match=lost.replace(".", r"\.")):
        to_kavatar({key: x for key, x in tensors.items() if key != lost}, names.rows, wanted)
