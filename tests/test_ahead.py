"""Programs compiled ahead: nothing is run, nothing is compiled twice, and a run afterwards compiles nothing."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
import soundfile
from PIL import Image
from typer.testing import CliRunner

from configs import demo, wan
from kavatar_jax.__main__ import app
from kavatar_jax.cascade.command import DEMO
from kavatar_jax.cascade.denoise import TEXTS, Shared, fill_banks
from kavatar_jax.cascade.pipeline import generate_in_one_pass
from kavatar_jax.cascade.weights import describe_weights, draw_untrained, load_weights, parts_of
from kavatar_jax.checkpoint.weights import save_component
from kavatar_jax.config import STACKED
from kavatar_jax.director.rules import direct
from kavatar_jax.media.text import ByteTokenizer
from kavatar_jax.parallel.mesh import make_mesh
from kavatar_jax.parallel.programs import compiling, program
from kavatar_jax.parallel.sharding import batch_sharding, constrain
from kavatar_jax.types import SAMPLE_RATE
from tests.tones import make_request

COUNT = """
import collections, sys, jax
from kavatar_jax.__main__ import app
seen = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: seen.update([event.rpartition("/")[2]]))
app(sys.argv[1:], standalone_mode=False)
print("hits", seen["cache_hits"], "misses", seen["cache_misses"])
"""


@program(static_argnames="times")
def scale(x, y, *, times):
    return {"product": times * x * y, "sum": (x + y).sum().astype("bfloat16")}


def test_programs_are_compiled_and_not_run():
    told = []
    x = jax.ShapeDtypeStruct((2, 3), np.float32)
    with compiling(lambda name, seconds: told.append(name)):
        for times in (2, 2, 3):
            out = scale(x, np.ones(3, np.float32), times=times)
    assert told == ["scale", "scale"]
    assert out["product"].shape == (2, 3) and out["sum"].dtype == "bfloat16"
    np.testing.assert_array_equal(out["product"], 0)
    np.testing.assert_array_equal(scale(np.ones(3), 2.0, times=2)["product"], 4)


def test_outputs_lie_where_the_program_puts_them():
    with jax.set_mesh(mesh := make_mesh()), compiling(lambda *_: None):
        x = jax.ShapeDtypeStruct((8, 4), np.float32, sharding=batch_sharding(mesh))
        out = scale(x, 1.0, times=1)["product"]
    assert out.sharding.is_equivalent_to(batch_sharding(mesh), 2)


def test_threads_start_programs_on_several_devices_one_at_a_time():
    at_work, most = [], []

    @program(static_argnames="times")
    def gathered(x, *, times):
        at_work.append(times)
        most.append(len(at_work))
        time.sleep(0.1)  # while it is traced
        at_work.remove(times)
        x = constrain(times + x / 2, "batch", None)
        return constrain(constrain(x - x.mean() / 2, None, None), "batch", None)

    def work(times):
        x = jax.device_put(np.ones((8, 4), np.float32), batch_sharding(mesh))
        with jax.set_mesh(mesh):
            for _ in range(50):  # not waiting for any of them, but for the last
                x = gathered(x, times=times)
        return np.asarray(x)

    mesh = make_mesh()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, range(1, 5)))
    assert most == [1] * 4
    for times, x in enumerate(found, start=1):
        np.testing.assert_allclose(x, times / 2 / (1 - 1 / 4), rtol=1e-5)


def make_weights(folder, config):
    weights = draw_untrained(config, 0, ByteTokenizer())
    for name in parts_of(config.dit):
        save_component(getattr(weights, name), getattr(config, name), folder / name)
    shutil.copytree(DEMO / "tokenizer", folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_weights(tmp_path_factory.mktemp("made") / "weights", demo.tiny())


@pytest.mark.parametrize("on_host", [("text",), STACKED])
def test_weights_are_described_as_they_are_loaded(folder, on_host):
    config = dataclasses.replace(demo.tiny(), on_host=on_host)
    with jax.set_mesh(make_mesh(2, 2, 1, 2)):
        loaded, described = load_weights(folder, config), describe_weights(folder, config)
    for name in parts_of(config.dit):
        pairs = list(zip(*map(jax.tree.leaves, (getattr(loaded, name), getattr(described, name))), strict=True))
        assert all((a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding) for a, b in pairs)
        assert any(leaf.sharding.memory_kind == "pinned_host" for leaf, _ in pairs) == (name in on_host)


def test_a_video_is_the_same_with_all_weights_on_the_host(folder):
    found = []
    for on_host in ((), STACKED):
        config = dataclasses.replace(demo.tiny(), on_host=on_host)
        with jax.set_mesh(make_mesh(devices=jax.devices()[:2])):
            weights, request = load_weights(folder, config), make_request(config, 1.0)
            found.append(np.stack(list(generate_in_one_pass(request, direct, weights, config).images)).astype(int))
    assert found[0].std() > 10 and np.abs(found[1] - found[0]).max() <= 1


def test_banks_are_filled_with_their_last_rows():
    shared = Shared(np.arange(6.0).reshape(6, 1), None, np.arange(3.0).reshape(3, 1), None)
    filled = fill_banks(shared, 4)
    np.testing.assert_array_equal(filled.text[:, 0], [0, 1, 2, 3, 4, 5, 5, 5])
    np.testing.assert_array_equal(filled.condition[:, 0], [0, 1, 2, 2])
    alone = fill_banks(shared._replace(text=shared.text[:2], condition=shared.condition[:1]), 4)
    assert len(alone.text) == TEXTS and len(alone.condition) == 1


@pytest.mark.parametrize(
    "words",
    [
        *(["--lengths", "1,x"], ["--lengths", "0"], ["--mode", "video"], ["--mode", "film"], ["--size", "1"]),
        ["--mode", "video", "--batch"],
    ],
)
def test_bad_orders_are_one_line(words):
    result = CliRunner().invoke(app, ["compile", "--config", "demo:tiny", *words])
    assert result.exit_code == 2 and result.output.startswith("kavatar: ") and result.output.count("\n") == 1
    assert "--batch" not in words or "--batch is for" in result.output


@pytest.mark.slow
@pytest.mark.parametrize("mode, batch", [("single", 0), ("cascade", 0), ("video", 0), ("single", 1), ("cascade", 4)])
def test_after_it_a_run_in_a_new_process_compiles_nothing(tmp_path, mode, batch):
    """No program, that is, that takes long enough to compile to be kept. batch: so many devices make one, 0: none."""
    config = wan.tiny() if mode == "video" else demo.tiny()
    folder = make_weights(tmp_path / "weights", config)
    soundfile.write(tmp_path / "speech.wav", np.zeros(SAMPLE_RATE), SAMPLE_RATE)
    order = ["--config", config.name, "--weights", str(folder), "--mode", mode]
    order += ["--instruction", "Rain on a window."] if mode == "video" else []

    def kavatar(*words, least):
        """least: seconds of compiling from which a program is kept, or missed; a busy machine takes longer."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(batch or 1)}
        environment |= {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
        environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": str(least)}
        command = [sys.executable, "-c", COUNT, *words, *order]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return result.stdout, int(re.search(r"misses (\d+)", result.stdout)[1])

    told, compiled = kavatar("compile", "--lengths", "1", *["--batch"] * bool(batch), least=0.2)
    assert compiled > 0 and f": {compiled} programs, " in told
    if batch:
        Image.new("RGB", (config.width, config.height)).save(tmp_path / "portrait.png")
        job = {"name": "video", "portrait": "portrait.png", "speech": "speech.wav"}
        (tmp_path / "manifest.jsonl").write_text(json.dumps(job))
        run = ["batch", str(tmp_path / "manifest.jsonl"), "--out", str(tmp_path)]
    else:
        speech = [] if mode == "video" else ["--speech", str(tmp_path / "speech.wav")]
        run = ["generate", *speech, "--out", str(tmp_path / "video.mp4")]
    _, missed = kavatar(*run, least=1.0)
    assert missed == 0 and (tmp_path / "video.mp4").is_file()
