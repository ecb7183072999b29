"""LoRA files of ours as diffusers and peft load them: fused there, the weights are what merging here makes of them."""

import numpy as np
import pytest
from test_live_layouts import fill, make_dit

from kavatar_jax.checkpoint.bridge import flatten
from kavatar_jax.checkpoint.lora import Change, write_lora
from kavatar_jax.checkpoint.shards import open_tensors
from kavatar_jax.checkpoint.weights import read_config
from kavatar_jax.config import DiTConfig
from kavatar_jax.models.components import abstract
from tools.convert_checkpoint import convert
from tools.convert_lora import ROWS
from tools.export import export

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")
GB = 10**9
FILE = "diffusion_pytorch_model.safetensors"


def draw_branches(params, naming):
    """Beside every linear of the blocks, which is what diffusers takes of kohya, or of everything."""
    draw, branches = np.random.default_rng(0), {}
    for path, leaf in flatten(params).items():
        stacked = path.startswith("blocks/")
        if not path.endswith("/kernel") or len(leaf.shape) - stacked != 2 or (naming == "kohya" and not stacked):
            continue
        for layer in range(leaf.shape[0]) if stacked else [None]:
            rank = 2 if naming == "kohya" or "q/" in path else 3
            inputs, outputs = leaf.shape[-2:]
            down, up = (draw.standard_normal(shape, np.float32) for shape in ((rank, inputs), (outputs, rank)))
            branches[path, layer] = Change("oi->io", 0.25 if "v/" in path else 0.5, down=down, up=up)
    return branches


@pytest.mark.parametrize("naming", ["diffusers", "kohya"])
def test_fused_there_and_merged_here(tmp_path, naming):
    model = fill(make_dit("i2v"), torch.float32)
    model.save_pretrained(tmp_path / "one" / "transformer")
    convert(tmp_path / "one", tmp_path / "ours")
    params = abstract("dit", read_config(tmp_path / "ours" / "dit", DiTConfig))
    branches = draw_branches(params, naming)
    write_lora(tmp_path / "lora.safetensors", branches, ROWS[naming], params, naming)
    convert(tmp_path / "ours", tmp_path / "merged", loras=[str(tmp_path / "lora.safetensors")])
    export(tmp_path / "merged", tmp_path / "back", "diffusers", shard_size=GB)
    ours = open_tensors(tmp_path / "back" / "transformer" / FILE)

    loader = diffusers.loaders.WanLoraLoaderMixin
    state, metadata = loader.lora_state_dict(str(tmp_path / "lora.safetensors"), return_lora_metadata=True)
    assert len(state) == 2 * len(branches)
    before = {key: x.numpy().copy() for key, x in model.state_dict().items()}
    model.load_lora_adapter(state, prefix="transformer", metadata=metadata)
    model.fuse_lora()
    model.unload_lora()
    theirs = {key: x.numpy() for key, x in model.state_dict().items()}
    assert theirs.keys() == ours.keys()
    assert sum(not np.array_equal(theirs[key], before[key]) for key in theirs) == len(branches)
    for key, values in theirs.items():
        np.testing.assert_allclose(ours[key], values, rtol=0, atol=2e-6, err_msg=key)
