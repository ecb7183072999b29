"""An endless supply of training clips with known answers: an index goes in, a clip with all its truth comes out.

A record is a pure function of (config, index): nothing is stored, nothing depends on order, so a position is a number
and resuming is exact. Voices and looks of the two splits never meet.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import grain
import numpy as np

from kavatar_jax.puppets.articulation import mouth_shapes
from kavatar_jax.puppets.drive import drive
from kavatar_jax.puppets.identity import Identity, sample_identity
from kavatar_jax.puppets.performance import Script, perform, sample_script
from kavatar_jax.puppets.prompts import describe
from kavatar_jax.puppets.room import record, sample_room
from kavatar_jax.puppets.stage import render
from kavatar_jax.puppets.state import column, rest_state
from kavatar_jax.puppets.voice import sample_voice, utter
from kavatar_jax.types import SAMPLE_RATE

MARGIN = 2  # seconds of a recording before a clip, for `drive` to judge by, and after it, where speech goes on
SPLITS = {"train": 0, "held out": 1 << 30}  # where the seeds of a split's looks, voices and rooms begin


@dataclass(frozen=True, kw_only=True)
class RecordsConfig:
    """frames: of a clip; fps must divide the sample rate, so that each frame has a whole number of samples;
    identities: how many looks (and as many voices) a split has; silent: share of clips in which nobody speaks;
    driven: how far the mouth's opening is what `drive` makes of the recording, in place of what the phones say; memory:
    samples of the recording before a clip that come with it, in half of all clips with the beginning of the recording."""

    seed: int = 0
    split: str = "train"
    frames: int = 49
    height: int = 128
    width: int = 128
    fps: int = 25
    identities: int = 1 << 20
    silent: float = 0.04
    driven: float = 0.0
    memory: int = 0

    def __post_init__(self):
        if self.split not in SPLITS:
            raise ValueError(f"unknown split {self.split!r}; there are {', '.join(map(repr, SPLITS))}")
        if self.fps < 1 or SAMPLE_RATE % self.fps:
            raise ValueError(f"fps {self.fps} does not divide {SAMPLE_RATE} Hz; 16, 20, 25, 32 and 50 do")
        if self.frames < 1:
            raise ValueError(f"frames is {self.frames}; a clip needs at least one")
        if not 1 <= self.identities <= 1 << 20:
            raise ValueError(f"identities is {self.identities}; it must be between 1 and {1 << 20}")
        if self.memory < 0:
            raise ValueError(f"memory is {self.memory} samples; it must be at least 0")


class Performance(NamedTuple):
    """A clip before its pictures. sound: (config.memory + S,) float32, from the memory on, silence as long as there is no
    recording; state: (F, K) float32; rng: of what is still to be chosen."""

    identity: Identity
    script: Script
    sound: np.ndarray
    state: np.ndarray
    rng: np.random.Generator


class Records:
    """A random-access source, as grain wants it. `records[i]` is a dict of

    video: (F, H, W, 3) uint8             audio: (config.memory + S,) float32 in [-1, 1], 16 kHz, S = F * 16000 / fps exactly
    portrait: (H, W, 3) uint8, at rest    face_mask, lip_mask: (F, H, W) bool
    state: (F, K) float32, see `state.COLUMNS`
    prompt, emotion, action, camera: str (action: names joined by "+", or "none")      identity: int, its seed
    """

    def __init__(self, config: RecordsConfig):
        self.config = config

    def __len__(self) -> int:
        return 1 << 31

    def perform(self, index: int) -> Performance:
        """What is heard and done in a clip; most of a record's time goes into its pictures."""
        config = self.config
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} is not in 0..{len(self) - 1}")
        first = SPLITS[config.split]
        rng = np.random.default_rng([config.seed, first, int(index)])
        identity = sample_identity(first + int(rng.integers(config.identities)))
        voice = sample_voice(first + int(rng.integers(config.identities)), identity.person)
        room = sample_room(first + int(rng.integers(config.identities)))
        seed = int(rng.integers(1 << 62))
        seconds = config.frames / config.fps
        script = sample_script(rng, seconds)
        mood = {"smile": 1.0, "neutral": 0.0, "frown": -1.0}[script.emotion]
        step = SAMPLE_RATE // config.fps
        margin = MARGIN * config.fps if config.driven else 0
        lead = max(margin, -(-config.memory // step))  # frames of the recording before the clip
        if config.memory:  # fewer in half of all clips, none in one of eleven: videos begin like that
            lead = round(lead * np.clip(rng.uniform(-0.2, 2), 0, 1))
        length = lead + config.frames + margin
        speech = utter(voice, length / config.fps, seed=seed, smile=mood, arousal=script.arousal)
        mouth = mouth_shapes(speech.phones, config.fps, length)
        samples, phones = speech.samples, speech.phones
        if rng.random() < config.silent:
            samples, mouth, phones = 0 * samples, 0 * mouth, []
        sound = record(samples, room, seed=seed)
        if config.driven:
            mouth[:, 0] += config.driven * (drive(sound, config.fps)[:, 0] - mouth[:, 0])
        began = lead / config.fps
        phones = [replace(phone, start=phone.start - began, end=phone.end - began) for phone in phones]
        mouth = mouth[lead:][: config.frames]
        state = perform(mouth, script, fps=config.fps, seed=seed, phones=phones)
        heard = np.pad(sound, (config.memory, 0))[lead * step :][: config.memory + config.frames * step]
        return Performance(identity, script, heard, state, rng)

    def __getitem__(self, index: int) -> dict:
        config = self.config
        identity, script, sound, state, rng = self.perform(index)
        footage = render(identity, state, height=config.height, width=config.width)
        return {
            "video": footage.video,
            "audio": sound,
            "prompt": describe(identity, script, rng),
            "portrait": _portrait(identity, state, config),
            "face_mask": footage.face_mask,
            "lip_mask": footage.lip_mask,
            "state": state,
            "emotion": script.emotion,
            "action": "+".join(action.name for action in script.actions) or "none",
            "camera": script.camera,
            "identity": identity.seed,
        }


def stream(config: RecordsConfig, *, threads: int = 1, ahead: int = 2) -> grain.IterDataset:
    """Records 0, 1, 2, ... without end; its iterator's get_state and set_state keep the position exactly.

    threads: that make records; ahead: how many are kept ready. The order does not depend on either.
    """
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    return grain.MapDataset.source(Records(config)).repeat().to_iter_dataset(options)


def _portrait(identity, state: np.ndarray, config: RecordsConfig) -> np.ndarray:
    """The puppet at rest in the light in which the clip begins."""
    rest = rest_state(1)
    for name in ("light", "light_x"):
        column(rest, name)[:] = column(state, name)[0]
    return render(identity, rest, height=config.height, width=config.width).video[0]
