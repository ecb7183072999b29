"""A voice that speaks: phones and a speaker go in, 16 kHz samples come out, aligned with the phones to the sample.

A source-filter synthesiser after Klatt (1980, doi:10.1121/1.383940): glottal pulses with jitter, shimmer and breath
pass five moving formants and a nasal pole and zero in cascade; turbulence passes a band of its own in parallel.
"""

from dataclasses import dataclass

import numpy as np
from scipy import signal

from kavatar_jax.puppets.articulation import Phone, babble
from kavatar_jax.puppets.phonemes import PHONEMES, SILENCE
from kavatar_jax.types import SAMPLE_RATE

_STEP = 64  # samples for which the filters stand still: 4 ms
_CONTROL = SAMPLE_RATE / _STEP
_NASAL_POLE, _NASAL_ZERO = 270.0, 450.0


@dataclass(frozen=True, kw_only=True)
class Voice:
    """A speaker. pitch: Hz; lively: scale of pitch movements; tract: formants relative to a man's; rate: 1 usual;
    breath, jitter, shimmer: 0 none; tilt: how dull the source is, 0 bright .. 1."""

    pitch: float
    lively: float
    tract: float
    rate: float
    breath: float
    jitter: float
    shimmer: float
    tilt: float


@dataclass(frozen=True)
class Utterance:
    """samples: (n,) float32 at 16 kHz, loud passages near an RMS of 0.1; phones tile the time they take."""

    samples: np.ndarray
    phones: list[Phone]


def sample_voice(seed: int, person: str = "") -> Voice:
    """The voice that belongs to a seed. person: one of identity.PERSONS, or empty for any."""
    rng = np.random.default_rng([seed, 0x50])
    person = person or str(rng.choice(["man", "woman", "boy", "girl"]))
    pitch, tract = {
        "man": (rng.uniform(85, 140), rng.uniform(0.96, 1.06)),
        "old man": (rng.uniform(90, 150), rng.uniform(0.95, 1.04)),
        "woman": (rng.uniform(165, 240), rng.uniform(1.12, 1.2)),
        "old woman": (rng.uniform(150, 215), rng.uniform(1.08, 1.17)),
    }.get(person, (rng.uniform(235, 310), rng.uniform(1.22, 1.32)))
    old = person.startswith("old")
    return Voice(
        pitch=pitch,
        tract=tract,
        lively=rng.uniform(0.6, 1.4),
        rate=rng.uniform(0.88, 1.15) - 0.1 * old,
        breath=rng.uniform(0.02, 0.2) + 0.1 * old,
        jitter=rng.uniform(0.002, 0.01) + 0.008 * old,
        shimmer=rng.uniform(0.02, 0.08) + 0.04 * old,
        tilt=rng.uniform(0.2, 0.8),
    )


def utter(voice: Voice, seconds: float, *, seed: int, smile: float = 0.0, arousal: float = 0.5) -> Utterance:
    """Say invented words for exactly round(seconds * 16000) samples.

    smile: -1 sad .. 1 happy, arousal: 0 calm .. 1 excited; excited speech is faster, higher, louder and brighter, happy
    speech higher, livelier and, with the lips spread, of higher formants.
    """
    rng = np.random.default_rng([seed, 0xA0])
    rate = voice.rate * (0.82 + 0.36 * arousal) * (1 + 0.06 * min(smile, 0))
    phones = babble(seconds, rate=rate, rng=rng)
    return Utterance(speak(phones, voice, rng=rng, smile=smile, arousal=arousal), phones)


def speak(phones: list[Phone], voice: Voice, *, rng, smile: float = 0.0, arousal: float = 0.5) -> np.ndarray:
    """(n,) float32: the sound of phones, n = round(16000 * their end)."""
    length = round(phones[-1].end * SAMPLE_RATE)
    steps = -(-length // _STEP)
    tracks = _tracks(phones, voice, steps, 1 + 0.03 * smile)
    pitch = voice.pitch * 2 ** (_melody(phones, voice, steps, smile, arousal, rng) / 12)
    loudness = 10 ** (_stress_db(phones, steps) / 20)
    voiced, flow = _glottis(pitch, voice, arousal, steps, rng)
    noise = rng.standard_normal(steps * _STEP)
    voicing = _per_sample(tracks.voicing * loudness)
    aspiration = _per_sample(tracks.aspiration + voice.breath * 0.35 * tracks.voicing)
    source = voiced * voicing + 0.12 * noise * aspiration * (0.5 + flow)
    samples = _filter(source, tracks.throat) + _turbulence(tracks.bursts, loudness, rng)
    samples = samples[:length]
    loud = np.percentile(np.abs(samples), 90) + 1e-6 if len(samples) else 1.0
    return (samples * (0.15 * 10 ** ((arousal - 0.5) * 8 / 20) / loud)).astype(np.float32)


@dataclass(frozen=True)
class _Tracks:
    """What the synthesiser does at each step: amplitudes (n,) and filter sections (n, sections, 6); bursts: turbulence
    as (first step, last step, amplitude, band)."""

    voicing: np.ndarray
    aspiration: np.ndarray
    throat: np.ndarray
    bursts: list[tuple[int, int, float, tuple[float, float]]]


def _tracks(phones: list[Phone], voice: Voice, steps: int, spread: float) -> _Tracks:
    formants = np.tile((500.0, 1450.0, 2450.0), (steps, 1))
    voicing, aspiration, nasal = np.zeros((3, steps))
    bursts = []
    for i, phone in enumerate(phones):
        sound = PHONEMES[phone.symbol]
        at = slice(int(phone.start * _CONTROL), max(int(phone.end * _CONTROL), int(phone.start * _CONTROL) + 1))
        span = len(voicing[at])
        start = np.array(sound.formants)
        if phone.symbol == "HH" and i + 1 < len(phones):  # a breath through the next vowel's throat
            start = np.array(PHONEMES[phones[i + 1].symbol].formants)
        end = np.array(sound.end) if sound.end else start
        if sound.kind == "vowel" and phone.stress == 0:
            start, end = 0.8 * start + 0.2 * np.array((500, 1450, 2450)), 0.8 * end + 0.2 * np.array((500, 1450, 2450))
        formants[at] = start + (end - start) * np.linspace(0, 1, span)[:, None]
        if sound.kind == "stop":
            release = at.start + round(0.6 * span)
            bursts.append(
                (release, min(release + (12 if phone.symbol == "CH" else 3), at.stop), sound.friction, sound.band)
            )
            voicing[at.start : release] = sound.voicing
            voicing[release : at.stop] = 0.8 if sound.voicing else 0.0
            aspiration[release : at.stop] = 0.0 if sound.voicing else 0.7
        else:
            voicing[at] = sound.voicing
            if sound.friction:
                bursts.append((at.start, at.stop, sound.friction, sound.band))
            aspiration[at] = 0.9 if phone.symbol == "HH" else 0.0
            nasal[at] = sound.kind == "nasal"
    formants = _smooth(formants, 15) * voice.tract * spread
    nasal = _smooth(nasal, 9)
    return _Tracks(
        voicing=_smooth(voicing, 7),
        aspiration=_smooth(aspiration, 5),
        throat=_throat(formants, nasal, voice),
        bursts=bursts,
    )


def _throat(formants: np.ndarray, nasal: np.ndarray, voice: Voice) -> np.ndarray:
    """Cascade of five formants and a nasal pole with its zero, which cancel each other in sounds of the mouth."""
    high = np.minimum(np.array((3500.0, 4500.0)) * voice.tract, 7200)
    centres = np.concatenate([formants, np.broadcast_to(high, (len(formants), 2))], 1)
    widths = np.array((70.0, 100.0, 150.0, 220.0, 300.0)) + nasal[:, None] * (60, 120, 80, 0, 0)
    sections = _resonators(centres, np.broadcast_to(widths, centres.shape))
    pole = _resonators(np.full((len(nasal), 1), _NASAL_POLE), np.full((len(nasal), 1), 100.0))
    zero = _resonators(_NASAL_POLE + (_NASAL_ZERO - _NASAL_POLE) * nasal[:, None], np.full((len(nasal), 1), 100.0))
    pole[..., :3] = pole[..., 0:1] * zero[..., 3:] / zero[..., 3:4]
    return np.concatenate([sections, pole], 1)


def _resonators(centres: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """(..., sections, 6) second-order sections with poles at the centres, in Hz, of gain 1 at 0 Hz."""
    radius = np.exp(-np.pi * widths / SAMPLE_RATE)
    a1 = -2 * radius * np.cos(2 * np.pi * centres / SAMPLE_RATE)
    a2 = radius**2
    zero = np.zeros_like(a1)
    return np.stack([1 + a1 + a2, zero, zero, np.ones_like(a1), a1, a2], -1)


def _filter(source: np.ndarray, sections: np.ndarray) -> np.ndarray:
    """Pass a source through sections that change every two steps, keeping the filters' memory."""
    out = np.empty_like(source)
    memory = np.zeros((sections.shape[1], 2))
    for i in range(0, len(sections), 2):
        part = slice(i * _STEP, (i + 2) * _STEP)
        out[part], memory = signal.sosfilt(sections[i], source[part], zi=memory)
    return out


def _turbulence(bursts, loudness: np.ndarray, rng) -> np.ndarray:
    """Noise of every hiss and burst through a band of its own."""
    steps = len(loudness)
    out = np.zeros(steps * _STEP)
    for first, last, amplitude, band in bursts:
        start, stop = max(first - 2, 0), min(last + 2, steps)
        level = np.zeros(stop - start)
        level[first - start : last - start] = 0.022 * amplitude
        noise = rng.standard_normal((stop - start) * _STEP) * _per_sample(_smooth(level, 3) * loudness[start:stop])
        section = _resonators(np.array([band[0]]), np.array([band[1]]))
        section[:, :3] /= np.abs(signal.freqz_sos(section, [band[0]], fs=SAMPLE_RATE)[1])
        out[start * _STEP : stop * _STEP] += signal.sosfilt(np.repeat(section, 2, 0), noise)
    return out


def _glottis(pitch: np.ndarray, voice: Voice, arousal: float, steps: int, rng):
    """Derivative of the flow through the glottis, and the flow itself 0..1, at 16 kHz.

    Rosenberg's pulse (1971, doi:10.1121/1.1912389), made at 32 kHz so that little folds back; each cycle has its own
    length (jitter) and height (shimmer).
    """
    rate = 2 * SAMPLE_RATE
    samples = 2 * steps * _STEP
    knots = np.arange(samples // 400 + 2)
    drift = np.interp(np.arange(samples), 400 * knots, 0.004 * rng.standard_normal(len(knots)))
    hertz = np.interp(np.arange(samples), np.arange(steps) * 2 * _STEP, pitch) * (1 + drift)
    cycles = np.cumsum(hertz) / rate
    number = cycles.astype(np.int64)
    wobble = voice.jitter * rng.standard_normal(number[-1] + 2)
    height = 1 + voice.shimmer * rng.standard_normal(number[-1] + 2)
    phase = cycles - number
    phase = phase + (
        wobble[number] * (1 - phase) + wobble[number + 1] * phase
    )  # cycle ends move, phase stays continuous
    opened, closed = 0.4, 0.16
    t = np.arange(2048) / 2048
    flow = np.where(t < opened, 0.5 - 0.5 * np.cos(np.pi * t / opened), np.cos(0.5 * np.pi * (t - opened) / closed))
    flow[t > opened + closed] = 0
    shape = np.diff(flow, append=0) * 2048
    corner = 45 * 2 ** (1.2 * (arousal - 0.5) - 2.0 * voice.tilt)  # harmonic above which the source falls faster
    decay = np.exp(-2 * np.pi * corner / 2048)
    shape = signal.lfilter([1 - decay], [1, -decay], np.tile(shape, 2))[2048:]
    shape /= np.sqrt(np.mean(shape**2))
    at = (phase % 1) * 2048
    source = np.interp(at, np.arange(2048), shape, period=2048) * height[number]
    return signal.resample_poly(source, 1, 2), np.interp(at[::2], np.arange(2048), flow, period=2048)


def _melody(phones: list[Phone], voice: Voice, steps: int, smile: float, arousal: float, rng) -> np.ndarray:
    """Semitones around the voice's pitch: falling through each phrase, rising on stresses, with an end of its own."""
    times = np.arange(steps) / _CONTROL
    melody = np.full(steps, 5 * (arousal - 0.5) + 1.5 * smile)
    lively = voice.lively * (0.6 + 0.8 * arousal) * (1 + 0.3 * smile)
    for start, end in _phrases(phones):
        inside = (times >= start - 0.05) & (times < end + 0.05)
        t = (times[inside] - start) / max(end - start, 0.3)
        melody[inside] += 2.0 - 3.5 * t
        closing = np.exp(-(((times[inside] - end) / 0.14) ** 2))
        melody[inside] += closing * (4.5 if rng.random() < 0.25 else -2.5)
    for phone in phones:
        if phone.stress and PHONEMES[phone.symbol].kind == "vowel":
            peak = 0.5 * (phone.start + phone.end) + 0.02
            melody += lively * phone.stress * rng.uniform(0.8, 1.8) * np.exp(-(((times - peak) / 0.085) ** 2))
    return _smooth(melody, 11)


def _stress_db(phones: list[Phone], steps: int) -> np.ndarray:
    """Stressed syllables are louder; each phrase grows softer towards its end."""
    level = np.zeros(steps)
    for phone in phones:
        level[int(phone.start * _CONTROL) : int(phone.end * _CONTROL) + 1] = (-3.0, 0.0, 2.0)[phone.stress]
    times = np.arange(steps) / _CONTROL
    for start, end in _phrases(phones):
        inside = (times >= start) & (times < end)
        level[inside] -= 4 * (times[inside] - start) / max(end - start, 0.3)
    return _smooth(level, 15)


def _phrases(phones: list[Phone]):
    """(start, end) of each run of sounds between silences."""
    start = None
    for phone in phones:
        if phone.symbol == SILENCE:
            if start is not None:
                yield start, phone.start
            start = None
        elif start is None:
            start = phone.start
    if start is not None:
        yield start, phones[-1].end


def _smooth(track: np.ndarray, width: int) -> np.ndarray:
    """Moving average with a Hann window over the first axis, edges held."""
    window = np.hanning(width + 2)[1:-1]
    padded = np.pad(track, [(width // 2, width // 2)] + [(0, 0)] * (track.ndim - 1), mode="edge")
    return signal.convolve(padded, (window / window.sum()).reshape(-1, *[1] * (track.ndim - 1)), "valid", "direct")


def _per_sample(track: np.ndarray) -> np.ndarray:
    return np.interp(np.arange(len(track) * _STEP), (np.arange(len(track)) + 0.5) * _STEP, track)
