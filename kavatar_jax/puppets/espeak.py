"""Real words in many languages through espeak-ng, where it is installed: text goes in, an utterance with phones comes out.

espeak-ng's library reports when each sound begins; its IPA names are mapped to the nearest sounds of `phonemes`. The
rest of the package never needs it: ask `installed()` first.
"""

import ctypes
import ctypes.util
import threading
from functools import cache

import numpy as np
from scipy import signal

from kavatar_jax.puppets.articulation import Phone
from kavatar_jax.puppets.phonemes import PHONEMES, SILENCE
from kavatar_jax.puppets.voice import Utterance
from kavatar_jax.types import SAMPLE_RATE

# constants of espeak-ng's speak_lib.h
_SYNCHRONOUS, _PHONEME_EVENTS_IN_IPA, _DONT_EXIT, _UTF8, _POSITION_CHARACTER = 2, 0x3, 0x8000, 1, 1
_RATE, _PITCH, _EVENT_END_OF_LIST, _EVENT_PHONEME = 1, 3, 0, 7
_ONE_AT_A_TIME = threading.Lock()  # the library has one global state

_SOUNDS = {
    "aɪ": "AY", "aʊ": "AW", "eɪ": "EY", "oʊ": "OW", "əʊ": "OW", "ɔɪ": "OY", "ɔø": "OY", "tʃ": "CH", "dʒ": "CH", "ts": "S",
    "pf": "F", "i": "IY", "ɪ": "IH", "ᵻ": "IH", "ɨ": "IH", "ɯ": "IH", "e": "EH", "ɛ": "EH", "æ": "AE", "a": "AE", "ɑ": "AA",
    "ɒ": "AO", "ɔ": "AO", "o": "AO", "ʊ": "UH", "u": "UW", "y": "UW", "ʏ": "UH", "ø": "UH", "œ": "UH", "ʌ": "AH", "ɐ": "AH",
    "ɜ": "ER", "ɚ": "ER", "ɝ": "ER", "ə": "AX", "ɵ": "UH", "m": "M", "n": "N", "ŋ": "NG", "ɲ": "N", "ɳ": "N", "p": "P",
    "b": "B", "t": "T", "d": "D", "ʈ": "T", "ɖ": "D", "k": "K", "ɡ": "G", "g": "G", "q": "K", "c": "K", "ɟ": "G", "f": "F",
    "v": "V", "ʋ": "V", "β": "V", "θ": "TH", "ð": "TH", "s": "S", "z": "Z", "ʃ": "SH", "ʂ": "SH", "ɕ": "SH", "ʒ": "ZH",
    "ʐ": "ZH", "ʑ": "ZH", "x": "HH", "χ": "HH", "ç": "HH", "h": "HH", "ɦ": "HH", "ɣ": "HH", "ʔ": "HH", "l": "L", "ɫ": "L",
    "ʎ": "L", "ɭ": "L", "r": "R", "ɹ": "R", "ɾ": "R", "ʁ": "R", "ʀ": "R", "ɻ": "R", "w": "W", "ɥ": "W", "ʍ": "W", "j": "Y",
}  # fmt: skip


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("milliseconds", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("name", ctypes.c_char * 8),
    ]


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


def installed() -> bool:
    """Whether espeak-ng's library and its data can be used here."""
    return _library() is not None


def say(text: str, voice: str = "en-us", *, words_per_minute: int = 165, pitch: int = 50) -> Utterance:
    """Read a text aloud. voice: a name of espeak-ng's (`espeak-ng --voices`), pitch: 0..99.

    Raises ValueError if espeak-ng is missing or does not know the voice.
    """
    opened = _library()
    if opened is None:
        raise ValueError("espeak-ng is not installed here; install it (apt-get install espeak-ng) or use voice.utter")
    library, rate = opened
    pieces: list[np.ndarray] = []
    marks: list[tuple[int, str]] = []

    @_Callback
    def collect(wave, count, events):
        if wave and count > 0:
            pieces.append(np.ctypeslib.as_array(wave, (count,)).copy())
        i = 0
        while events[i].type != _EVENT_END_OF_LIST:
            if events[i].type == _EVENT_PHONEME:
                marks.append((events[i].milliseconds, events[i].name.decode("utf-8", "ignore")))
            i += 1
        return 0

    with _ONE_AT_A_TIME:
        if library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"espeak-ng knows no voice {voice!r}; `espeak-ng --voices` lists its names")
        library.espeak_SetParameter(_RATE, words_per_minute, 0)
        library.espeak_SetParameter(_PITCH, pitch, 0)
        library.espeak_SetSynthCallback(collect)
        data = text.encode()
        library.espeak_Synth(data, len(data) + 1, 0, _POSITION_CHARACTER, 0, _UTF8, None, None)
        library.espeak_Synchronize()
    if not pieces:
        raise ValueError(f"espeak-ng said nothing for {text!r}")
    samples = np.concatenate(pieces).astype(np.float64) / 32768
    samples = signal.resample_poly(samples, SAMPLE_RATE, rate).astype(np.float32)
    return Utterance(samples, _phones(marks, len(samples) / SAMPLE_RATE))


@cache
def _library():
    """The opened library and its sample rate, or None."""
    name = ctypes.util.find_library("espeak-ng") or "libespeak-ng.so.1"
    try:
        library = ctypes.CDLL(name)
    except OSError:
        return None
    library.espeak_SetVoiceByName.argtypes = [ctypes.c_char_p]
    library.espeak_Synth.argtypes = [
        ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint,
        ctypes.POINTER(ctypes.c_uint), ctypes.c_void_p,
    ]  # fmt: skip
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, None, _PHONEME_EVENTS_IN_IPA | _DONT_EXIT)
    return (library, rate) if rate > 0 else None


def _phones(marks: list[tuple[int, str]], seconds: float) -> list[Phone]:
    """Phones that tile the utterance, from the times at which sounds begin."""
    starts = [(0, "")] + sorted(marks, key=lambda mark: mark[0]) + [(round(1000 * seconds), "")]
    phones = []
    for (start, name), (end, _) in zip(starts, starts[1:], strict=False):
        if end > start:
            phones.append(Phone(_symbol(name), start / 1000, end / 1000, 1 if "ˈ" in name else 0))
    if phones:
        phones[-1] = Phone(phones[-1].symbol, phones[-1].start, seconds, phones[-1].stress)
    return phones


def _symbol(name: str) -> str:
    """The nearest sound of `phonemes` to an IPA name of espeak-ng's; pauses have names of no letters."""
    letters = name.strip("ˈˌː_:|,'; ")
    for length in (2, 1):
        if letters[:length] in _SOUNDS:
            return _SOUNDS[letters[:length]]
    return "AX" if letters and letters[0].isalpha() else SILENCE


assert all(symbol in PHONEMES for symbol in _SOUNDS.values())
