"""What the tests of the converter share: the miniature released tree in words, and helpers around it."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from kavatar_jax.models.components import COMPONENTS
from tools.convert_checkpoint import convert
from tools.layouts import FILES

ROOT = Path(__file__).parents[1]
REFERENCES = Path(os.environ.get("KAVATAR_REFERENCES", Path(__file__).parents[2] / "shared" / "golden"))
TINY = json.loads((Path(__file__).parent / "golden" / "checkpoint_tree_tiny.json").read_text())
HEADS = TINY["dims"]["clip"]["num_heads"]  # the tiny portrait encoder's, which its file does not tell
TOKENIZER = FILES["tokenizer"][0]
NAMES = {part: FILES[part][0] for part in COMPONENTS}
STORED = {"dit": "bfloat16", "vae": "float32", "text": "bfloat16", "image": "float32", "speech": "float32"}
GB = 10**9
# keys and parameters that the published networks use of the released files
PUBLISHED = {
    "dit": (1143, 1_747_426_112), "vae": (194, 126_892_531), "text": (242, 5_680_910_336),
    "image": (392, 632_076_800), "speech": (210, 94_371_712 - 768),
}  # fmt: skip


def plain(path):
    return str(Path(path).with_suffix(".safetensors"))


def write_tokenizer(folder, path=TOKENIZER):
    """What the converter looks for, and what makes it one of plain bytes, so that no vocabulary is needed."""
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_text("{}")
    (folder / path).with_name("config.json").write_text('{"kind": "bytes"}')


def as_torch(torch, x):
    return torch.from_numpy(x.astype(np.float32)).to(torch.bfloat16 if x.dtype != np.float32 else torch.float32)


def rewrite(path, tensors):
    path.unlink()
    save_file(tensors, path)


def refusal(*arguments, **options):
    with pytest.raises(ValueError) as caught:
        convert(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)
