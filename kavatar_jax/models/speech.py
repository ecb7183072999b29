"""Speech encoders behind one interface, chosen by the class of their config: recordings in, a vector per 20 ms out.

A file of one has `listen(params, samples_BS, config, *, lora)` -> (B, L, width), `normalise(samples)`, which prepares a
recording of any length on the host, and `token_count(samples, config)`, the L that comes of so many samples.
"""

from types import ModuleType

from kavatar_jax.config import LogMelConfig, SpeechConfig, Wav2Vec2Config
from kavatar_jax.models import log_mel, wav2vec2

KINDS = {Wav2Vec2Config: wav2vec2, LogMelConfig: log_mel}


def kind(config: SpeechConfig) -> ModuleType:
    return KINDS[type(config)]
