"""Where clips come from: a bucket goes in, a random-access source of records comes out.

A record of the sources "puppets" and "clips" is a dict:
    name: what to call it in messages                  video: (F, H, W, 3) uint8 of the bucket's source_size
    samples: (n,) float32, a memory and then F frames  face, lip: (F, H, W) bool, or uint8 with 255 inside
    prompt: str                                        portrait: (H, W, 3) uint8, where there is one
    director: (L, D) float32, where there is one
The memory is what was heard before the first frame, Config.memory_samples; silence where the recording begins later.
One of "voices" has a name, samples, and `mouth`, (F, 2) float32 opening and width.
One of "prompts" has a name, a prompt and `meant`, (len(MEANINGS),) float32 of what the prompt asks for.
One of "prepared" holds a row of every field of a Batch; see `prepared`.
"""

import functools
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from kavatar_jax.config import Config
from kavatar_jax.director.rules import direct
from kavatar_jax.media.arrays import load_arrays
from kavatar_jax.media.audio import load_speech
from kavatar_jax.media.image import resize
from kavatar_jax.media.video import read_frames
from kavatar_jax.puppets.identity import sample_identity
from kavatar_jax.puppets.performance import ACTIONS, CAMERAS, sample_script
from kavatar_jax.puppets.prompts import describe
from kavatar_jax.puppets.records import SPLITS, Performance, Records, RecordsConfig
from kavatar_jax.puppets.state import column
from kavatar_jax.puppets.voice import sample_voice, utter
from kavatar_jax.training.config import Bucket, DataConfig
from kavatar_jax.training.prepared import Prepared
from kavatar_jax.types import SAMPLE_RATE, Request, Speech

MEANINGS = ("smile", "neutral", "frown", *ACTIONS, *CAMERAS)
STRETCHES = 4  # of one performance: what a voice is like and the sound around a clip are made once for all of them
PROMPTS = 0x7E  # keeps the chances of prompts apart from those of records
MASK_FOLDERS = {"face": "face_masks", "lip": "lip_masks"}


class Source(Protocol):
    """Records by number. endless: they are taken in order, and none twice."""

    endless: bool

    def __len__(self) -> int: ...

    def record(self, index: int, rng: np.random.Generator) -> dict[str, Any]: ...


def open_source(config: DataConfig, bucket: Bucket, model: Config) -> Source:
    """Records as `model` sees and hears them. ValueError if what the config names is not there."""
    if config.source == "prepared":
        return Prepared(config, bucket)
    if config.source == "clips":
        return ClipFolders(config, bucket, model)
    if config.source == "prompts":
        return PuppetPrompts(config)
    return {"puppets": Puppets, "voices": PuppetVoices}[config.source](config, bucket, model)


class Puppets:
    """The known-answer world."""

    endless = True

    def __init__(self, config: DataConfig, bucket: Bucket, model: Config):
        self._directed = config.directed
        width, height = bucket.source_size
        number = config.buckets.index(bucket)  # buckets do not show the same performances at two sizes
        self._records = Records(
            RecordsConfig(
                seed=config.seed + 1000003 * number,
                split=config.split,
                frames=bucket.frames,
                width=width,
                height=height,
                fps=model.fps,
                driven=config.driven,
                memory=model.memory_samples,
            )
        )

    def __len__(self) -> int:
        return len(self._records)

    def record(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        record = self._records[index]
        prompt = record["prompt"]
        if self._directed:  # for what is said in the clip itself
            prompt = directed_prompt(record | {"audio": record["audio"][self._records.config.memory :]})
        return {
            "name": f"puppet {self._records.config.seed}/{index}",
            "video": record["video"],
            "samples": record["audio"],
            "face": record["face_mask"],
            "lip": record["lip_mask"],
            "prompt": prompt,
            "portrait": record["portrait"],
        }


class PuppetVoices:
    """What puppets say and how their mouths move for it, in stretches of `frames`; STRETCHES of them follow each other."""

    endless = True

    def __init__(self, config: DataConfig, bucket: Bucket, model: Config):
        self._frames, self._memory = bucket.frames, model.memory_samples
        self._records = RecordsConfig(
            seed=config.seed,
            split=config.split,
            frames=STRETCHES * bucket.frames,
            fps=model.fps,
            driven=config.driven,
            memory=model.memory_samples,
        )
        self._samples = bucket.frames * SAMPLE_RATE // model.fps

    def __len__(self) -> int:
        return 1 << 31

    def record(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        number, part = divmod(index, STRETCHES)
        told = _perform(self._records, number)
        mouth = np.stack([column(told.state, name) for name in ("mouth_open", "mouth_width")], axis=1)
        return {
            "name": f"voice {index}",
            "samples": told.sound[part * self._samples :][: self._memory + self._samples],
            "mouth": mouth[part * self._frames :][: self._frames],
        }


@functools.lru_cache(maxsize=8)
def _perform(config: RecordsConfig, index: int) -> Performance:
    return Records(config).perform(index)


class PuppetPrompts:
    """What puppets are told to do, as the director would word it, and what of it there is to understand."""

    endless = True

    def __init__(self, config: DataConfig):
        self._seed, self._first = config.seed, SPLITS[config.split]

    def __len__(self) -> int:
        return 1 << 31

    def record(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        rng = np.random.default_rng([self._seed, self._first, index, PROMPTS])
        identity = sample_identity(self._first + int(rng.integers(1 << 20)))
        script = sample_script(rng, rng.uniform(1, 4))
        told = {"prompt": describe(identity, script, rng), "audio": _some_speech(int(rng.integers(16)))}
        grey = np.full((8, 8, 3), 128, np.uint8)
        prompt = directed_prompt({**told, "portrait": grey}) if rng.random() < 0.7 else told["prompt"]
        names = {script.emotion, script.camera, *(action.name for action in script.actions)}
        meant = np.array([name in names for name in MEANINGS], np.float32)
        return {"name": f"prompt {self._seed}/{index}", "prompt": prompt, "meant": meant}


def directed_prompt(record: dict[str, Any]) -> str:
    """The prompt of the director's first shot for a puppet's own words, voice and looks: what inference would read."""
    request = Request(portrait=record["portrait"], speech=Speech(samples=record["audio"]), instruction=record["prompt"])
    return direct(request).shots[0].prompt


@functools.cache
def _some_speech(seed: int) -> np.ndarray:
    return utter(sample_voice(seed), 1.5, seed=seed).samples


class ClipFolders:
    """Folders as StableAvatar lays them out, listed in a text file, one to a line:

        sub_clip.mp4  audio.wav  face_masks/frame_0.png ...  lip_masks/frame_0.png ...  and, if you like,
        prompt.txt  portrait.png  director.npy

    A stretch of `frames` at the run's frame rate is taken from a random place. A clip that is too short holds its last
    frame in silence. Where there is no prompt.txt the path says which of the release's three prompts it is.
    """

    endless = False

    def __init__(self, config: DataConfig, bucket: Bucket, model: Config):
        self._config, self._bucket, self._fps, self._memory = config, bucket, model.fps, model.memory_samples
        listing = Path(config.folder) / bucket.clips
        if not bucket.clips or not listing.is_file():
            raise ValueError(f"a bucket's clips is {bucket.clips!r}; name a file in {config.folder} that lists folders")
        lines = [line.strip() for line in listing.read_text().splitlines()]
        self._folders = [Path(config.folder, line) for line in lines if line]
        if not self._folders:
            raise ValueError(f"{listing} lists no folders")

    def __len__(self) -> int:
        return len(self._folders)

    def record(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        folder, bucket, fps, size = self._folders[index], self._bucket, self._fps, self._bucket.source_size
        frames = list(read_frames(folder / "sub_clip.mp4", fps=fps))
        start = int(rng.integers(max(0, len(frames) - bucket.frames) + 1))
        chosen = np.minimum(np.arange(start, start + bucket.frames), len(frames) - 1)
        record = {
            "name": str(folder),
            "video": np.stack([resize(frames[i], size) for i in chosen]),
            "samples": _stretch(load_speech(folder / "audio.wav").samples, start, bucket.frames, fps, self._memory),
            "prompt": _prompt(folder),
        }
        for name, where in MASK_FOLDERS.items():
            record[name] = self._masks(folder / where, chosen, len(frames))
        if (folder / "portrait.png").is_file():
            record["portrait"] = resize(np.asarray(Image.open(folder / "portrait.png").convert("RGB")), size)
        if (folder / "director.npy").is_file():
            record["director"] = load_arrays(folder / "director.npy").astype(np.float32)
        return record

    def _masks(self, folder: Path, chosen: np.ndarray, count: int) -> np.ndarray:
        """Masks are numbered as the frames of the file; those nearest in time are taken."""
        width, height = self._bucket.source_size
        files = sorted(folder.glob("*.png"), key=lambda file: int(file.stem.rpartition("_")[2]))
        if not files and self._config.whole_masks:
            return np.full((len(chosen), height, width), 255, np.uint8)
        if not files:
            raise ValueError(f"{folder} holds no masks; make them, or set data.whole_masks to do without")
        nearest = np.clip(np.round((chosen + 0.5) * len(files) / count - 0.5).astype(int), 0, len(files) - 1)
        return np.stack([np.asarray(Image.open(files[i]).convert("L").resize((width, height))) for i in nearest])


def _stretch(samples: np.ndarray, start: int, frames: int, fps: int, memory: int) -> np.ndarray:
    first, count = round(start * SAMPLE_RATE / fps), memory + round(frames * SAMPLE_RATE / fps)
    heard = np.pad(samples, (memory, 0))[first : first + count]
    return np.pad(heard, (0, count - len(heard)))


def _prompt(folder: Path) -> str:
    if (folder / "prompt.txt").is_file():
        return (folder / "prompt.txt").read_text(encoding="utf-8").strip()
    doing = {"singing": "singing", "speech": "talking", "dancing": "simultaneously dancing and singing"}
    found = [action for word, action in doing.items() if word in str(folder)]
    if not found:
        raise ValueError(f"{folder} has no prompt.txt, and its path names none of {', '.join(doing)}")
    return f"The protagonist is {found[0]}"
