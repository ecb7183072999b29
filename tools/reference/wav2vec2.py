"""wav2vec 2.0 features of recorded waveforms."""

from collections.abc import Iterator
from functools import partial

import jax
import numpy as np

from kavatar_jax.models import wav2vec2
from tools.reference import load
from tools.reference.synthetic_weights import Fixture

FIXTURES = ("wav2vec2_",)


def run(fixture: Fixture) -> Iterator[tuple[str, np.ndarray]]:
    config = wav2vec2.config_of(dict(fixture.shapes()), fixture.meta["config"])
    abstract = jax.eval_shape(partial(wav2vec2.init, config), jax.random.key(0))
    params = load(fixture, wav2vec2.TORCH, abstract, unused=wav2vec2.UNUSED)
    listen = jax.jit(lambda params, samples: wav2vec2.Wav2Vec2(config).apply({"params": params}, samples))
    for case in fixture.meta["cases"]:
        samples_BS = wav2vec2.normalise(fixture.inputs(case)["waveform"])[None]
        outputs = listen(params, samples_BS)
        yield f"{case}/input_values", samples_BS
        yield f"{case}/last_hidden_state", np.asarray(outputs.last)
        yield f"{case}/extract_features", np.asarray(outputs.features)
        yield f"{case}/hidden_1", np.asarray(outputs.hidden[1])
