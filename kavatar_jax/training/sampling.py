"""A look at what has been learnt: fixed clips, performed again by the averaged weights, as videos and a contact sheet."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from PIL import Image

from kavatar_jax.config import Config
from kavatar_jax.diffusion import guidance
from kavatar_jax.diffusion.flow import TRAIN_STEPS, sampling_sigmas
from kavatar_jax.diffusion.guidance import Branch
from kavatar_jax.diffusion.solver import euler
from kavatar_jax.media.video import contact_sheet, write_video
from kavatar_jax.models import vae
from kavatar_jax.models.audio_adapter import slice_table
from kavatar_jax.models.dit import DiT, Inputs
from kavatar_jax.parallel.sharding import batch_slots, replicated
from kavatar_jax.training import encoders
from kavatar_jax.training.config import SamplesConfig, TrainConfig
from kavatar_jax.training.data import Clips, Loader
from kavatar_jax.training.objective import Batch, join_condition
from kavatar_jax.training.reconstruction import to_pixels
from kavatar_jax.types import Params, Speech

SHEET_FRAMES = 8  # of each clip

Perform = Callable[[Params], np.ndarray]  # parameters -> the clips performed anew, (B, F, H, W, 3) uint8


def make_perform(
    model: Config, look: SamplesConfig, seed: int, mesh
) -> Callable[[Params, Params, Batch, Clips], jax.Array]:
    """(parameters, frozen, batch, clips) -> the clips performed anew from noise, (B, F, H, W, 3) uint8 on every process."""

    def perform(whole: Params, blank, batch: Batch, key):
        noise = jax.random.normal(key, (*batch.latents.shape[:-1], batch.latents.shape[-1] // 2))
        branches = guidance.text_and_audio(look.text_scale, look.audio_scale)
        told = [tell(whole["params"], batch, blank, branch, model) for branch in branches]
        sigmas = jnp.asarray(sampling_sigmas(look.steps, look.shift, double_shift=False))

        def step(x, levels):
            velocities = [_velocity(whole, inputs, x, levels[0], model) for inputs in told]
            return euler(x, guidance.combine(jnp.stack(velocities), branches), *levels), None

        latents, _ = jax.lax.scan(step, noise, (sigmas[:-1], sigmas[1:]))
        return to_pixels(vae.decode(whole["params"]["vae"], latents, model.vae))

    compiled = jax.jit(perform, out_shardings=replicated(mesh))
    key = jax.random.key(seed)
    return lambda whole, frozen, batch, clips: compiled(whole, frozen["blank"], batch, key)


def tell(params: Params, batch: Batch, blank, branch: Branch, model: Config) -> Inputs:
    """What one branch of guidance is told; latents and timestep are still to be put in."""
    B, T = batch.latents.shape[:2]
    text = batch.text if branch.positive else jnp.broadcast_to(blank, batch.text.shape)
    text = encoders.read(params, text, model) if text.ndim == 2 else text
    image, speech, slices = batch.image, batch.speech, None
    if image is not None and image.ndim == 4:
        image = encoders.see(params, image, model)
    if speech is not None:
        speech = encoders.listen(params, speech, model) if speech.ndim == 2 else speech
        table = slice_table(speech.shape[1], 4 * (T - 1) + 1)
        slices = jnp.broadcast_to(jnp.asarray(table), (B, *table.shape))
    condition = None
    if model.dit.in_channels > model.dit.out_channels:
        shown = jnp.split(batch.condition, 2, axis=-1)[0]
        condition = join_condition(batch.given, shown)
    return Inputs(
        latents=batch.latents, timestep=jnp.zeros(B), text=text, condition=condition, image=image, speech=speech,
        slices=slices, heard=jnp.full(B, branch.heard), director=batch.director,
    )  # fmt: skip


class Samples:
    """Called with (step, parameters) every `every` steps; writes samples/000500_0.mp4 ... and samples/000500.png.

    Left the clip as recorded, right as performed, with its sound.
    """

    def __init__(
        self, every: int, real: np.ndarray, sound: np.ndarray | None, fps: int, perform: Perform, folder: Path
    ):
        self.every, self._real, self._sound, self._fps = every, real, sound, fps
        self._perform, self._folder = perform, folder

    def __call__(self, step: int, params: Params) -> Path | None:
        """The contact sheet's path, on the first process; rows are the clips in turn, as recorded and as performed."""
        made = self._perform(params)
        if jax.process_index():
            return None
        self._folder.mkdir(parents=True, exist_ok=True)
        chosen = np.unique(np.linspace(0, made.shape[1] - 1, SHEET_FRAMES).astype(int))
        for i, (real, drawn) in enumerate(zip(self._real, made, strict=True)):
            frames = np.concatenate([real, drawn], axis=2)
            write_video(self._folder / f"{step:06d}_{i}.mp4", frames, fps=self._fps, speech=self._speech(i))
        rows = np.stack([self._real[:, chosen], made[:, chosen]], axis=1)
        path = self._folder / f"{step:06d}.png"
        sheet = contact_sheet(rows.reshape(-1, *rows.shape[3:]), columns=len(chosen))
        Image.fromarray(sheet).save(path)
        return path

    def _speech(self, clip: int) -> Speech | None:
        if self._sound is None:
            return None
        heard = self._sound[clip]  # normalised; as loud as it can be
        return Speech(samples=heard / max(1e-6, float(np.abs(heard).max())))


def open_samples(config: TrainConfig, task, fixed: Params, mesh, out: Path) -> Samples | None:
    """The samples that the config asks for, if any; `task` is a tasks.Task, `fixed` what its step is given."""
    if config.samples is None:
        return None
    look, slots = config.samples, batch_slots(mesh)
    shown = look.data.buckets[0].batch
    bucket = replace(look.data.buckets[0], batch=slots * -(-shown // slots))  # a whole number for each slot of the mesh
    clips = next(Loader(replace(look.data, buckets=(bucket,)), task.row, config.model, mesh)).clips
    batch = task.encode(fixed, clips)

    def perform(whole: Params) -> np.ndarray:
        return np.asarray(task.perform(whole, fixed, batch, clips))[:shown]

    sound = None if clips.samples is None else _gather(clips.samples)[:, config.model.memory_samples :]
    return Samples(look.every, _gather(clips.video)[:shown], sound, config.model.fps, perform, out / "samples")


def _velocity(whole: Params, inputs: Inputs, x, sigma, model):
    B = x.shape[0]
    inputs = inputs._replace(latents=x, timestep=jnp.full(B, sigma * TRAIN_STEPS))
    variables = {"params": whole["params"]["dit"], "lora": whole["lora"].get("dit", {})}
    return DiT(model.dit).apply(variables, inputs).velocity


def _gather(x) -> np.ndarray:
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
