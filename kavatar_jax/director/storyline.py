"""Storylines as files: JSON in, a validated `Storyline` out, and back.

    {"summary": "one sentence for the whole performance",
     "shots": [{"start": 0.0, "end": 2.4,               seconds; shots tile [0, duration) in order, without gaps
                "prompt": "The protagonist is talking", what the shot shows
                "negative": "sad, frowning",            what it must not show               optional, ""
                "action": "raises a hand",              what the body does                  optional, ""
                "emotion": "happy",                     one word                            optional, "neutral"
                "arousal": 0.7,                         0 asleep .. 1 beside oneself        optional, 0.5
                "camera": "slow zoom in"}]}             framing and movement                optional, "static"

The keys are the fields of `types.Shot`, so a field added there is a key here. Hidden states are not written: they
belong to the model that made them. A language model's answer is read too, with what it puts around the JSON.
"""

import json
import math
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from kavatar_jax.types import Shot, Storyline

FRAME = 1 / 25  # seconds; times closer than this cannot be told apart in the video


def read_storyline(path_or_text: Path | str) -> Storyline:
    """The storyline in a file, or in a text that holds a JSON object. `check` it against the speech before use.

    ValueError: no such file, not JSON, or a key that is missing, unknown, given twice or of the wrong type.
    """
    text = _text(path_or_text)
    opening, closing = text.find("{"), text.rfind("}")
    if opening < 0 or closing < opening:
        raise ValueError(f"the storyline holds no JSON object, it begins {text[:40]!r}: write {{'summary', 'shots'}}")
    try:
        plan = json.loads(text[opening : closing + 1], parse_int=float, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        line = text[: opening + error.pos].count("\n") + 1
        raise ValueError(f"the storyline is not JSON: {error.msg} in line {line}; mend that line") from None
    _require_keys(plan, "the storyline", required={"summary", "shots"}, known={"summary", "shots"})
    if not isinstance(plan["summary"], str):
        raise ValueError(f"the storyline's summary is {plan['summary']!r}: give one sentence as a string")
    if not isinstance(plan["shots"], list):
        raise ValueError(f"the storyline's shots are {plan['shots']!r}: give a list of objects")
    shots = tuple(_read_shot(shot, number) for number, shot in enumerate(plan["shots"], 1))
    return Storyline(summary=plan["summary"], shots=shots)


def write_storyline(storyline: Storyline, path: Path | str) -> None:
    """Writes the storyline as JSON that a person can edit; times keep every digit, `hidden` is left out."""
    plan = {"summary": storyline.summary, "shots": [asdict(shot) for shot in storyline.shots]}
    Path(path).write_text(json.dumps(plan, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def check(storyline: Storyline, duration: float) -> Storyline:
    """The same storyline with shots that tile [0, duration) exactly, or a ValueError that names the shot to mend.

    duration: seconds of speech. Gaps, overlaps and ends that are off by less than a frame (0.04 s) are closed silently:
    the later shot gives way. Everything larger is the author's to decide.
    """
    assert math.isfinite(duration) and duration > 0, duration
    if not storyline.shots:
        raise ValueError("the storyline has no shots: write at least one, from 0 to the end of the speech")
    for number, shot in enumerate(storyline.shots, 1):
        _check_shot(shot, number, duration)
    shots = []
    joint = 0.0
    for number, shot in enumerate(storyline.shots, 1):
        if abs(shot.start - joint) >= FRAME:
            raise ValueError(_misplaced(shot, number, joint))
        end = duration if number == len(storyline.shots) and abs(shot.end - duration) < FRAME else shot.end
        shots.append(replace(shot, start=joint, end=end))
        if end - joint < min(FRAME, duration):
            raise ValueError(f"shot {number} ({shot.start:g} to {shot.end:g} s) is shorter than a frame: lengthen it")
        joint = end
    if joint != duration:
        raise ValueError(
            f"shot {len(shots)} is the last and ends at {joint:g} s, the speech at {duration:g} s: extend it"
        )
    return replace(storyline, shots=tuple(shots))


def _text(path_or_text: Path | str) -> str:
    """The text itself, or what the file of that name holds. A string with a brace or a line break is text."""
    if isinstance(path_or_text, str) and ("{" in path_or_text or "\n" in path_or_text):
        return path_or_text
    path = Path(path_or_text)
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"cannot read the storyline {str(path)!r} ({error.strerror}): give a JSON file") from None
    except UnicodeDecodeError:
        raise ValueError(f"the storyline {str(path)!r} is not text: give a JSON file in UTF-8") from None


def _unique(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object as a dict; json itself would keep the last of two equal keys and say nothing."""
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"the storyline gives {twice[0]!r} twice in one object: keep one of them")
    return dict(pairs)


def _require_keys(given: Any, name: str, *, required: set[str], known: set[str]) -> None:
    if not isinstance(given, dict):
        raise ValueError(f"{name} is {given!r}: write an object with {', '.join(sorted(required))}")
    if missing := sorted(required - given.keys()):
        raise ValueError(f"{name} lacks {', '.join(map(repr, missing))}: add it")
    if unknown := sorted(given.keys() - known):
        raise ValueError(
            f"{name} has the unknown key {unknown[0]!r}: remove it or use one of {', '.join(sorted(known))}"
        )


def _read_shot(shot: Any, number: int) -> Shot:
    known = get_type_hints(Shot)
    required = {field.name for field in fields(Shot) if field.default is MISSING}
    _require_keys(shot, f"shot {number}", required=required, known=set(known))
    values: dict[str, Any] = shot
    for name, value in values.items():
        if not isinstance(value, known[name]):
            kind = "number" if known[name] is float else "string"
            raise ValueError(f"shot {number}: {name} is {value!r}: give a {kind}")
    return Shot(**values)


def _check_shot(shot: Shot, number: int, duration: float) -> None:
    """What a shot can get wrong by itself."""
    for name in ("start", "end", "arousal"):
        if not math.isfinite(getattr(shot, name)):
            raise ValueError(f"shot {number}: {name} is {getattr(shot, name)}: give a finite number")
    if shot.end <= shot.start:
        raise ValueError(
            f"shot {number} ends at {shot.end:g} s, not after its start at {shot.start:g} s: swap or move them"
        )
    if shot.end - duration >= FRAME:
        raise ValueError(
            f"shot {number} ends at {shot.end:g} s, beyond the speech of {duration:g} s: shorten or drop it"
        )
    if not 0 <= shot.arousal <= 1:
        raise ValueError(f"shot {number}: arousal is {shot.arousal:g}: give a number from 0 to 1")
    if not shot.prompt.strip():
        raise ValueError(f"shot {number} has an empty prompt: say what it shows")


def _misplaced(shot: Shot, number: int, joint: float) -> str:
    if number == 1:
        return f"shot 1 starts at {shot.start:g} s: the first shot must start at 0"
    kind = "leaves a gap after" if shot.start > joint else "overlaps"
    return (
        f"shot {number} starts at {shot.start:g} s and {kind} shot {number - 1}, ending at {joint:g} s: let them meet"
    )
