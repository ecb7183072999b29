"""What the user wrote, read: an English instruction in, clauses with their time, emotion, action and camera out.

Rules, not understanding: words of `lexicon` are looked up, "not angry" is told from "angry" and "very" from "slightly",
and "first ... then ... at the end" becomes shares of the performance. A text in another language yields clauses in
which nothing is recognised, and goes on as it is.
"""

import re
from dataclasses import dataclass, replace

from kavatar_jax.director import lexicon

Share = tuple[float, float]  # of the performance, from 0 to 1, end exclusive
THROUGHOUT: Share = (0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Clause:
    """A piece of the instruction and what was recognised in it.

    when: its share of the performance. emotions: name -> intensity, 0.5 slight, 1 plain, 1.5 strong; in the order said.
    actions: phrases for the prompt. camera: framing or movement -> what contradicts it. against: what the user ruled
    out, for the negative prompt. tempo: -1 slow, 0 not said, 1 fast.
    """

    text: str
    when: Share
    emotions: dict[str, float]
    actions: tuple[str, ...]
    camera: dict[str, str]
    against: tuple[str, ...]
    tempo: int


def read_instruction(instruction: str) -> tuple[Clause, ...]:
    """The clauses of an instruction in the order written; none for a blank one."""
    pieces = _pieces(instruction.translate(_PLAIN))
    clauses = [_read_clause(piece.text, when) for piece, when in zip(pieces, _shares(pieces), strict=True)]
    return _carry_emotions(clauses)


_PLAIN = str.maketrans({"’": "'", "‘": "'", "\t": " "})
_EARLY, _MIDDLE, _NEXT, _LATE = range(4)
_ADVERBS = {_EARLY: lexicon.EARLY_ADVERB, _NEXT: lexicon.NEXT_ADVERB, _LATE: lexicon.LATE_ADVERB}
_PHRASES = {_EARLY: lexicon.EARLY_PHRASE, _MIDDLE: lexicon.MIDDLE_PHRASE, _LATE: lexicon.LATE_PHRASE}
_TIMES = [  # phrases first: "at first" is not "first"
    (re.compile(rf"\b(?:{words})\b", re.IGNORECASE), rank, table is _ADVERBS)
    for table in (_PHRASES, _ADVERBS)
    for rank, words in table.items()
]
_ADVERB_AHEAD = re.compile(rf"\s+(?=(?:{'|'.join(_ADVERBS.values())})\b(?!\W*$))", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?;…])\s+|(?<=[。！？；])|\n+")
_AND = re.compile(r"\s+(?:and|but)\s+", re.IGNORECASE)
_LOOSE_ENDS = re.compile(r"^(?:\W|and\b|but\b)+|(?:\s|[.!?;,]|\band|\bbut)+$", re.IGNORECASE)
_SUBJECT = re.compile(
    r"(?:he|she|it|they|(?:the|a) (?:man|woman|person|girl|boy|speaker|singer|protagonist|character))?", re.IGNORECASE
)


@dataclass(kw_only=True)
class _Piece:
    text: str
    sentence: int
    rank: int | None  # _EARLY .. _LATE; None: no time was said
    step: int = 0  # which of the _NEXT ones


def _pieces(instruction: str) -> list[_Piece]:
    """The instruction cut where its time changes."""
    pieces: list[_Piece] = []
    for number, sentence in enumerate(_SENTENCE_END.split(instruction)):
        rank, step = None, 0
        for part in _parts(sentence):
            text, said, opens, adverb = _time(part)
            if said is not None:
                rank, step = said, len(pieces)
                if adverb and said != _EARLY:
                    _imply_first(pieces, number, said)
            piece = _Piece(text=text, sentence=number, rank=rank, step=step if rank == _NEXT else 0)
            if _SUBJECT.fullmatch(text):
                pass  # "she | then waves"
            elif pieces and replace(pieces[-1], text=text) == piece:
                pieces[-1].text += ", " + text
            else:
                pieces.append(piece)
            if said is not None and not opens:
                rank = None  # "first she smiles, waves" goes on, "waves at the end, smiling" does not
    return pieces


def _parts(sentence: str) -> list[str]:
    """Parts with one time each: between commas, before adverbs of time, at an "and" that joins two times."""
    parts = [part for piece in sentence.split(",") for part in _ADVERB_AHEAD.split(piece.strip())]
    several = [sum(1 for pattern, _, _ in _TIMES if pattern.search(part)) > 1 for part in parts]
    return [
        half for part, joined in zip(parts, several, strict=True) for half in (_AND.split(part) if joined else [part])
    ]


def _time(part: str) -> tuple[str, int | None, bool, bool]:
    """The part without its word of time; that word's rank or None, whether it opens the part, if it is an adverb."""
    for pattern, rank, adverb in _TIMES:
        if word := pattern.search(part):
            before, after = _LOOSE_ENDS.sub("", part[: word.start()]), _LOOSE_ENDS.sub("", part[word.end() :])
            return f"{before} {after}".strip(), rank, not before, adverb
    return _LOOSE_ENDS.sub("", part), None, False, False


def _imply_first(pieces: list[_Piece], sentence: int, rank: int) -> None:
    """ "He smiles, then waves" and "He smiles. Then he waves.": nothing says "first", and yet the smile is."""
    if not pieces or any(piece.rank is not None for piece in pieces):
        return
    if pieces[-1].sentence == sentence or rank == _NEXT:
        sentence = pieces[-1].sentence
        for piece in pieces:
            piece.rank = _EARLY if piece.sentence == sentence else None


def _shares(pieces: list[_Piece]) -> list[Share]:
    """When each piece happens. Several steps share the performance evenly; a single one takes its end of it."""
    steps = sorted({(piece.rank, piece.step) for piece in pieces if piece.rank is not None})
    if len(steps) == 1:
        lone = {_EARLY: (0.0, 0.25), _MIDDLE: (0.25, 0.75), _NEXT: (0.5, 1.0), _LATE: (0.75, 1.0)}
        return [THROUGHOUT if piece.rank is None else lone[piece.rank] for piece in pieces]
    share = {step: (n / len(steps), (n + 1) / len(steps)) for n, step in enumerate(steps)}
    return [THROUGHOUT if piece.rank is None else share[piece.rank, piece.step] for piece in pieces]


def _read_clause(text: str, when: Share) -> Clause:
    camera, against_camera, text_without_camera = _find_camera(text)
    emotions, against_emotions = _find_emotions(text)
    actions, against_actions = _find_actions(text_without_camera)
    tempo = 0
    for sign, words in lexicon.TEMPO.items():
        for word in re.finditer(rf"\b(?:{words})\b", text_without_camera, re.IGNORECASE):
            tempo = tempo or (-sign if _is_denied(text_without_camera[: word.start()]) else sign)
    against = against_emotions + against_actions + against_camera
    return Clause(text=text, when=when, emotions=emotions, actions=actions, camera=camera, against=against, tempo=tempo)


def _carry_emotions(clauses: list[Clause]) -> tuple[Clause, ...]:
    """An action ends with its step, a mood lasts until a later step names or rules out one."""
    mood: dict[str, float] = {}
    carried: dict[Share, dict[str, float]] = {}
    for when in sorted({clause.when for clause in clauses} - {THROUGHOUT}):
        step = [clause for clause in clauses if clause.when == when]
        if any(clause.emotions or clause.against for clause in step):
            mood = {name: factor for clause in step for name, factor in clause.emotions.items()}
        else:
            carried[when] = mood
    return tuple(replace(clause, emotions=carried.get(clause.when, clause.emotions)) for clause in clauses)


_EMOTION = re.compile(
    "|".join(rf"\b(?P<{name}>{emotion.words})\b" for name, emotion in lexicon.EMOTIONS.items()), re.IGNORECASE
)
_JOINED = re.compile(r"\W*(?:\b(?:or|nor)\b)?\W*", re.IGNORECASE)


def _find_emotions(text: str) -> tuple[dict[str, float], tuple[str, ...]]:
    """Emotions that shall be, with their intensity, and the words for those that shall not."""
    wanted: dict[str, float] = {}
    denied: list[str] = []
    end, was_denied = 0, False
    for word in _EMOTION.finditer(text):
        # "without anger, fear or disgust": one negation for the list
        listed = was_denied and _JOINED.fullmatch(text[end : word.start()]) is not None
        was_denied = listed or _is_denied(text[: word.start()])
        end = word.end()
        if was_denied:
            denied.append(word.group().lower())
        else:
            name = str(word.lastgroup)
            wanted[name] = max(wanted.get(name, 0.0), _intensity(text[: word.start()]))
    return wanted, tuple(denied)


def _intensity(before: str) -> float:
    for factor, words in lexicon.INTENSITY.items():
        if re.search(rf"\b(?:{words})\s+(?:(?:bit|of|more)\s+)*$", before, re.IGNORECASE):
            return factor
    return 1.0


def _is_denied(before: str) -> bool:
    """Whether a negation among the four words before reaches the word that follows."""
    for word in reversed(re.findall(r"[\w']+|,", before)[-4:]):
        if word == "," or re.fullmatch(lexicon.TURNS, word, re.IGNORECASE):
            return False
        if re.fullmatch(lexicon.NEGATIONS, word, re.IGNORECASE):
            return True
    return False


def _find_actions(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What the body shall do, in the order said, and what it shall not."""
    found = [
        (match.start(), f"{verb}{match.group(1).lower()}", _is_denied(text[: match.start()]))
        for pattern, verb in _ACTIONS
        for match in pattern.finditer(text)
    ]
    wanted = tuple(action for _, action, denied in sorted(found) if not denied)
    return wanted, tuple(action for _, action, denied in sorted(found) if denied)


_ACTIONS = [(re.compile(rf"\b(?:{verb})({rest})\b", re.IGNORECASE), name) for verb, name, rest in lexicon.ACTIONS]
_CAMERA = [(re.compile(rf"\b(?:{words})\b", re.IGNORECASE), move, against) for words, move, against in lexicon.CAMERA]


def _find_camera(text: str) -> tuple[dict[str, str], tuple[str, ...], str]:
    """Framing and movement that shall be, with their opposites; those that shall not; the text without these words.

    Without them because a "slow zoom" is not a slow performer.
    """
    wanted: dict[str, str] = {}
    denied: list[str] = []
    for pattern, move, opposite in _CAMERA:
        if match := pattern.search(text):
            before, after, pace = _find_pace(text[: match.start()], match.group(), text[match.end() :])
            if _is_denied(before):
                denied.append(move)
            else:
                wanted[f"{pace} {move}".strip()] = opposite
            text = f"{before} {after}"
    return wanted, tuple(denied), text


def _find_pace(before: str, move: str, after: str) -> tuple[str, str, str]:
    """The text around a camera movement without the adverb that belongs to it, and the pace that it gives."""
    for pace, words in (("slow", lexicon.SLOW_CAMERA), ("fast", lexicon.FAST_CAMERA)):
        ahead = re.search(rf"\b(?:{words})(?:,? the camera)?,?\s*$", before, re.IGNORECASE)
        behind = re.match(rf"\s*(?:{words})\b", after, re.IGNORECASE)
        if ahead or behind or re.search(rf"\b(?:{words})\b", move, re.IGNORECASE):
            return before[: ahead.start()] if ahead else before, after[behind.end() :] if behind else after, pace
    return before, after, ""
