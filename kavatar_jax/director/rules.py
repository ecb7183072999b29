"""The director that needs no language model: a request in, a storyline out, by rules.

What the user says comes first, then the voice, then the portrait (the order of evidence of Kling-Avatar, arXiv
2509.09595, section 2.1). Every shot gets a negative prompt of its own that names the opposite of its emotion and of its
motion (KlingAvatar 2.0, arXiv 2512.13313, section 3.2). The same request always gives the same storyline.
"""

import math
import re
from collections.abc import Iterable

import numpy as np

from kavatar_jax.director import lexicon
from kavatar_jax.director.instruction import THROUGHOUT, Clause, read_instruction
from kavatar_jax.director.prosody import Span, find_spans, find_voice
from kavatar_jax.types import Request, Shot, Storyline

TALKING = "The protagonist is talking"  # the captions StableAvatar was trained with (Francis-Rings/StableAvatar)
SINGING = "The protagonist is singing"
LISTENING = "The protagonist is listening quietly with closed lips"

ARTEFACTS = "identity change, distorted face, deformed hands, flickering"
AROUSED, CALM = 0.65, 0.35  # beyond these a voice is called lively or calm
AGAINST_TEMPO = {
    -1: "fast motion, hectic gestures",
    0: "frozen face, jerky motion",
    1: "slow motion, stiff body, frozen face",
}
RESTING = 0.2  # arousal of someone who listens


def direct(request: Request, *, max_seconds: float = 3.2, min_seconds: float = 0.8) -> Storyline:
    """Shots cut at the pauses of the speech, that tile [0, request.speech.seconds) exactly.

    max_seconds, min_seconds: of a shot; the defaults are a window of 81 frames at 25 fps and a quarter of it. Longer
    shots remain where the speech has no pause; the cascade divides them. No speech at all is one shot of listening.

    The instruction stands word for word in every prompt. What was recognised in it is placed by its words of time
    ("first", "then", "at the end"), on every shot where it has none; an emotion the user did not give is heard from
    the voice, and a striking light or colour of the portrait is named last.
    """
    if not 0 < min_seconds <= max_seconds:
        raise ValueError(f"shots of {min_seconds:g} to {max_seconds:g} s: give 0 < min_seconds <= max_seconds")
    if not len(request.speech.samples):
        raise ValueError("the speech is empty: give a recording of at least one frame")
    clauses = read_instruction(request.instruction)
    spans = find_spans(request.speech, max_seconds=max_seconds, min_seconds=min_seconds)
    voices = find_voice(request.speech, spans)
    look = describe_look(request.portrait)
    wishes = (_merge(_clauses_of(span, spans, clauses)) for span in spans)
    shots = [
        _shot(span, wish, voice=voice, instruction=request.instruction.strip(), look=look)
        for span, wish, voice in zip(spans, wishes, voices, strict=True)
    ]
    return Storyline(summary=_summarise(request.instruction.strip(), shots, voices), shots=tuple(shots))


def direct_unheard(request: Request) -> Storyline:
    """One shot without end, for speech that is yet to come; request.speech is not read.

    There are no pauses to cut at, no voice to hear a mood in, and no end from which "first" and "at the end" could be
    told: clauses with words of time stand in the prompt as they were written, and do nothing else.
    """
    wish = _merge([clause for clause in read_instruction(request.instruction) if clause.when == THROUGHOUT])
    look = describe_look(request.portrait)
    shot = _shot((0.0, math.inf), wish, voice=0.5, instruction=request.instruction.strip(), look=look)
    return Storyline(summary=request.instruction.strip() or TALKING, shots=(shot,))


def describe_look(portrait: np.ndarray) -> str:
    """A sentence on the light and the colours of a picture (H, W, 3) uint8 where they are striking, else "".

    Brightness is the mean luma (Rec. 709), colourfulness the measure of Hasler and Suesstrunk (2003), whose raters call
    less than 15 "not colourful" and more than 59 "quite colourful".
    """
    red, green, blue = np.moveaxis(portrait.astype(np.float32), -1, 0)
    luma = float((0.2126 * red + 0.7152 * green + 0.0722 * blue).mean()) / 255
    red_green, yellow_blue = red - green, (red + green) / 2 - blue
    spread = np.hypot(red_green.std(), yellow_blue.std())
    colourfulness = float(spread + 0.3 * np.hypot(red_green.mean(), yellow_blue.mean()))
    words = []
    if luma < 0.25 or luma > 0.7:
        words.append("dark" if luma < 0.25 else "bright")
    if colourfulness < 15 or colourfulness > 59:
        words.append("nearly colourless" if colourfulness < 15 else "colourful")
    return f"The picture is {' and '.join(words)}." if words else ""


def _shot(span: Span, wish: Clause, *, voice: float | None, instruction: str, look: str) -> Shot:
    emotion = next(iter(wish.emotions), None) or _heard_emotion(voice, wish.against)
    arousal = _arousal(voice, wish.emotions)
    return Shot(
        start=span[0],
        end=span[1],
        prompt=_prompt(instruction, wish, voice=voice, emotion=emotion, look=look),
        negative=_negative(wish, voice=voice, emotion=emotion, arousal=arousal),
        action=", ".join(wish.actions),
        emotion=emotion,
        arousal=arousal,
        camera=", ".join(wish.camera) or "static",
    )


def _clauses_of(span: Span, spans: list[Span], clauses: tuple[Clause, ...]) -> list[Clause]:
    """The clauses that fall on a span: those whose share holds its middle, or has its own middle nearest to it."""
    duration = spans[-1][1]
    middles = [(start + end) / 2 / duration for start, end in spans]
    middle = (span[0] + span[1]) / 2 / duration
    found = []
    for clause in clauses:
        first, last = clause.when
        centre = (first + last) / 2
        inside = [m for m in middles if first <= m < last] or [min(middles, key=lambda m: abs(m - centre))]
        if middle in inside:
            found.append(clause)
    return found


def _merge(clauses: list[Clause]) -> Clause:
    """What the clauses of one shot ask for together. What was said for this moment overrules what was said for all."""
    now = [clause for clause in clauses if clause.when != THROUGHOUT]
    emotions = _join(clause.emotions for clause in now) or _join(clause.emotions for clause in clauses)
    wanted_now = _join(clause.emotions for clause in now)
    against = [
        term
        for clause in clauses
        for term in clause.against
        if clause in now or not any(_names(term, emotion) for emotion in wanted_now)
    ]
    return Clause(
        text="; ".join(clause.text for clause in now),
        when=now[0].when if now else THROUGHOUT,
        emotions=dict(sorted(emotions.items(), key=lambda item: -item[1])),
        actions=tuple(dict.fromkeys(action for clause in clauses for action in clause.actions)),
        camera=_join(clause.camera for clause in now) or _join(clause.camera for clause in clauses),
        against=tuple(against),
        tempo=next((clause.tempo for clause in [*now, *clauses] if clause.tempo), 0),
    )


def _join(tables: Iterable[dict]) -> dict:
    return {key: value for table in tables for key, value in table.items()}


def _names(term: str, emotion: str) -> bool:
    return re.fullmatch(lexicon.EMOTIONS[emotion].words, term, re.IGNORECASE) is not None


def _heard_emotion(voice: float | None, against: tuple[str, ...]) -> str:
    """A word without valence: loud and high says that a speaker is stirred, not whether in joy or in anger."""
    if voice is None or CALM <= voice <= AROUSED:
        return "neutral"
    emotion = "lively" if voice > AROUSED else "calm"
    return "neutral" if any(_names(term, emotion) for term in against) else emotion


def _arousal(voice: float | None, emotions: dict[str, float]) -> float:
    """The emotion the user gave sets the level, the voice moves about it."""
    if not emotions:
        return RESTING if voice is None else round(voice, 3)
    name, intensity = next(iter(emotions.items()))
    level = 0.5 + (lexicon.EMOTIONS[name].arousal - 0.5) * intensity
    return round(min(max(level + (0.0 if voice is None else voice - 0.5), 0.0), 1.0), 3)


def _prompt(instruction: str, wish: Clause, *, voice: float | None, emotion: str, look: str) -> str:
    """The user's words, then what they and the voice mean for this shot, then the picture."""
    actions = [action for action in wish.actions if action != "singing"]
    activity = LISTENING if voice is None else SINGING if "singing" in wish.actions else TALKING
    degree = {0.5: "slightly ", 1.5: "very "}.get(wish.emotions.get(emotion, 1.0), "")
    manner = [f"looking {degree}{emotion}"] if wish.emotions or emotion != "neutral" else []
    now = f"Now: {wish.text}" if wish.text else ""
    camera = f"Camera: {', '.join(wish.camera)}" if wish.camera else ""
    sentences = [instruction, now, ", ".join([activity, *manner, *actions]), camera, look]
    return " ".join(_with_stop(sentence) for sentence in sentences if sentence)


def _with_stop(sentence: str) -> str:
    return sentence if sentence[-1] in ".!?;:…。！？；" else sentence + "."


def _negative(wish: Clause, *, voice: float | None, emotion: str, arousal: float) -> str:
    """What the user ruled out, then the opposites of this shot's emotion, motion and camera, then common artefacts."""
    wanted = wish.emotions or {emotion: 1.0}  # "sad but smiling": the opposite of sad must not forbid the smile
    opposites = [
        term for term in lexicon.EMOTIONS[emotion].opposite if not any(_names(term, other) for other in wanted)
    ]
    tempo = wish.tempo or (1 if arousal > AROUSED else -1 if arousal < CALM else 0)
    mouth = "talking, open mouth, moving lips" if voice is None else ""
    terms = [*wish.against, *opposites, mouth, AGAINST_TEMPO[tempo], *wish.camera.values(), ARTEFACTS]
    return ", ".join(dict.fromkeys(term for term in terms if term))


def _summarise(instruction: str, shots: list[Shot], voices: list[float | None]) -> str:
    """One sentence: what it is about, how long it is and through which moods it goes."""
    theme = instruction.rstrip(".。 ") or (LISTENING if set(voices) == {None} else TALKING)
    moods = ", ".join(dict.fromkeys(shot.emotion for shot in shots))
    return f"{theme}; {len(shots)} shot{'s' if len(shots) > 1 else ''} over {shots[-1].end:.1f} seconds, mood: {moods}."
