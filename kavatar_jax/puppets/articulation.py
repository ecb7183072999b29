"""What is said and what the mouth does for it: a seed goes in, timed phones come out; phones in, mouth shapes out.

The mouth follows Cohen and Massaro's model of coarticulation (1993, "Modeling coarticulation in synthetic visual
speech"): each sound pulls the mouth towards its shape with a dominance that falls off exponentially in time, so lips
round before a rounded vowel is heard. Sounds made with shut lips shut them, whatever surrounds them; so does silence.
"""

from dataclasses import dataclass

import numpy as np

from kavatar_jax.puppets.phonemes import LIPS_SHUT, PHONEMES, SILENCE, VOWELS

_REACH = 0.024  # seconds over which a sound's pull falls by a factor e
_CONTROL = 250  # Hz at which mouth shapes are worked out
_ONSETS = ("P", "B", "M", "T", "D", "N", "K", "G", "F", "V", "S", "Z", "SH", "TH", "L", "R", "W", "Y", "HH", "CH")
_ONSET_WEIGHTS = (6, 7, 9, 8, 6, 6, 5, 4, 5, 3, 7, 2, 3, 2, 6, 5, 5, 2, 4, 2)
_CLUSTERS = (("S", "T"), ("P", "R"), ("T", "R"), ("B", "L"), ("K", "L"), ("F", "R"), ("S", "P"), ("G", "R"), ("S", "M"))
_CODAS = ("N", "T", "M", "S", "L", "K", "D", "P", "Z", "NG", "V", "F", "B", "SH")
_CODA_WEIGHTS = (9, 7, 6, 7, 6, 4, 5, 4, 4, 3, 2, 2, 2, 1)


@dataclass(frozen=True)
class Phone:
    """One sound of an utterance. start, end: seconds; stress: 0 unstressed, 1 stressed, 2 stressed in its phrase."""

    symbol: str
    start: float
    end: float
    stress: int = 0


def babble(seconds: float, *, rate: float, rng: np.random.Generator) -> list[Phone]:
    """Phrases of invented words with pauses between them, tiling [0, seconds] exactly; the last sound is cut off."""
    phones: list[Phone] = []
    time = 0.0

    def say(symbol: str, duration: float, stress: int = 0):
        nonlocal time
        if time < seconds:
            phones.append(Phone(symbol, time, min(time + duration, seconds), stress))
            time += duration

    if rng.random() < 0.7:
        say(SILENCE, rng.uniform(0.08, 0.4))
    while time < seconds:
        words = int(rng.integers(2, 7))
        for word in range(words):
            for symbol, stress, last in _word(rng, focus=word == words - 1 or rng.random() < 0.2):
                stretch = (1.2 if stress else 0.85) * (1.35 if last and word == words - 1 else 1.0)
                stretch = stretch if PHONEMES[symbol].kind == "vowel" else 1.0
                say(symbol, PHONEMES[symbol].seconds * stretch * rng.uniform(0.85, 1.2) / rate, stress)
        say(SILENCE, rng.choice([rng.uniform(0.16, 0.35), rng.uniform(0.35, 0.8)]))
    return phones


def mouth_shapes(phones: list[Phone], fps: float, frames: int) -> np.ndarray:
    """(frames, 3) float32: opening 0..1, width -1..1 and teeth 0..1 at the middle of each frame of 1/fps seconds."""
    if not phones:
        raise ValueError("no phones; silence is a phone too, with the symbol '_'")
    pad = 25
    end = max(phones[-1].end, frames / fps)
    times = (np.arange(-pad, int(end * _CONTROL) + pad) + 0.5) / _CONTROL
    pull = np.stack([_pull(phone, times) for phone in phones])  # (phones, time)
    grips = np.array([PHONEMES[phone.symbol].grip for phone in phones])
    targets = np.stack([_target(phone, times) for phone in phones])  # (phones, time, 3)
    shapes = np.empty((len(times), 3))
    for axis, grip in ((0, 0), (1, 1), (2, 0)):
        weight = pull * grips[:, grip, None] + 1e-12
        shapes[:, axis] = (weight * targets[..., axis]).sum(0) / weight.sum(0)
    shapes[:, 0] *= 1 - _sealed(phones, times)
    hann = np.hanning(15)[1:-1] / np.hanning(15).sum()
    shapes = np.stack([np.convolve(track, hann, "same") for track in shapes.T], 1)
    shapes[:, 2] *= np.clip(shapes[:, 0] / 0.04, 0, 1)  # no teeth behind shut lips
    middle = (np.arange(frames) + 0.5) / fps
    sampled = [np.interp(middle, times, track) for track in shapes.T]
    return np.clip(np.stack(sampled, 1), (0, -1, 0), (1, 1, 1)).astype(np.float32)


def _word(rng, *, focus: bool):
    """Sounds of an invented word: (symbol, stress, whether it is in the last syllable)."""
    syllables = int(rng.choice([1, 2, 3, 4], p=(0.4, 0.36, 0.18, 0.06)))
    stressed = int(rng.integers(syllables))
    for i in range(syllables):
        stress = (2 if focus else 1) if i == stressed else 0
        last = i == syllables - 1
        if rng.random() < 0.12:
            onset = _CLUSTERS[rng.integers(len(_CLUSTERS))]
        elif rng.random() < 0.92:
            onset = (_pick(rng, _ONSETS, _ONSET_WEIGHTS),)
        else:
            onset = ()
        nucleus = "AX" if not stress and rng.random() < 0.35 else str(rng.choice(VOWELS))
        coda = (_pick(rng, _CODAS, _CODA_WEIGHTS),) if rng.random() < (0.5 if last else 0.2) else ()
        for symbol in (*onset, nucleus, *coda):
            yield symbol, stress, last


def _pick(rng, names, weights) -> str:
    weights = np.asarray(weights, float)
    return str(rng.choice(names, p=weights / weights.sum()))


def _pull(phone: Phone, times: np.ndarray) -> np.ndarray:
    """How strongly a sound shapes the mouth over time: full within its core, falling off outside."""
    duration = phone.end - phone.start
    margin = min(0.35 * duration, 0.06) if phone.symbol == SILENCE else 0.3 * duration
    start, end = phone.start + margin, phone.end - margin
    outside = np.maximum(np.maximum(start - times, times - end), 0)
    return np.exp(-outside / _REACH)


def _target(phone: Phone, times: np.ndarray) -> np.ndarray:
    phoneme = PHONEMES[phone.symbol]
    start = np.array(phoneme.shape)
    end = np.array(phoneme.end_shape or phoneme.shape)
    if phoneme.kind == "vowel" and phone.stress == 0:
        start, end = start * (0.8, 0.8, 1), end * (0.8, 0.8, 1)
    t = np.clip((times - phone.start) / max(phone.end - phone.start, 1e-6), 0, 1)
    t = (t * t * (3 - 2 * t))[:, None]
    return start + (end - start) * t


def _sealed(phones: list[Phone], times: np.ndarray) -> np.ndarray:
    """1 where the lips must be shut, with ramps of 30 ms."""
    sealed = np.zeros(len(times))
    for phone in phones:
        if phone.symbol in LIPS_SHUT or (phone.symbol == SILENCE and phone.end - phone.start > 0.12):
            inset = 0.0 if phone.symbol in LIPS_SHUT else 0.05
            outside = np.maximum(phone.start + inset - times, times - (phone.end - inset))
            sealed = np.maximum(sealed, np.clip(1 - outside / 0.03, 0, 1))
    return sealed
