"""What `kavatar generate` does: check everything first, run the cascade under a progress display, write the files."""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import time
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

import kavatar_jax
from kavatar_jax.cascade.denoise import Denoise, denoise
from kavatar_jax.cascade.film import pictures_wanted
from kavatar_jax.cascade.pipeline import generate, generate_in_one_pass, generate_without_speech
from kavatar_jax.cascade.weights import Weights, alike, draw_untrained, load_weights, read_configs, read_lora_files
from kavatar_jax.checkpoint.lora import Changes
from kavatar_jax.checkpoint.weights import NO_CHANGES
from kavatar_jax.config import Config, load_config, set_fields
from kavatar_jax.console import Display, keep_compiled_programs
from kavatar_jax.diffusion.caching import read_cache
from kavatar_jax.director.rules import direct
from kavatar_jax.director.storyline import check, read_storyline, write_storyline
from kavatar_jax.media.audio import is_silent, load_speech
from kavatar_jax.media.faces import open_landmarker
from kavatar_jax.media.image import check_size, load_portrait
from kavatar_jax.media.text import ByteTokenizer
from kavatar_jax.media.video import check_writable, write_video
from kavatar_jax.parallel.mesh import make_mesh
from kavatar_jax.puppets.identity import sample_identity
from kavatar_jax.puppets.stage import render_portrait
from kavatar_jax.puppets.voice import sample_voice, utter
from kavatar_jax.types import Report, Request, Scene, Speech, Storyline, Video

SPOKEN = ("cascade", "single")  # modes in which somebody speaks
MODES = (*SPOKEN, "video")
# by how many pictures a plain video is made from: what it is called, and the settings it gets unless others are asked for
KINDS = ("words alone", "a portrait", "a portrait and a last frame")
PLAIN_CONFIGS = ("wan:t2v_1b", "wan:i2v_480p", "wan:flf2v_720p")
PUPPET, PUPPET_SECONDS = 7, 10.0  # who talks, and how long, where no portrait and no speech are given
DEMO = Path(kavatar_jax.__file__).parent / "demo"  # the weights that come with the package
UNTRAINED_SEED = 0  # of the networks that stand in where there are no weights for a config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """The command line, as typed; what a command does not ask for is at rest."""

    out: Path
    portrait: Path | None = None
    speech: Path | None = None
    instruction: str = ""
    config: str = ""
    weights: Path | None = None
    mode: str = "single"
    size: str = ""
    fps: int | None = None
    steps: int | None = None
    seed: int = 0
    storyline: Path | None = None
    storyline_out: Path | None = None
    last_frame: Path | None = None
    frames: int | None = None
    fields: tuple[str, ...] = ()
    loras: tuple[str, ...] = ()
    lora_unused: str = "refuse"
    cache: Path | None = None


def run(order: Order) -> None:
    """Make the video. ValueError, before any work, for whatever is wrong with the order."""
    console = Console(stderr=True)
    keep_compiled_programs()
    config = read_order(order)
    changes = read_lora_files(order.loras, config.dit, unused=order.lora_unused)
    if order.mode == "video":
        request, plan = read_scene(order, config), None
    else:
        request, plan = read_performance(order, config, console)

    started = time.perf_counter()
    with jax.set_mesh(make_mesh(**dataclasses.asdict(config.mesh))), Display(console) as display:
        weights = open_weights(order, config, console, changes)
        display("loading weights", 1, 1)
        video = draw(order, request, plan, weights, config, display)
        write_video(order.out, video.images, fps=video.fps, speech=video.speech, seconds=video.frames / video.fps)
    sidecar = _describe(order, config, plan, display.seconds, video.frames, time.perf_counter() - started)
    _write_whole(sidecar_path(order.out), json.dumps(sidecar, indent=2, ensure_ascii=False) + "\n")
    console.print(f"{order.out}: {video.frames} frames, {video.frames / video.fps:.1f} s of video")


def read_order(order: Order) -> Config:
    """The run's config, after checking every path and number of the order that can be checked without work."""
    config = choose_config(order)
    check_writable(order.out)
    if order.storyline_out is not None and not order.storyline_out.parent.is_dir():
        raise ValueError(f"--storyline-out {order.storyline_out}: the folder does not exist; create it first")
    return config


def choose_config(order: Order) -> Config:
    """The run's config with what the order and the weights directory change in it."""
    if order.mode not in MODES:
        raise ValueError(f"--mode {order.mode} is not one of {', '.join(MODES)}")
    _check_mode(order)
    config = load_config(order.config or _usual_config(order))
    if not isinstance(config, Config):
        raise ValueError(f"--config {order.config} describes a training run; `kavatar train` takes it")
    config = with_cache(config, order.cache)
    fields = []
    if order.size:
        try:
            width, height = map(int, order.size.lower().split("x"))
        except ValueError:
            raise ValueError(f"--size {order.size} is not WIDTHxHEIGHT, as in 512x512") from None
        check_size(width, height, config.grain)
        config = dataclasses.replace(config, width=width, height=height)
    fields += [f"fps={order.fps}"] if order.fps is not None else []
    fields += [f"sampling.window_frames={order.frames}"] if order.frames is not None else []
    fields += [f"sampling.steps={order.steps}"] if order.steps is not None else []
    config = set_fields(config, [*fields, *order.fields])
    folder = find_weights(order, config)
    if folder is not None:
        config = read_configs(folder, config)
    elif order.loras:
        raise ValueError(f"--lora {order.loras[0]} is for weights that have been trained; give --weights DIR too")
    _check_network(order, config)
    _check_guidance(order, config)
    return config


def with_cache(config: Config, path: Path | None) -> Config:
    """A config whose sampling reuses what a file of tools/calibrate_cache.py says; None changes nothing."""
    if path is None:
        return config
    return dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, cache=read_cache(path)))


def read_scene(order: Order, config: Config) -> Scene:
    """What a plain video is made from."""
    size = config.width, config.height
    first, last = (
        None if path is None else load_portrait(path, size=size) for path in (order.portrait, order.last_frame)
    )
    return Scene(instruction=order.instruction, first=first, last=last, seed=order.seed)


def read_request(order: Order, config: Config) -> Request:
    """Portrait and speech as given; without them a puppet and its synthetic voice."""
    portrait = read_portrait(order, config)
    if order.speech is None:
        speech = Speech(samples=utter(sample_voice(PUPPET), PUPPET_SECONDS, seed=PUPPET).samples)
    else:
        speech = load_speech(order.speech)
    return Request(portrait=portrait, speech=speech, instruction=order.instruction, seed=order.seed)


def read_portrait(order: Order, config: Config) -> np.ndarray:
    """(H, W, 3) uint8 at the size of the video; a puppet's where none is given."""
    if order.portrait is None:
        return render_portrait(sample_identity(PUPPET), width=config.width, height=config.height)
    return load_portrait(order.portrait, size=(config.width, config.height))


def read_plan(order: Order, request: Request) -> Storyline:
    """The user's storyline if one is given, else the director's."""
    if order.storyline is None:
        return direct(request)
    return check(read_storyline(order.storyline), request.speech.seconds)


def read_performance(order: Order, config: Config, console: Console) -> tuple[Request, Storyline]:
    """Who says what, and the plan for it, which is written where it is asked for."""
    request = read_request(order, config)
    if is_silent(request.speech):
        console.print(f"{order.speech} is silent: the mouth will stay closed")
    plan = read_plan(order, request)
    if order.storyline_out:
        write_storyline(plan, order.storyline_out)
    return request, plan


def find_weights(order: Order, config: Config) -> Path | None:
    """The weights directory of an order: the one given, else the package's own, which fit the config "demo" alone."""
    return DEMO if order.weights is None and config.name == "demo" else order.weights


def open_weights(order: Order, config: Config, console: Console, changes: Changes = NO_CHANGES) -> Weights:
    """The networks of an order, with what LoRA files add to them, and a word about what they do not know."""
    folder = find_weights(order, config)
    if folder is None:
        console.print(
            f"no --weights: untrained networks of {config.name}'s sizes, so the video shows noise, not a face"
        )
        return draw_untrained(config, UNTRAINED_SEED, ByteTokenizer())
    if folder == DEMO:
        _warn_of_demo(order, config, console)
    return load_weights(folder, config, changes=changes)


def draw(
    order: Order, request: Request | Scene, plan: Storyline | None, weights: Weights, config: Config, report: Report,
    denoise: Denoise = denoise,
) -> Video:  # fmt: skip
    """What the order's mode makes of it."""
    if isinstance(request, Scene):
        return generate_without_speech(request, weights, config, report=report, denoise=denoise)
    assert plan is not None
    if order.mode == "single":
        return generate_in_one_pass(request, lambda _: plan, weights, config, report=report, denoise=denoise)
    landmarker, _ = open_landmarker()
    return generate(request, lambda _: plan, weights, config, landmarker=landmarker, report=report, denoise=denoise)


def sidecar_path(out: Path) -> Path:
    return out.with_suffix(".json")


def _check_mode(order: Order) -> None:
    """ValueError for options that the mode has no use for."""
    if order.mode != "video":
        for name, value in (("--last-frame", order.last_frame), ("--frames", order.frames)):
            if value is not None:
                raise ValueError(f"{name} {value} is for --mode video; a talking video is as long as its speech")
        return
    spoken = {"--speech": order.speech, "--storyline": order.storyline, "--storyline-out": order.storyline_out}
    for name, value in spoken.items():
        if value is not None:
            raise ValueError(
                f"{name} {value}: nobody speaks in --mode video; leave it out, or use --mode cascade or single"
            )
    if order.portrait is None and order.last_frame is not None:
        raise ValueError(f"--last-frame {order.last_frame} needs the first frame too: --portrait FILE")
    if order.portrait is None and not order.instruction:
        raise ValueError("--mode video without a picture has words alone to go by; give --instruction TEXT")
    if order.frames is not None and (order.frames < 5 or order.frames % 4 != 1):
        raise ValueError(
            f"--frames {order.frames} is not 4n+1; the nearest is {4 * max(1, round((order.frames - 1) / 4)) + 1}"
        )


def _usual_config(order: Order) -> str:
    if order.mode == "video":
        if order.weights is None:
            raise ValueError(
                "--mode video needs Wan2.1's weights: --weights DIR, made by tools/convert_checkpoint.py; or try it "
                "untrained with --config wan:tiny"
            )
        return PLAIN_CONFIGS[_pictures_given(order)]
    return "demo" if order.weights is None or alike(order.weights, load_config("demo")) else "stableavatar"


def _check_network(order: Order, config: Config) -> None:
    """ValueError if the transformer was made for another mode or other pictures."""
    name = order.weights or f"--config {config.name}"
    if order.mode != "video":
        if config.dit.audio is None:
            raise ValueError(f"{name} does not listen to speech; use it with --mode video")
    elif config.dit.audio is not None:
        raise ValueError(f"{name} is made for speech: use --mode cascade or single, or plain Wan2.1's weights")
    elif (wanted := pictures_wanted(config.dit)) != (given := _pictures_given(order)):
        raise ValueError(
            f"{name} makes a video from {KINDS[wanted]}, and {KINDS[given]} is given; that is for models such as "
            f"{PLAIN_CONFIGS[given]}"
        )


def _check_guidance(order: Order, config: Config) -> None:
    """ValueError for guidance that a plain video has nothing to be led by."""
    sampling = config.sampling
    if order.mode == "video" and sampling.audio_attention != 1:
        raise ValueError(f"sampling.audio_attention is {sampling.audio_attention:g}, and nobody speaks: leave it at 1")
    if order.mode == "video" and sampling.frame_scale != 1 and not _pictures_given(order):
        raise ValueError(
            f"sampling.frame_scale is {sampling.frame_scale:g}, and there is no picture: leave it at 1, or give --portrait"
        )


def _pictures_given(order: Order) -> int:
    return (order.portrait is not None) + (order.last_frame is not None)


def _warn_of_demo(order: Order, config: Config, console: Console) -> None:
    known = load_config("demo")
    if order.portrait is not None:
        console.print(
            f"the demo weights know drawn puppets only, so {order.portrait} will not look like itself unless it is one; for "
            "people convert StableAvatar's released weights with tools/convert_checkpoint.py and give --weights"
        )
    if (config.width, config.height) != (known.width, known.height):
        console.print(
            f"the demo weights know {known.width}x{known.height} only; at {config.width}x{config.height} they will do badly"
        )


def _describe(order: Order, config: Config, plan: Storyline | None, seconds: dict, frames: int, total: float) -> dict:
    """How the video was made, for the file beside it."""
    packages = ("jax", "jaxlib", "flax", "numpy")
    story = plan and {"summary": plan.summary, "shots": [dataclasses.asdict(shot) for shot in plan.shots]}
    return {
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "order": {name: str(value) if isinstance(value, Path) else value for name, value in vars(order).items()},
        "frames": frames,
        "config": dataclasses.asdict(config),
        **({"storyline": story} if story else {}),
        "seconds": {**{stage: round(value, 2) for stage, value in seconds.items()}, "total": round(total, 2)},
        "devices": [str(device) for device in jax.devices()],
        "versions": {"kavatar_jax": kavatar_jax.__version__, **{p: importlib.metadata.version(p) for p in packages}},
    }


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)
