"""Whole runs on eight devices, from prepared clips and stored weights: logs, resuming, signals, meshes, processes."""

import json
import math
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import train_tiny
from kavatar_jax.checkpoint import weights as files
from kavatar_jax.checkpoint.bridge import flatten
from kavatar_jax.checkpoint.files import Tensors
from kavatar_jax.media.video import probe
from kavatar_jax.models import vae
from kavatar_jax.models.components import COMPONENTS, abstract
from kavatar_jax.parallel.mesh import make_mesh
from kavatar_jax.parallel.sharding import partition, replicated, spec
from kavatar_jax.training import config as kinds
from kavatar_jax.training import data, loop, state
from kavatar_jax.training.command import run as run_command
from kavatar_jax.training.config import (
    Bucket,
    MeshConfig,
)
from kavatar_jax.training.prepare import prepare
from kavatar_jax.types import silent
from tests.puppet_batches import MODEL, OTHER_SIZES, SIZES, take

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with weights, a byte tokenizer and 40 prepared clips, and the config of a run of ten steps from them."""
    folder = tmp_path_factory.mktemp("world")
    tiny = train_tiny.config()
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key == "scale":
            return np.ones(leaf.shape, np.float32)
        return rng.standard_normal(leaf.shape, np.float32) * np.float32(np.prod(leaf.shape[:-1]) ** -0.5)

    for name in ("dit", "text"):
        part = getattr(tiny.model, name)
        params = jax.tree_util.tree_map_with_path(draw, abstract(name, part))
        files.save_component(params, part, folder / "weights" / name)
    (folder / "weights" / "tokenizer").mkdir()
    (folder / "weights" / "tokenizer" / "config.json").write_text('{"kind": "bytes"}')
    write_prepared(folder / "clips", tiny.data.buckets[0], count=40)
    return replace(
        tiny,
        steps=10,
        weights=str(folder / "weights"),
        trained=kinds.TrainedConfig(patterns=kinds.EVERYTHING),
        data=replace(tiny.data, source="prepared", folder=str(folder / "clips")),
        checkpoint=kinds.CheckpointConfig(every=5, keep=3),
        mesh=MeshConfig(**SIZES),
    )


def write_prepared(folder: Path, bucket: Bucket, *, count: int):
    rng = np.random.default_rng(1)
    grid = kinds.latent_size(bucket.frames, bucket.height, bucket.width, train_tiny.model().vae)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float16)

    where = folder / f"{bucket.width}x{bucket.height}x{bucket.frames}"
    where.mkdir(parents=True)
    for i in range(count):
        np.savez(
            where / f"{i:08d}.npz", latents=normal(*grid, 32), conditions=normal(2, *grid, 32), face=rng.random(grid),
            lip=rng.random(grid), text=normal(16, 16), speech=normal(2 * bucket.frames - 1, 16), last=np.int32(4),
        )  # fmt: skip
    (folder / "about.json").write_text(json.dumps({"views": [[False, False], [False, True]], "learning": []}))


def lines(out: Path) -> dict[int, dict]:
    return {line["step"]: line for line in map(json.loads, (out / "log.jsonl").read_text().splitlines())}


def saved(out: Path, step: int):
    """A checkpoint's arrays by path, on the host."""
    from orbax.checkpoint import v1 as ocp

    folder = out / "checkpoints" / str(step)
    known = ocp.metadata(folder, checkpointable_name="state").metadata
    tree = ocp.load(
        folder, jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), known), checkpointable_name="state"
    )
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight")
    assert loop.train(world, out, resume=False) == 10
    return out


@pytest.fixture(scope="module")
def interrupted(world, tmp_path_factory):
    """The same run, asked to stop while its fourth batch is on its way."""
    out = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch:
        following = data.Loader.__next__

        def next_one(loader):
            if loader.position == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return following(loader)

        patch.setattr(data.Loader, "__next__", next_one)
        stopped = loop.train(world, out, resume=True)  # nothing to resume from: from the start
    return out, stopped


def test_a_run_logs_and_leaves_weights(world, straight):
    found = lines(straight)
    assert list(found) == list(range(1, 11))
    keys = {
        "loss",
        "error",
        "lip_error",
        "gradient_norm",
        "learning_rate",
        "seconds",
        "tokens_per_second",
        "memory_gib",
    }
    assert keys <= set(found[10]) and any(key.startswith("loss_0.") for key in found[10])
    assert found[1]["learning_rate"] == 0 and found[10]["learning_rate"] == pytest.approx(1e-3)
    assert all(math.isfinite(value) for line in found.values() for value in line.values())
    assert found[10]["loss"] < found[1]["loss"]
    state_at_end = saved(straight, 10)
    part = world.model.dit
    stored = files.read_config(straight / "weights" / "dit", type(part))
    assert stored == part and sorted(p.name for p in (straight / "weights").iterdir()) == ["dit"]
    mesh = make_mesh(**SIZES)
    shape = abstract("dit", part)
    loaded = files.load_component(
        straight / "weights" / "dit", shape, partition(shape, COMPONENTS["dit"].model.AXES, mesh)
    )
    name = "['blocks']['self_attn']['q']['kernel']"
    mine = np.asarray(loaded["blocks"]["self_attn"]["q"]["kernel"])
    averages = next(v for k, v in state_at_end.items() if "ema" in k and k.endswith(name))
    np.testing.assert_array_equal(mine, averages)
    masters = next(v for k, v in state_at_end.items() if "trained" in k and k.endswith(name))
    assert np.abs(masters - averages).max() > 0


def test_sigterm_saves_and_the_run_goes_on_bit_for_bit(world, straight, interrupted, tmp_path):
    out, stopped = interrupted
    assert stopped == 5 and not (out / "weights").exists()
    out = Path(shutil.copytree(out, tmp_path / "copy"))
    assert loop.train(world, out, resume=True) == 10
    one, two = lines(straight), lines(out)
    timed = {"seconds", "tokens_per_second", "memory_gib"}
    for step in range(1, 11):
        assert {k: v for k, v in one[step].items() if k not in timed} == {
            k: v for k, v in two[step].items() if k not in timed
        }
    ours, theirs = saved(out, 10), saved(straight, 10)
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)


def test_another_mesh_goes_on_with_the_same_numbers(world, straight, interrupted, tmp_path, monkeypatch):
    """Restored from (2, 2, 2, 1) onto (1, 4, 1, 2), and the batch in one part instead of two."""
    out = Path(shutil.copytree(interrupted[0], tmp_path / "copy"))
    places = {}

    def make_step(losses, draw, config, shardings, mesh, made=loop.make_step):
        step = made(losses, draw, config, shardings, mesh)

        def noting(*arguments):
            result = step(*arguments)
            places.update(flatten(jax.tree.map(lambda leaf: leaf.sharding.spec, result[0].trained)))
            return result

        return noting

    monkeypatch.setattr(loop, "make_step", make_step)
    config = replace(world, mesh=MeshConfig(**OTHER_SIZES), optimizer=replace(world.optimizer, accumulate=1))
    assert loop.train(config, out, resume=True) == 10
    one, two = lines(straight), lines(out)
    for step in range(interrupted[1] + 1, 11):
        for name in ("loss", "lip_error", "gradient_norm"):
            assert two[step][name] == pytest.approx(one[step][name], rel=2e-5), (step, name)
    assert places["params/dit/blocks/up/kernel"] == spec("layers", "embed", "mlp")
    assert places["params/dit/blocks/self_attn/q/kernel"] == spec("layers", "embed", "heads")


def test_numbers_that_blow_up_stop_the_run(world, straight, tmp_path):
    """One clip that is not finite: the message names its batch, and the state before it is kept."""
    clips = Path(shutil.copytree(world.data.folder, tmp_path / "clips"))
    order = data.Records(world.data, world.data.buckets[0], MODEL)
    batch = world.data.buckets[0].batch
    name = order.take(4 * batch, np.random.default_rng(0))["name"]  # the first clip of the fifth batch
    seen_before = [order.take(serial, np.random.default_rng(0))["name"] for serial in range(4 * batch)]
    assert name not in seen_before
    file = clips / f"{name}.npz"
    arrays = dict(np.load(file))
    arrays["latents"][0, 0, 0, 0] = np.nan
    np.savez(file, **arrays)
    config = replace(world, data=replace(world.data, folder=str(clips)))
    for resume in (False, True):
        with pytest.raises(loop.Diverged, match=f"step 5: .* Batch 4: .*{name}.* step 4"):
            loop.train(config, tmp_path / "out", resume=resume)
        assert max(map(int, os.listdir(tmp_path / "out" / "checkpoints"))) == 4
    assert lines(straight)[4]["loss"] == lines(tmp_path / "out")[4]["loss"]


def test_a_folder_with_checkpoints_is_not_written_over(world, straight):
    with pytest.raises(ValueError, match="--resume"):
        loop.train(world, straight, resume=False)


# slower: programs of their own


WORKER = """
import pickle, sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_disable_most_optimizations", True)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from pathlib import Path
from kavatar_jax.training import data, loop
if int(sys.argv[2]) == 1 and sys.argv[5]:  # only one of the two is asked to stop
    import os, signal
    following = data.Loader.__next__
    def next_one(loader):
        if loader.position == int(sys.argv[5]):
            os.kill(os.getpid(), signal.SIGTERM)
        return following(loader)
    data.Loader.__next__ = next_one
config = pickle.loads(Path(sys.argv[3]).read_bytes())
print(loop.train(config, Path(sys.argv[4]), resume=True))
"""


def run_two_processes(config, out: Path, *, stop: str = "") -> list[int]:
    """Train on two processes of four devices each; how far each says that it came."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    (out / "config.pickle").write_bytes(pickle.dumps(config))
    command = [sys.executable, "-c", WORKER, address]
    rest = [str(out / "config.pickle"), str(out), stop]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": Path(__file__).parents[1]}
    programs = {**os.environ, "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or ""}
    running = [subprocess.Popen([*command, str(i), *rest], text=True, env=programs, **pipes) for i in range(2)]
    told = [process.communicate(timeout=900) for process in running]
    assert all(process.returncode == 0 for process in running), "\n".join(error[-3000:] for _, error in told)
    return [int(said.split()[-1]) for said, _ in told]


@pytest.mark.slow
def test_two_processes_train_what_one_does(world, straight, tmp_path):
    """Two processes of four devices, stopped by a signal to one of them and gone on with, against one of eight."""
    stopped = run_two_processes(world, tmp_path, stop="2")
    assert stopped[0] == stopped[1] and 3 <= stopped[0] < 10
    assert run_two_processes(world, tmp_path) == [10, 10]
    one, two = lines(straight), lines(tmp_path)
    for step in range(1, 11):
        for name in ("loss", "lip_error", "gradient_norm"):
            assert two[step][name] == pytest.approx(one[step][name], rel=2e-5), (step, name)
    ours, theirs = saved(tmp_path, 10), saved(straight, 10)
    for path, leaf in ours.items():
        # Adam turns a gradient that is rounding alone into whole steps: that of a bias of keys, which moves nothing, and
        # of single elements elsewhere; so tensors are compared by the length of one step as well
        if "trained" in path and not re.search(r"\['k(_audio|_image)?'\]\['bias'\]", path):
            np.testing.assert_allclose(leaf, theirs[path], rtol=1e-3, atol=1e-4, err_msg=path)
            apart = np.sqrt(np.mean(np.square(leaf - theirs[path])))
            assert apart < 0.01 * world.optimizer.learning_rate, (path, apart)
    assert (tmp_path / "weights" / "dit" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["adapter", "director", "lora"])
def test_only_what_is_named_learns(world, tmp_path, variant, monkeypatch):
    asked = getattr(train_tiny, variant)()
    folder = tmp_path / "clips"
    shutil.copytree(world.data.folder, folder)
    rng = np.random.default_rng(0)
    for file in folder.glob("*/*.npz"):
        np.savez(file, **np.load(file), director=rng.standard_normal((5, 12)).astype(np.float16))
    config = replace(world, trained=asked.trained, data=replace(world.data, folder=str(folder)), steps=3)
    config = replace(config, optimizer=replace(config.optimizer, accumulate=1, warmup=0, ema=0.0))
    before, frozen = {}, {}

    def begin(config, components, mesh, begun=loop.begin):
        found = begun(config, components, mesh)
        before.update(flatten(jax.device_get(found[0].trained)))
        frozen.update(flatten(found[1]))
        return found

    monkeypatch.setattr(loop, "begin", begin)
    loop.train(config, tmp_path, resume=False)
    stored = dict(flatten(files.load_component(
        tmp_path / "weights" / "dit", abstract("dit", world.model.dit),
        jax.tree.map(lambda _: replicated(make_mesh(**SIZES)), abstract("dit", world.model.dit)),
    )))  # fmt: skip
    start = files.Tensors(Path(world.weights) / "dit" / "model.safetensors")
    changed = {path for path, leaf in stored.items() if np.abs(np.asarray(leaf) - start[path]).max() > 0}
    if variant == "lora":
        linears = {path.removeprefix("lora/dit/").removesuffix("/up") for path in before if path.endswith("/up")}
        assert len(linears) > 8 and not any("audio" in path for path in linears)
        assert {f"{path}/kernel" for path in linears} <= changed
        assert {path for path in changed if "audio" not in path} == {f"{path}/kernel" for path in linears}
    else:
        named = {path.removeprefix("params/dit/") for path in before}
        assert changed <= named and len(changed) >= len(named) - 1  # a bias of keys moves nothing
    assert not before.keys() & frozen.keys()


@pytest.mark.slow
def test_buckets_of_two_lengths_and_audio_over_the_clip(world, tmp_path):
    """Each length has one program, or two where audio attention is drawn; the guard would stop a third."""
    long, short = world.data.buckets[0], replace(world.data.buckets[0], frames=5, weight=0.5)
    folder = tmp_path / "clips"
    shutil.copytree(world.data.folder, folder)
    about = (folder / "about.json").read_text()
    write_prepared(folder, short, count=16)
    (folder / "about.json").write_text(about)
    objective = replace(world.objective, clip_level=0.5)
    clips = replace(world.data, folder=str(folder), buckets=(long, short))
    config = replace(world, steps=6, data=clips, objective=objective)
    loader = data.Loader(config.data, lambda *_: None, MODEL, make_mesh(**SIZES))
    assert [batch.bucket.frames for batch in take(loader, 6)].count(5) == 2
    drawn = {(batch.bucket.frames, loop.draw_clip_level(config, n + 1)) for n, batch in enumerate(
        take(data.Loader(config.data, lambda *_: None, MODEL, make_mesh(**SIZES)), 6))}  # fmt: skip
    assert len(drawn) > 2
    assert loop.train(config, tmp_path / "out", resume=False) == 6
    assert all(math.isfinite(line["loss"]) for line in lines(tmp_path / "out").values())


@pytest.mark.slow
def test_from_nothing_to_weights_on_puppets(tmp_path):
    """The command, from a config's name: networks drawn anew, the text encoder learning too, samples on the way."""
    run_command(config="train_tiny:watched", out=tmp_path, fields=("steps=5", "mesh.data=8"))
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == [
        "dit", "speech", "text", "tokenizer", "vae",
    ]  # fmt: skip
    assert probe(tmp_path / "samples" / "000005_0.mp4").frames == 9
    info = probe(tmp_path / "samples" / "000005_0.mp4")
    assert (info.width, info.height, info.has_audio) == (64, 32, True)
    with Image.open(tmp_path / "samples" / "000005.png") as sheet:
        assert sheet.size == (8 * 32, 2 * 32) and np.asarray(sheet)[:32].std() > 10  # recorded above performed
    assert (tmp_path / "config.json").is_file()


@pytest.mark.slow
def test_prepared_clips_are_the_encoded_ones(tmp_path):
    tiny = replace(train_tiny.config(), mesh=MeshConfig(data=8))
    prepare(tiny, tmp_path, count=8, report=silent)
    assert json.loads((tmp_path / "about.json").read_text())["learning"] == ["text"]
    mesh = make_mesh(data=8)
    with jax.set_mesh(mesh):
        task = loop.open_task(tiny, mesh)
        _, frozen, _ = state.begin(tiny, task.components, mesh)
        batch = next(data.Loader(tiny.data, task.row, MODEL, mesh))
        fresh = jax.device_get(task.encode(task.prepare(frozen), batch.clips))
    config = replace(tiny.data, source="prepared", folder=str(tmp_path))
    read = jax.device_get(next(data.Loader(config, task.row, MODEL, mesh)))
    order = [int(name.rsplit("/", 1)[1]) for name in read.names]  # puppets come in order, files shuffled
    for name in ("latents", "face", "lip", "speech", "text"):
        np.testing.assert_allclose(getattr(read.clips, name), getattr(fresh, name)[order], rtol=2e-3, atol=2e-3)
    files_of = [dict(np.load(tmp_path / "32x32x9" / f"{i:08d}.npz")) for i in range(8)]
    for i, found in enumerate(files_of):
        last = int(batch.clips.last[i])
        if last in (0, found["last"]):  # another frame may have been drawn when it was prepared
            np.testing.assert_allclose(found["conditions"][min(last, 1)], fresh.condition[i], rtol=2e-3, atol=2e-3)
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == ["speech", "vae"]
    from_there = replace(tiny, data=config, weights=str(tmp_path / "weights"), fresh=(r"(dit|text)/.*",), steps=1)
    assert loop.train(from_there, tmp_path / "run", resume=False) == 1
    with pytest.raises(ValueError, match="prepare it again"):
        loop.train(replace(tiny, data=replace(config, portrait=0.5)), tmp_path / "out", resume=False)
    with pytest.raises(ValueError, match="learning the encoders"):
        trained = kinds.TrainedConfig(patterns=kinds.EVERYTHING)
        loop.train(replace(tiny, data=config, trained=trained), tmp_path / "out", resume=False)


@pytest.mark.slow
def test_the_autoencoder_learns_and_measures_its_latents(tmp_path):
    config = train_tiny.vae()
    config = replace(config, steps=20, optimizer=replace(config.optimizer, accumulate=1, warmup=0, learning_rate=2e-3))
    config = replace(config, mesh=MeshConfig(data=8), checkpoint=kinds.CheckpointConfig(every=20, keep=1))
    assert loop.train(config, tmp_path, resume=False) == 20
    found = lines(tmp_path)
    assert np.mean([found[n]["loss"] for n in range(16, 21)]) < 0.75 * found[1]["loss"]
    stored = files.read_config(tmp_path / "weights" / "vae", type(config.model.vae))
    shape = abstract("vae", stored)
    places = jax.tree.map(lambda _: replicated(make_mesh(data=8)), shape)
    params = files.load_component(tmp_path / "weights" / "vae", shape, places)
    clips = next(data.Loader(config.data, data.footage_row, MODEL, make_mesh(data=8), position=100)).clips
    mean, _ = jax.jit(lambda p, v: vae.encode(p, v / 127.5 - 1, stored))(params, clips.video.astype(jnp.float32))
    assert np.all(np.abs(np.asarray(mean).mean(axis=(0, 1, 2, 3))) < 0.5)
    np.testing.assert_allclose(np.asarray(mean).std(axis=(0, 1, 2, 3)), 1, atol=0.4)

    decoder = kinds.TrainedConfig(patterns=(r"vae/decoder/.*",))
    alone = replace(config, weights=str(tmp_path / "weights"), trained=decoder, steps=2)
    assert loop.train(alone, tmp_path / "more", resume=False) == 2
    assert files.read_config(tmp_path / "more" / "weights" / "vae", type(stored)) == stored  # latents are as they were
    first, second = (
        Tensors(folder / "weights" / "vae" / "model.safetensors") for folder in (tmp_path, tmp_path / "more")
    )
    changed = {path for path in first if (first[path] != second[path]).any()}
    assert changed and all(path.startswith("decoder/") for path in changed)
