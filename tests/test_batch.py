"""`kavatar batch` on the tiny config: the same file alone and beside others, after kills, and from two processes."""

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile
from PIL import Image
from typer.testing import CliRunner

from configs import demo
from kavatar_jax import __main__
from kavatar_jax.cascade import batch
from kavatar_jax.cascade.blueprint import tell_windows
from kavatar_jax.cascade.denoise import denoise, draw_noise
from kavatar_jax.cascade.encode import encode
from kavatar_jax.cascade.pipeline import generate
from kavatar_jax.cascade.together import Stopped, Together
from kavatar_jax.cascade.weights import draw_untrained
from kavatar_jax.config import set_fields
from kavatar_jax.director.rules import direct
from kavatar_jax.media.text import ByteTokenizer
from kavatar_jax.media.video import probe, read_frames
from kavatar_jax.parallel.mesh import make_mesh
from kavatar_jax.types import SAMPLE_RATE, silent
from tests.tones import make_request
from tools import kill_sweep

JOBS = (("anna", 1.1, "single"), ("b.1", 2.4, "cascade"), ("b", 0.5, "cascade"), ("dora", 3.0, "single"))
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """A run's own devices are the first of the eight, as in the processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a portrait and a recording for each job."""
    folder, rng = tmp_path_factory.mktemp("inputs"), np.random.default_rng(0)
    for i, (name, seconds, _) in enumerate(JOBS):
        time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
        tone = 0.3 * np.sin(2 * np.pi * (150 + 20 * i) * time) * (np.sin(2 * np.pi * 1.5 * time) > -0.3)
        soundfile.write(folder / f"{name}.wav", tone, SAMPLE_RATE)
        Image.fromarray(rng.integers(0, 256, (90, 70, 3), np.uint8)).save(folder / f"{name}.png")
    return folder


def line_of(job, **more) -> str:
    name, _, mode = job
    told = {"name": name, "portrait": f"{name}.png", "speech": f"{name}.wav", "mode": mode, "seed": len(name)}
    return json.dumps({**told, "instruction": f"{name} smiles", **more})


def write_manifest(inputs: Path, name: str, lines) -> Path:
    (inputs / name).write_text("".join(f"{line}\n" for line in lines))
    return inputs / name


def kavatar(manifest: Path, out: Path, *words):
    return CliRunner().invoke(
        __main__.app, ["batch", str(manifest), "--out", str(out), "--config", "demo:tiny", *words]
    )


def results(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def videos(out: Path) -> dict[str, bytes]:
    """Everything in a folder but its ledger."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "results.jsonl"}


@pytest.fixture(scope="module")
def manifest(inputs):
    return write_manifest(inputs, "all.jsonl", map(line_of, JOBS))


@pytest.fixture(scope="module")
def made(manifest, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "videos"
    result = kavatar(manifest, out)
    assert result.exit_code == 0, result.output
    return out


def test_every_line_becomes_a_video(made):
    assert sorted(videos(made)) == sorted(f"{name}.mp4" for name, *_ in JOBS)
    told = {line["name"]: line for line in results(made)}
    for number, (name, seconds, _) in enumerate(JOBS, start=1):
        info = probe(made / f"{name}.mp4")
        assert (info.frames, info.has_audio) == (round(seconds * 25), True)
        assert (told[name]["status"], told[name]["line"], told[name]["frames"]) == ("done", number, info.frames)


@pytest.mark.parametrize("job", [JOBS[1], JOBS[3]], ids=lambda job: job[2])
def test_a_video_is_the_same_alone_and_beside_others(inputs, made, tmp_path, job):
    alone = write_manifest(inputs, "alone.jsonl", [line_of(job)])
    assert kavatar(alone, tmp_path).exit_code == 0
    assert videos(tmp_path) == {f"{job[0]}.mp4": videos(made)[f"{job[0]}.mp4"]}


def test_threads_share_eight_devices_and_weights_in_parts(inputs, made, tmp_path, monkeypatch):
    """A thread a video, all of which decode on all devices; the same bytes as alone."""
    monkeypatch.setattr(jax, "local_devices", jax.devices)
    meshes = []
    monkeypatch.setattr(
        batch, "make_mesh", lambda *sizes, **more: meshes.append(make_mesh(*sizes, **more)) or meshes[-1]
    )
    lines = [line_of(JOBS[0]), line_of(JOBS[3]), line_of(JOBS[0], name="bert"), line_of(JOBS[0], name="cora", seed=2)]
    for out, manifest in (("all", lines), ("alone", lines[:1])):
        result = kavatar(write_manifest(inputs, "some.jsonl", manifest), tmp_path / out, "--set", "mesh.fsdp=2")
        assert result.exit_code == 0, result.output
    assert dict(meshes[0].shape) == {"data": 4, "fsdp": 2, "context": 1, "tensor": 1}
    together, alone = videos(tmp_path / "all"), videos(tmp_path / "alone")
    assert len(together) == 4 and together["anna.mp4"] == together["bert.mp4"] == alone["anna.mp4"]
    pairs = zip(read_frames(tmp_path / "alone" / "anna.mp4"), read_frames(made / "anna.mp4"), strict=True)
    assert max(np.abs(a.astype(int) - b).mean() for a, b in pairs) < 0.5


def test_what_is_done_is_skipped_and_what_is_not_is_made_again(inputs, made, tmp_path, monkeypatch):
    out = Path(shutil.copytree(made, tmp_path / "copy"))
    drawn = []
    monkeypatch.setattr(batch, "draw", lambda order, *rest: drawn.append(order.out.stem) or _draw(order, *rest))
    lines = [line_of(job) for job in JOBS]
    (inputs / "moved").mkdir()
    manifest = write_manifest(inputs, "again.jsonl", lines)
    assert kavatar(manifest, out).exit_code == 0 and not drawn

    (out / "anna.mp4").unlink()
    for leftover in (".anna.17.mute.mp4", ".b.1.17.partial.mp4", ".b.17.partial.mp4"):
        (out / leftover).write_bytes(b"half a video")
    lines[2] = line_of(JOBS[2], seed=9)
    assert kavatar(write_manifest(inputs, "again.jsonl", lines), out).exit_code == 0
    assert sorted(drawn) == ["anna", "b"]
    differing = {name for name, video in videos(made).items() if videos(out)[name] != video}
    assert differing == {"b.mp4"} and videos(out).keys() == videos(made).keys()


_draw = batch.draw


def test_bad_lines_are_told_and_the_others_made(inputs, made, tmp_path):
    (inputs / "noise.wav").write_bytes(b"\x00\x01" * 500)
    lines = [
        "{", "[1]", line_of(JOBS[2]), "", line_of(JOBS[2]), line_of(JOBS[0], speech="nothing.wav"),
        line_of(JOBS[0], spech="anna.wav"), line_of(JOBS[0], seed="7"), line_of(JOBS[0], name="../anna"), '{"name": "anna"}',
        line_of(JOBS[0], mode="video"), line_of(JOBS[0], name="noisy", speech="noise.wav"), line_of(JOBS[0], name="é"),
    ]  # fmt: skip
    manifest = write_manifest(inputs, "bad.jsonl", lines)
    manifest.write_bytes(manifest.read_bytes().replace(b"\\u00e9", b"\xe9"))
    result = kavatar(manifest, tmp_path)
    assert result.exit_code == 1
    assert videos(tmp_path) == {"b.mp4": videos(made)["b.mp4"]}
    told = {line["line"]: line.get("error", "") for line in results(tmp_path)}
    expected = {
        1: "not JSON", 2: "not a JSON object", 3: "", 5: "taken by line 3", 6: "nothing.wav: no such file",
        7: "'spech' is not one of name", 8: "seed '7' is not a whole number", 9: "slashes", 10: "portrait, speech missing",
        11: "'video' is not one of", 12: "noise.wav: not a sound file", 13: "not UTF-8",
    }  # fmt: skip
    assert told.keys() == expected.keys()
    for number, words in expected.items():
        assert words in told[number], told[number]
        assert number in (3, 12) or f"bad.jsonl line {number}: " in told[number]


def test_a_bad_call_is_one_line_and_exit_2(inputs, manifest, tmp_path):
    empty = write_manifest(inputs, "empty.jsonl", [])
    (tmp_path / "file").write_text("")
    for words in (
        (inputs / "nowhere.jsonl", tmp_path / "out"), (empty, tmp_path / "out"), (manifest, tmp_path / "file"),
        (manifest, tmp_path / "out", "--mode", "video"), (manifest, tmp_path / "out", "--steps", "0"),
    ):  # fmt: skip
        result = kavatar(*words)
        assert result.exit_code == 2 and result.output.startswith("kavatar: ") and result.output.count("\n") == 1


def test_a_video_that_fails_under_way_leaves_the_others_alone(manifest, made, tmp_path, monkeypatch):
    def failing(order, request, plan, weights, config, report, denoise):
        def broken(*arguments, report, **named):
            def full(*_):
                raise MemoryError("no room")

            return denoise(*arguments, report=full, **named)  # after a step, when its windows have been beside others'

        return _draw(order, request, plan, weights, config, report, broken if order.out.stem == "dora" else denoise)

    monkeypatch.setattr(batch, "draw", failing)
    result = kavatar(manifest, tmp_path)
    assert result.exit_code == 1 and "line 4, dora: no room" in result.output
    (failed,) = (line for line in results(tmp_path) if line["status"] == "failed")
    assert (failed["name"], failed["line"], failed["error"]) == ("dora", 4, "MemoryError: no room")
    expected = videos(made)
    del expected["dora.mp4"]
    assert videos(tmp_path) == expected


def test_ctrl_c_stops_at_once_and_leaves_whole_videos_only(manifest, made, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    calls = itertools.count()
    read = batch.read_performance
    monkeypatch.setattr(batch, "read_performance", lambda *a: interrupted() if next(calls) == 2 else read(*a))
    assert kavatar(manifest, tmp_path).exit_code == 130
    assert videos(tmp_path).items() <= videos(made).items()


@pytest.mark.parametrize("fields", [[], ["sampling.frame_scale=1.5", "sampling.audio_attention=1.3"]])
def test_windows_of_several_videos_are_denoised_as_each_alone(fields):
    config, mesh = set_fields(demo.tiny(), fields), make_mesh(devices=jax.devices())
    weights = draw_untrained(config, 0, ByteTokenizer())
    tasks = []
    for seconds in (1.0, 2.4):
        request = make_request(config, seconds, seed=3)
        conditions = encode(request, direct(request), weights, config, silent)
        windows, told, shared = tell_windows(conditions, weights, config)
        tasks.append((draw_noise(3, windows, config), told, shared, windows, config.dit, config.sampling))
    expected = [
        denoise(weights.dit, np.array(task[0]), *task[1:], stage="", report=silent)[: task[3].count] for task in tasks
    ]
    with Together(weights.dit, config.dit, config.sampling, mesh) as together:
        found = [together.denoise(weights.dit, *task, stage="", report=silent)[: task[3].count] for task in tasks]
        assert together.size == 16 and together.slots == 16 * 2 * config.sampling.steps
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(other, one, atol=2e-5 * np.abs(one).max())
    with pytest.raises(Stopped):
        together.denoise(weights.dit, *tasks[0], stage="", report=silent)


def test_the_cascade_is_that_of_a_single_video():
    config, mesh = demo.tiny(), make_mesh(devices=jax.local_devices())
    weights, request = draw_untrained(config, 0, ByteTokenizer()), make_request(config, 2.4)
    with jax.set_mesh(mesh), Together(weights.dit, config.dit, config.sampling, mesh) as together:
        one, other = (
            np.stack(list(generate(request, direct, weights, config, denoise=how).images)).astype(int)
            for how in (denoise, together.denoise)
        )
    assert np.abs(other - one).max() <= 1  # the same but for rounding, and that of pixels


# in processes of their own

WORKER = """
import itertools, os, signal, sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)  # of which one is used, as above
jax.config.update("jax_default_matmul_precision", "highest")
address, index, moment, manifest, out = sys.argv[1:]
if address:
    jax.distributed.initialize(address, 2, int(index))
local = jax.local_devices
jax.local_devices = lambda: local()[:1]
from kavatar_jax.cascade import batch, manifest as manifests
from kavatar_jax.__main__ import app
def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
if moment == "ledger":  # the first video has its name, and no line says so yet
    manifests.Ledger.add = kill
elif moment:  # so many signs of progress have been given
    calls, show = itertools.count(), batch._Progress._show
    batch._Progress._show = lambda *told, **named: kill() if next(calls) == int(moment) else show(*told, **named)
app(["batch", manifest, "--out", out, "--config", "demo:tiny"])
"""


def start(manifest: Path, out: Path, *, address: str = "", index: int = 0, moment: str = "") -> subprocess.Popen:
    words = [sys.executable, "-c", WORKER, address, str(index), moment, str(manifest), str(out)]
    programs = {**os.environ, "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or ""}
    return subprocess.Popen(words, cwd=ROOT, env=programs, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("moment", ["ledger", pytest.param("130", marks=pytest.mark.slow)])
def test_after_a_kill_the_rest_is_made_and_all_is_as_if_undisturbed(manifest, made, tmp_path, moment):
    killed = start(manifest, tmp_path, moment=moment)
    _, said = killed.communicate(timeout=1800)
    assert killed.returncode == -signal.SIGKILL, said
    whole = {name: video for name, video in videos(tmp_path).items() if not name.startswith(".")}
    assert whole.items() < videos(made).items() and (whole or moment != "ledger")
    assert kavatar(manifest, tmp_path).exit_code == 0
    assert videos(tmp_path) == videos(made)


@pytest.mark.slow
def test_two_processes_make_what_one_does(manifest, made, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    running = [start(manifest, tmp_path, address=address, index=index) for index in range(2)]
    told = [process.communicate(timeout=1800)[1] for process in running]
    assert all(process.returncode == 0 for process in running), "\n".join(said[-3000:] for said in told)
    assert all("2 of 2 videos are there" in said for said in told), told
    assert videos(tmp_path) == videos(made)
    assert sorted(line["name"] for line in results(tmp_path)) == sorted(name for name, *_ in JOBS)


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(manifest, tmp_path):
    kill_sweep.main(manifest, tmp_path, kills=4, seed=1, config="demo:tiny")
