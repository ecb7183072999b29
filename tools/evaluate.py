"""Judge trained weights in the known-answer world: python tools/evaluate.py --weights DIR --out FILE.json

Puppets and voices that no training has seen perform, their frames are read back, and the readings are held against the
truth (kavatar_jax.puppets.judge says how each number is made). Sections, all unless --only names some:

    sync      mouth opening against what the phones say, one part, and the sound does, three, as in the clips that the demo's
              weights were taught (--driven 0 for the phones alone), and with --audio against what puppets.drive makes of
              recordings
    identity  CIEDE2000 of mean colours to the portrait, in the videos of sync
    drift     the same two along one video of --long-frames
    control   prompts for smiles, frowns, turns, a raised hand and zooms; the voice is neutral throughout
    seams     the joints of the cascade's sub-clips, whatever --mode the other sections use

Tables go to the terminal, numbers to --out after each section, contact sheets and each section's first video to --keep.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from configs.demo import DRIVEN
from kavatar_jax.cascade.command import MODES, with_cache
from kavatar_jax.cascade.pipeline import generate, generate_in_one_pass
from kavatar_jax.cascade.weights import Weights, load_weights, read_configs
from kavatar_jax.config import Config, load_config, set_fields
from kavatar_jax.console import Display, keep_compiled_programs
from kavatar_jax.director.rules import direct
from kavatar_jax.media.video import contact_sheet
from kavatar_jax.parallel.mesh import make_mesh
from kavatar_jax.puppets import judge
from kavatar_jax.puppets.performance import Action, Script
from kavatar_jax.types import Report, silent
from tools.scenes import STILLS, Performer, Scene, Seen, real, synthetic, watch

Section = dict[str, list[dict]]  # title of a table: its rows


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--config", default="demo")
    parser.add_argument("--audio", type=Path, help="a folder of real recordings")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas between")
    parser.add_argument("--mode", choices=MODES, default="single")
    parser.add_argument("--clips", type=int, default=8, help="puppets in each section, and recordings")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each clip")
    parser.add_argument(
        "--driven", type=float, default=DRIVEN, help="share of the truth of synthetic voices that is the sound's"
    )
    parser.add_argument("--long-frames", type=int, default=3700, help="of the video on which drift is measured")
    parser.add_argument("--steps", type=int, help="denoising steps")
    parser.add_argument("--cache", type=Path, help="as of kavatar generate")
    parser.add_argument("--set", dest="fields", action="append", default=[], help="replace a field: sampling.shift=5")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where to keep contact sheets and videos")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    arguments = parser.parse_args(words)
    try:
        config = read_arguments(arguments)
        keep_compiled_programs()
        with jax.set_mesh(make_mesh()), Display(Console(stderr=True)) as display:
            weights = load_weights(arguments.weights, config)
            evaluate(arguments, config, performers(weights, config, display), report=display)
    except ValueError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    return 0


def read_arguments(arguments) -> Config:
    """The run's config, once everything that can be checked without work has been."""
    for name, least in (("clips", 2), ("long_frames", 200)):
        if getattr(arguments, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; it must be at least {least}")
    if not 1 <= arguments.seconds <= 600:
        raise ValueError(f"--seconds is {arguments.seconds:g}; it must be between 1 and 600")
    if not 0 <= arguments.driven <= 1:
        raise ValueError(f"--driven is {arguments.driven:g}; it is a share, between 0 and 1")
    for name in arguments.only.split(","):
        if name not in SECTIONS:
            raise ValueError(
                f"--only {arguments.only}: there is no section {name!r}; choose from {', '.join(SECTIONS)}"
            )
    if not arguments.out.parent.is_dir() or arguments.out.is_dir():
        raise ValueError(f"--out {arguments.out}: is a folder, or in one that does not exist; name a file")
    if arguments.audio is not None:
        _recordings(arguments.audio, arguments.clips)
    steps = [] if arguments.steps is None else [f"sampling.steps={arguments.steps}"]
    config = load_config(arguments.config)
    if not isinstance(config, Config):
        raise ValueError(f"--config {arguments.config} describes a training run; give that of its model, such as demo")
    config = with_cache(config, arguments.cache)
    return read_configs(arguments.weights, set_fields(config, [*steps, *arguments.fields]))


def performers(weights: Weights, config: Config, report: Report) -> dict[str, Performer]:
    """By mode. The cascade goes without a finder of faces, as puppets are drawn."""
    makers = {"single": generate_in_one_pass, "cascade": generate}
    return {mode: partial(make, director=direct, weights=weights, config=config, report=report)
            for mode, make in makers.items()}  # fmt: skip


def evaluate(arguments, config: Config, performers: dict[str, Performer], *, report: Report = silent) -> dict:
    """Every section asked for; returns what --out holds."""
    found: dict = {"order": {key: str(value) for key, value in vars(arguments).items()}, "config": asdict(config)}
    if arguments.keep is not None:
        arguments.keep.mkdir(parents=True, exist_ok=True)
    studio = _Studio(arguments, config, performers, report)
    for name in (name for name in SECTIONS if name in arguments.only.split(",")):
        started = time.perf_counter()
        tables = SECTIONS[name](studio)
        for title, rows in tables.items():
            if title != "clips":
                Console(width=150).print(table(f"{name}: {title}", rows))
        found[name] = {**tables, "seconds": round(time.perf_counter() - started, 1)}
        arguments.out.write_text(json.dumps(_plain(found), indent=1) + "\n")
    return found


class _Studio:
    """Where scenes are made, performed and read. What two sections need is performed once."""

    def __init__(self, arguments, config: Config, performers: dict[str, Performer], report: Report):
        self.arguments, self.config, self._performers, self._report = arguments, config, performers, report
        self._talks: dict[str, list[Seen]] = {}

    def talks(self) -> dict[str, list[Seen]]:
        """Held-out puppets that just talk, by where their voices come from."""
        if not self._talks:
            count, seconds, audio = self.arguments.clips, self.arguments.seconds, self.arguments.audio
            scenes = {"synthetic": [self.talk(number, seconds) for number in range(count)]}
            if audio is not None:
                paths = enumerate(_recordings(audio, count))
                scenes["real"] = [real(count + i, path, seconds, self.config) for i, path in paths]
            self._talks = {source: self.watch(f"sync {source}", found) for source, found in scenes.items()}
        return self._talks

    def talk(self, number: int, seconds: float) -> Scene:
        return synthetic(number, seconds, self.config, driven=self.arguments.driven)

    def watch(self, title: str, scenes: list[Scene], *, mode: str | None = None) -> list[Seen]:
        """Perform and read; keep a sheet of all and a video of the first."""
        perform, keep = self._performers[mode or self.arguments.mode], self.arguments.keep
        file = title.replace(" ", "_")
        seen = []
        for number, scene in enumerate(scenes):
            film = keep / f"{file}.mp4" if keep is not None and not seen else None
            seen.append(watch(scene, perform, fps=self.config.fps, film=film))
            self._report(title, number + 1, len(scenes))
        if keep is not None:
            tiles = [still for one in seen for still in one.stills]
            Image.fromarray(contact_sheet(tiles, columns=STILLS + 1)).save(keep / f"{file}.png")
        return seen


def judge_sync(studio: _Studio) -> Section:
    tables: Section = {"correlation": [], "silence": [], "clips": []}
    for source, seen in studio.talks().items():
        pairs = [one.mouth for one in seen]
        for truth, against in (("own", pairs), ("another's", judge.swap_truths(pairs))):
            tables["correlation"].append({"voices": source, "truth": truth, **asdict(judge.judge_sync(against))})
        share, frames = judge.judge_silence(pairs)
        tables["silence"].append({"voices": source, "frames": frames, "shut": share})
        tables["clips"] += [{"name": one.scene.name, **asdict(judge.judge_sync([one.mouth]))} for one in seen]
    return tables


def judge_identity(studio: _Studio) -> Section:
    tables: Section = {"CIEDE2000 to the portrait": [], "clips": []}
    for source, seen in studio.talks().items():
        found = [judge.judge_colours(one.reading, one.portrait) for one in seen]
        for what, merge in (("mean", np.mean), ("worst", np.max)):
            row = {part: float(merge([colours[part] for colours in found])) for part in judge.PARTS}
            tables["CIEDE2000 to the portrait"].append({"voices": source, "of clips": what, **row})
        tables["clips"] += [{"name": one.scene.name, **row} for one, row in zip(seen, found, strict=True)]
    return tables


def judge_drift(studio: _Studio) -> Section:
    config, frames = studio.config, studio.arguments.long_frames
    scene = studio.talk(0, frames / config.fps)
    (seen,) = studio.watch("drift", [scene])
    colours = judge.follow_colours(seen.reading, seen.portrait)
    sync = judge.follow_sync(*seen.mouth)
    rows = [{"what": f"{part}, CIEDE2000", **asdict(judge.judge_drift(colours[part]))} for part in judge.PARTS]
    rows.append({"what": "sync, correlation", **asdict(judge.judge_drift(sync, every=100))})
    return {f"{len(seen.reading.smile)} frames, slopes per 100": rows}


def judge_control(studio: _Studio) -> Section:
    scripts = {judge.NEUTRAL: Script(), "smile": Script(emotion="smile"), "frown": Script(emotion="frown")}
    seconds = studio.arguments.seconds
    for name in ("turn left", "turn right", "raise hand"):
        scripts[name] = Script(actions=(Action(name, 0.0, seconds),))
    for name in ("zoom in", "zoom out"):
        scripts[name] = Script(camera=name)
    scenes = [
        synthetic(number, seconds, studio.config, asked=asked, script=script)
        for number in range(studio.arguments.clips)
        for asked, script in scripts.items()
    ]
    seen = studio.watch("control", scenes)
    trials = [judge.Trial(one.scene.puppet, one.scene.asked, one.reading) for one in seen]
    found = judge.judge_control(trials)
    neutral = {trial.puppet: trial.reading for trial in trials if trial.asked == judge.NEUTRAL}
    clips = [
        {
            "name": one.scene.name,
            "asked": one.scene.asked,
            "prompt": one.scene.request.instruction,
            "responses": {kind: judge.response(kind, one.reading, neutral[one.scene.puppet]) for kind in judge.BARS},
        }
        for one in seen
    ]
    title = "chance: judged on the family's videos that were asked for something else or, but for emotions, for nothing"
    return {title: [{"asked": asked, **asdict(control)} for asked, control in found.items()], "clips": clips}


def judge_seams(studio: _Studio) -> Section:
    first = 2 * studio.arguments.clips
    numbers = range(first, first + studio.arguments.clips)
    scenes = [synthetic(number, studio.arguments.seconds, studio.config) for number in numbers]
    seen = studio.watch("seams", scenes, mode="cascade")
    found = judge.judge_seams([(one.steps, one.cuts) for one in seen])
    clips = [{"name": one.scene.name, "cuts": one.cuts, "steps": one.steps.round(3).tolist()} for one in seen]
    return {"step across a joint, usual: 95th percentile of the others": [asdict(found)], "clips": clips}


SECTIONS: dict[str, Callable[[_Studio], Section]] = {
    "sync": judge_sync,
    "identity": judge_identity,
    "drift": judge_drift,
    "control": judge_control,
    "seams": judge_seams,
}


def _recordings(folder: Path, count: int) -> list[Path]:
    """The first of a folder's files; one that is no recording is an error when it is loaded."""
    if not folder.is_dir():
        raise ValueError(f"--audio {folder}: there is no such folder")
    paths = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if len(paths) < 2:
        raise ValueError(f"--audio {folder}: give two recordings or more, as each is also held against another's truth")
    return paths[:count]


def table(title: str, rows: list[dict]) -> Table:
    """Rows with the same keys, numbers to three places."""
    table = Table(*(name.replace("_", " ") for name in rows[0]), title=title, title_justify="left")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    return table


def _plain(value):
    """What JSON can hold: nan becomes null."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
