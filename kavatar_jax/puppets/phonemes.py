"""The sounds of the puppets' language: how each is made in the throat and what it looks like at the mouth.

Formants are an adult man's, in Hz: vowels after Peterson and Barney (1952, doi:10.1121/1.1906875, table II), consonants
after Klatt (1980, doi:10.1121/1.383940, tables II and III), rounded. Symbols are ARPABET's; "_" is silence.
"""

from dataclasses import dataclass

SILENCE = "_"


@dataclass(frozen=True, kw_only=True)
class Phoneme:
    """One sound.

    kind: vowel, nasal, stop, fricative, glide or silence
    seconds: usual length
    formants: (F1, F2, F3) Hz; end: the same at its end, for diphthongs
    voicing, friction: amplitude of the voice and of turbulence; band: (centre, width) Hz of the turbulence
    opening, width, teeth: the mouth's target, opening and teeth 0..1, width -1 rounded .. 1 spread; end_shape: the same
        at its end, for diphthongs
    grip: how strongly the sound insists on its opening and on its width against its neighbours
    """

    kind: str
    seconds: float
    formants: tuple[float, float, float]
    end: tuple[float, float, float] | None = None
    voicing: float = 1.0
    friction: float = 0.0
    band: tuple[float, float] = (3000.0, 2000.0)
    shape: tuple[float, float, float]
    end_shape: tuple[float, float, float] | None = None
    grip: tuple[float, float] = (1.0, 1.0)


def _vowel(f1, f2, f3, opening, width, teeth, *, seconds=0.11) -> Phoneme:
    return Phoneme(kind="vowel", seconds=seconds, formants=(f1, f2, f3), shape=(opening, width, teeth))


def _diphthong(start: Phoneme, end: Phoneme) -> Phoneme:
    return Phoneme(
        kind="vowel", seconds=0.18, formants=start.formants, end=end.formants, shape=start.shape, end_shape=end.shape
    )


def _nasal(f2, f3, opening, *, grip) -> Phoneme:
    return Phoneme(kind="nasal", seconds=0.08, formants=(270, f2, f3), voicing=0.2, shape=(opening, 0, 0), grip=grip)


def _stop(f2, f3, voicing, friction, band, opening, teeth, *, grip) -> Phoneme:
    return Phoneme(
        kind="stop",
        seconds=0.085,
        formants=(250, f2, f3),
        voicing=voicing,
        friction=friction,
        band=band,
        shape=(opening, 0, teeth),
        grip=grip,
    )


def _fricative(f1, f2, f3, voicing, friction, band, shape, *, width_grip=1.5) -> Phoneme:
    return Phoneme(
        kind="fricative",
        seconds=0.1,
        formants=(f1, f2, f3),
        voicing=voicing,
        friction=friction,
        band=band,
        shape=shape,
        grip=(3.0, width_grip),
    )


def _glide(f1, f2, f3, shape, *, grip) -> Phoneme:
    return Phoneme(kind="glide", seconds=0.07, formants=(f1, f2, f3), voicing=0.75, shape=shape, grip=grip)


_VOWELS = {
    "IY": _vowel(270, 2290, 3010, 0.22, 0.85, 0.5),
    "IH": _vowel(390, 1990, 2550, 0.34, 0.45, 0.4, seconds=0.08),
    "EH": _vowel(530, 1840, 2480, 0.56, 0.4, 0.4, seconds=0.1),
    "AE": _vowel(660, 1720, 2410, 0.8, 0.4, 0.45, seconds=0.14),
    "AA": _vowel(730, 1090, 2440, 1.0, 0.0, 0.2, seconds=0.15),
    "AH": _vowel(640, 1190, 2390, 0.62, 0.0, 0.2, seconds=0.09),
    "AO": _vowel(570, 840, 2410, 0.72, -0.55, 0.1, seconds=0.14),
    "UH": _vowel(440, 1020, 2240, 0.34, -0.6, 0.1, seconds=0.08),
    "UW": _vowel(300, 870, 2240, 0.2, -1.0, 0.0),
    "ER": _vowel(490, 1350, 1690, 0.38, -0.4, 0.2, seconds=0.12),
    "AX": _vowel(500, 1450, 2450, 0.36, 0.0, 0.2, seconds=0.06),
}
_STRONG = (2.5, 0.6)  # insists on its opening, takes its width from its neighbours
_SHUT = (4.0, 0.6)

PHONEMES = _VOWELS | {
    SILENCE: Phoneme(
        kind="silence", seconds=0.3, formants=(500, 1450, 2450), voicing=0, shape=(0, 0, 0), grip=(6.0, 1.5)
    ),
    "AY": _diphthong(_VOWELS["AA"], _VOWELS["IH"]),
    "AW": _diphthong(_VOWELS["AA"], _VOWELS["UH"]),
    "EY": _diphthong(_VOWELS["EH"], _VOWELS["IY"]),
    "OW": _diphthong(_VOWELS["AO"], _VOWELS["UW"]),
    "OY": _diphthong(_VOWELS["AO"], _VOWELS["IY"]),
    "M": _nasal(1000, 2200, 0.0, grip=_SHUT),
    "N": _nasal(1700, 2600, 0.2, grip=(2.0, 0.5)),
    "NG": _nasal(2100, 2700, 0.26, grip=(1.5, 0.4)),
    "P": _stop(900, 2200, 0.0, 1.2, (900, 1200), 0.0, 0, grip=_SHUT),
    "B": _stop(900, 2200, 0.12, 0.9, (800, 1200), 0.0, 0, grip=_SHUT),
    "T": _stop(1750, 2650, 0.0, 2.0, (4200, 2600), 0.16, 0.7, grip=_STRONG),
    "D": _stop(1750, 2650, 0.12, 1.5, (3800, 2600), 0.16, 0.7, grip=_STRONG),
    "K": _stop(2000, 2350, 0.0, 1.6, (2000, 900), 0.28, 0.2, grip=(2.0, 0.4)),
    "G": _stop(2000, 2350, 0.12, 1.2, (1900, 900), 0.28, 0.2, grip=(2.0, 0.4)),
    "F": _fricative(340, 1100, 2080, 0.0, 0.14, (6000, 5000), (0.05, 0.1, 1.0)),
    "V": _fricative(250, 1100, 2080, 0.3, 0.08, (6000, 5000), (0.05, 0.1, 1.0)),
    "TH": _fricative(320, 1400, 2540, 0.0, 0.12, (5500, 4500), (0.15, 0.1, 0.9)),
    "S": _fricative(320, 1500, 2530, 0.0, 0.9, (6200, 1900), (0.1, 0.35, 1.0)),
    "Z": _fricative(250, 1500, 2530, 0.25, 0.5, (6000, 1900), (0.1, 0.35, 1.0)),
    "SH": _fricative(300, 1840, 2750, 0.0, 0.9, (3000, 1500), (0.16, -0.6, 0.9), width_grip=3.0),
    "ZH": _fricative(300, 1840, 2750, 0.25, 0.5, (3000, 1500), (0.16, -0.6, 0.9), width_grip=3.0),
    "CH": Phoneme(
        kind="stop",
        seconds=0.12,
        formants=(300, 1840, 2750),
        voicing=0,
        friction=0.9,
        band=(3200, 1600),
        shape=(0.14, -0.55, 0.9),
        grip=(4.0, 3.0),
    ),
    "HH": Phoneme(
        kind="fricative", seconds=0.06, formants=(500, 1450, 2450), voicing=0, shape=(0.4, 0, 0.2), grip=(0.1, 0.1)
    ),
    "L": _glide(310, 1050, 2880, (0.3, 0.1, 0.3), grip=(1.5, 0.4)),
    "R": _glide(310, 1060, 1380, (0.24, -0.55, 0.1), grip=(1.5, 1.5)),
    "W": _glide(290, 610, 2150, (0.1, -1.0, 0.0), grip=(3.0, 4.0)),
    "Y": _glide(260, 2070, 3020, (0.2, 0.7, 0.4), grip=(1.5, 1.5)),
}
LIPS_SHUT = frozenset(("M", "P", "B"))
VOWELS = tuple(name for name, phoneme in PHONEMES.items() if phoneme.kind == "vowel")
CONSONANTS = tuple(name for name, phoneme in PHONEMES.items() if phoneme.kind not in ("vowel", "silence"))
