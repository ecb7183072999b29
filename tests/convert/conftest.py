"""A miniature of the released tree and what is made of it, for the tests of the converter."""

import json
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from released_tree import (
    HEADS,
    NAMES,
    STORED,
    TINY,
    TOKENIZER,
    plain,
    write_tokenizer,
)
from safetensors.numpy import save_file

from tools.convert_checkpoint import convert
from tools.layouts import FILES, TRANSFORMERS
from tools.reference.e2e import TreeFile


@pytest.fixture(scope="module")
def without_torch():
    """The tree's files are looked for as safetensors, which need no torch."""
    with pytest.MonkeyPatch.context() as patch:
        for part, path in NAMES.items():
            patch.setitem(FILES, part, [plain(path)])
        for name, path in TRANSFORMERS.items():
            patch.setitem(TRANSFORMERS, name, plain(path))
        yield


@pytest.fixture(scope="module")
def values():
    """part -> the tensors of its file: every key of the released layout, small."""
    dtypes = {part: np.dtype(getattr(ml_dtypes, name, name)) for part, name in STORED.items()}
    trees = {part: TreeFile(TINY, path, "checkpoint-tree") for part, path in NAMES.items()}
    return {part: {key: np.asarray(x, dtypes[part]) for key, x in trees[part].items()} for part in trees}


@pytest.fixture(scope="module")
def released(tmp_path_factory, without_torch, values):
    """A miniature of the released tree."""
    folder = tmp_path_factory.mktemp("released")
    for path in [*NAMES.values(), TOKENIZER]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
    for part, tensors in values.items():
        save_file(tensors, folder / plain(NAMES[part]))
    for path, content in TINY["json"].items():
        (folder / path).write_text(json.dumps(content))
    write_tokenizer(folder)
    return folder


@pytest.fixture
def tree(released, tmp_path):
    """A copy of the tree to break: files are linked, so write new ones."""
    return Path(shutil.copytree(released, tmp_path / "tree", copy_function=os.link))


@pytest.fixture(scope="module")
def converted(released, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "new" / "tiny"
    convert(released, folder, image_heads=HEADS)
    return folder
