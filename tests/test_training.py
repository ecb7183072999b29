"""The trainer: its objective against recorded references and by hand, its data, its state, whole runs on 8 devices."""

import json
import math
import os
import pickle
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import stableavatar, train_stableavatar, train_tiny
from kavatar_jax.checkpoint import weights as files
from kavatar_jax.checkpoint.bridge import flatten, unflatten
from kavatar_jax.checkpoint.store import Store
from kavatar_jax.diffusion.flow import add_noise, target_velocity
from kavatar_jax.media.text import ByteTokenizer
from kavatar_jax.media.video import probe, write_video
from kavatar_jax.models import dit, vae
from kavatar_jax.models.components import COMPONENTS, abstract
from kavatar_jax.nn.layers import Linear
from kavatar_jax.parallel.mesh import make_mesh
from kavatar_jax.parallel.sharding import batch_sharding, partition, replicated, spec
from kavatar_jax.puppets.performance import CAMERAS
from kavatar_jax.training import config as kinds
from kavatar_jax.training import data, encode, events, flops, loop, objective, optimizer, state, tasks
from kavatar_jax.training.command import run as run_command
from kavatar_jax.training.config import (
    Bucket,
    CheckpointConfig,
    DataConfig,
    LogConfig,
    LoRAConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
    TrainedConfig,
)
from kavatar_jax.training.prepare import prepare
from kavatar_jax.training.prepared import views_of
from kavatar_jax.training.sources import MEANINGS, open_source
from kavatar_jax.types import silent
from tests.conftest import GOLDEN
from tools.reference import loss
from tools.reference.synthetic_weights import Fixture

SIZES = {"data": 2, "fsdp": 2, "context": 2, "tensor": 1}
OTHER_SIZES = {"data": 1, "fsdp": 4, "context": 1, "tensor": 2}


@pytest.fixture(scope="module", autouse=True)
def quick_programs():
    """Compiling is nearly all of what these tests do, so little is optimised."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# the objective


def test_loss_equals_the_reference():
    fixture, seen = Fixture(GOLDEN / "loss"), set()
    for name, value in loss.run(fixture):
        fixture.check(name, value)
        seen.add(name)
    assert seen == set(fixture.meta["outputs"])


def test_the_reference_notices_a_motion_term_along_frames(monkeypatch):
    monkeypatch.setattr(loss, "RELEASED", replace(loss.RELEASED, motion="frames"))
    fixture = Fixture(GOLDEN / "loss")
    with pytest.raises(AssertionError, match="loss_table"):
        fixture.check("batch2/loss_table", dict(loss.run(fixture))["batch2/loss_table"])


def test_clean_prediction_with_a_clipped_weight_is_an_error_of_clean_latents():
    """|v' - v|^2 (sigma / max(sigma, 0.4))^2 = |x' - x|^2 / max(sigma, 0.4)^2."""
    rng = np.random.default_rng(0)
    clean, noise, guess = rng.standard_normal((3, 2, 3, 4, 4, 5)).astype(np.float32)
    sigma = np.float32([0.1, 0.8]).reshape(2, 1, 1, 1, 1)
    noisy = add_noise(clean, noise, sigma)
    error = dit.velocity_to(guess, noisy, 1000 * sigma.ravel()) - target_velocity(clean, noise)
    weighted = np.square(error) * np.square(sigma / np.maximum(sigma, 0.4))
    np.testing.assert_allclose(weighted, np.square(guess - clean) / np.maximum(sigma, 0.4) ** 2, rtol=1e-3, atol=1e-4)


def test_mask_weights():
    face, lip = jnp.full((4, 1, 1, 1), 0.5), jnp.full((4, 1, 1, 1), 0.25)
    gamma = jnp.float32([0.39, 0.4, 0.5, 0.99])
    weight = objective.mask_weight(gamma, face, lip, ObjectiveConfig())
    np.testing.assert_allclose(weight.ravel(), [1.75, 0.5, 0.25, 0.25])
    flat = objective.mask_weight(gamma, face, lip, ObjectiveConfig(weighting="none", lip_weight=9.0))
    np.testing.assert_allclose(flat.ravel(), 1 + 8 * 0.25)


def test_masks_in_groups_follow_the_autoencoder():
    masks = np.zeros((1, 9, 4, 4), np.float32)
    masks[0, 0], masks[0, 5:9, :2, :2] = 1, 1  # the first frame alone is the first latent; frames 5 to 8 are the third
    small = np.asarray(objective.resize_masks(masks, (3, 2, 2), "grouped"))[0]
    np.testing.assert_allclose(small[0], 1)
    np.testing.assert_allclose(small[1], 0)
    np.testing.assert_allclose(small[2], [[1, 0], [0, 0]])


def test_noise_levels():
    uniform = ObjectiveConfig(shift=1.0)
    sigma = np.asarray(objective.draw_sigmas(jax.random.key(0), 1000, uniform))
    np.testing.assert_allclose(np.sort(sigma), np.arange(1, 1001) / 1000, atol=1e-6)  # one in each slice
    free = objective.draw_sigmas(jax.random.key(0), 4000, replace(uniform, stratified=False))
    assert abs(float(free.mean()) - 0.5) < 0.02 and free.min() > 0 and free.max() <= 1
    shifted = objective.draw_sigmas(jax.random.key(0), 1000, replace(uniform, shift=5.0))
    np.testing.assert_allclose(shifted, 5 * sigma / (1 + 4 * sigma), rtol=1e-5)
    normal = ObjectiveConfig(timesteps="logit_normal", shift=1.0, logit_mean=-1.0, logit_std=0.5)
    levels = np.asarray(objective.draw_sigmas(jax.random.key(1), 4000, normal), np.float64)
    levels = np.clip(levels - 0.0005, 1e-6, 1)
    logits = np.log(levels / (1 - levels))
    assert abs(logits.mean() + 1) < 0.05 and abs(logits.std() - 0.5) < 0.03


def test_latents_are_drawn_from_the_posterior():
    vae = replace(train_tiny.model().vae, latent_channels=2, latent_mean=(0.0, 1.0), latent_std=(2.0, 4.0))
    moments = jnp.float32([0.5, -0.5, 0.0, 2 * math.log(3.0)]).reshape(1, 1, 1, 1, 4)
    normal = jnp.ones((1, 1, 1, 1, 2))
    expected = {"mode": [0.5, -0.5], "sample": [0.5 + 1 / 2, -0.5 + 3 / 4], "released": [1.5, 2.5]}
    for kind, value in expected.items():
        drawn = objective.sample_posterior(moments, normal, vae, ObjectiveConfig(posterior=kind))
        np.testing.assert_allclose(drawn.ravel(), value, rtol=1e-6)


def test_the_condition_shows_what_is_given():
    given = encode.given_frames(jnp.array([False, True]), 3)
    np.testing.assert_array_equal(given[:, 0], 1)
    np.testing.assert_array_equal(given[:, 1], 0)
    np.testing.assert_array_equal(given[:, 2], [[0, 0, 0, 0], [0, 0, 0, 1]])  # the last of four frames
    latents = jnp.arange(2 * 3 * 1 * 1 * 2, dtype=jnp.float32).reshape(2, 3, 1, 1, 2)
    first = objective.join_condition(given, latents)
    np.testing.assert_array_equal(first[..., 4:], latents)
    np.testing.assert_array_equal(first[..., 0, 0, :4], given)
    every = dit.show_reference(first)[:, :, 0, 0, 4:]
    np.testing.assert_array_equal(every[0], latents[0, [0, 0, 0], 0, 0])
    np.testing.assert_array_equal(every[1], latents[1, [0, 0, 2], 0, 0])


# the optimizer and the state


def test_learning_rate():
    config = OptimizerConfig(learning_rate=2.0, warmup=4, schedule="cosine", final=0.1)
    rate = optimizer.learning_rate(config, 14)
    np.testing.assert_allclose([rate(n) for n in (0, 2, 4, 9, 14)], [0, 1, 2, 1.1, 0.2], atol=1e-6)
    assert optimizer.learning_rate(replace(config, schedule="constant"), 14)(1000) == 2.0


def test_muon_takes_kernels_as_matrices():
    """A layer's update is orthogonal but for its size, whatever the gradient's scale; biases are Adam's."""
    rng = np.random.default_rng(0)
    params = {"dit": {
        "blocks": {"q": {"kernel": jnp.zeros((2, 6, 4)), "bias": jnp.zeros((2, 4))}},
        "conv": {"kernel": jnp.zeros((3, 3, 2, 4))},
    }}  # fmt: skip
    grads = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), params)
    made = optimizer.make_optimizer(OptimizerConfig(kind="muon", learning_rate=1.0, warmup=0, clip=1e9), 10)
    update, _ = made.update(grads, made.init(params), params)
    scaled, _ = made.update(jax.tree.map(lambda g: 100 * g, grads), made.init(params), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), update, scaled)
    maps = [*update["dit"]["blocks"]["q"]["kernel"], update["dit"]["conv"]["kernel"].reshape(18, 4)]
    for matrix in maps:
        values = np.linalg.svd(matrix, compute_uv=False)
        assert values.max() < 2 * values.min()  # Newton-Schulz brings them to about one another
        rms = float(np.sqrt(np.square(matrix).mean()))
        assert 0.7 * optimizer.ADAM_RMS < rms < 1.3 * optimizer.ADAM_RMS
    steps = np.abs(update["dit"]["blocks"]["q"]["bias"])  # of Adam with Nesterov momentum
    assert np.ptp(steps) < 1e-3 and 1 < steps.min() < 2


def test_gradient_norm_limit_of_the_release():
    config = train_stableavatar.config().optimizer
    assert optimizer.norm_limit(0.01, 0, config) == pytest.approx(0.25)
    assert optimizer.norm_limit(0.01, 500, config) == pytest.approx(0.15)
    assert optimizer.norm_limit(0.2, 2000, config) == pytest.approx(0.05)
    assert optimizer.norm_limit(0.3, 2000, config) == pytest.approx(0.05 / 6)  # a spike, six times the limit
    assert optimizer.norm_limit(5.0, 2000, config) == pytest.approx(0.05 / 10)
    assert optimizer.norm_limit(0.3, 900, config) > 0.05  # none before it has settled
    tree = {"a": jnp.float32([3.0, 4.0])}
    clip = optimizer.clip_gradients(OptimizerConfig(learning_rate=1.0, clip=1.0))
    np.testing.assert_allclose(clip.update(tree, clip.init(tree))[0]["a"], [0.6, 0.8], rtol=1e-6)


@pytest.fixture(scope="module")
def paths():
    """Every parameter of StableAvatar's transformer."""
    return list(flatten({"dit": abstract("dit", replace(stableavatar.config().dit, director_width=64))}))


def test_what_learns(paths):
    def chosen(patterns, frozen=()):
        config = kinds.TrainedConfig(patterns=patterns, frozen=frozen)
        learns, _ = state.split({"params": unflatten({path: 0 for path in paths}), "lora": {}}, config)
        return {path.removeprefix("params/") for path in flatten(learns)}

    everything, released = chosen(kinds.EVERYTHING), chosen(kinds.RELEASED)
    assert everything == set(paths)
    frozen_tops = {path.split("/")[1] for path in everything - released}
    assert frozen_tops == {"patch", "text", "time", "image", "head", "director"}
    attention = chosen(kinds.ATTENTION_AND_ADAPTER)
    assert attention < released and not any(path.startswith(("dit/blocks/up", "dit/blocks/down")) for path in attention)
    assert "dit/blocks/cross_attn/k_audio/kernel" in chosen(kinds.ADAPTER)
    assert all(path.startswith("dit/audio/") or "_audio/" in path for path in chosen(kinds.ADAPTER))
    assert all("director" in path for path in chosen(kinds.DIRECTOR)) and chosen(kinds.DIRECTOR)
    without_text = chosen(kinds.RELEASED, kinds.TEXT_CROSS_ATTENTION)
    attention = [f"{name}/{leaf}" for name in "qkvo" for leaf in ("kernel", "bias")] + ["norm_q/scale", "norm_k/scale"]
    assert released - without_text == {f"dit/blocks/cross_attn/{leaf}" for leaf in attention}


def test_lora_on_the_linears_of_the_release():
    """368 in the 1.3B model: 12 in each of 30 blocks (10 of them here, two serve audio), and those around them."""
    part = stableavatar.config().dit
    axes = {f"params/dit/{row}": value for row, value in COMPONENTS["dit"].model.AXES.items()}
    linears = state.find_linears({"dit": abstract("dit", part)}, LoRAConfig(rank=128, scale=0.5), axes)
    layers = {path: part.layers if axis[0] == "layers" else 1 for path, axis in linears.items()}
    assert sum(layers.values()) == 368
    with pytest.raises(ValueError, match="match no linear"):
        state.find_linears({"dit": abstract("dit", part)}, LoRAConfig(rank=1, scale=1.0, patterns=("no",)), axes)


def test_lora_starts_as_nothing_and_folds_into_the_kernel():
    params = {"dit": {"blocks": {"q": {"kernel": jax.random.normal(jax.random.key(0), (2, 6, 8))}}}}
    axes = {"params/dit/blocks/q/kernel": ("layers", "embed", "heads")}
    config = LoRAConfig(rank=3, scale=0.5, patterns=(".*",))
    linears = state.find_linears(params, config, axes)
    assert state.lora_axes(linears)["lora/dit/blocks/q/down"] == ("layers", "embed", None)
    assert state.lora_axes(linears)["lora/dit/blocks/q/up"] == ("layers", None, "heads")
    lora = state.draw_lora(params, linears, config, seed=0)["dit"]["blocks"]["q"]
    assert lora["down"].shape == (2, 6, 3) and float(jnp.abs(lora["down"]).max()) <= 6**-0.5
    x = jax.random.normal(jax.random.key(1), (5, 6))
    linear = Linear(8, "float32", "float32", use_bias=False)

    def out(kernel, branch):
        return linear.apply({"params": {"kernel": kernel}, "lora": branch}, x)

    kernel = params["dit"]["blocks"]["q"]["kernel"]
    for layer in range(2):
        branch = {name: leaf[layer] for name, leaf in lora.items()}
        np.testing.assert_array_equal(out(kernel[layer], branch), x @ kernel[layer])
        branch["up"] = jax.random.normal(jax.random.key(2), (3, 8))
        folded = state.fold_lora({"q": {"kernel": kernel[layer]}}, {"q": branch})["q"]["kernel"]
        np.testing.assert_allclose(out(kernel[layer], branch), x @ folded, rtol=1e-5, atol=1e-5)
        assert float(jnp.abs(folded - kernel[layer]).max()) > 0.1


def test_checkpoints_keep_the_newest_and_are_read_onto_another_mesh(tmp_path):
    mesh, other = make_mesh(**SIZES), make_mesh(**OTHER_SIZES)
    values = np.arange(32, dtype=np.float32).reshape(8, 4)
    tree = {"a": jax.device_put(values, jax.NamedSharding(mesh, spec("embed", None))), "n": jnp.int32(7)}
    with Store(tmp_path / "kept", keep=2) as store:
        with pytest.raises(ValueError, match="no checkpoint"):
            store.restore(tree)
        for step in (1, 2, 3):
            store.save(step, tree | {"n": jnp.int32(step)}, {"position": step})
        store.wait()
        assert store.steps == [2, 3] and store.latest == 3
        place = jax.NamedSharding(other, spec("heads", "embed"))
        wanted = {"a": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=place),
                  "n": jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(other))}  # fmt: skip
        found, record = store.restore(wanted)
    assert record == {"position": 3} and int(found["n"]) == 3
    assert found["a"].sharding.spec == place.spec
    np.testing.assert_array_equal(found["a"], values)
    (tmp_path / "kept" / "9.orbax-checkpoint-tmp-1").mkdir()  # what a killed process leaves
    with Store(tmp_path / "kept", keep=2) as store:
        assert store.steps == [2, 3]


def test_networks_are_as_the_weights_directory_describes_them(tmp_path):
    tiny = replace(train_tiny.config(), weights=str(tmp_path), fresh=(r"(dit|text|speech)/.*",))
    stored = replace(tiny.model.vae, latent_mean=(0.5,) * 16, dtype="bfloat16")
    (tmp_path / "vae").mkdir()
    files.write_config(tmp_path / "vae", stored)
    assert state.drawn_anew(tiny) == {"dit", "text", "speech"}
    assert state.drawn_anew(replace(tiny, weights="")) == set(COMPONENTS)
    found = state.adopt(tiny).model
    assert found.vae == replace(stored, dtype="float32")
    assert (found.dit, found.text) == (tiny.model.dit, tiny.model.text)
    assert isinstance(tasks.open_tokenizer(tiny), ByteTokenizer)  # its text encoder starts anew
    with pytest.raises(ValueError, match="tokenizer"):
        tasks.open_tokenizer(replace(tiny, fresh=(r"dit/.*",)))


# the data


PUPPETS = DataConfig(source="puppets", buckets=(Bucket(width=32, height=32, frames=5, batch=8),), first_last=0.5)


def puppet_row():
    return partial(data.clip_row, model=train_tiny.model(), tokenizer=ByteTokenizer())


def take(loader, count):
    return [jax.device_get(next(loader)) for _ in range(count)]


def test_a_batch_is_known_by_its_number():
    mesh, other = make_mesh(**SIZES), make_mesh(**OTHER_SIZES)
    first = take(data.Loader(PUPPETS, puppet_row(), 25, mesh), 3)
    later = take(data.Loader(PUPPETS, puppet_row(), 25, other, position=2), 1)[0]
    assert later.number == 2 and later.names == first[2].names
    jax.tree.map(np.testing.assert_array_equal, later.clips, first[2].clips)
    assert len({name for batch in first for name in batch.names}) == 24
    clips = first[0].clips
    assert clips.video.shape == (8, 5, 32, 32, 3) and clips.video.dtype == np.uint8
    assert clips.samples.shape == (8, 5 * 640) and 0 < clips.last.sum() < 8
    np.testing.assert_array_equal(clips.reference, clips.video[:, 0])
    assert np.unique(clips.lip).tolist() == [0, 255]


def test_clips_between_two_frames_begin_with_their_own():
    config = replace(PUPPETS, portrait=1.0, first_last=0.5)
    assert views_of(config) == [(True, False), (False, True)]
    assert views_of(replace(config, portrait=0.5)) == [(False, False), (True, False), (False, True)]
    clips = take(data.Loader(config, puppet_row(), 25, make_mesh(**SIZES)), 1)[0].clips
    own = (clips.reference == clips.video[:, 0]).all(axis=(1, 2, 3))
    np.testing.assert_array_equal(own, clips.last)


def test_puppets_prompts_as_the_director_words_them():
    plain, directed = (
        open_source(replace(PUPPETS, directed=directed), PUPPETS.buckets[0], 25).record(3, None)
        for directed in (False, True)
    )
    assert directed["prompt"].startswith(plain["prompt"]) and "The protagonist" in directed["prompt"]
    np.testing.assert_array_equal(plain["video"], directed["video"])


def test_prompts_say_what_they_mean():
    source = open_source(DataConfig(source="prompts", buckets=PUPPETS.buckets), PUPPETS.buckets[0], 25)
    records = [source.record(i, None) for i in range(40)]
    assert len({record["prompt"] for record in records}) == 40
    for record in records:
        meant = {name for name, value in zip(MEANINGS, record["meant"], strict=True) if value}
        assert len(meant & {"smile", "neutral", "frown"}) == 1 and len(meant & set(CAMERAS)) == 1
        if "zoom in" in meant:
            assert any(word in record["prompt"].lower() for word in ("zoom", "closer", "pushes in"))


def test_the_text_encoder_learns_to_read(tmp_path):
    """Two hundred prompts later it tells more than their base rates."""
    model = replace(train_tiny.model(), text=replace(train_tiny.model().text, width=32, mlp=64))
    config = TrainConfig(
        name="reads",
        model=replace(model, dit=replace(model.dit, text_length=192)),
        task="text",
        steps=40,
        data=DataConfig(source="prompts", buckets=(Bucket(width=32, height=32, frames=1, batch=16),)),
        trained=TrainedConfig(patterns=(r"text/.*",)),
        optimizer=OptimizerConfig(kind="muon", learning_rate=5e-3, warmup=5),
        checkpoint=CheckpointConfig(every=100),
        log=LogConfig(every=1),
    )
    assert loop.train(config, tmp_path, resume=False) == 40
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert np.mean([line["loss"] for line in lines[-5:]]) < 0.7 * lines[0]["loss"]
    assert (tmp_path / "weights" / "text" / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="prompts"):
        replace(config, data=PUPPETS)
    wrong = replace(config, trained=TrainedConfig(patterns=(r"vae/.*",)))
    with pytest.raises(ValueError, match="text encoder alone"):
        loop.train(wrong, tmp_path / "wrong", resume=False)


def test_a_process_loads_the_rows_of_its_own_devices():
    mesh = make_mesh(**SIZES)
    rows = np.array([2, 3, 6, 7])  # as if only they were here

    class Half:
        def __init__(self, whole):
            self._whole = whole

        def addressable_devices_indices_map(self, shape):
            found = self._whole.addressable_devices_indices_map(shape)
            return {device: index for device, index in found.items() if index[0].start in (2, 6)}

    loader = data.Loader(PUPPETS, puppet_row(), 25, mesh)
    loader._sharding = Half(loader._sharding)
    np.testing.assert_array_equal(loader.rows(PUPPETS.buckets[0]), rows)
    whole = np.arange(8.0)
    placed = data.place(whole, np.arange(8), 8, batch_sharding(mesh))
    np.testing.assert_array_equal(placed, whole)


def test_a_batch_has_to_spread_over_the_mesh():
    uneven = replace(PUPPETS, buckets=(replace(PUPPETS.buckets[0], batch=6),))
    with pytest.raises(ValueError, match="multiple"):
        data.Loader(uneven, puppet_row(), 25, make_mesh(**SIZES))


def test_padding_shrinks_the_clip_and_its_masks():
    record = {"video": np.full((2, 20, 20, 3), 200, np.uint8), "face": np.ones((2, 20, 20), bool),
              "lip": np.zeros((2, 20, 20), bool), "portrait": np.full((20, 20, 3), 100, np.uint8)}  # fmt: skip
    padded = data.pad(record, np.array([0.25, 0.1, 0.0, 0.5]))
    assert (padded["video"][:, :10, 5:18] == 200).all() and (padded["video"][:, 10:] == 0).all()
    assert (padded["video"][:, :, :5] == 0).all() and (padded["video"][:, :, 18:] == 0).all()
    assert padded["face"][0, 5, 10] == 255 and padded["face"][0, 15, 10] == 0
    assert padded["portrait"][5, 10].tolist() == [100] * 3


def test_clip_folders(tmp_path):
    config = clip_folders(tmp_path)
    bucket = config.buckets[0]
    records = data.Records(config, bucket, 25)
    taken = [records.take(serial, np.random.default_rng(serial)) for serial in range(6)]
    assert sorted(record["name"] for record in taken[:2]) == sorted(record["name"] for record in taken[2:4])
    for record in taken:
        assert record["video"].shape == (5, 32, 48, 3) and record["samples"].shape == (5 * 640,)
        assert record["face"].min() == 255 and record["lip"][0, 20, 24] == 255 and record["lip"][0, 4, 4] == 0
        start = record["video"][:, 16, 24, 0].astype(int)  # frames get brighter by 10 each
        assert np.all(np.abs(np.diff(start) - 10) < 5)
        first = round((start[0] - 20) / 10)
        assert record["samples"][320] == pytest.approx(first / 100, abs=0.02)  # each frame has a level of its own
    prompts = {record["prompt"] for record in taken}
    assert prompts == {"a cat speaks", "The protagonist is singing"}
    shutil.rmtree(tmp_path / "singing" / "00002" / "lip_masks")
    with pytest.raises(ValueError, match="whole_masks"):
        [records.take(serial, np.random.default_rng(0)) for serial in range(2)]
    whole = data.Records(replace(config, whole_masks=True), bucket, 25)
    assert all(whole.take(serial, np.random.default_rng(0))["face"].min() == 255 for serial in range(2))


def clip_folders(root: Path) -> DataConfig:
    """Two clips of 12 frames in the released layout, each frame with a brightness and a sound level of its own."""
    for name in ("other/00001", "singing/00002"):
        folder = root / name
        frames = [np.full((32, 48, 3), 20 + 10 * i, np.uint8) for i in range(12)]
        folder.mkdir(parents=True)
        sound = np.repeat(np.arange(12) / 100, 640).astype(np.float32)
        write_video(folder / "sub_clip.mp4", frames, fps=25, speech=None, quality=1)
        write_wave(folder / "audio.wav", sound)
        for kind in ("face_masks", "lip_masks"):
            (folder / kind).mkdir()
            mask = np.full((64, 96), 255 if kind == "face_masks" else 0, np.uint8)
            mask[32:48, 32:64] = 255
            for i in range(12):
                Image.fromarray(mask).save(folder / kind / f"frame_{i}.png")
    (root / "other/00001/prompt.txt").write_text("a cat speaks\n")
    (root / "list.txt").write_text("other/00001\nsinging/00002\n")
    bucket = Bucket(width=48, height=32, frames=5, batch=2, clips="list.txt")
    return DataConfig(source="clips", folder=str(root), buckets=(bucket,))


def write_wave(path: Path, samples: np.ndarray):
    import soundfile

    soundfile.write(path, samples, 16000, subtype="FLOAT")


def test_mistakes_are_told_in_a_line(tmp_path):
    tiny = train_tiny.config()
    with pytest.raises(ValueError, match="4n\\+1"):
        Bucket(width=32, height=32, frames=8, batch=1)
    with pytest.raises(ValueError, match="data.folder"):
        DataConfig(source="clips", buckets=PUPPETS.buckets)
    with pytest.raises(ValueError, match="about.json"):
        data.Records(replace(PUPPETS, source="prepared", folder=str(tmp_path)), PUPPETS.buckets[0], 25)
    with pytest.raises(ValueError, match="accumulate"):
        replace(tiny, optimizer=replace(tiny.optimizer, accumulate=3))
    with pytest.raises(ValueError, match="no training run"):
        run_command(config="demo", out=tmp_path)
    with pytest.raises(ValueError, match="match no parameter"), jax.set_mesh(make_mesh(**SIZES)) as mesh:
        state.begin(replace(tiny, trained=kinds.TrainedConfig(patterns=("no",))), [], mesh)


@pytest.mark.parametrize("name", ["train_tiny", "train_stableavatar"])
def test_every_config_is_whole(name):
    module = {"train_tiny": train_tiny, "train_stableavatar": train_stableavatar}[name]
    made = [f() for f in vars(module).values() if callable(f) and getattr(f, "__module__", "") == module.__name__]
    for config in [c for c in made if isinstance(c, kinds.TrainConfig)]:
        assert config.name.split(":")[0] == name
        assert config.task in state.learning(config) or config.task == "dit"
        assert state.learning(config), config.name


@pytest.mark.parametrize("make", [train_stableavatar.config, train_stableavatar.full], ids=["1.3B", "14B"])
def test_the_gradient_at_published_sizes(make):
    """Shapes alone, nothing computed: 81 frames of 832 x 480 through the objective and back."""
    config = make()
    model, bucket = config.model, config.data.buckets[0]
    T, h, w = kinds.latent_size(bucket.frames, bucket.height, bucket.width, model.vae)
    assert (T, h, w) == (21, 60, 104)

    def array(*shape):
        return jax.ShapeDtypeStruct((2, *shape), jnp.float32)

    batch = objective.Batch(
        latents=array(T, h, w, 32), condition=array(T, h, w, 32), given=array(T, 4), face=array(T, h, w),
        lip=array(T, h, w), text=array(512, 4096), image=array(257, 1280), speech=array(161, 768),
    )  # fmt: skip

    def loss_of(params, batch, key):
        drawn, blank = objective.draw(key, batch, config.objective), jnp.zeros((1, 512, 4096))
        values = objective.losses(params, {}, batch, blank, drawn, model, config.objective, clip_level=False)
        return values["loss"].mean()

    params = {"dit": abstract("dit", model.dit)}
    gradient = jax.eval_shape(jax.grad(loss_of), params, batch, jax.eval_shape(lambda: jax.random.key(0)))
    assert jax.tree.map(lambda leaf: leaf.shape, gradient) == jax.tree.map(lambda leaf: leaf.shape, params)


# the log


def test_event_files(tmp_path):
    assert events.crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C
    writer = events.EventWriter(tmp_path)
    writer.scalar("loss", 300, 0.25)
    writer.image("samples", 7, b"\x89PNG", width=3, height=2)
    writer.close()
    blob, records = next(tmp_path.iterdir()).read_bytes(), []
    while blob:
        (length,) = struct.unpack_from("<Q", blob)
        head, event, tail = blob[:8], blob[12 : 12 + length], blob[12 + length : 16 + length]
        assert events._masked(head) == blob[8:12] and events._masked(event) == tail
        records.append(event)
        blob = blob[16 + length :]
    assert b"brain.Event:2" in records[0]
    assert records[1][9:12] == b"\x10\xac\x02"  # field 2, a varint of 300
    assert records[1].endswith(b"\x0a\x04loss\x15" + struct.pack("<f", 0.25))
    assert b"\x08\x02\x10\x03\x18\x03\x22\x04\x89PNG" in records[2]


def test_flops_of_published_sizes():
    """Wan 1.3B and 14B at 81 frames of 832 x 480 on text alone: 283.0 and 1678.4 TFLOPs; the avatar a little more."""
    config, large = stableavatar.config().dit, stableavatar.fourteen_b().dit
    grid = (21, 60, 104)
    plain = flops.forward(replace(config, audio=None, image_width=None), grid)
    assert plain == pytest.approx(283.0e12, rel=0.001)
    assert flops.forward(replace(large, audio=None, image_width=None), grid) == pytest.approx(1678.4e12, rel=0.001)
    seen = flops.forward(replace(config, audio=None), grid, image_tokens=257)
    heard = flops.forward(config, grid, image_tokens=257, speech_tokens=161)
    assert 1.001 < seen / plain < 1.01 and 1.001 < heard / seen < 1.01
    assert flops.train(plain, 1.0) == 3 * plain


# whole runs on eight devices, from prepared clips and stored weights


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with weights, a byte tokenizer and 40 prepared clips, and the config of a run of ten steps from them."""
    folder = tmp_path_factory.mktemp("world")
    tiny = train_tiny.config()
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key == "scale":
            return np.ones(leaf.shape, np.float32)
        return rng.standard_normal(leaf.shape, np.float32) * np.float32(np.prod(leaf.shape[:-1]) ** -0.5)

    for name in ("dit", "text"):
        part = getattr(tiny.model, name)
        params = jax.tree_util.tree_map_with_path(draw, abstract(name, part))
        files.save_component(params, part, folder / "weights" / name)
    (folder / "weights" / "tokenizer").mkdir()
    (folder / "weights" / "tokenizer" / "config.json").write_text('{"kind": "bytes"}')
    write_prepared(folder / "clips", tiny.data.buckets[0], count=40)
    return replace(
        tiny,
        steps=10,
        weights=str(folder / "weights"),
        trained=kinds.TrainedConfig(patterns=kinds.EVERYTHING),
        data=replace(tiny.data, source="prepared", folder=str(folder / "clips")),
        checkpoint=kinds.CheckpointConfig(every=5, keep=3),
        mesh=MeshConfig(**SIZES),
    )


def write_prepared(folder: Path, bucket: Bucket, *, count: int):
    rng = np.random.default_rng(1)
    grid = kinds.latent_size(bucket.frames, bucket.height, bucket.width, train_tiny.model().vae)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float16)

    where = folder / f"{bucket.width}x{bucket.height}x{bucket.frames}"
    where.mkdir(parents=True)
    for i in range(count):
        np.savez(
            where / f"{i:08d}.npz", latents=normal(*grid, 32), conditions=normal(2, *grid, 32), face=rng.random(grid),
            lip=rng.random(grid), text=normal(16, 16), speech=normal(2 * bucket.frames - 1, 16),
        )  # fmt: skip
    (folder / "about.json").write_text(json.dumps({"views": [[False, False], [False, True]], "learning": []}))


def lines(out: Path) -> dict[int, dict]:
    return {line["step"]: line for line in map(json.loads, (out / "log.jsonl").read_text().splitlines())}


def saved(out: Path, step: int):
    """A checkpoint's arrays by path, on the host."""
    from orbax.checkpoint import v1 as ocp

    folder = out / "checkpoints" / str(step)
    known = ocp.metadata(folder, checkpointable_name="state").metadata
    tree = ocp.load(
        folder, jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), known), checkpointable_name="state"
    )
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight")
    assert loop.train(world, out, resume=False) == 10
    return out


@pytest.fixture(scope="module")
def interrupted(world, tmp_path_factory):
    """The same run, asked to stop while its fourth batch is on its way."""
    out = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch:
        following = data.Loader.__next__

        def next_one(loader):
            if loader.position == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return following(loader)

        patch.setattr(data.Loader, "__next__", next_one)
        stopped = loop.train(world, out, resume=True)  # nothing to resume from: from the start
    return out, stopped


def test_a_run_logs_and_leaves_weights(world, straight):
    found = lines(straight)
    assert list(found) == list(range(1, 11))
    keys = {
        "loss",
        "error",
        "lip_error",
        "gradient_norm",
        "learning_rate",
        "seconds",
        "tokens_per_second",
        "memory_gib",
    }
    assert keys <= set(found[10]) and any(key.startswith("loss_0.") for key in found[10])
    assert found[1]["learning_rate"] == 0 and found[10]["learning_rate"] == pytest.approx(1e-3)
    assert all(math.isfinite(value) for line in found.values() for value in line.values())
    assert found[10]["loss"] < found[1]["loss"]
    state_at_end = saved(straight, 10)
    part = world.model.dit
    stored = files.read_config(straight / "weights" / "dit", type(part))
    assert stored == part and sorted(p.name for p in (straight / "weights").iterdir()) == ["dit"]
    mesh = make_mesh(**SIZES)
    shape = abstract("dit", part)
    loaded = files.load_component(
        straight / "weights" / "dit", shape, partition(shape, COMPONENTS["dit"].model.AXES, mesh)
    )
    name = "['blocks']['self_attn']['q']['kernel']"
    mine = np.asarray(loaded["blocks"]["self_attn"]["q"]["kernel"])
    averages = next(v for k, v in state_at_end.items() if "ema" in k and k.endswith(name))
    np.testing.assert_array_equal(mine, averages)
    masters = next(v for k, v in state_at_end.items() if "trained" in k and k.endswith(name))
    assert np.abs(masters - averages).max() > 0


def test_sigterm_saves_and_the_run_goes_on_bit_for_bit(world, straight, interrupted, tmp_path):
    out, stopped = interrupted
    assert stopped == 5 and not (out / "weights").exists()
    out = Path(shutil.copytree(out, tmp_path / "copy"))
    assert loop.train(world, out, resume=True) == 10
    one, two = lines(straight), lines(out)
    timed = {"seconds", "tokens_per_second", "memory_gib"}
    for step in range(1, 11):
        assert {k: v for k, v in one[step].items() if k not in timed} == {
            k: v for k, v in two[step].items() if k not in timed
        }
    ours, theirs = saved(out, 10), saved(straight, 10)
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)


def test_another_mesh_goes_on_with_the_same_numbers(world, straight, interrupted, tmp_path, monkeypatch):
    """Restored from (2, 2, 2, 1) onto (1, 4, 1, 2), and the batch in one part instead of two."""
    out = Path(shutil.copytree(interrupted[0], tmp_path / "copy"))
    places = {}

    def make_step(losses, draw, config, shardings, mesh, made=loop.make_step):
        step = made(losses, draw, config, shardings, mesh)

        def noting(*arguments):
            result = step(*arguments)
            places.update(flatten(jax.tree.map(lambda leaf: leaf.sharding.spec, result[0].trained)))
            return result

        return noting

    monkeypatch.setattr(loop, "make_step", make_step)
    config = replace(world, mesh=MeshConfig(**OTHER_SIZES), optimizer=replace(world.optimizer, accumulate=1))
    assert loop.train(config, out, resume=True) == 10
    one, two = lines(straight), lines(out)
    for step in range(interrupted[1] + 1, 11):
        for name in ("loss", "lip_error", "gradient_norm"):
            assert two[step][name] == pytest.approx(one[step][name], rel=2e-5), (step, name)
    assert places["params/dit/blocks/up/kernel"] == spec("layers", "embed", "mlp")
    assert places["params/dit/blocks/self_attn/q/kernel"] == spec("layers", "embed", "heads")


def test_numbers_that_blow_up_stop_the_run(world, straight, tmp_path):
    """One clip that is not finite: the message names its batch, and the state before it is kept."""
    clips = Path(shutil.copytree(world.data.folder, tmp_path / "clips"))
    order = data.Records(world.data, world.data.buckets[0], 25)
    batch = world.data.buckets[0].batch
    name = order.take(4 * batch, np.random.default_rng(0))["name"]  # the first clip of the fifth batch
    seen_before = [order.take(serial, np.random.default_rng(0))["name"] for serial in range(4 * batch)]
    assert name not in seen_before
    file = clips / f"{name}.npz"
    arrays = dict(np.load(file))
    arrays["latents"][0, 0, 0, 0] = np.nan
    np.savez(file, **arrays)
    config = replace(world, data=replace(world.data, folder=str(clips)))
    for resume in (False, True):
        with pytest.raises(loop.Diverged, match=f"step 5: .* Batch 4: .*{name}.* step 4"):
            loop.train(config, tmp_path / "out", resume=resume)
        assert max(map(int, os.listdir(tmp_path / "out" / "checkpoints"))) == 4
    assert lines(straight)[4]["loss"] == lines(tmp_path / "out")[4]["loss"]


def test_a_folder_with_checkpoints_is_not_written_over(world, straight):
    with pytest.raises(ValueError, match="--resume"):
        loop.train(world, straight, resume=False)


# slower: programs of their own


WORKER = """
import pickle, sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_disable_most_optimizations", True)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from pathlib import Path
from kavatar_jax.training import data, loop
if int(sys.argv[2]) == 1 and sys.argv[5]:  # only one of the two is asked to stop
    import os, signal
    following = data.Loader.__next__
    def next_one(loader):
        if loader.position == int(sys.argv[5]):
            os.kill(os.getpid(), signal.SIGTERM)
        return following(loader)
    data.Loader.__next__ = next_one
config = pickle.loads(Path(sys.argv[3]).read_bytes())
print(loop.train(config, Path(sys.argv[4]), resume=True))
"""


def run_two_processes(config, out: Path, *, stop: str = "") -> list[int]:
    """Train on two processes of four devices each; how far each says that it came."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    (out / "config.pickle").write_bytes(pickle.dumps(config))
    command = [sys.executable, "-c", WORKER, address]
    rest = [str(out / "config.pickle"), str(out), stop]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": Path(__file__).parents[1]}
    programs = {**os.environ, "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or ""}
    running = [subprocess.Popen([*command, str(i), *rest], text=True, env=programs, **pipes) for i in range(2)]
    told = [process.communicate(timeout=900) for process in running]
    assert all(process.returncode == 0 for process in running), "\n".join(error[-3000:] for _, error in told)
    return [int(said.split()[-1]) for said, _ in told]


@pytest.mark.slow
def test_two_processes_train_what_one_does(world, straight, tmp_path):
    """Two processes of four devices, stopped by a signal to one of them and gone on with, against one of eight."""
    stopped = run_two_processes(world, tmp_path, stop="2")
    assert stopped[0] == stopped[1] and 3 <= stopped[0] < 10
    assert run_two_processes(world, tmp_path) == [10, 10]
    one, two = lines(straight), lines(tmp_path)
    for step in range(1, 11):
        for name in ("loss", "lip_error", "gradient_norm"):
            assert two[step][name] == pytest.approx(one[step][name], rel=2e-5), (step, name)
    ours, theirs = saved(tmp_path, 10), saved(straight, 10)
    for path, leaf in ours.items():
        # Adam turns a gradient that is rounding alone into whole steps, as that of a bias of keys, which moves nothing,
        # and of single elements elsewhere; so tensors are compared as a whole, by the length of one step
        if "trained" in path and not re.search(r"\['k(_audio|_image)?'\]\['bias'\]", path):
            apart = np.sqrt(np.mean(np.square(leaf - theirs[path])))
            assert apart < 0.01 * world.optimizer.learning_rate, (path, apart)
    assert (tmp_path / "weights" / "dit" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["adapter", "director", "lora"])
def test_only_what_is_named_learns(world, tmp_path, variant, monkeypatch):
    asked = getattr(train_tiny, variant)()
    folder = tmp_path / "clips"
    shutil.copytree(world.data.folder, folder)
    rng = np.random.default_rng(0)
    for file in folder.glob("*/*.npz"):
        np.savez(file, **np.load(file), director=rng.standard_normal((5, 12)).astype(np.float16))
    config = replace(world, trained=asked.trained, data=replace(world.data, folder=str(folder)), steps=3)
    config = replace(config, optimizer=replace(config.optimizer, accumulate=1, warmup=0, ema=0.0))
    before, frozen = {}, {}

    def begin(config, components, mesh, begun=loop.begin):
        found = begun(config, components, mesh)
        before.update(flatten(jax.device_get(found[0].trained)))
        frozen.update(flatten(found[1]))
        return found

    monkeypatch.setattr(loop, "begin", begin)
    loop.train(config, tmp_path, resume=False)
    stored = dict(flatten(files.load_component(
        tmp_path / "weights" / "dit", abstract("dit", world.model.dit),
        jax.tree.map(lambda _: replicated(make_mesh(**SIZES)), abstract("dit", world.model.dit)),
    )))  # fmt: skip
    start = files.Tensors(Path(world.weights) / "dit" / "model.safetensors")
    changed = {path for path, leaf in stored.items() if np.abs(np.asarray(leaf) - start[path]).max() > 0}
    if variant == "lora":
        linears = {path.removeprefix("lora/dit/").removesuffix("/up") for path in before if path.endswith("/up")}
        assert len(linears) > 8 and not any("audio" in path for path in linears)
        assert {f"{path}/kernel" for path in linears} <= changed
        assert {path for path in changed if "audio" not in path} == {f"{path}/kernel" for path in linears}
    else:
        named = {path.removeprefix("params/dit/") for path in before}
        assert changed <= named and len(changed) >= len(named) - 1  # a bias of keys moves nothing
    assert not before.keys() & frozen.keys()


@pytest.mark.slow
def test_buckets_of_two_lengths_and_audio_over_the_clip(world, tmp_path):
    """Each length has one program, or two where audio attention is drawn; the guard would stop a third."""
    long, short = world.data.buckets[0], replace(world.data.buckets[0], frames=5, weight=0.5)
    folder = tmp_path / "clips"
    shutil.copytree(world.data.folder, folder)
    about = (folder / "about.json").read_text()
    write_prepared(folder, short, count=16)
    (folder / "about.json").write_text(about)
    objective = replace(world.objective, clip_level=0.5)
    clips = replace(world.data, folder=str(folder), buckets=(long, short))
    config = replace(world, steps=6, data=clips, objective=objective)
    loader = data.Loader(config.data, lambda *_: None, 25, make_mesh(**SIZES))
    assert [batch.bucket.frames for batch in take(loader, 6)].count(5) == 2
    drawn = {(batch.bucket.frames, loop.draw_clip_level(config, n + 1)) for n, batch in enumerate(
        take(data.Loader(config.data, lambda *_: None, 25, make_mesh(**SIZES)), 6))}  # fmt: skip
    assert len(drawn) > 2
    assert loop.train(config, tmp_path / "out", resume=False) == 6
    assert all(math.isfinite(line["loss"]) for line in lines(tmp_path / "out").values())


@pytest.mark.slow
def test_from_nothing_to_weights_on_puppets(tmp_path):
    """The command, from a config's name: networks drawn anew, the text encoder learning too, samples on the way."""
    run_command(config="train_tiny:watched", out=tmp_path, fields=("steps=5", "mesh.data=8"))
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == [
        "dit", "speech", "text", "tokenizer", "vae",
    ]  # fmt: skip
    assert probe(tmp_path / "samples" / "000005_0.mp4").frames == 9
    info = probe(tmp_path / "samples" / "000005_0.mp4")
    assert (info.width, info.height, info.has_audio) == (64, 32, True)
    with Image.open(tmp_path / "samples" / "000005.png") as sheet:
        assert sheet.size == (8 * 32, 2 * 32) and np.asarray(sheet)[:32].std() > 10  # recorded above performed
    assert (tmp_path / "config.json").is_file()


@pytest.mark.slow
def test_prepared_clips_are_the_encoded_ones(tmp_path):
    tiny = replace(train_tiny.config(), mesh=MeshConfig(data=8))
    prepare(tiny, tmp_path, count=8, report=silent)
    assert json.loads((tmp_path / "about.json").read_text())["learning"] == ["text"]
    mesh = make_mesh(data=8)
    with jax.set_mesh(mesh):
        task = loop.open_task(tiny, mesh)
        _, frozen, _ = state.begin(tiny, task.components, mesh)
        batch = next(data.Loader(tiny.data, task.row, 25, mesh))
        fresh = jax.device_get(task.encode(task.prepare(frozen), batch.clips))
    config = replace(tiny.data, source="prepared", folder=str(tmp_path))
    read = jax.device_get(next(data.Loader(config, task.row, 25, mesh)))
    order = [int(name.rsplit("/", 1)[1]) for name in read.names]  # puppets come in order, files shuffled
    for name in ("latents", "face", "lip", "speech", "text"):
        np.testing.assert_allclose(getattr(read.clips, name), getattr(fresh, name)[order], rtol=2e-3, atol=2e-3)
    files_of = [dict(np.load(tmp_path / "32x32x9" / f"{i:08d}.npz")) for i in range(8)]
    for i, found in enumerate(files_of):
        last = int(batch.clips.last[i])
        np.testing.assert_allclose(found["conditions"][last], fresh.condition[i], rtol=2e-3, atol=2e-3)
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == ["speech", "vae"]
    from_there = replace(tiny, data=config, weights=str(tmp_path / "weights"), fresh=(r"(dit|text)/.*",), steps=1)
    assert loop.train(from_there, tmp_path / "run", resume=False) == 1
    with pytest.raises(ValueError, match="prepare it again"):
        loop.train(replace(tiny, data=replace(config, portrait=0.5)), tmp_path / "out", resume=False)
    with pytest.raises(ValueError, match="learning the encoders"):
        trained = kinds.TrainedConfig(patterns=kinds.EVERYTHING)
        loop.train(replace(tiny, data=config, trained=trained), tmp_path / "out", resume=False)


@pytest.mark.slow
def test_the_autoencoder_learns_and_measures_its_latents(tmp_path):
    config = train_tiny.vae()
    config = replace(config, steps=20, optimizer=replace(config.optimizer, accumulate=1, warmup=0, learning_rate=2e-3))
    config = replace(config, mesh=MeshConfig(data=8), checkpoint=kinds.CheckpointConfig(every=20, keep=1))
    assert loop.train(config, tmp_path, resume=False) == 20
    found = lines(tmp_path)
    assert np.mean([found[n]["loss"] for n in range(16, 21)]) < 0.75 * found[1]["loss"]
    stored = files.read_config(tmp_path / "weights" / "vae", type(config.model.vae))
    shape = abstract("vae", stored)
    places = jax.tree.map(lambda _: replicated(make_mesh(data=8)), shape)
    params = files.load_component(tmp_path / "weights" / "vae", shape, places)
    clips = next(data.Loader(config.data, data.footage_row, 25, make_mesh(data=8), position=100)).clips
    mean, _ = jax.jit(lambda p, v: vae.encode(p, v / 127.5 - 1, stored))(params, clips.video.astype(jnp.float32))
    assert np.all(np.abs(np.asarray(mean).mean(axis=(0, 1, 2, 3))) < 0.5)
    np.testing.assert_allclose(np.asarray(mean).std(axis=(0, 1, 2, 3)), 1, atol=0.4)


@pytest.mark.slow
def test_workers_make_the_same_batches():
    mesh = make_mesh(**SIZES)
    alone = take(data.Loader(PUPPETS, puppet_row(), 25, mesh), 2)
    helped = take(data.Loader(replace(PUPPETS, workers=1), puppet_row(), 25, mesh), 2)
    for one, two in zip(alone, helped, strict=True):
        assert one.names == two.names
        jax.tree.map(np.testing.assert_array_equal, one.clips, two.clips)
