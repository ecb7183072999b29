"""A training run's checkpoint as weights: what the run itself writes at its end, averages or not, and its LoRA as files."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import train_tiny
from kavatar_jax.checkpoint.files import Tensors
from kavatar_jax.checkpoint.lora import Merged, read_lora
from kavatar_jax.checkpoint.store import Store
from kavatar_jax.checkpoint.weights import revive, save_component
from kavatar_jax.config import load_config
from kavatar_jax.models.components import abstract
from kavatar_jax.models.names import LORA
from kavatar_jax.parallel.mesh import make_mesh
from kavatar_jax.training.config import LoRAConfig, TrainConfig, TrainedConfig
from kavatar_jax.training.export import export
from kavatar_jax.training.learnt import open_run
from kavatar_jax.training.state import begin, join, learning
from tools.convert_checkpoint import convert
from tools.convert_lora import main as convert_lora

LORA_CONFIG = LoRAConfig(rank=3, scale=0.3, patterns=(r"dit/blocks/self_attn/.*", r"dit/text/.*"))


def shaken(tree, seed):
    """Other numbers in every array, as training would leave them."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.1 * draw.standard_normal(x.shape).astype(np.float32), tree)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with a LoRA, and a little else that learns, after two checkpoints; and its own export."""
    folder = tmp_path_factory.mktemp("run")
    base = train_tiny.config()
    model = dataclasses.replace(base.model, text=dataclasses.replace(base.model.text, param_dtype="bfloat16"))
    draw = np.random.default_rng(0)
    for name in ("dit", "text"):
        params = jax.tree.map(
            lambda x: draw.standard_normal(x.shape).astype(x.dtype), abstract(name, getattr(model, name))
        )
        save_component(params, getattr(model, name), folder / "start" / name)
    trained = TrainedConfig(patterns=(r"dit/audio/head/.*", r"text/embedding"), lora=LORA_CONFIG)
    config = dataclasses.replace(base, model=model, weights=str(folder / "start"), trained=trained)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    mesh = make_mesh()
    with jax.set_mesh(mesh), Store(folder / "checkpoints", keep=2) as store:
        state, frozen, _ = begin(config, ["dit", "text"], mesh)
        for step in (2, 4):
            state = state._replace(trained=shaken(state.trained, step), ema=shaken(state.trained, 10 * step))
            store.save(step, state, {"position": step})
        for kind, learnt in (("raw", state.trained), ("ema", state.ema)):
            export(model, learning(config), join(learnt, frozen), folder / kind, start=config.weights)
    return folder


@pytest.mark.parametrize("kind", ["raw", "ema"])
def test_as_the_run_itself_ends(run, tmp_path, kind, capsys):
    convert(run, tmp_path / "out", weights_of=kind)
    assert "run: there is checkpoints/" in capsys.readouterr().err
    for name in ("dit", "text"):
        found, wanted = (Tensors(top / name / "model.safetensors") for top in (tmp_path / "out", run / kind))
        assert found.dtypes == wanted.dtypes and found.shapes == wanted.shapes
        for key in wanted:  # a branch's products are summed in another order there
            apart = np.abs(found[key].astype(np.float32) - wanted[key].astype(np.float32)).max()
            assert apart <= (2e-6 if key.endswith("kernel") and name == "dit" else 0), key
        assert (tmp_path / "out" / name / "config.json").read_text() == (run / kind / name / "config.json").read_text()
    assert json.loads((tmp_path / "out" / "tokenizer" / "config.json").read_text()) == {"kind": "bytes"}


def test_which_step_and_which_weights(run, tmp_path):
    assert (open_run(run).stored.step, open_run(run).kind) == (4, "ema")
    convert(run, tmp_path / "early", step=2, only=["text"])
    convert(run, tmp_path / "late", only=["text"])
    one, two = (Tensors(tmp_path / name / "text" / "model.safetensors") for name in ("early", "late"))
    assert not np.array_equal(one["embedding"], two["embedding"])
    with pytest.raises(ValueError, match="no checkpoint of step 3 in .*; there are 2, 4"):
        convert(run, tmp_path / "none", step=3)
    with pytest.raises(ValueError, match="--step and --weights-of are for the folder of a training run"):
        convert(run / "start", tmp_path / "none", step=3)
    assert not (tmp_path / "none").exists()


def test_what_no_file_holds(run, tmp_path):
    described = json.loads((run / "config.json").read_text())
    (tmp_path / "checkpoints").symlink_to(run / "checkpoints")
    (tmp_path / "config.json").write_text(json.dumps(described | {"fresh": [r"dit/blocks/down/.*"]}))
    with pytest.raises(ValueError, match="dit: blocks/down/bias, blocks/down/kernel and 2 in all began from chance"):
        convert(tmp_path, tmp_path / "out")
    (tmp_path / "config.json").write_text(json.dumps(described | {"task": "vae"}))
    with pytest.raises(ValueError, match="trains the autoencoder"):
        convert(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("naming", ["diffusers", "kohya"])
def test_its_lora_as_a_file(run, tmp_path, naming, capsys):
    """The branches' bits, and what is merged of the file is what the run's own branches give."""
    out = tmp_path / "lora.safetensors"
    assert convert_lora([str(run), str(out), "--to", naming, "--weights-of", "raw"]) == 0
    assert "learn beside the branches" in capsys.readouterr().err
    taken = open_run(run, kind="raw")
    wanted = abstract("dit", taken.config.model.dit)
    found, left = read_lora(out, LORA, wanted)
    ours = {(path, layer): one for path, layers in taken.branches("dit").items() for layer, (one,) in layers.items()}
    assert found.keys() == ours.keys() and not left and len(found) == 2 * 4 + 2
    for home, (one,) in found.items():
        assert one.down.tobytes() == np.ascontiguousarray(ours[home].down).tobytes()
        assert one.up.tobytes() == np.ascontiguousarray(ours[home].up).tobytes()
        assert one.scale == pytest.approx(0.3, rel=1e-6) and one.layout == ours[home].layout
    start = Tensors(run / "start" / "dit" / "model.safetensors")
    changes = {path: {layer: found[path, layer] for layer in layers} for path, layers in taken.branches("dit").items()}
    mine, theirs = Merged(start, taken.branches("dit")), Merged(start, changes)
    for path in changes:
        np.testing.assert_allclose(mine[path].astype(np.float32), theirs[path].astype(np.float32), rtol=1e-2, atol=1e-6)
    assert convert_lora([str(run), str(out), "--to", naming]) == 2  # it is there already


def test_from_one_naming_to_another(run, tmp_path, capsys):
    one, two, three = (tmp_path / f"{name}.safetensors" for name in ("one", "two", "three"))
    assert convert_lora([str(run), str(one), "--to", "diffusers"]) == 0
    assert convert_lora([str(one), str(two), "--to", "kohya"]) == 2
    assert "--weights DIR is missing" in capsys.readouterr().err
    for source, out, naming in ((one, two, "kohya"), (two, three, "diffusers")):
        assert convert_lora([str(source), str(out), "--to", naming, "--weights", str(run / "start")]) == 0
    first, last = load_file(one), load_file(three)
    assert first.keys() == last.keys() and all(first[key].tobytes() == last[key].tobytes() for key in first)


@pytest.mark.parametrize(
    "name", ["train_tiny", "train_tiny:lora", "train_tiny:watched", "train_stableavatar:kling", "demo_vae"]
)
def test_a_run_knows_its_config(name):
    config = load_config(name)
    assert revive(json.loads(json.dumps(dataclasses.asdict(config))), TrainConfig, "it") == config
