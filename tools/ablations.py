"""StableAvatar's ablations in the known-answer world, beside what the paper says of its own (arXiv 2508.08248).

    python tools/ablations.py --weights DIR --out FILE.json                       how a long video is sampled
    python tools/ablations.py --weights DIR --train CLIPS --runs DIR --out FILE.json    and what the adapter is made of

Sampling: one held-out puppet talks for --long-frames frames with each fusion of windows and each guidance, and its first
200 frames are held against those from 3,500 on. Training: the adapter, and the attention to it, learn anew inside the
transformer of DIR, --steps steps each on the prepared clips of CLIPS, once whole and four times without a part of it; a run
that was cut short goes on. The figures of the two worlds are not of one kind: what can be compared is which rows are better.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from kavatar_jax.cascade.weights import Weights, load_weights, read_configs
from kavatar_jax.checkpoint.weights import load_component
from kavatar_jax.config import Config, load_config
from kavatar_jax.console import Display, keep_compiled_programs
from kavatar_jax.diffusion.windows import Windows
from kavatar_jax.models.components import abstract, model_of
from kavatar_jax.parallel.mesh import current, make_mesh
from kavatar_jax.parallel.sharding import partition
from kavatar_jax.puppets import judge
from kavatar_jax.training.config import TrainConfig, load_training
from kavatar_jax.training.loop import train
from kavatar_jax.types import Report
from tools.evaluate import performers, table
from tools.scenes import Seen, synthetic, watch

FUSIONS = ("log", "uniform", "fixed", "none")
GUIDANCES = {  # the paper gives no weights of its native guidance
    "none": {"text_scale": 1.0, "audio_scale": 1.0},
    "classifier-free": {"text_scale": 1.0, "audio_scale": 3.0},
    "audio native": {"native": (1.0, 1.0)},
}
ADAPTERS = {
    "whole": {},
    "no modulation": {"modulated": False},
    "no cross-attention": {"looking": False},
    "neither": {"modulated": False, "looking": False},
    "no adapter": {"modulated": False, "looking": False, "layers": 0},
}
PAPER = {  # Long100: FVD (less is better), CSIM, Sync-C; the tables of the other ablations could not be had as text
    "none": {"FVD": 866, "CSIM": 0.822, "Sync-C": 7.48},
    "classifier-free": {"FVD": 822, "CSIM": 0.828, "Sync-C": 7.62},
    "audio native": {"FVD": 532, "CSIM": 0.853, "Sync-C": 8.20},
}
ENDS, LATE = 200, 3500  # frames at the start of a video, and where its late part begins
LEARNING = (r"dit/audio/.*", r"dit/blocks/cross_attn/.*")  # by the adapter's runs
ANEW = (r"dit/audio/.*", r"dit/blocks/cross_attn/[kv]_audio/.*")


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--config", default="demo")
    parser.add_argument("--long-frames", type=int, default=3700, help="of the videos of the first part; 0 for none")
    parser.add_argument("--train", type=Path, metavar="CLIPS", help="clips that tools/prepare.py made")
    parser.add_argument("--recipe", default="demo_dit", help="the config of the runs")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablations"), help="where they are kept")
    parser.add_argument("--steps", type=int, default=400, help="of each run")
    parser.add_argument("--clips", type=int, default=8, help="puppets on which a run is judged, for 4 s each")
    parser.add_argument("--set", dest="fields", action="append", default=[], help="replace a field of the recipe")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    arguments = parser.parse_args(words)
    try:
        config = read_arguments(arguments)
        keep_compiled_programs()
        found: dict[str, list[dict]] = {}
        with jax.set_mesh(make_mesh()), Display(Console(stderr=True)) as display:
            weights = load_weights(arguments.weights, config)
            for title, rows in ablate(arguments, config, weights, display):
                Console(width=150).print(table(title, rows))
                found[title] = rows
                arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    except ValueError as error:
        print(f"ablations: {error}", file=sys.stderr)
        return 2
    return 0


def read_arguments(arguments) -> Config:
    """The run's config, once everything that can be checked without work has been."""
    if arguments.long_frames and arguments.long_frames < 2 * ENDS:
        raise ValueError(f"--long-frames is {arguments.long_frames}; give 0, or at least {2 * ENDS}")
    if not arguments.out.parent.is_dir() or arguments.out.is_dir():
        raise ValueError(f"--out {arguments.out}: is a folder, or in one that does not exist; name a file")
    if arguments.train is None and not arguments.long_frames:
        raise ValueError("there is nothing to do: give --long-frames, or --train with a folder of prepared clips")
    config = load_config(arguments.config)
    if not isinstance(config, Config):
        raise ValueError(f"--config {arguments.config} describes a training run; give that of its model, such as demo")
    if arguments.train is not None:
        recipe(arguments, "whole")
    return read_configs(arguments.weights, config)


def ablate(arguments, config: Config, weights: Weights, report: Report):
    """(title, rows) of every table, as they are done."""
    if arguments.long_frames:
        yield (
            "fusion of windows",
            [{"fusion": name, **sample(arguments, config, weights, report, fusion=name)} for name in FUSIONS],
        )
        yield (
            "guidance, and the paper's Long100",
            [
                {"guidance": name, **sample(arguments, config, weights, report, **fields), **PAPER[name]}
                for name, fields in GUIDANCES.items()
            ],
        )
    if arguments.train is not None:
        rows = []
        for name in ADAPTERS:
            run, out = recipe(arguments, name), arguments.runs / name.replace(" ", "_")
            if train(run, out, resume=True) < run.steps:
                raise ValueError(f"asked to stop; the same command goes on with {out}")
            learnt = dataclasses.replace(config, dit=dataclasses.replace(config.dit, audio=run.model.dit.audio))
            rows.append({"adapter": name, **judge_run(learnt, weights, out, arguments.clips, report)})
        yield f"the adapter, {arguments.steps} steps each", rows


def sample(arguments, config: Config, weights: Weights, report: Report, **fields) -> dict[str, float]:
    """One long video in one pass, judged."""
    config = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, **fields))
    scene = synthetic(0, arguments.long_frames / config.fps, config)
    seen = watch(scene, performers(weights, config, report)["single"], fps=config.fps)
    return judge_long(seen, config)


def judge_long(seen: Seen, config: Config) -> dict[str, float]:
    """Sync and colours, of the first frames and of the late ones, and how visible the edges of windows are."""
    frames = len(seen.reading.smile)
    late = min(LATE, frames - ENDS)
    mouth, truth = seen.mouth
    colours = judge.follow_colours(seen.reading, seen.portrait)
    edges = judge.judge_seams([(seen.steps, window_edges(frames, config))])
    found = {"sync": judge.correlate(mouth, truth)}
    for when, part in (("early", np.s_[:ENDS]), ("late", np.s_[late:])):
        found[f"sync {when}"] = judge.correlate(mouth[part], truth[part])
        found[f"CIEDE {when}"] = float(np.mean([colours[name][part].mean() for name in judge.PARTS]))
    return found | {"edge step / 95th percentile": edges.ratio}


def window_edges(frames: int, config: Config) -> tuple[int, ...]:
    """The frames before those at which a window begins or the one before it ends."""
    length, overlap = config.sampling.window_latents, config.sampling.overlap
    windows = Windows(total=-(-(frames - 1) // 4) + 1, length=length, stride=length - overlap, slots=0)
    starts = np.arange(1, windows.count) * windows.stride
    edges = 4 * np.concatenate([starts, starts + overlap]) - 4  # latent n begins at frame 4 n - 3
    return tuple(sorted(int(edge) for edge in edges if 0 < edge < frames - 1))


def recipe(arguments, name: str) -> TrainConfig:
    """The run in which an adapter learns anew."""
    places = [f"data.folder={arguments.train}", f"weights={arguments.weights}", f"steps={arguments.steps}"]
    run = load_training(arguments.recipe, [*places, *arguments.fields])
    whole = run.model.dit.audio
    if run.task != "dit" or whole is None:
        raise ValueError(f"--recipe {arguments.recipe} does not train a transformer with an audio adapter")
    dit = dataclasses.replace(run.model.dit, audio=dataclasses.replace(whole, **ADAPTERS[name]))
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, dit=dit),
        fresh=ANEW,
        trained=dataclasses.replace(run.trained, patterns=LEARNING),
    )


def judge_run(config: Config, weights: Weights, run: Path, clips: int, report: Report) -> dict[str, float]:
    """Sync of held-out puppets with the transformer that a run left behind."""
    wanted = abstract("dit", config.dit)
    places = partition(wanted, model_of("dit", config.dit).AXES, current())
    weights = dataclasses.replace(weights, dit=load_component(run / "weights" / "dit", wanted, places))
    perform = performers(weights, config, report)["single"]
    pairs = [watch(synthetic(number, 4.0, config), perform, fps=config.fps).mouth for number in range(clips)]
    own, other = judge.judge_sync(pairs), judge.judge_sync(judge.swap_truths(pairs))
    return {"sync": own.pooled, "lag": own.lag, "another's": other.pooled, "shut": judge.judge_silence(pairs)[0]}


if __name__ == "__main__":
    sys.exit(main())
