"""The trainer: its objective against recorded references and by hand, its data, its state, whole runs on 8 devices."""

import math
import struct
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from configs import stableavatar, train_stableavatar, train_tiny
from kavatar_jax.checkpoint import weights as files
from kavatar_jax.checkpoint.bridge import flatten, unflatten
from kavatar_jax.checkpoint.store import Store
from kavatar_jax.config import WhisperConfig
from kavatar_jax.diffusion.flow import add_noise, target_velocity, velocity_towards
from kavatar_jax.media.text import ByteTokenizer
from kavatar_jax.models import dit
from kavatar_jax.models.components import COMPONENTS, abstract
from kavatar_jax.nn.layers import Linear
from kavatar_jax.parallel.mesh import make_mesh
from kavatar_jax.parallel.sharding import replicated, spec
from kavatar_jax.training import config as kinds
from kavatar_jax.training import data, encode, events, flops, objective, optimizer, state, tasks
from kavatar_jax.training.command import run as run_command
from kavatar_jax.training.config import (
    Bucket,
    DataConfig,
    LoRAConfig,
    ObjectiveConfig,
    OptimizerConfig,
)
from tests.conftest import GOLDEN
from tests.puppet_batches import MODEL, OTHER_SIZES, PUPPETS, SIZES
from tools.reference import loss
from tools.reference.synthetic_weights import Fixture

pytestmark = pytest.mark.usefixtures("quick_compilation")


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
    error = velocity_towards(noisy, guess, sigma) - target_velocity(clean, noise)
    weighted = np.square(error) * np.square(sigma / np.maximum(sigma, 0.4))
    np.testing.assert_allclose(weighted, np.square(guess - clean) / np.maximum(sigma, 0.4) ** 2, rtol=1e-3, atol=1e-4)


def test_channels_weigh_as_told_against_one_another():
    face, lip, gamma = jnp.zeros((2, 3, 4, 4)), jnp.zeros((2, 3, 4, 4)).at[:, :, 1, 2].set(0.5), jnp.zeros(2)
    goal = ObjectiveConfig(motion="none", weighting="none", lip_weight=9.0)
    told = replace(goal, channels=(1.0, 2.0, 9.0))  # of which the mean is 4
    weight = objective.loss_weight(gamma, face, lip, told)
    np.testing.assert_allclose(weight[:, :, 0, 0], np.broadcast_to([0.25, 0.5, 2.25], (2, 3, 3)))
    np.testing.assert_allclose(weight[:, :, 1, 2], np.broadcast_to([1.25, 2.5, 11.25], (2, 3, 3)))
    apart = objective.loss_weight(gamma, face, lip, replace(told, lip_channels=(4.0, 2.0, 0.3)))  # a mean of 2.1
    np.testing.assert_allclose(apart[:, :, 0, 0], weight[:, :, 0, 0])
    np.testing.assert_allclose(apart[0, 0, 1, 2], [0.25 + 16 / 2.1, 0.5 + 8 / 2.1, 2.25 + 1.2 / 2.1], rtol=1e-6)
    alike = objective.loss_weight(gamma, face, lip, replace(goal, channels=(7.0,) * 3))
    np.testing.assert_allclose(*jnp.broadcast_arrays(alike, objective.loss_weight(gamma, face, lip, goal)), rtol=1e-6)
    for name in ("channels", "lip_channels"):
        with pytest.raises(ValueError, match=f"objective.{name} are 3, and there are 16 latent"):
            replace(train_tiny.config(), objective=replace(goal, **{name: (1.0, 2.0, 9.0)}))
        with pytest.raises(ValueError, match="weights above 0, and one is 0"):
            replace(goal, **{name: (1.0, 0.0)})


def test_velocities_err_by_weight_and_by_motion():
    rng = np.random.default_rng(0)
    predicted, target, weight = rng.uniform(0.5, 2, (3, 2, 3, 4, 4, 3)).astype(np.float32)
    still = ObjectiveConfig(motion="none", channels=(1.0, 2.0, 9.0))
    wanted = (np.square(predicted - target) * weight).mean(axis=(1, 2, 3, 4))
    np.testing.assert_allclose(objective.velocity_loss(predicted, target, weight, still), wanted, rtol=1e-5)
    steps = np.square(np.diff(predicted - target, axis=1)) * [0.25, 0.5, 2.25]
    moving = replace(still, motion="frames", motion_weight=1.0)
    found = objective.velocity_loss(predicted, target, weight, moving)
    np.testing.assert_allclose(found, steps.mean(axis=(1, 2, 3, 4)), rtol=1e-5)


def test_mask_weights():
    face, lip = jnp.full((4, 1, 1, 1), 0.5), jnp.full((4, 1, 1, 1), 0.25)
    gamma = jnp.float32([0.39, 0.4, 0.5, 0.99])
    weight = objective.loss_weight(gamma, face, lip, ObjectiveConfig())
    np.testing.assert_allclose(weight.ravel(), [1.75, 0.5, 0.25, 0.25])
    flat = objective.loss_weight(gamma, face, lip, ObjectiveConfig(weighting="none", lip_weight=9.0))
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
    given = encode.given_frames(jnp.array([0, 8, 4]), 3)
    np.testing.assert_array_equal(given[:, 0], 1)
    np.testing.assert_array_equal(given[:, 1], [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]])  # the last of four frames
    np.testing.assert_array_equal(given[:, 2], [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    video = jnp.asarray(np.random.default_rng(0).integers(0, 256, (3, 9, 2, 2, 3)), jnp.uint8)
    clips = data.Clips(video=video, face=None, lip=None, reference=255 - video[:, 0], last=jnp.array([0, 8, 4]))
    shown = np.asarray(encode.show(clips, held=1))
    np.testing.assert_array_equal(shown[:, 0], encode.to_signed(clips.reference))
    assert [np.flatnonzero(np.abs(clip).max(axis=(1, 2, 3))).tolist() for clip in shown] == [[0], [0, 8], [0, 4]]
    for clip, frame in ((1, 8), (2, 4)):
        np.testing.assert_array_equal(shown[clip, frame], encode.to_signed(video[clip, frame]))
    shown = np.asarray(encode.show(clips, held=4))
    assert [np.flatnonzero(np.abs(clip).max(axis=(1, 2, 3))).tolist() for clip in shown] == [
        [0],
        [0, 5, 6, 7, 8],
        [0, 1, 2, 3, 4],
    ]
    np.testing.assert_array_equal(shown[1, 5:], np.repeat(encode.to_signed(video[1, 8:]), 4, axis=0))
    given = given[:2]
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


def test_muons_slots_lie_where_their_kernels_do():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    kernel, bias = spec("embed", "heads"), spec("heads")
    params = {"dit": {"q": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}}}
    places = {"dit": {"q": {"kernel": NamedSharding(mesh, kernel), "bias": NamedSharding(mesh, bias)}}}
    config = OptimizerConfig(kind="muon", learning_rate=1e-3, ema=0.9)
    make, _ = state.plan_state(params, places, config, 10, mesh)
    fresh = make(jax.device_put(params, places))
    found = [(slot.shape, slot.sharding.spec) for slot in jax.tree.leaves(fresh.optimizer) if slot.size > 3]
    assert set(found) == {((8, 4), kernel), ((4,), bias)}


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
    for name in ("vae", "speech"):
        (tmp_path / name).mkdir()
    files.write_config(tmp_path / "vae", stored)
    assert state.drawn_anew(tiny) == {"dit", "text", "speech"}
    assert state.drawn_anew(replace(tiny, weights="")) == set(COMPONENTS)
    found = state.adopt(tiny).model
    assert found.vae == replace(stored, dtype="float32")
    heard = WhisperConfig(width=8, heads=1, layers=1, mlp=8)
    files.write_config(tmp_path / "speech", heard)
    assert state.adopt(replace(tiny, fresh=(r"(dit|text)/.*",))).model.speech == heard
    assert (found.dit, found.text) == (tiny.model.dit, tiny.model.text)
    assert isinstance(tasks.open_tokenizer(tiny), ByteTokenizer)  # its text encoder starts anew
    with pytest.raises(ValueError, match="tokenizer"):
        tasks.open_tokenizer(replace(tiny, fresh=(r"dit/.*",)))


def test_mistakes_are_told_in_a_line(tmp_path):
    tiny = train_tiny.config()
    with pytest.raises(ValueError, match="4n\\+1"):
        Bucket(width=32, height=32, frames=8, batch=1)
    with pytest.raises(ValueError, match="data.folder"):
        DataConfig(source="clips", buckets=PUPPETS.buckets)
    with pytest.raises(ValueError, match="about.json"):
        data.Records(replace(PUPPETS, source="prepared", folder=str(tmp_path)), PUPPETS.buckets[0], MODEL)
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
