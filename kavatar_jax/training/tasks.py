"""What can be learnt: the networks each task needs, its batches, its loss and how a sample of it is made."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import numpy as np

from kavatar_jax.checkpoint.bridge import flatten
from kavatar_jax.config import Config
from kavatar_jax.media.text import ByteTokenizer, Tokenizer, load_tokenizer
from kavatar_jax.models.components import COMPONENTS, abstract, model_of
from kavatar_jax.parallel.mesh import current
from kavatar_jax.parallel.sharding import batch_sharding, replicated
from kavatar_jax.training import encoders, flops, hearing, objective, reading, reconstruction, sampling
from kavatar_jax.training.config import Bucket, TrainConfig, latent_size
from kavatar_jax.training.data import Clips, Loaded, Row, clip_row, footage_row
from kavatar_jax.training.encode import encode
from kavatar_jax.training.prepared import check_learning
from kavatar_jax.training.sources import MEANINGS
from kavatar_jax.training.state import drawn_anew, join, learning, learns
from kavatar_jax.training.step import Losses
from kavatar_jax.types import SAMPLE_RATE, Params

MEASURED_BATCHES = 16


class Work(NamedTuple):
    """Of one clip. tokens: what the transformer sees of it; flops: of training on it, 0 where that is not counted."""

    tokens: int
    flops: float


class Task(NamedTuple):
    """components: networks to load; row: from a record to its row of a batch; learning: components of which some learns

    prepare: (frozen parameters) -> what the step is given beside the state; encode: (that, Clips) -> batch
    draw, losses: as `make_step` wants them; perform: (parameters, that, batch, clips) -> frames (B, F, H, W, 3) uint8
    work: (bucket, share of weights that learns) -> of one clip; settle: (parameters, batches) -> the model as it is now
    """

    components: list[str]
    learning: frozenset[str]
    row: Row
    prepare: Callable[[Params], Params]
    encode: Callable[[Params, Any], Any]
    draw: Callable
    losses: Losses
    perform: Callable[[Params, Params, Any, Clips], jax.Array]
    work: Callable[[Bucket, float], Work]
    settle: Callable[[Params, Iterator[Loaded]], Config]


def open_task(config: TrainConfig, mesh) -> Task:
    return {"dit": dit_task, "vae": vae_task, "text": text_task, "speech": speech_task}[config.task](config, mesh)


def dit_task(config: TrainConfig, mesh) -> Task:
    """The transformer, and with it whichever encoders `trained` names."""
    model, goal, live = config.model, config.objective, learning(config)
    tokenizer, components = open_tokenizer(config), _networks(config, live)

    def prepare(frozen: Params) -> Params:
        blank, _ = tokenizer([""], model.dit.text_length)
        if "text" not in components:
            blank = np.zeros((1, model.dit.text_length, model.dit.text_width), np.float32)  # never asked for
        elif "text" not in live:
            blank = jax.jit(lambda params: encoders.read(params, blank, model))(frozen["params"])
        return {"weights": frozen, "blank": jax.device_put(blank, replicated(mesh))}

    def to_batch(params: Params, clips: Clips):
        return encode(params, clips, model, masks=goal.masks, live=live)

    programs = len(config.data.buckets) + 1  # and the samples'
    to_batch = jax.jit(chex.assert_max_traces(to_batch, n=programs), out_shardings=batch_sharding(mesh))

    def losses(trained, frozen, batch, draws, clip_level):
        whole = join(trained, frozen["weights"])
        parts = (whole["params"], whole["lora"], batch, frozen["blank"], draws)
        return objective.losses(*parts, model, goal, clip_level=clip_level)

    return Task(
        components=components,
        learning=live,
        row=functools.partial(clip_row, model=model, tokenizer=tokenizer),
        prepare=prepare,
        encode=lambda fixed, clips: to_batch(fixed["weights"]["params"], clips) if isinstance(clips, Clips) else clips,
        draw=lambda key, batch: objective.draw(key, batch, goal),
        losses=losses,
        perform=sampling.make_perform(model, config.samples, config.seed, mesh) if config.samples else _nothing_to_see,
        work=lambda bucket, share: _dit_work(bucket, share, model),
        settle=lambda whole, batches: model,
    )


def vae_task(config: TrainConfig, mesh) -> Task:
    """The autoencoder, on pictures alone."""
    model = config.model.vae
    if learning(config) != {"vae"}:
        raise ValueError(f"the task 'vae' trains the autoencoder alone; trained.patterns is {config.trained.patterns}")

    paths = (f"vae/{path}" for path in flatten(abstract("vae", model)) if path.startswith("encoder/"))
    encoder_learns = any(learns(path, config.trained) for path in paths)

    def settle(whole, batches):  # a decoder that learns alone leaves the latents as they are
        return measure_latents(config.model, whole["params"]["vae"], batches) if encoder_learns else config.model

    def losses(trained, frozen, clips, draws, clip_level):
        params = join(trained, frozen["weights"])["params"]["vae"]
        return reconstruction.losses(params, clips, draws, model, config.reconstruction)

    show = jax.jit(functools.partial(reconstruction.reconstruct, model=model), out_shardings=replicated(mesh))
    return Task(
        components=["vae"],
        learning=frozenset({"vae"}),
        row=footage_row,
        prepare=lambda frozen: {"weights": frozen},
        encode=lambda frozen, clips: clips,
        draw=lambda key, clips: reconstruction.draw(key, clips, model),
        losses=losses,
        perform=lambda whole, frozen, batch, clips: show(whole["params"]["vae"], clips.video),
        work=lambda bucket, share: Work(math.prod(latent_size(bucket.frames, bucket.height, bucket.width, model)), 0.0),
        settle=settle,
    )


def text_task(config: TrainConfig, mesh) -> Task:
    """The text encoder, on prompts alone."""
    model, tokenizer = config.model, open_tokenizer(config)
    if learning(config) != {"text"}:
        raise ValueError(
            f"the task 'text' trains the text encoder alone; trained.patterns is {config.trained.patterns}"
        )
    if model.text.width < len(MEANINGS):
        raise ValueError(f"text.width is {model.text.width}; {len(MEANINGS)} meanings need at least as much")

    def losses(trained, frozen, prompts, draws, clip_level):
        return reading.losses(join(trained, frozen["weights"])["params"], prompts, model)

    length = model.dit.text_length
    return Task(
        components=["text"],
        learning=frozenset({"text"}),
        row=functools.partial(reading.prompt_row, tokenizer=tokenizer, length=length),
        prepare=lambda frozen: {"weights": frozen},
        encode=lambda frozen, prompts: prompts,
        draw=lambda key, prompts: jax.numpy.zeros(len(prompts.ids)),  # there is nothing random
        losses=losses,
        perform=_nothing_to_see,
        work=lambda bucket, share: Work(length, 0.0),
        settle=lambda whole, batches: model,
    )


def speech_task(config: TrainConfig, mesh) -> Task:
    """The speech encoder, on voices and the mouths that belong to them."""
    model = config.model
    if learning(config) != {"speech"}:
        raise ValueError(
            f"the task 'speech' trains the speech encoder alone; trained.patterns is {config.trained.patterns}"
        )
    if model.speech.width < hearing.ANSWERS:
        raise ValueError(f"speech.width is {model.speech.width}; {hearing.ANSWERS} answers need at least as much")

    def losses(trained, frozen, voices, draws, clip_level):
        return hearing.losses(join(trained, frozen["weights"])["params"], voices, model)

    def work(bucket, share):
        samples = round(bucket.frames * SAMPLE_RATE / model.fps)
        return Work(model_of("speech", model.speech).token_count(samples, model.speech), 0.0)

    return Task(
        components=["speech"],
        learning=frozenset({"speech"}),
        row=functools.partial(hearing.voice_row, model=model),
        prepare=lambda frozen: {"weights": frozen},
        encode=lambda frozen, voices: voices,
        draw=lambda key, voices: jax.numpy.zeros(len(voices.samples)),  # there is nothing random
        losses=losses,
        perform=_nothing_to_see,
        work=work,
        settle=lambda whole, batches: model,
    )


def measure_latents(model: Config, params: Params, batches: Iterator[Loaded]) -> Config:
    """The model with the mean and deviation of its latents over some clips, by which they are normalised from now on."""
    measure = jax.jit(
        functools.partial(reconstruction.latent_moments, model=model.vae), out_shardings=replicated(current())
    )
    moments = [jax.device_get(measure(params, next(batches).clips.video)) for _ in range(MEASURED_BATCHES)]
    mean, square = np.mean(np.array(moments, np.float64), axis=0)
    std = np.sqrt(square - np.square(mean))
    measured = dataclasses.replace(
        model.vae, latent_mean=tuple(map(float, mean.round(4))), latent_std=tuple(map(float, std.round(4)))
    )
    return dataclasses.replace(model, vae=measured)


def open_tokenizer(config: TrainConfig) -> Tokenizer:
    """The weights directory's; plain bytes where there are no weights, or none of the text encoder."""
    folder = Path(config.weights) / "tokenizer"
    anew = not config.weights or "text" in drawn_anew(config)
    return ByteTokenizer() if anew and not (config.weights and folder.is_dir()) else load_tokenizer(folder)


def _networks(config: TrainConfig, live: frozenset[str]) -> list[str]:
    """The components that the transformer's task needs, given those that learn."""
    if "vae" in live:
        raise ValueError("the autoencoder does not learn in the task 'dit'; train it first, with task = 'vae'")
    prepared, dit = config.data.source == "prepared", config.model.dit
    if prepared:
        check_learning(config.data, live)
    if not prepared or config.samples is not None:  # clips have to be encoded
        used = {
            "dit": True,
            "vae": True,
            "text": True,
            "image": dit.image_width is not None,
            "speech": dit.audio is not None,
        }
        return [name for name in used if used[name]]
    return [
        name for name in COMPONENTS if name in live | {"dit"} or (name == "text" and config.objective.drop_text > 0)
    ]


def _dit_work(bucket: Bucket, share: float, model: Config) -> Work:
    grid = latent_size(bucket.frames, bucket.height, bucket.width, model.vae)
    samples = round(bucket.frames * SAMPLE_RATE / model.fps)
    spoken = model_of("speech", model.speech).token_count(samples, model.speech)
    seen = 1 + (model.image.image_size // model.image.patch) ** 2
    once = flops.forward(model.dit, grid, image_tokens=seen, speech_tokens=spoken)
    return Work(flops.video_tokens(model.dit, grid), flops.train(once, share))


def _nothing_to_see(*_):
    raise AssertionError("the config asks for no samples")
