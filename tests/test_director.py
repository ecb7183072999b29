"""The director: storylines as files, cut points on the VAE's grid, shots at pauses, and instructions by rules."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import signal

from kavatar_jax.director.cuts import cut_points
from kavatar_jax.director.instruction import read_instruction
from kavatar_jax.director.prosody import find_spans, find_voice
from kavatar_jax.director.rules import describe_look, direct
from kavatar_jax.director.storyline import check, read_storyline, write_storyline
from kavatar_jax.media import audio
from kavatar_jax.types import SAMPLE_RATE, Request, Shot, Speech, Storyline

GREY = np.full((16, 16, 3), (150, 120, 90), np.uint8)
RECORDINGS = [
    "jfk_en_11s.flac",
    "joyhallo_zh_15s.wav",
    "f5_ref_zh.wav",
    "liveavatar_grandmother.wav",
    "nvidia_a2f_en.wav",
    "tts_jane_16s.wav",
    "librivox_sonnet_en_53s.mp3",
]


def storyline_of(*ends: float) -> Storyline:
    starts = (0.0, *ends[:-1])
    shots = tuple(Shot(start=a, end=b, prompt="p") for a, b in zip(starts, ends, strict=True))
    return Storyline(summary="s", shots=shots)


def babble(*plan: tuple[str, float] | tuple[str, float, dict]) -> Speech:
    """Speech-like sound from ("voice" or "pause", seconds, {level, pitch}): a buzz in syllables, and faint noise."""
    rng = np.random.default_rng(0)
    pieces = []
    for kind, seconds, *how in plan:
        time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
        piece = 1e-4 * rng.standard_normal(len(time))
        if kind == "voice":
            settings = {"level": 0.2, "pitch": 120.0, **(how[0] if how else {})}
            buzz = sum(np.sin(2 * np.pi * settings["pitch"] * n * time) / n for n in range(1, 9))
            piece += settings["level"] * buzz * (0.55 - 0.45 * np.cos(2 * np.pi * 4 * time))
        pieces.append(piece)
    return Speech(samples=np.concatenate(pieces).astype(np.float32))


def plan(speech: Speech, instruction: str = "", **kwargs) -> Storyline:
    return direct(Request(portrait=GREY, speech=speech, instruction=instruction), **kwargs)


FOUR_PHRASES = babble(*[("voice", 2.0), ("pause", 0.4)] * 3, ("voice", 2.0))


# storylines as files


def test_storyline_round_trip(tmp_path):
    shots = (
        Shot(start=0.0, end=1.1, prompt='Сказал: "да"', negative="grau, ß", action="a", emotion="sad", arousal=0.3),
        Shot(start=1.1, end=0.1 + 0.2 + 3, prompt="微笑", camera="slow zoom in"),
    )
    storyline = Storyline(summary="première", shots=shots, hidden=np.zeros((2, 3)))
    write_storyline(storyline, tmp_path / "plan.json")
    again = read_storyline(tmp_path / "plan.json")
    assert again == storyline and again.hidden is None
    assert read_storyline(str(tmp_path / "plan.json")) == again
    text = (tmp_path / "plan.json").read_text(encoding="utf-8")
    assert "微笑" in text and "hidden" not in text


def test_storyline_from_a_chatty_answer():
    answer = 'Here it is:\n```json\n{"summary": "s", "shots": [{"start": 0, "end": 2, "prompt": "p"}]}\n```\nEnjoy!'
    assert read_storyline(answer) == Storyline(summary="s", shots=(Shot(start=0.0, end=2.0, prompt="p"),))


SHOT = '{"start": 0, "end": 2, "prompt": "p"%s}'


@pytest.mark.parametrize(
    "text, message",
    [
        ("\n", "holds no JSON object"),
        ('{"summary": "s", "shots": [}', "not JSON: .* line 1"),
        ('{"summary": "s",\n\n "shots" []}', "line 3"),
        ('{"summary": "s"}', "storyline lacks 'shots'"),
        ('{"summary": "s", "shots": [], "title": ""}', "unknown key 'title'"),
        ('{"summary": 3, "shots": []}', "summary is 3"),
        ('{"summary": "s", "shots": {}}', "give a list"),
        ('{"summary": "s", "summary": "t", "shots": []}', "'summary' twice"),
        ('{"summary": "s", "shots": [%s, {"start": 2, "end": 3}]}' % (SHOT % ""), "shot 2 lacks 'prompt'"),
        ('{"summary": "s", "shots": [%s, 5]}' % (SHOT % ""), "shot 2 is 5"),
        ('{"summary": "s", "shots": [%s]}' % (SHOT % ', "mood": ""'), "shot 1 has the unknown key 'mood'.*emotion"),
        ('{"summary": "s", "shots": [%s]}' % (SHOT % ', "arousal": "high"'), "shot 1: arousal is 'high'.*number"),
        ('{"summary": "s", "shots": [%s]}' % (SHOT % ', "arousal": true'), "shot 1: arousal is True"),
        ('{"summary": "s", "shots": [%s]}' % (SHOT % ', "camera": 1'), "shot 1: camera is 1.0.*string"),
        ("no-such-file.json", "cannot read the storyline 'no-such-file.json'"),
    ],
)
def test_unreadable_storylines(text, message):
    with pytest.raises(ValueError, match=message) as error:
        read_storyline(text)
    assert "\n" not in str(error.value)


def test_storyline_that_is_no_text(tmp_path):
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(ValueError, match="UTF-8"):
        read_storyline(tmp_path / "plan.json")


def test_check_closes_what_is_smaller_than_a_frame():
    shots = (
        Shot(start=0.01, end=2.0, prompt="a"),
        Shot(start=2.03, end=4.0, prompt="b"),
        Shot(start=3.97, end=6.03, prompt="c"),
    )
    hidden = np.ones((2, 2))
    checked = check(Storyline(summary="s", shots=shots, hidden=hidden), 6.0)
    assert [(shot.start, shot.end) for shot in checked.shots] == [(0.0, 2.0), (2.0, 4.0), (4.0, 6.0)]
    assert checked.hidden is hidden
    assert check(checked, 6.0) == checked


@pytest.mark.parametrize(
    "change, message",
    [
        ({0: {"start": 0.5}}, "shot 1 starts at 0.5 s: the first shot must start at 0"),
        ({1: {"start": 2.5}}, "shot 2 starts at 2.5 s and leaves a gap after shot 1, ending at 2 s"),
        ({2: {"start": 3.5}}, "shot 3 starts at 3.5 s and overlaps shot 2, ending at 4 s"),
        ({2: {"end": 7.0}}, "shot 3 ends at 7 s, beyond the speech of 6 s"),
        ({2: {"end": 5.0}}, "shot 3 is the last and ends at 5 s, the speech at 6 s"),
        ({1: {"start": 4.0, "end": 2.0}}, "shot 2 ends at 2 s, not after its start"),
        ({1: {"end": math.nan}}, "shot 2: end is nan"),
        ({1: {"end": math.inf}}, "shot 2: end is inf"),
        ({1: {"arousal": 1.5}}, "shot 2: arousal is 1.5"),
        ({1: {"prompt": " "}}, "shot 2 has an empty prompt"),
        ({1: {"end": 2.03}, 2: {"start": 2.03}}, "shot 2 .* is shorter than a frame"),
    ],
)
def test_check_names_the_shot(change, message):
    storyline = storyline_of(2.0, 4.0, 6.0)
    shots = tuple(replace(shot, **change.get(n, {})) for n, shot in enumerate(storyline.shots))
    with pytest.raises(ValueError, match=message) as error:
        check(replace(storyline, shots=shots), 6.0)
    assert "\n" not in str(error.value)


def test_check_wants_shots():
    with pytest.raises(ValueError, match="no shots"):
        check(Storyline(summary="s", shots=()), 1.0)


# cut points


def random_storyline(rng: np.random.Generator) -> tuple[Storyline, float]:
    lengths = rng.uniform(0.05, rng.choice([0.5, 3.2, 12.0]), size=rng.integers(1, 20))
    return storyline_of(*np.cumsum(lengths).tolist()), float(lengths.sum())


@pytest.mark.parametrize("seed", range(150))
def test_cut_points_keep_the_grid(seed):
    rng = np.random.default_rng(seed)
    storyline, duration = random_storyline(rng)
    fps, window = float(rng.choice([16, 23.976, 25, 30])), int(rng.choice([5, 9, 21, 49, 81, 125]))
    frames = max(2, math.ceil(duration * fps) + int(rng.integers(-2, 3)))
    quiet = rng.normal(size=frames) if rng.random() < 0.5 else None
    cuts = cut_points(storyline, fps=fps, window_frames=window, frames=frames, quiet=quiet)
    lengths = np.diff(cuts)
    assert cuts[0] == 0 and frames - 1 <= cuts[-1] < frames - 1 + 4
    assert all(length % 4 == 0 and 4 <= length <= window - 1 for length in lengths)
    if cuts[-1] + 1 >= window / 4:
        assert lengths.min() + 1 >= window / 4
    else:
        assert len(lengths) == 1


def test_cut_points_are_the_shot_boundaries_where_clips_fit():
    rng = np.random.default_rng(1)
    for _ in range(30):
        ends = np.cumsum(rng.uniform(0.8, 3.2, size=12))
        frames = math.ceil(ends[-1] * 25)
        cuts = cut_points(storyline_of(*ends.tolist()), fps=25, window_frames=81, frames=frames)
        assert len(cuts) == 13
        assert np.abs(np.array(cuts[1:-1]) - ends[:-1] * 25).max() <= 2 + 1e-9


def test_long_shot_is_divided_evenly_or_where_it_is_quiet():
    storyline = storyline_of(8.0)
    assert (
        cut_points(storyline, fps=25, window_frames=81, frames=201) == [0, 68, 136, 200]
        or np.ptp(np.diff(cut_points(storyline, fps=25, window_frames=81, frames=201))) <= 4
    )
    energy = np.full(201, -20.0)
    energy[50:54] = energy[128:130] = -60.0
    cuts = cut_points(storyline, fps=25, window_frames=81, frames=201, quiet=energy)
    assert cuts == [0, 52, 128, 200]


def test_shorts_are_merged_and_displaced_cuts_stay_near():
    assert cut_points(storyline_of(0.4, 3.0, 6.0), fps=25, window_frames=81, frames=150)[1] == 76
    # 80 + 12 + 80 frames: nothing can be merged, so one cut leaves its boundary by as little as a quarter window asks
    cuts = cut_points(storyline_of(3.2, 3.68, 6.88), fps=25, window_frames=81, frames=173)
    assert cuts in ([0, 72, 92, 172], [0, 80, 100, 172])


def test_cut_points_are_the_cheapest():
    """Against every possible set of cuts, with the price that the docstring promises."""
    rng = np.random.default_rng(2)
    for _ in range(25):
        storyline, duration = random_storyline(rng)
        frames, window = int(rng.integers(20, 60)), 21
        fps = frames / duration
        quiet = rng.normal(size=frames)
        cuts = cut_points(storyline, fps=fps, window_frames=window, frames=frames, quiet=quiet)
        boundaries = {math.floor(shot.start * fps / 4 + 0.5) * 4 for shot in storyline.shots} - {0}
        boundaries = {boundary for boundary in boundaries if boundary < cuts[-1]}

        def price(cuts, boundaries=boundaries, quiet=quiet):
            inner = set(cuts[1:-1])
            loud = sum(1 + np.mean(quiet < quiet[min(cut, len(quiet) - 1)]) for cut in inner - boundaries)
            uncut = sum(1 + min(abs(boundary - cut) for cut in cuts) / 20 for boundary in boundaries - inner)
            return loud + uncut + 0.05 * sum((length / 20) ** 2 for length in np.diff(cuts))

        inner = range(4, cuts[-1], 4)
        all_cuts = (
            [0, *some, cuts[-1]] for count in range(len(inner) + 1) for some in itertools.combinations(inner, count)
        )
        allowed = [c for c in all_cuts if 5 < min(np.diff(c)) + 1 and max(np.diff(c)) <= 20]
        assert price(cuts) == pytest.approx(min(map(price, allowed)))


@pytest.mark.parametrize("window", [4, 1, 80, 82])
def test_cut_points_refuse_windows_off_the_grid(window):
    with pytest.raises(ValueError, match="4k \\+ 1"):
        cut_points(storyline_of(3.0), fps=25, window_frames=window, frames=75)


def test_cut_points_of_almost_nothing():
    assert cut_points(storyline_of(0.1), fps=25, window_frames=81, frames=2) == [0, 4]
    with pytest.raises(ValueError, match="1 frame"):
        cut_points(storyline_of(0.04), fps=25, window_frames=81, frames=1)


# shots from the voice


def test_shots_are_cut_in_the_known_pauses():
    spans = find_spans(FOUR_PHRASES, max_seconds=3.2, min_seconds=0.8)
    pauses = [(2.0, 2.4), (4.4, 4.8), (6.8, 7.2)]
    assert len(spans) == 4
    for (_, cut), (start, end) in zip(spans[:-1], pauses, strict=True):
        assert start + 0.03 < cut < end - 0.03


def test_speech_without_pauses_stays_whole():
    speech = babble(("voice", 1.5), ("pause", 0.4), ("voice", 6.0), ("pause", 0.1), ("voice", 1.0))
    spans = find_spans(speech, max_seconds=3.2, min_seconds=0.8)
    assert len(spans) == 2 and 1.5 < spans[0][1] < 1.9 and spans[1][1] == speech.seconds


def test_no_shot_is_short_and_only_unavoidable_ones_are_long():
    rng = np.random.default_rng(3)
    for _ in range(12):
        parts = [(kind, rng.uniform(0.25, 2.5)) for _ in range(8) for kind in ("voice", "pause")]
        speech = babble(*parts[:-1])
        spans = find_spans(speech, max_seconds=3.2, min_seconds=0.8)
        assert spans[0][0] == 0 and spans[-1][1] == speech.seconds
        assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
        for start, end in spans:
            assert end - start >= 0.8
            if end - start > 3.2:
                # 0.1 s of slack: a cut keeps 0.04 s from the edges of its pause, and candidates are 0.1 s apart
                inside = [(max(a + 0.1, start + 0.8), min(b - 0.1, end - 0.8)) for a, b in audio.find_pauses(speech)]
                assert not any(b - a > 0.1 for a, b in inside)


def test_a_long_silence_is_a_shot_of_its_own():
    shots = plan(babble(("voice", 1.2), ("pause", 2.5), ("voice", 1.2))).shots
    listening = [shot for shot in shots if "listening" in shot.prompt]
    assert len(shots) == 3 and listening == [shots[1]]
    assert 1.2 < shots[1].start < 1.5 and 3.4 < shots[1].end < 3.7
    assert "open mouth" in shots[1].negative and "open mouth" not in shots[0].negative


def test_cuts_avoid_a_click_in_a_pause():
    speech = babble(("voice", 2.0), ("pause", 0.6), ("voice", 2.0))
    samples = speech.samples.copy()
    middle = round(2.3 * SAMPLE_RATE)
    samples[middle - 320 : middle + 320] += 0.2 * np.sin(np.arange(640)).astype(np.float32)
    assert any(start < 2.1 and end > 2.5 for start, end in audio.find_pauses(Speech(samples=samples)))
    (_, cut), _ = find_spans(Speech(samples=samples), max_seconds=3.2, min_seconds=0.8)
    assert 2.0 < cut < 2.6 and abs(cut - 2.3) > 0.04


def test_arousal_follows_loudness_and_pitch():
    plain, loud, high = {}, {"level": 0.4}, {"pitch": 160.0}
    parts = [(("voice", 1.5, how), ("pause", 0.4)) for how in (plain, plain, loud, plain, high, plain, plain)]
    speech = babble(*itertools.chain(*parts))
    spans = [(n * 1.9, n * 1.9 + 1.9) for n in range(7)]
    voice = find_voice(speech, spans)
    assert voice[0] == pytest.approx(0.5, abs=0.06) and voice[0] == pytest.approx(voice[6], abs=0.02)
    logit = np.log(np.array(voice) / (1 - np.array(voice)))
    assert logit[2] - logit[0] == pytest.approx(20 * math.log10(2) / 6, abs=0.05)
    assert logit[4] - logit[0] == pytest.approx(12 * math.log2(160 / 120) / 4, abs=0.05)
    assert find_voice(replace(speech, samples=speech.samples * 0.1), spans) == pytest.approx(voice, abs=0.02)


def test_arousal_of_a_pause_is_none():
    assert find_voice(FOUR_PHRASES, [(0.0, 2.0), (2.0, 2.4)])[1] is None


@pytest.mark.parametrize("samples", [np.zeros(5 * SAMPLE_RATE, np.float32), np.zeros(1, np.float32)])
def test_silence_is_one_shot_of_listening(samples):
    storyline = plan(Speech(samples=samples))
    (shot,) = storyline.shots
    assert (shot.start, shot.end) == (0.0, len(samples) / SAMPLE_RATE)
    assert "listening" in shot.prompt and "closed lips" in shot.prompt and "talking" in shot.negative
    assert "listening" in storyline.summary


@pytest.mark.parametrize("name", RECORDINGS)
def test_real_recordings_are_cut_in_pauses(data, name):
    speech = audio.load_speech(data / "audio" / name)
    storyline = plan(speech)
    assert check(storyline, speech.seconds) == storyline
    assert storyline == plan(speech)
    assert len(storyline.shots) > 1
    # the speech band's power in the 40 ms around each instant, measured without the package
    band = signal.sosfiltfilt(signal.butter(4, 200, "highpass", fs=SAMPLE_RATE, output="sos"), speech.samples)
    power = 10 * np.log10(np.convolve(band**2, np.full(640, 1 / 640), "same") + 1e-12)
    for shot in storyline.shots[1:]:
        assert power[round(shot.start * SAMPLE_RATE)] < np.percentile(power, 75) - 20
    assert all(0 <= shot.arousal <= 1 for shot in storyline.shots)


# instructions


@pytest.mark.parametrize(
    "text, emotions",
    [
        ("He looks angry", {"angry": 1.0}),
        ("speaking furiously, she is very angry", {"angry": 1.5}),
        ("a slightly sad mood", {"sad": 0.5}),
        ("He is not angry but sad", {"sad": 1.0}),
        ("She isn’t happy", {}),
        ("without anger, fear or disgust", {}),
        ("not angry or sad, only calm", {"calm": 1.0}),
        ("not only happy", {"happy": 1.0}),
        ("an unhappy, worried woman", {"sad": 1.0, "afraid": 1.0}),
        ("CONFUSED!", {"confused": 1.0}),
        ("enthusiastic and confident", {"excited": 1.0, "confident": 1.0}),
        ("astonished", {"surprised": 1.0}),
        ("a room with warm light", {}),
        ("她很生气", {}),
    ],
)
def test_emotion_words(text, emotions):
    found = [clause.emotions for clause in read_instruction(text)]
    assert {name: factor for part in found for name, factor in part.items()} == emotions


@pytest.mark.parametrize(
    "text, actions, camera, against",
    [
        ("turns left", ["turning left"], [], []),
        (
            "She turns her head to the left and raises a hand",
            ["turning her head to the left", "raising a hand"],
            [],
            [],
        ),
        ("He is waving, nodding and shrugging", ["waving", "nodding", "shrugging"], [], []),
        ("The waves of the sea", [], [], []),
        ("doesn't raise his hand", [], [], ["raising his hand"]),
        ("looks happy", [], [], []),
        ("holds a calm expression and touches on politics", [], [], []),
        ("holds up a book, reaches for the cup", ["holding up a book", "reaching for the cup"], [], []),
        ("looks straight at the camera", ["looking straight at the camera"], [], []),
        ("slow zoom in", [], ["slow zoom in"], []),
        ("The camera slowly zooms out", [], ["slow zoom out"], []),
        ("camera pans quickly to the right", [], ["fast pan right"], []),
        ("close-up with a static camera", [], ["static", "close-up"], []),
        ("don't zoom in", [], [], ["zoom in"]),
        ("She tilts her head", ["tilting her head"], [], []),
    ],
)
def test_action_and_camera_words(text, actions, camera, against):
    (clause,) = read_instruction(text)
    assert [*clause.actions] == actions and [*clause.camera] == camera and [*clause.against] == against


@pytest.mark.parametrize(
    "text, tempo", [("moves slowly", -1), ("not too fast", -1), ("slow zoom in", 0), ("big gestures", 1), ("talks", 0)]
)
def test_tempo_words(text, tempo):
    (clause,) = read_instruction(text)
    assert clause.tempo == tempo


HALF, THIRD = [(0.0, 1 / 2), (1 / 2, 1.0)], [(0.0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1.0)]


@pytest.mark.parametrize(
    "text, clauses",
    [
        ("She smiles and waves", [("She smiles and waves", (0, 1))]),
        ("First she smiles, then she waves.", [("she smiles", HALF[0]), ("she waves", HALF[1])]),
        ("She smiles, nods, then waves", [("She smiles, nods", HALF[0]), ("waves", HALF[1])]),
        ("She smiles. Then she waves.", [("She smiles", HALF[0]), ("she waves", HALF[1])]),
        ("He is sad at first and happy at the end", [("He is sad", HALF[0]), ("happy", HALF[1])]),
        ("At first he is sad and at the end he is happy", [("he is sad", HALF[0]), ("he is happy", HALF[1])]),
        ("In a park, she waves at the end", [("In a park", (0, 1)), ("she waves", (0.75, 1))]),
        ("Finally, he nods, bows", [("he nods, bows", (0.75, 1))]),
        ("he nods finally", [("he nods", (0.75, 1))]),
        (
            "He starts calm, becomes angry and ends with a smile",
            [*zip(["calm", "angry", "a smile"], THIRD, strict=True)],
        ),
        ("In the middle she laughs", [("she laughs", (0.25, 0.75))]),
        ("Her first day, next to the end of the road", [("Her first day, next to the end of the road", (0, 1))]),
        ("她先微笑，然后挥手。", [("她先微笑，然后挥手。", (0, 1))]),
        ("   ", []),
    ],
)
def test_time_words(text, clauses):
    found = [(clause.text, clause.when) for clause in read_instruction(text)]
    assert [text for text, _ in found] == [text for text, _ in clauses]
    assert [when for _, when in found] == [pytest.approx(when) for _, when in clauses]


def test_a_mood_lasts_and_an_action_does_not():
    laugh, wave, end = read_instruction("First she laughs and nods, then she waves, finally she is not happy")
    assert laugh.emotions == wave.emotions == {"happy": 1.0} and end.emotions == {}
    assert wave.actions == ("waving",)


def test_instruction_is_placed_on_the_shots():
    text = "A woman in a garden, first very sad, then she raises a hand, at the end she smiles. Slow zoom in!"
    shots = plan(FOUR_PHRASES, text).shots
    assert all(text in shot.prompt for shot in shots)
    assert [shot.emotion for shot in shots] == ["sad", "sad", "sad", "happy"]
    assert [shot.action for shot in shots] == ["", "raising a hand", "raising a hand", ""]
    assert "very sad" in shots[0].prompt.removeprefix(text) and "raising" not in shots[0].prompt
    assert {shot.camera for shot in shots} == {"slow zoom in"}
    assert all("zoom out" in shot.negative for shot in shots)
    assert shots[0].arousal < 0.3 < 0.6 < shots[-1].arousal


def test_late_action_reaches_the_last_shot_only():
    shots = plan(FOUR_PHRASES, "Finally he bows").shots
    assert [shot.action for shot in shots] == ["", "", "", "bowing"]
    (only,) = plan(babble(("voice", 2.0)), "Finally he bows").shots
    assert only.action == "bowing"


def test_negative_prompts_oppose_their_shot():
    happy, angry = plan(FOUR_PHRASES, "First happy, finally angry, not shouting, moving slowly").shots[::3]
    assert "sad" in happy.negative and "smiling" not in happy.negative
    assert "smiling" in angry.negative and "sad" not in angry.negative
    assert "fast motion" in angry.negative and "slow motion" not in angry.negative
    (shot, *_) = plan(FOUR_PHRASES, "sad but smiling, never angry, no zoom in").shots
    terms = shot.negative.split(", ")
    assert shot.emotion == "sad" and "angry" in terms and "zoom in" in terms and "smiling" not in terms
    for shot in plan(FOUR_PHRASES, "happy").shots:
        assert "flickering" in shot.negative and shot.negative.isascii()


def test_what_is_said_for_the_moment_overrules():
    *early, last = plan(FOUR_PHRASES, "He never smiles. Static camera. At the end he smiles, slow zoom in").shots
    assert all("smiles" in shot.negative and shot.camera == "static" for shot in early)
    assert last.emotion == "happy" and "smiles" not in last.negative.split(", ")
    assert last.camera == "slow zoom in" and "camera movement" not in last.negative


def test_without_an_instruction():
    storyline = plan(FOUR_PHRASES)
    for shot in storyline.shots:
        assert shot.prompt == "The protagonist is talking."
        assert (shot.emotion, shot.action, shot.camera) == ("neutral", "", "static")
        assert shot.arousal == pytest.approx(0.5, abs=0.02)
    assert storyline.summary.startswith("The protagonist is talking; 4 shots over 9.2 seconds")


def test_a_late_emotion_replaces_the_general_one():
    shots = plan(FOUR_PHRASES, "A sad man. At the end he is happy.").shots
    assert [shot.emotion for shot in shots] == ["sad", "sad", "sad", "happy"]


def test_singing_changes_the_activity():
    for shot in plan(FOUR_PHRASES, "A girl sings").shots:
        assert "The protagonist is singing" in shot.prompt and "is talking" not in shot.prompt


def test_emotion_is_heard_where_none_is_said():
    loud = {"level": 0.6, "pitch": 170.0}
    speech = babble(*[("voice", 2.4), ("pause", 0.4)] * 3, ("voice", 2.4, loud))
    assert [shot.emotion for shot in plan(speech).shots] == ["neutral", "neutral", "neutral", "lively"]
    said = plan(speech, "He is sad").shots
    assert {shot.emotion for shot in said} == {"sad"} and said[-1].arousal > said[0].arousal
    whisper = babble(*[("voice", 2.4), ("pause", 0.4)] * 3, ("voice", 2.4, {"level": 0.05}))
    assert plan(whisper).shots[-1].emotion == "calm"
    assert plan(whisper, "never calm").shots[-1].emotion == "neutral"


def test_unknown_language_goes_through_verbatim():
    text = "Она улыбается, потом машет рукой"
    for shot in plan(FOUR_PHRASES, f"  {text}\n").shots:
        assert shot.prompt.startswith(f"{text}. ") and shot.emotion == "neutral" and shot.action == ""


def test_look_names_only_what_strikes():
    ramp = np.linspace(0, 1, 64)
    assert describe_look(GREY) == ""
    assert describe_look(np.full((8, 8, 3), 20, np.uint8)) == "The picture is dark and nearly colourless."
    assert describe_look(np.full((8, 8, 3), 230, np.uint8)) == "The picture is bright and nearly colourless."
    bands = (255 * np.stack([ramp > 0.5, (ramp * 4 % 1) > 0.5, ramp < 0.3], -1)).astype(np.uint8)
    assert describe_look(np.tile(bands, (64, 1, 1))) == "The picture is colourful."


def test_direct_refuses_nonsense():
    with pytest.raises(ValueError, match="min_seconds <= max_seconds"):
        plan(FOUR_PHRASES, max_seconds=1.0, min_seconds=2.0)
    with pytest.raises(ValueError, match="empty"):
        plan(Speech(samples=np.zeros(0, np.float32)))


def test_written_plan_of_the_rules_is_read_back(tmp_path):
    storyline = plan(FOUR_PHRASES, "First she smiles, then she waves")
    write_storyline(storyline, tmp_path / "plan.json")
    assert check(read_storyline(tmp_path / "plan.json"), FOUR_PHRASES.seconds) == storyline
    shot = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))["shots"][0]
    assert list(shot) == ["start", "end", "prompt", "negative", "action", "emotion", "arousal", "camera"]
