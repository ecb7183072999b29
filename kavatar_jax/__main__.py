"""The `kavatar` command."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def kavatar():
    """Audio-driven avatar video in JAX: one portrait, a speech recording and an instruction become a talking video."""


@app.command()
def generate(
    out: Annotated[Path, typer.Option(help="Where the video goes; FILE.json beside it tells how it was made.")],
    portrait: Annotated[
        Path | None,
        typer.Option(help="Who talks: png, jpeg, webp, ...; without it a puppet. In mode video the first frame."),
    ] = None,
    last_frame: Annotated[Path | None, typer.Option(help="How a video of --mode video ends.")] = None,
    speech: Annotated[Path | None, typer.Option(help="wav, mp3, flac, m4a, ...; without it a synthetic voice.")] = None,
    instruction: Annotated[str, typer.Option(help="What happens, in words.")] = "",
    config: Annotated[str, typer.Option(help="A name in configs/, NAME:VARIANT, or a file.")] = "",
    weights: Annotated[Path | None, typer.Option(help="Weights directory; without it the demo's.")] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="FILE or FILE:SCALE, added to the transformer; may be given several times.")
    ] = None,
    lora_unused: Annotated[
        str, typer.Option(help="Tensors of such files that nothing here is for: refuse or ignore.")
    ] = "refuse",
    mode: Annotated[
        str,
        typer.Option(
            help="cascade; single: one pass of sliding windows at full size; video: plain Wan2.1, nobody speaks, from the "
            "instruction and, where given, the first frame, or first and last."
        ),
    ] = "cascade",
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT in pixels, multiples of 16.")] = "",
    frames: Annotated[int | None, typer.Option(help="How long a video of --mode video is: 4n+1 frames.")] = None,
    fps: Annotated[int | None, typer.Option(help="Frames a second.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same video.")] = 0,
    storyline: Annotated[Path | None, typer.Option(help="A plan to follow instead of writing one.")] = None,
    storyline_out: Annotated[Path | None, typer.Option(help="Also write the plan here.")] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="Skip the transformer's blocks at some steps, as tools/calibrate_cache.py found."),
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Replace a field: sampling.text_scale=4.")] = None,
):
    """Turn a portrait, a speech recording and an instruction into a talking video."""
    from kavatar_jax.cascade import command

    order = command.Order(
        portrait=portrait, speech=speech, out=out, instruction=instruction, config=config, weights=weights,
        mode=mode, size=size, fps=fps, steps=steps, seed=seed, storyline=storyline, storyline_out=storyline_out,
        last_frame=last_frame, frames=frames, loras=tuple(lora or ()), lora_unused=lora_unused, cache=cache,
        fields=tuple(set_ or ()),
    )  # fmt: skip
    with _speaking_plainly():
        command.run(order)


@app.command("compile")
def compile_(
    config: Annotated[str, typer.Option(help="A name in configs/, NAME:VARIANT, or a file.")] = "",
    weights: Annotated[Path | None, typer.Option(help="Weights directory, of which only the configs are read.")] = None,
    mode: Annotated[str, typer.Option(help="cascade, single or video.")] = "cascade",
    portrait: Annotated[Path | None, typer.Option(help="Mode video: as of kavatar generate.")] = None,
    last_frame: Annotated[Path | None, typer.Option(help="Mode video: as of kavatar generate.")] = None,
    instruction: Annotated[str, typer.Option(help="Mode video: any words, where there is no picture.")] = "",
    frames: Annotated[int | None, typer.Option(help="Mode video: as of kavatar generate.")] = None,
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT in pixels, multiples of 16.")] = "",
    fps: Annotated[int | None, typer.Option(help="Frames a second.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    lengths: Annotated[str, typer.Option(help="Seconds of speech, several with commas between.")] = "10",
    batch: Annotated[bool, typer.Option("--batch", help="What kavatar batch will run, not kavatar generate.")] = False,
    cache: Annotated[Path | None, typer.Option(help="As of kavatar generate.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Replace a field: sampling.text_scale=4.")] = None,
):
    """Compile what `kavatar generate`, or `batch`, will run with such settings on this machine: it then starts at once."""
    from kavatar_jax.cascade import ahead, command

    order = command.Order(
        out=Path("-"), config=config, weights=weights, mode=mode, portrait=portrait, last_frame=last_frame,
        instruction=instruction, frames=frames, size=size, fps=fps, steps=steps, cache=cache, fields=tuple(set_ or ()),
    )  # fmt: skip
    with _speaking_plainly():
        ahead.run(order, lengths, batch=batch)


@app.command()
def batch(
    manifest: Annotated[
        Path,
        typer.Argument(
            help="A line of JSON for every video: name, portrait, speech; where wanted instruction, seed, storyline, mode. "
            "Paths are relative to the manifest."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the videos, NAME.mp4, and of results.jsonl.")],
    config: Annotated[str, typer.Option(help="A name in configs/, NAME:VARIANT, or a file.")] = "",
    weights: Annotated[Path | None, typer.Option(help="Weights directory; without it the demo's.")] = None,
    mode: Annotated[str, typer.Option(help="cascade or single, for lines that do not say.")] = "cascade",
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT in pixels, multiples of 16.")] = "",
    fps: Annotated[int | None, typer.Option(help="Frames a second.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Replace a field: sampling.text_scale=4.")] = None,
):
    """Make many videos. Those that are done are skipped when it is run again; exit 1 if some could not be made."""
    from kavatar_jax.cascade import batch, command

    order = command.Order(
        out=out, config=config, weights=weights, mode=mode, size=size, fps=fps, steps=steps, fields=tuple(set_ or ()),
    )  # fmt: skip
    with _speaking_plainly():
        if not batch.run(manifest, order):
            raise typer.Exit(1)


@app.command()
def stream(
    out: Annotated[
        Path, typer.Option(help="A video that plays while it grows: FILE.mp4; - for raw RGB frames to stdout.")
    ],
    portrait: Annotated[Path | None, typer.Option(help="Who talks; without it a puppet.")] = None,
    speech: Annotated[
        Path, typer.Option(help="- for raw 16-bit mono samples from stdin, as they come; or a recording.")
    ] = Path("-"),
    rate: Annotated[int, typer.Option(help="Of raw samples, in Hz.")] = 16_000,
    follow: Annotated[
        float | None,
        typer.Option(help="The recording (wav or raw) still grows, and is over after so many seconds without growth."),
    ] = None,
    instruction: Annotated[str, typer.Option(help="What happens all the time, in words.")] = "",
    config: Annotated[str, typer.Option(help="A name in configs/, NAME:VARIANT, or a file.")] = "",
    weights: Annotated[Path | None, typer.Option(help="Weights directory; without it the demo's.")] = None,
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT in pixels, multiples of 16.")] = "",
    fps: Annotated[int | None, typer.Option(help="Frames a second.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; fewer answer sooner.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same video.")] = 0,
    cache: Annotated[
        Path | None,
        typer.Option(help="Skip the transformer's blocks at some steps, as tools/calibrate_cache.py found."),
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Replace a field: sampling.window_frames=17.")] = None,
):
    """Turn speech into a talking video while it is being spoken; Ctrl-C ends it."""
    from kavatar_jax.cascade import command
    from kavatar_jax.cascade.stream import run

    order = command.Order(
        portrait=portrait, speech=speech, out=out, instruction=instruction, config=config, weights=weights,
        size=size, fps=fps, steps=steps, seed=seed, cache=cache, fields=tuple(set_ or ()),
    )  # fmt: skip
    with _speaking_plainly():
        run(order, rate=rate, follow=follow)


@app.command()
def train(
    config: Annotated[str, typer.Option(help="A training config: a name in configs/, NAME:VARIANT, or a file.")],
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, logs, samples and weights.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in OUT.")] = False,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Replace a field: steps=100.")] = None,
):
    """Train a network as a config says."""
    from kavatar_jax.training import command

    with _speaking_plainly():
        command.run(config=config, out=out, resume=resume, fields=tuple(set_ or ()))


@contextlib.contextmanager
def _speaking_plainly():
    """One line and exit 2 for whatever the user can mend, 1 for a disk that failed, 130 when interrupted."""
    try:
        yield
    except ValueError as error:
        print(f"kavatar: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except OSError as error:
        print(f"kavatar: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print("kavatar: interrupted; nothing was left under the final name", file=sys.stderr)
        raise typer.Exit(130) from None


def main() -> None:
    app()


if __name__ == "__main__":
    main()
