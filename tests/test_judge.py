"""Judging performances: values worked by hand, and the puppets' own truth found good and its broken copies found out."""

import argparse
import json
from dataclasses import replace

import numpy as np
import pytest

from kavatar_jax.config import load_config
from kavatar_jax.media.video import probe
from kavatar_jax.puppets import judge, measure
from kavatar_jax.puppets.drive import drive
from kavatar_jax.puppets.identity import sample_identity
from kavatar_jax.puppets.judge import NEUTRAL, Trial
from kavatar_jax.puppets.performance import Script, perform
from kavatar_jax.puppets.records import SPLITS, Records, RecordsConfig
from kavatar_jax.puppets.stage import render
from kavatar_jax.puppets.state import column
from kavatar_jax.types import Video
from tools import evaluate, scenes


def reading(frames=9, **values):
    """At rest, mid-grey; values: of every frame, or one each."""
    plain = {"mouth_open", "mouth_width", "smile", "yaw", "pitch", "roll", "blink", "hand"}
    tracks = {name: np.zeros(frames) for name in plain} | {"zoom": np.ones(frames)}
    tracks |= {part: np.full((frames, 3), 128.0) for part in judge.PARTS}
    for name, value in values.items():
        tracks[name] = np.broadcast_to(np.asarray(value, float), tracks[name].shape)
    return measure.Reading(**tracks)


def noise(seed, frames=60):
    return np.random.default_rng(seed).random(frames)


# sync


def test_correlation_finds_its_lag():
    truth = noise(0)
    late, early = np.roll(truth, 3), np.roll(truth, -2)
    assert judge.correlate(2 * truth + 1, truth) == pytest.approx(1)
    assert judge.correlate(1 - truth, truth) == pytest.approx(-1)
    assert judge.correlate(late, truth, lag=3) == pytest.approx(1) and judge.correlate(late, truth) < 0.5
    assert judge.correlate(early, truth, lag=-2) == pytest.approx(1)
    found = judge.judge_sync([(late, truth), (np.roll(noise(1), 3), noise(1))])
    assert (found.lag, found.clip_lag, found.clips, found.frames) == (3, 3, 2, 120)
    assert found.pooled_at_lag == pytest.approx(1) and found.clip_at_lag == pytest.approx(1) and found.pooled < 0.5


def test_mouths_and_truths_that_do_not_move():
    still, truth = np.full(60, 0.4), noise(0)
    assert judge.correlate(still, truth) == 0, "a frozen mouth is no sync"
    assert np.isnan(judge.correlate(truth, still)) and np.isnan(judge.correlate(truth[:2], truth[:2]))
    found = judge.judge_sync([(truth, truth), (truth, still), (still, noise(1))])
    assert found.clip == pytest.approx(0.5), "medians leave out the clip in which nobody speaks, not the frozen one"
    frozen = judge.judge_sync([(still, truth)])
    assert (frozen.pooled, frozen.lag, frozen.clip) == (0, 0, 0)
    assert np.isnan(judge.judge_sync([(truth, still)]).pooled)


def test_lengths_may_differ_and_truths_are_swapped():
    pairs = [(noise(i, 60 - i), noise(i, 60)) for i in range(3)]
    assert judge.judge_sync(pairs).frames == 60 + 59 + 58
    swapped = judge.swap_truths(pairs)
    assert len(swapped) == 6 and all(not np.array_equal(seen[:50], truth[:50]) for seen, truth in swapped)
    assert abs(judge.judge_sync(swapped).pooled) < 0.2


def test_silence_keeps_away_from_speech():
    truth = np.array([0, 0, 0, 0, 0.3, 0, 0, 0, 0.04, 0, 0, 0])
    silent = np.array([1, 1, 0, 0, 0, 0, 0, 1, 0, 1, 1, 1], bool)
    seen = np.where(silent, 0.05, 0.9)
    assert judge.judge_silence([(seen, truth)]) == (1.0, 6)
    assert judge.judge_silence([(seen, truth), (np.full(6, 0.2), np.zeros(6))]) == (0.5, 12)
    share, frames = judge.judge_silence([(seen, np.ones(12))])
    assert np.isnan(share) and frames == 0


# colours and drift


def test_colours_are_compared_with_the_portrait():
    portrait, red = reading(1), reading(skin=(140, 128, 128))
    assert judge.judge_colours(reading(), portrait) == dict.fromkeys(judge.PARTS, 0)
    found = judge.judge_colours(red, portrait)
    assert found["skin"] > 3 and found["hair"] == 0
    np.testing.assert_allclose(judge.follow_colours(red, portrait)["skin"], np.full(9, found["skin"]))
    flicker = np.full((10, 3), 128.0) + 6 * (-1.0) ** np.arange(10)[:, None]
    flickering = reading(10, background=flicker)
    assert judge.judge_colours(flickering, portrait)["background"] == 0, "of the mean colour"
    assert judge.follow_colours(flickering, portrait)["background"].min() > 1


def test_drift_is_a_slope_and_a_change():
    line = judge.judge_drift(0.02 * np.arange(1000) + 5)
    assert line.slope == pytest.approx(2) and line.change == pytest.approx(16)
    assert line.first == pytest.approx(5 + 0.02 * 99.5)
    blocks = np.array([0.9, np.nan, 0.8, 0.75, 0.7, 0.65])
    falling = judge.judge_drift(blocks, every=100)
    assert falling.slope == pytest.approx(-0.05) and falling.change == pytest.approx(0.675 - 0.9)
    short = judge.judge_drift(np.arange(10.0))
    assert (short.first, short.last) == (2, 7), "halves where there is no room for two ends"
    assert np.isnan(judge.judge_drift(np.array([np.nan, 1.0])).slope)


def test_sync_is_followed_block_by_block():
    truth = noise(0, 350)
    seen = np.where(np.arange(350) < 100, truth, noise(1, 350))
    found = judge.follow_sync(seen, truth)
    assert len(found) == 3 and found[0] == pytest.approx(1) and np.abs(found[1:]).max() < 0.3


# control


def test_responses_have_the_sign_of_what_was_asked():
    rest = reading()

    def does(asked, **values):
        return judge.response(asked, reading(**values), rest) > judge.BARS[asked]

    assert does("smile", smile=0.1) and not does("smile", smile=-0.1) and does("frown", smile=-0.1)
    assert not does("smile") and not does("frown"), "a prompt that changes nothing is not obeyed"
    assert judge.response("smile", reading(smile=0.5), reading(smile=0.2)) == pytest.approx(0.3)
    assert does("turn left", yaw=-5) and not does("turn left", yaw=5) and not does("turn left", yaw=-3)
    assert does("turn right", yaw=[0, 0, 1, 6, 6, 6, 6, -2, -2]) and does("raise hand", hand=0.5)
    once = np.eye(9)[4]
    assert not does("turn right", yaw=20 * once) and not does("raise hand", hand=once), "one misread frame"
    assert does("zoom in", zoom=np.linspace(1, 1.2, 9)) and not does("zoom in", zoom=1.03)
    assert does("zoom out", zoom=np.linspace(1, 0.9, 9)) and not does("zoom out", zoom=0.98)


def test_control_is_told_from_chance():
    shown = {"smile": {"smile": 0.7}, "frown": {"smile": -0.7}, "raise hand": {"hand": 1}, "zoom in": {"zoom": 1.2}}
    shown |= {"zoom out": {"zoom": 0.9}, "turn left": {"yaw": -20}, "turn right": {"yaw": 20}, NEUTRAL: {}}
    obeyed = [Trial(puppet, asked, reading(**values)) for puppet in (0, 1) for asked, values in shown.items()]
    found = judge.judge_control(obeyed)
    assert set(found) == set(judge.BARS)
    assert all((row.success, row.chance, row.trials) == (1, 0, 2) for row in found.values())
    assert (found["zoom in"].others, found["raise hand"].others, found["smile"].others) == (4, 2, 2)
    assert found["turn left"].response == 20

    deaf = [replace(trial, reading=reading(zoom=1.2, yaw=-9, hand=1)) for trial in obeyed]
    found = judge.judge_control(deaf)
    for asked in ("zoom in", "turn left", "raise hand"):
        assert found[asked].success == found[asked].chance == 1, "what always happens is no obedience"
    assert found["zoom out"].success == found["smile"].success == 0
    some = judge.judge_control([trial for trial in obeyed if trial.asked in ("raise hand", NEUTRAL)])
    assert set(some) == {"raise hand"}


# seams


def test_seams_stand_out_or_do_not():
    steps = np.full(40, 2.0)
    even = judge.judge_seams([(steps, (8, 20))])
    assert (even.joints, even.joint, even.usual, even.ratio, even.above) == (2, 2, 2, 1, 0)
    steps[8] = 10  # from frame 8, which two sub-clips share, to frame 9
    jump = judge.judge_seams([(steps, (0, 8, 20, 40)), (steps, ())])
    assert (jump.joints, jump.joint, jump.ratio, jump.above) == (2, 6, 3, 0.5)
    assert judge.judge_seams([(steps, (9, 20))]).ratio < 1.1
    none = judge.judge_seams([(steps, ())])
    assert none.joints == 0 and np.isnan(none.ratio)


# the puppets' own truth


@pytest.fixture(scope="module")
def clips():
    """Held-out clips of a second and what is read from them: (record, opening, reading, the portrait's reading)."""
    source = Records(RecordsConfig(frames=25, split="held out", silent=0.0, seed=11))
    found = []
    for index in range(3):
        clip = source[index]
        portrait = clip["portrait"]
        truth = column(clip["state"], "mouth_open")
        found.append((clip, truth, measure.read(clip["video"], portrait), measure.read(portrait[None], portrait)))
    return found


def test_the_truth_is_found_good(clips):
    pairs = [(seen.mouth_open, truth) for _, truth, seen, _ in clips]
    found, swapped = judge.judge_sync(pairs), judge.judge_sync(judge.swap_truths(pairs))
    assert min(found.pooled, found.clip) > 0.95 and found.lag == found.clip_lag == 0
    assert swapped.pooled < 0.4 and swapped.clip < 0.4
    for _, _, seen, portrait in clips:
        assert max(judge.judge_colours(seen, portrait).values()) < 3


def test_a_late_mouth_is_found_out(clips):
    late = []
    for clip, truth, _, _ in clips[:2]:
        video = np.concatenate([clip["video"][[0, 0, 0]], clip["video"][:-3]])
        late.append((measure.read(video, clip["portrait"]).mouth_open, truth))
    found = judge.judge_sync(late)
    assert found.lag == found.clip_lag == 3 and found.pooled_at_lag > 0.95 and found.pooled < 0.7


def test_shifted_colours_and_a_frozen_video_are_found_out(clips):
    clip, truth, _, portrait = clips[0]
    tinted = np.clip(clip["video"][::5] * (1.12, 1.0, 0.85), 0, 255).astype(np.uint8)
    assert min(judge.judge_colours(measure.read(tinted, clip["portrait"]), portrait).values()) > 3
    frozen = measure.read(np.repeat(clip["video"][12:13], 12, 0), clip["portrait"])
    assert abs(judge.judge_sync([(frozen.mouth_open, truth)]).clip_at_lag) < 0.4


# the tool


def renders(request):
    """A performer that cannot be bettered."""
    seed = SPLITS["held out"] + request.seed
    who = sample_identity(seed)
    frames = len(request.speech.samples) // 640
    _, opening = scenes.say(seed, who.person, frames, 25)
    mouth = np.stack([opening, 0 * opening, 0 * opening], 1)
    video = render(who, perform(mouth, Script(), fps=25, seed=request.seed)).video
    return Video(images=iter(video), frames=frames, fps=25, speech=request.speech)


def flashes(request):
    """The same, darker from its second joint on."""
    video = renders(request)
    darker = (frame // 2 if number > 12 else frame for number, frame in enumerate(video.images))
    return replace(video, images=darker, cuts=(6, 12))


def test_a_scene_is_driven_as_its_world_is():
    phones, both, sound = (scenes.synthetic(1, 1.0, load_config("demo"), driven=share) for share in (0.0, 0.5, 1.0))
    np.testing.assert_array_equal(phones.request.speech.samples, sound.request.speech.samples)
    np.testing.assert_allclose(sound.truth, drive(sound.request.speech.samples, 25)[:25, 0], atol=1e-6)
    np.testing.assert_allclose(both.truth, (phones.truth + sound.truth) / 2, atol=1e-6)
    assert 0.05 < np.abs(phones.truth - sound.truth).mean() < 0.5


def test_the_tool_judges_whoever_performs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scenes, "BLOCK", 12)  # more than one to a clip
    order = argparse.Namespace(
        weights=tmp_path, config="demo", audio=None, only="sync,seams,identity", mode="single", clips=2, seconds=0.8,
        driven=0.0, long_frames=200, steps=None, fields=[], keep=tmp_path / "kept", out=tmp_path / "judged.json",
    )  # fmt: skip
    evaluate.evaluate(order, load_config("demo"), {"single": renders, "cascade": flashes})
    found = json.loads((tmp_path / "judged.json").read_text())
    own, other = found["sync"]["correlation"]
    assert own["pooled"] > 0.95 and own["lag"] == 0 and own["frames"] == 40 and other["pooled"] < 0.6
    assert len(found["sync"]["clips"]) == 2 and "drift" not in found
    (seams,) = next(rows for title, rows in found["seams"].items() if title.startswith("step"))
    assert seams["joints"] == 4 and seams["above"] >= 0.5 and seams["ratio"] > 2
    _, worst = found["identity"]["CIEDE2000 to the portrait"]
    assert max(worst[part] for part in judge.PARTS) < 3
    assert "sync: correlation" in capsys.readouterr().out
    kept = {path.name for path in order.keep.iterdir()}
    assert kept == {"sync_synthetic.png", "sync_synthetic.mp4", "seams.png", "seams.mp4"}
    info = probe(order.keep / "seams.mp4")
    assert info.frames == 20 and info.has_audio


def test_the_tool_refuses_bad_orders(tmp_path, capsys):
    def said(*words, weights=tmp_path):
        assert evaluate.main(["--weights", str(weights), "--out", str(tmp_path / "out.json"), *words]) == 2
        message = capsys.readouterr().err
        assert message.startswith("evaluate: ") and message.count("\n") == 1
        return message

    assert "incomplete" in said() and "nowhere" in said(weights=tmp_path / "nowhere")
    assert "no section 'hair'" in said("--only", "sync,hair")
    assert "at least 2" in said("--clips", "1") and "at least 200" in said("--long-frames", "10")
    assert "a share" in said("--driven", "1.5")
    assert "between 1 and 600" in said("--seconds", "0") and "did you mean" in said("--set", "sampling.step=1")
    assert "no such folder" in said("--audio", str(tmp_path / "none"))
    assert "two recordings" in said("--audio", str(tmp_path))
    assert "name a file" in said("--out", str(tmp_path)) and "training run" in said("--config", "demo_dit")
    assert not (tmp_path / "out.json").exists()
