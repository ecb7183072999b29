"""The data: batches that a number names, on any mesh; puppets, prompts, voices and folders of clips; the encoders' tasks."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import train_tiny
from kavatar_jax.config import SPEECH_TOKEN, WhisperConfig
from kavatar_jax.media.video import write_video
from kavatar_jax.parallel.mesh import make_mesh
from kavatar_jax.parallel.sharding import batch_sharding
from kavatar_jax.puppets.performance import CAMERAS
from kavatar_jax.puppets.records import Records, RecordsConfig
from kavatar_jax.puppets.state import column
from kavatar_jax.training import data, hearing, loop
from kavatar_jax.training.config import (
    Bucket,
    CheckpointConfig,
    DataConfig,
    LogConfig,
    OptimizerConfig,
    TrainConfig,
    TrainedConfig,
)
from kavatar_jax.training.prepared import views_of
from kavatar_jax.training.sources import MEANINGS, STRETCHES, open_source
from tests.puppet_batches import MODEL, OTHER_SIZES, PUPPETS, SIZES, puppet_row, take


def test_a_batch_is_known_by_its_number():
    mesh, other = make_mesh(**SIZES), make_mesh(**OTHER_SIZES)
    first = take(data.Loader(PUPPETS, puppet_row(), MODEL, mesh), 3)
    later = take(data.Loader(PUPPETS, puppet_row(), MODEL, other, position=2), 1)[0]
    assert later.number == 2 and later.names == first[2].names
    jax.tree.map(np.testing.assert_array_equal, later.clips, first[2].clips)
    assert len({name for batch in first for name in batch.names}) == 24
    clips = first[0].clips
    assert clips.video.shape == (8, 5, 32, 32, 3) and clips.video.dtype == np.uint8
    assert clips.samples.shape == (8, 5 * 640) and 0 < (clips.last > 0).sum() < 8
    np.testing.assert_array_equal(clips.reference, clips.video[:, 0])
    assert np.unique(clips.lip).tolist() == [0, 255]


def test_clips_between_two_frames_begin_with_their_own():
    config = replace(PUPPETS, portrait=1.0, first_last=0.5)
    assert views_of(config) == [(True, False), (False, True)]
    assert views_of(replace(config, portrait=0.5)) == [(False, False), (True, False), (False, True)]
    clips = take(data.Loader(config, puppet_row(), MODEL, make_mesh(**SIZES)), 1)[0].clips
    own = (clips.reference == clips.video[:, 0]).all(axis=(1, 2, 3))
    np.testing.assert_array_equal(own, clips.last > 0)
    drawn = {data.draw_last(np.random.default_rng(i), 33) for i in range(200)}
    assert drawn == set(range(4, 33, 4)) and data.draw_last(np.random.default_rng(0), 1) == 0


def test_puppets_prompts_as_the_director_words_them():
    plain, directed = (
        open_source(replace(PUPPETS, directed=directed), PUPPETS.buckets[0], MODEL).record(3, None)
        for directed in (False, True)
    )
    assert directed["prompt"].startswith(plain["prompt"]) and "The protagonist" in directed["prompt"]
    np.testing.assert_array_equal(plain["video"], directed["video"])


def test_prompts_say_what_they_mean():
    source = open_source(DataConfig(source="prompts", buckets=PUPPETS.buckets), PUPPETS.buckets[0], MODEL)
    records = [source.record(i, None) for i in range(40)]
    assert len({record["prompt"] for record in records}) == 40
    for record in records:
        meant = {name for name, value in zip(MEANINGS, record["meant"], strict=True) if value}
        assert len(meant & {"smile", "neutral", "frown"}) == 1 and len(meant & set(CAMERAS)) == 1
        if "zoom in" in meant:
            assert any(word in record["prompt"].lower() for word in ("zoom", "closer", "pushes in"))


def test_the_text_encoder_learns_to_read(tmp_path):
    """Two hundred prompts later it tells more than their base rates."""
    model = replace(train_tiny.model(), text=replace(train_tiny.model().text, width=32, mlp=64))
    config = TrainConfig(
        name="reads",
        model=replace(model, dit=replace(model.dit, text_length=192)),
        task="text",
        steps=40,
        data=DataConfig(source="prompts", buckets=(Bucket(width=32, height=32, frames=1, batch=16),)),
        trained=TrainedConfig(patterns=(r"text/.*",)),
        optimizer=OptimizerConfig(kind="muon", learning_rate=5e-3, warmup=5),
        checkpoint=CheckpointConfig(every=100),
        log=LogConfig(every=1),
    )
    assert loop.train(config, tmp_path, resume=False) == 40
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert np.mean([line["loss"] for line in lines[-5:]]) < 0.7 * lines[0]["loss"]
    assert (tmp_path / "weights" / "text" / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="prompts"):
        replace(config, data=PUPPETS)
    wrong = replace(config, trained=TrainedConfig(patterns=(r"vae/.*",)))
    with pytest.raises(ValueError, match="text encoder alone"):
        loop.train(wrong, tmp_path / "wrong", resume=False)


def test_voices_come_with_their_mouths():
    bucket = Bucket(width=32, height=32, frames=33, batch=4)
    config = DataConfig(source="voices", buckets=(bucket,), driven=0.5)
    source = open_source(config, bucket, MODEL)
    whole = Records(RecordsConfig(frames=33 * STRETCHES, driven=0.5)).perform(1)
    parts = [source.record(STRETCHES + i, None) for i in range(STRETCHES)]
    np.testing.assert_array_equal(np.concatenate([part["samples"] for part in parts]), whole.sound)
    mouth = np.concatenate([part["mouth"] for part in parts])
    np.testing.assert_array_equal(mouth[:, 0], column(whole.state, "mouth_open"))
    np.testing.assert_array_equal(mouth[:, 1], column(whole.state, "mouth_width"))


def test_clips_come_with_what_was_heard_before(tmp_path):
    """In the world a recording begins somewhere in the memory or before it; stretches of one follow each other."""
    bucket, memory = Bucket(width=32, height=32, frames=9, batch=4), 40 * SPEECH_TOKEN
    remembering = replace(MODEL, speech=replace(MODEL.speech, memory=40))
    source = open_source(DataConfig(source="voices", buckets=(bucket,)), bucket, remembering)
    parts = [source.record(index, None)["samples"] for index in range(8 * STRETCHES)]
    assert {len(part) for part in parts} == {memory + 9 * 640}
    for index in range(1, len(parts)):
        if index % STRETCHES:
            np.testing.assert_array_equal(parts[index][: -9 * 640], parts[index - 1][9 * 640 :])
    began = [np.flatnonzero(part)[0] for part in parts[::STRETCHES]]
    assert {0 < first < memory for first in began} == {False, True} and min(began) == 0
    pictures = replace(PUPPETS, driven=0.5)
    remembers, forgets = (
        open_source(pictures, PUPPETS.buckets[0], model).record(3, None) for model in (remembering, MODEL)
    )
    assert len(remembers["samples"]) == memory + len(forgets["samples"])

    config = clip_folders(tmp_path)
    taken = data.Records(config, config.buckets[0], remembering).take(0, np.random.default_rng(3))["samples"]
    assert len(taken) == memory + 5 * 640
    level = taken[memory:][::640]  # frame i of the file sounds i / 100
    start = round(100 * level[0])
    assert start > 0 and not taken[: memory - 640 * start].any()
    np.testing.assert_allclose(taken[memory - 640 * start :: 640], np.arange(start + 5) / 100, atol=0.02)


def test_answers_of_a_speech_encoder_are_held_against_their_frames(monkeypatch):
    """An encoder that knows everything has no error; one that answers a frame late errs, as does one that says more."""
    mouth = np.random.default_rng(0).normal(size=(2, 9, 2)).astype(np.float32)
    padded = np.pad((mouth - hearing.TYPICAL) / hearing.SPREAD, ((0, 0), (2, 3), (0, 0)))
    all_known = np.concatenate([padded[:, i : i + 10] for i in range(5)], axis=2)  # (2, 10, 10)

    def answer(late, more=0):
        told = np.repeat(all_known[:, late : late + 9], 2, axis=1)
        told = np.pad(told, ((0, 0), (0, 0), (0, more)), constant_values=3)
        monkeypatch.setattr(hearing.encoders, "listen", lambda params, samples, model: jnp.asarray(told))
        return hearing.losses({}, hearing.Voices(samples=None, mouth=mouth), None)

    assert max(np.abs(value).max() for value in answer(0).values()) < 1e-9
    assert min(answer(1)["loss"]) > 1 and min(answer(1)["opening"]) > 1
    talkative = answer(0, more=5)
    np.testing.assert_allclose(talkative["surplus"], 4.5)  # 5 axes of 9, over ten answers
    np.testing.assert_allclose(talkative["loss"], 4.5)
    assert np.abs(talkative["opening"]).max() < 1e-9


def test_the_speech_encoder_learns_to_hear(tmp_path):
    encoder = WhisperConfig(width=32, heads=2, layers=1, mlp=64, bands=20, positions=48, filled=False)
    config = TrainConfig(
        name="hears",
        model=replace(train_tiny.model(), speech=encoder),
        task="speech",
        steps=30,
        data=DataConfig(source="voices", buckets=(Bucket(width=32, height=32, frames=21, batch=16),), driven=0.5),
        trained=TrainedConfig(patterns=(r"speech/.*",)),
        optimizer=OptimizerConfig(kind="muon", learning_rate=5e-3, warmup=5),
        checkpoint=CheckpointConfig(every=100),
        log=LogConfig(every=1),
    )
    assert loop.train(config, tmp_path, resume=False) == 30
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for what in ("opening", "surplus"):
        assert np.mean([line[what] for line in lines[-5:]]) < 0.8 * np.mean([line[what] for line in lines[5:10]])
    assert (tmp_path / "weights" / "speech" / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="'speech' learns from the source 'voices'"):
        replace(config, data=PUPPETS)
    narrow = replace(config, model=replace(config.model, speech=replace(encoder, width=8)))
    with pytest.raises(ValueError, match="10 answers need"):
        loop.train(narrow, tmp_path / "narrow", resume=False)


def test_a_process_loads_the_rows_of_its_own_devices():
    mesh = make_mesh(**SIZES)
    rows = np.array([2, 3, 6, 7])  # as if only they were here

    class Half:
        def __init__(self, whole):
            self._whole = whole

        def addressable_devices_indices_map(self, shape):
            found = self._whole.addressable_devices_indices_map(shape)
            return {device: index for device, index in found.items() if index[0].start in (2, 6)}

    loader = data.Loader(PUPPETS, puppet_row(), MODEL, mesh)
    loader._sharding = Half(loader._sharding)
    np.testing.assert_array_equal(loader.rows(PUPPETS.buckets[0]), rows)
    whole = np.arange(8.0)
    placed = data.place(whole, np.arange(8), 8, batch_sharding(mesh))
    np.testing.assert_array_equal(placed, whole)


def test_a_batch_has_to_spread_over_the_mesh():
    uneven = replace(PUPPETS, buckets=(replace(PUPPETS.buckets[0], batch=6),))
    with pytest.raises(ValueError, match="multiple"):
        data.Loader(uneven, puppet_row(), MODEL, make_mesh(**SIZES))


def test_padding_shrinks_the_clip_and_its_masks():
    record = {"video": np.full((2, 20, 20, 3), 200, np.uint8), "face": np.ones((2, 20, 20), bool),
              "lip": np.zeros((2, 20, 20), bool), "portrait": np.full((20, 20, 3), 100, np.uint8)}  # fmt: skip
    padded = data.pad(record, np.array([0.25, 0.1, 0.0, 0.5]))
    assert (padded["video"][:, :10, 5:18] == 200).all() and (padded["video"][:, 10:] == 0).all()
    assert (padded["video"][:, :, :5] == 0).all() and (padded["video"][:, :, 18:] == 0).all()
    assert padded["face"][0, 5, 10] == 255 and padded["face"][0, 15, 10] == 0
    assert padded["portrait"][5, 10].tolist() == [100] * 3


def test_close_ups_are_cut_around_the_mouth():
    near = Bucket(width=32, height=32, frames=5, batch=8, closeup=3)
    config = replace(PUPPETS, buckets=(near,))
    whole = open_source(config, near, MODEL).record(3, None)
    close = data.close_up(whole, near, np.random.default_rng(0))
    assert whole["video"].shape == (5, 96, 96, 3) and whole["portrait"].shape == (96, 96, 3)
    assert close["video"].shape == (5, 32, 32, 3) and close["lip"].shape == (5, 32, 32)
    assert close["lip"].sum() == whole["lip"].sum() > 0  # all of the mouth is in it
    top, left = next(
        (y, x) for y in range(65) for x in range(65)
        if np.array_equal(whole["video"][:, y : y + 32, x : x + 32], close["video"])
    )  # fmt: skip
    np.testing.assert_array_equal(whole["portrait"][top : top + 32, left : left + 32], close["portrait"])
    clips = take(data.Loader(config, data.footage_row, MODEL, make_mesh(**SIZES)), 1)[0].clips
    assert clips.video.shape == (8, 5, 32, 32, 3) and clips.lip.any(axis=(1, 2, 3)).all()


def test_clip_folders(tmp_path):
    config = clip_folders(tmp_path)
    bucket = config.buckets[0]
    records = data.Records(config, bucket, MODEL)
    taken = [records.take(serial, np.random.default_rng(serial)) for serial in range(6)]
    assert sorted(record["name"] for record in taken[:2]) == sorted(record["name"] for record in taken[2:4])
    for record in taken:
        assert record["video"].shape == (5, 32, 48, 3) and record["samples"].shape == (5 * 640,)
        assert record["face"].min() == 255 and record["lip"][0, 20, 24] == 255 and record["lip"][0, 4, 4] == 0
        start = record["video"][:, 16, 24, 0].astype(int)  # frames get brighter by 10 each
        assert np.all(np.abs(np.diff(start) - 10) < 5)
        first = round((start[0] - 20) / 10)
        assert record["samples"][320] == pytest.approx(first / 100, abs=0.02)  # each frame has a level of its own
    prompts = {record["prompt"] for record in taken}
    assert prompts == {"a cat speaks", "The protagonist is singing"}
    shutil.rmtree(tmp_path / "singing" / "00002" / "lip_masks")
    with pytest.raises(ValueError, match="whole_masks"):
        [records.take(serial, np.random.default_rng(0)) for serial in range(2)]
    whole = data.Records(replace(config, whole_masks=True), bucket, MODEL)
    assert all(whole.take(serial, np.random.default_rng(0))["face"].min() == 255 for serial in range(2))


def clip_folders(root: Path) -> DataConfig:
    """Two clips of 12 frames in the released layout, each frame with a brightness and a sound level of its own."""
    for name in ("other/00001", "singing/00002"):
        folder = root / name
        frames = [np.full((32, 48, 3), 20 + 10 * i, np.uint8) for i in range(12)]
        folder.mkdir(parents=True)
        sound = np.repeat(np.arange(12) / 100, 640).astype(np.float32)
        write_video(folder / "sub_clip.mp4", frames, fps=25, speech=None, quality=1)
        write_wave(folder / "audio.wav", sound)
        for kind in ("face_masks", "lip_masks"):
            (folder / kind).mkdir()
            mask = np.full((64, 96), 255 if kind == "face_masks" else 0, np.uint8)
            mask[32:48, 32:64] = 255
            for i in range(12):
                Image.fromarray(mask).save(folder / kind / f"frame_{i}.png")
    (root / "other/00001/prompt.txt").write_text("a cat speaks\n")
    (root / "list.txt").write_text("other/00001\nsinging/00002\n")
    bucket = Bucket(width=48, height=32, frames=5, batch=2, clips="list.txt")
    return DataConfig(source="clips", folder=str(root), buckets=(bucket,))


def write_wave(path: Path, samples: np.ndarray):
    import soundfile

    soundfile.write(path, samples, 16000, subtype="FLOAT")


@pytest.mark.slow
def test_workers_make_the_same_batches():
    mesh = make_mesh(**SIZES)
    alone = take(data.Loader(PUPPETS, puppet_row(), MODEL, mesh), 2)
    helped = take(data.Loader(replace(PUPPETS, workers=1), puppet_row(), MODEL, mesh), 2)
    for one, two in zip(alone, helped, strict=True):
        assert one.names == two.names
        jax.tree.map(np.testing.assert_array_equal, one.clips, two.clips)
