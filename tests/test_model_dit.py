"""The DiT and its adapter: recorded references, the director's zero start, LoRA's zero start, bf16."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN

from configs import demo
from kavatar_jax.models import audio_adapter, dit
from kavatar_jax.models.audio_adapter import ABSENT, SILENCE, AudioPack, slice_table
from tools import ablations
from tools.reference import dit as reference
from tools.reference.synthetic_weights import Fixture

init = jax.jit(dit.init, static_argnums=0)  # compiled once, where it would be operation by operation

FIXTURES = ["dit_1b_small", "dit_14b_small", "wan_t2v_small", "wan_i2v_small", "wan_flf2v_small"]


@pytest.mark.parametrize("name", FIXTURES)
def test_recorded_outputs(name):
    fixture = Fixture(str(GOLDEN / name))
    seen = set()
    for output, value in reference.run(fixture):
        fixture.check(output, value)
        seen.add(output)
    assert seen == set(fixture.meta["outputs"])


def test_a_weight_that_is_off_by_one_percent_is_noticed(monkeypatch):
    fixture = Fixture(str(GOLDEN / "wan_t2v_small"))
    honest = reference.reference.synthesize_tensor

    def corrupted(key, shape, tag):
        return honest(key, shape, tag) * (1.01 if key == "blocks.1.self_attn.v.weight" else 1)

    monkeypatch.setattr(reference.reference, "synthesize_tensor", corrupted)
    with pytest.raises(AssertionError, match="exceeds"):
        for output, value in reference.run(fixture):
            fixture.check(output, value)


@pytest.fixture(scope="module")
def tiny():
    config = demo.tiny().dit
    params = init(config, jax.random.key(0))
    return config, hearing(params)


def hearing(params):
    """Audio values start at zero; with random ones tests hear something."""
    values = params["blocks"]["cross_attn"]["v_audio"]
    values["kernel"] = 0.1 * jax.random.normal(jax.random.key(1), values["kernel"].shape)
    return params


def make_inputs(config, **fields):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    T, tokens = 3, 18
    inputs = dit.Inputs(
        latents=draw(2, T, 4, 6, config.out_channels),
        timestep=jnp.array([900.0, 20.0]),
        text=draw(2, config.text_length, config.text_width),
        condition=draw(2, T, 4, 6, config.in_channels - config.out_channels),
        image=None if config.image_width is None else draw(2, 257, config.image_width),
        speech=draw(2, tokens, config.audio.speech_width),
        slices=jnp.asarray(slice_table(tokens, 9))[None].repeat(2, axis=0),
    )
    return inputs._replace(**fields)


def velocity(config, params, inputs, **collections):
    return apply(config, {"params": params, **collections}, inputs).velocity


@functools.partial(jax.jit, static_argnums=0)
def apply(config, variables, inputs):
    return dit.DiT(config).apply(variables, inputs)


def test_speech_changes_nothing_before_training():
    config = demo.tiny().dit
    params, inputs = init(config, jax.random.key(0)), make_inputs(config)
    assert np.abs(params["blocks"]["cross_attn"]["k_audio"]["kernel"]).max() > 0
    deaf = inputs._replace(heard=jnp.zeros(2, bool))
    np.testing.assert_array_equal(velocity(config, params, inputs), velocity(config, params, deaf))


@pytest.mark.parametrize("name", list(ablations.ADAPTERS))
def test_an_adapter_without_a_part_has_none_of_its_parameters(name):
    """And still hears: time and latents change what it says only where that part is there."""
    config = demo.tiny().dit
    parts = ablations.ADAPTERS[name]
    config = dataclasses.replace(config, audio=dataclasses.replace(config.audio, **parts))
    params = hearing(init(config, jax.random.key(0)))
    assert set(params["audio"]["blocks"] if "blocks" in params["audio"] else ()) == {
        *(("modulation",) if name in ("whole", "no cross-attention") else ()),
        *(("cross_norm", "norm_q", "norm_k", "q", "k", "v", "o") if name in ("whole", "no modulation") else ()),
        *(("up", "down") if name != "no adapter" else ()),
    }
    inputs = make_inputs(config)

    def tokens(**fields):
        return np.asarray(apply(config, {"params": params}, inputs._replace(**fields)).context.audio)

    def differs(**fields):
        return np.abs(tokens(**fields) - tokens()).max() > 1e-4

    assert differs(speech=-inputs.speech)
    assert differs(timestep=inputs.timestep + 50) == parts.get("modulated", True)
    assert differs(latents=-inputs.latents) == parts.get("looking", True)


def test_raised_attention_to_audio_is_raised_values(tiny):
    """Attention is linear in its values: to multiply what it gives is to multiply these, with their bias."""
    config, params = tiny
    attention = params["blocks"]["cross_attn"]
    values = attention["v_audio"] | {"bias": 0.1 + attention["v_audio"]["bias"]}

    def with_values(factor):
        raised = attention | {"v_audio": jax.tree.map(lambda leaf: factor * leaf, values)}
        return params | {"blocks": params["blocks"] | {"cross_attn": raised}}

    inputs = make_inputs(config)
    gained = inputs._replace(audio_gain=jnp.array([1.0, 1.5]))
    plain, raised = (velocity(config, with_values(factor), inputs) for factor in (1.0, 1.5))
    each, tolerance = velocity(config, with_values(1.0), gained), 1e-5 * np.abs(plain).max()
    np.testing.assert_allclose(each[0], plain[0], atol=tolerance)
    np.testing.assert_allclose(each[1], raised[1], atol=tolerance)
    assert np.abs(raised - plain)[1].max() > 100 * tolerance

    half = dataclasses.replace(config, dtype="bfloat16")  # blocks whose type changed could not be scanned
    assert jax.eval_shape(functools.partial(velocity, half), params, gained).shape == plain.shape


def test_an_untrained_director_changes_nothing(tiny):
    config, params = tiny
    directed = dataclasses.replace(config, director_width=20)
    fresh = init(directed, jax.random.key(1))
    grown = jax.tree.map(lambda leaf: leaf, params)
    grown["director"] = fresh["director"]
    grown["blocks"]["cross_attn"]["director_gate"] = fresh["blocks"]["cross_attn"]["director_gate"]
    hidden = jax.random.normal(jax.random.key(2), (2, 7, 20))
    inputs = make_inputs(config)
    plain = velocity(config, params, inputs)
    told = velocity(directed, grown, inputs._replace(director=hidden))
    # bit for bit whatever the director says; another program than the plain model's, so that one to rounding
    np.testing.assert_array_equal(told, velocity(directed, grown, inputs._replace(director=-3 * hidden)))
    np.testing.assert_allclose(told, plain, atol=5e-6)
    grown["blocks"]["cross_attn"]["director_gate"] += 0.5
    assert np.abs(velocity(directed, grown, inputs._replace(director=hidden)) - plain).max() > 1e-4


def test_a_head_that_predicts_clean_latents_gives_their_velocity(tiny):
    config, params = tiny
    inputs = make_inputs(config)
    head = velocity(config, params, inputs)
    turned = velocity(dataclasses.replace(config, predicts="clean"), params, inputs)
    for b, sigma in enumerate((0.9, 0.02)):
        np.testing.assert_allclose(turned[b], (inputs.latents[b] - head[b]) / sigma, rtol=1e-5, atol=1e-4)
    changed = velocity(dataclasses.replace(config, predicts="change"), params, inputs)
    for b, sigma in enumerate((0.9, 0.02)):
        clean = head[b] + inputs.condition[b, ..., 4:]
        np.testing.assert_allclose(changed[b], (inputs.latents[b] - clean) / sigma, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("predicts", ["clean", "change"])
def test_what_is_noisy_skips_to_the_output(tiny, predicts):
    config, params = tiny
    inputs = make_inputs(config)
    plain = velocity(dataclasses.replace(config, predicts=predicts), params, inputs)
    skipping = dataclasses.replace(config, predicts=predicts, skip=True)
    fresh = init(skipping, jax.random.key(0))["skip"]
    np.testing.assert_array_equal(velocity(skipping, {**params, "skip": fresh}, inputs), plain)
    gains = jnp.linspace(-1, 1, config.out_channels)
    time = {**fresh["time"], "bias": gains}
    told = velocity(skipping, {**params, "skip": {**fresh, "time": time}}, inputs)
    for b, sigma in enumerate((0.9, 0.02)):
        start = inputs.condition[b, ..., 4:] if predicts == "change" else 0
        more = gains * (inputs.latents[b] - (1 - sigma) * start)  # of the clean latents
        np.testing.assert_allclose(told[b], plain[b] - more / sigma, rtol=1e-5, atol=1e-4)
    token = {"kernel": jax.random.normal(jax.random.key(1), fresh["token"]["kernel"].shape)}
    told = velocity(skipping, {**params, "skip": {**fresh, "token": token}}, inputs)
    start = inputs.condition[0, ..., 4:] if predicts == "change" else 0
    gains = (plain - told)[0] * 0.9 / (inputs.latents[0] - 0.1 * start)
    T, H, W, C = gains.shape
    gains = np.asarray(gains).reshape(T, H // 2, 2, W // 2, 2, C).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 4, C)
    assert np.ptp(gains[..., 0], axis=0).min() > 0.1  # each token has its own,
    np.testing.assert_allclose(
        gains, np.broadcast_to(gains[:, :1], gains.shape), rtol=0.02, atol=0.02
    )  # of all its latents
    with pytest.raises(ValueError, match="dit.skip"):
        dataclasses.replace(config, skip=True)


def test_the_reference_in_every_frame_stands_where_nothing_is_given(tiny):
    config, params = tiny
    every = dataclasses.replace(config, reference="every")
    inputs = make_inputs(config)
    condition = inputs.condition.at[..., :4].set(0).at[:, 0, ..., :4].set(1)
    other = condition.at[:, 1, ..., 4:].add(1)  # a frame that is not given: what its latents are does not matter
    told = velocity(every, params, inputs._replace(condition=condition))
    np.testing.assert_array_equal(told, velocity(every, params, inputs._replace(condition=other)))
    filled = condition.at[:, 1:, ..., 4:].set(condition[:, :1, ..., 4:])
    np.testing.assert_allclose(told, velocity(config, params, inputs._replace(condition=filled)), atol=2e-6)
    given = other.at[:, 1, ..., 3].set(1)
    assert np.abs(velocity(every, params, inputs._replace(condition=given)) - told).max() > 1e-3


def test_speech_that_is_not_heard_does_not_matter(tiny):
    config, params = tiny
    inputs = make_inputs(config, heard=jnp.array([False, True]))
    other = inputs._replace(speech=inputs.speech + 1)
    one, two = velocity(config, params, inputs), velocity(config, params, other)
    np.testing.assert_array_equal(one[0], two[0])
    assert np.abs(one[1] - two[1]).max() > 1e-4


def test_a_frame_hears_only_its_own_slice(tiny):
    config, params = tiny
    deaf = dataclasses.replace(config, layers=1)
    first = {**params, "blocks": jax.tree.map(lambda leaf: leaf[:1], params["blocks"])}
    inputs = make_inputs(config)
    last = int(slice_table(18, 9)[0].max())
    changed = inputs._replace(speech=inputs.speech.at[:, last + 1 :].add(1))
    one, two = (apply(deaf, {"params": first}, told).last for told in (inputs, changed))
    frame = 4 * 6 // 4
    np.testing.assert_allclose(one[:, :frame], two[:, :frame], atol=1e-6)
    assert np.abs(one[:, -frame:] - two[:, -frame:]).max() > 1e-4


def test_absent_places_are_as_if_they_were_not_there(tiny):
    config, params = tiny
    inputs = make_inputs(config)
    wider = jnp.pad(inputs.slices, ((0, 0), (0, 0), (0, 3)), constant_values=ABSENT)
    silent = jnp.pad(inputs.slices, ((0, 0), (0, 0), (0, 3)), constant_values=SILENCE)
    plain = velocity(config, params, inputs)
    np.testing.assert_allclose(velocity(config, params, inputs._replace(slices=wider)), plain, atol=2e-6)
    assert np.abs(velocity(config, params, inputs._replace(slices=silent)) - plain).max() > 1e-5


def test_a_slice_is_a_set_but_for_the_pack(tiny):
    """As released, attention hears no order; the pack starts at nothing, then tells earlier from later in its own frame."""
    config, params = tiny
    inputs = make_inputs(config)
    plain = velocity(config, params, inputs)
    backwards = inputs._replace(slices=inputs.slices[..., ::-1])
    np.testing.assert_allclose(velocity(config, params, backwards), plain, atol=2e-6)
    count = inputs.slices.shape[-1]
    packed = dataclasses.replace(config, layers=1, audio=dataclasses.replace(config.audio, pack=count + 2))
    fresh = init(packed, jax.random.key(6))
    params = {**params, "pack": fresh["pack"]}
    params["blocks"] = {**jax.tree.map(lambda leaf: leaf[:1], params["blocks"]), "hear": fresh["blocks"]["hear"]}
    one = dataclasses.replace(config, layers=1)
    np.testing.assert_array_equal(velocity(packed, params, inputs), velocity(one, params, inputs))
    params["blocks"]["hear"] = {"kernel": jax.random.normal(jax.random.key(7), (1, config.width, config.width))}
    assert np.abs(velocity(packed, params, backwards) - velocity(packed, params, inputs)).max() > 1e-3
    narrow = inputs._replace(slices=inputs.slices[..., 1:-1])  # the middle stays where it is
    silent = inputs._replace(slices=inputs.slices.at[..., [0, -1]].set(SILENCE))
    heard = [AudioPack(packed).apply({"params": params["pack"]}, told.speech, told.slices) for told in (narrow, silent)]
    np.testing.assert_allclose(*heard, atol=1e-6)
    deaf = [inputs._replace(speech=speech, heard=jnp.zeros(2, bool)) for speech in (inputs.speech, inputs.speech + 1)]
    np.testing.assert_array_equal(*(velocity(packed, params, told) for told in deaf))
    small = dataclasses.replace(packed, audio=dataclasses.replace(config.audio, pack=count - 2))
    with pytest.raises(ValueError, match="audio.pack"):
        apply(small, {"params": params}, inputs)


def test_tokens_that_a_slice_lacks_leave_their_places_silent():
    tokens, frames = 18, 9
    table, spans = slice_table(tokens, frames), audio_adapter.slice_spans(tokens, frames)
    assert table.shape[1] == spans[0, 1] - spans[0, 0] + 1
    for row, (first, _) in zip(table, spans, strict=True):
        offsets = np.arange(len(row)) + first
        np.testing.assert_array_equal(row, np.where((offsets >= 0) & (offsets < tokens), offsets, SILENCE))
    assert (table[0] == SILENCE).any() and (table[-1] == SILENCE).any()


def test_lora_starts_at_nothing_and_then_counts(tiny):
    config, params = tiny
    inputs = make_inputs(config)
    kernel = params["blocks"]["self_attn"]["q"]["kernel"]
    down = jax.random.normal(jax.random.key(3), (kernel.shape[0], kernel.shape[1], 2))
    branch = {"down": down, "up": jnp.zeros((kernel.shape[0], 2, kernel.shape[2])), "scale": jnp.ones(kernel.shape[0])}
    lora = {"blocks": {"self_attn": {"q": branch}}}
    plain = velocity(config, params, inputs)
    np.testing.assert_array_equal(velocity(config, params, inputs, lora=lora), plain)
    branch["up"] = 0.1 * jax.random.normal(jax.random.key(4), branch["up"].shape)
    merged = jax.tree.map(lambda leaf: leaf, params)
    merged["blocks"]["self_attn"]["q"]["kernel"] = kernel + branch["down"] @ branch["up"]
    np.testing.assert_allclose(velocity(config, params, inputs, lora=lora), velocity(config, merged, inputs), atol=2e-5)


def test_bfloat16_stays_near_float32(tiny):
    config, params = tiny
    half = dataclasses.replace(config, dtype="bfloat16")
    inputs = make_inputs(config)
    exact, rounded = velocity(config, params, inputs), velocity(half, params, inputs)
    assert rounded.dtype == jnp.float32
    assert np.abs(exact - rounded).max() < 0.05 * np.abs(exact).max()


def test_gradients_reach_every_parameter(tiny):
    config, params = tiny
    inputs = make_inputs(config)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(velocity(config, p, inputs)))))(params)
    # a constant added to every logit of a softmax row cancels
    dead = [
        jax.tree_util.keystr(path)
        for path, grad in jax.tree_util.tree_leaves_with_path(grads)
        if not np.abs(grad).max() > 0 and "k_audio']['bias" not in jax.tree_util.keystr(path)
    ]
    assert dead == []
