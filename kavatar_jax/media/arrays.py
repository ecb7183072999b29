"""Arrays in numpy's own files."""

import threading
from pathlib import Path
from typing import Any

import numpy as np

# numpy reads a header with Python's parser, which threads of Python 3.11 may not share (cpython issue 106905)
_PARSER = threading.Lock()


def load_arrays(path: Path) -> Any:
    """The array of an .npy file, or a dict of those of an .npz file; from any thread. Errors as of np.load."""
    with _PARSER:
        found = np.load(path)
        if isinstance(found, np.ndarray):
            return found
        with found:
            return {name: found[name] for name in found.files}
