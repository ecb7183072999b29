"""kavatar_jax.media: sound, pictures, video and faces, on files made here and on real ones where the data folder is."""

import gc
import io
import os
import subprocess
import sys
import weakref
import zlib
from dataclasses import replace
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import soundfile
from PIL import Image, ImageCms

from kavatar_jax.media import audio, faces, image, video
from kavatar_jax.media.wear import CONTRAST, SATURATION, TINT, wear
from kavatar_jax.types import SAMPLE_RATE, Speech
from tools.reference.synthetic_weights import Fixture


def ffmpeg(*arguments: object) -> None:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def tone(seconds: float, rate: int, *, hz: float = 440.0, peak: float = 0.5) -> np.ndarray:
    return peak * np.sin(2 * np.pi * hz * np.arange(int(seconds * rate)) / rate)


def strongest_hz(samples: np.ndarray) -> float:
    return float(np.abs(np.fft.rfft(samples * np.hanning(len(samples)))).argmax() * SAMPLE_RATE / len(samples))


def test_media_imports_no_jax():
    code = "import sys; from kavatar_jax.media import audio, faces, image, video; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- audio: reading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, subtype, rate, channels",
    [
        ("a.wav", "PCM_16", 8000, 1),
        ("a.wav", "PCM_24", 44100, 2),
        ("a.wav", "FLOAT", 96000, 1),
        ("a.flac", "PCM_16", 22050, 2),
        ("a.mp3", None, 44100, 1),
        ("a.ogg", "VORBIS", 48000, 2),
        ("a.m4a", None, 44100, 2),
    ],
)
def test_any_format_becomes_16_khz_mono(tmp_path, name, subtype, rate, channels):
    path = tmp_path / name
    samples = np.stack([tone(1.0, rate)] * channels, axis=1)
    if name.endswith("m4a"):
        soundfile.write(tmp_path / "source.wav", samples, rate)
        ffmpeg("-i", tmp_path / "source.wav", path)
    else:
        soundfile.write(path, samples, rate, subtype=subtype)
    speech = audio.load_speech(path)
    assert speech.samples.dtype == np.float32 and speech.samples.ndim == 1 and speech.path == path
    assert speech.seconds == pytest.approx(1.0, abs=0.06)  # lossy formats pad the last frame
    middle = speech.samples[4000:12000]
    assert strongest_hz(middle) == pytest.approx(440, abs=2)
    assert np.sqrt(np.mean(middle**2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.03)


def test_16_khz_mono_is_untouched_and_stereo_is_the_mean(tmp_path):
    left, right = tone(0.5, SAMPLE_RATE), tone(0.5, SAMPLE_RATE, hz=1000, peak=0.25)
    soundfile.write(tmp_path / "mono.wav", left, SAMPLE_RATE, subtype="PCM_16")
    stored = soundfile.read(tmp_path / "mono.wav", dtype="float32")[0]
    np.testing.assert_array_equal(audio.load_speech(tmp_path / "mono.wav").samples, stored)
    soundfile.write(tmp_path / "two.wav", np.stack([left, right], axis=1), SAMPLE_RATE, subtype="FLOAT")
    np.testing.assert_allclose(audio.load_speech(tmp_path / "two.wav").samples, (left + right) / 2, atol=1e-6)


@pytest.mark.parametrize("suffix", ["mp3", "m4a", "ogg", "flac"])
def test_lossy_formats_keep_time(tmp_path, suffix):
    samples = np.zeros(44100)
    samples[22050:22094] = np.hanning(44)  # half a second in
    soundfile.write(tmp_path / "click.wav", samples, 44100)
    ffmpeg("-i", tmp_path / "click.wav", tmp_path / f"click.{suffix}")
    heard = audio.load_speech(tmp_path / f"click.{suffix}").samples
    assert np.abs(heard).argmax() / SAMPLE_RATE == pytest.approx(0.5005, abs=0.004)  # a tenth of a video frame


def test_sound_track_of_a_video_keeps_its_late_start(tmp_path):
    path = tmp_path / "late.mp4"
    picture = ["-f", "lavfi", "-i", "testsrc=d=2:s=64x64:r=10"]
    ffmpeg(*picture, "-itsoffset", 0.5, "-f", "lavfi", "-i", "sine=f=500:d=1", "-map", "0:v", "-map", "1:a", path)
    samples = np.abs(audio.load_speech(path).samples)
    assert samples[: int(0.45 * SAMPLE_RATE)].max() < 0.01
    assert samples[int(0.55 * SAMPLE_RATE) : int(0.6 * SAMPLE_RATE)].max() > 0.05


def test_peaks_above_one_are_scaled_not_clipped(tmp_path):
    loud = tone(0.5, SAMPLE_RATE, peak=3.0)
    soundfile.write(tmp_path / "loud.wav", loud, SAMPLE_RATE, subtype="FLOAT")
    np.testing.assert_allclose(audio.load_speech(tmp_path / "loud.wav").samples, loud / np.abs(loud).max(), atol=1e-6)


@pytest.mark.parametrize(
    "name, says",
    [
        ("nowhere.wav", "no such file"),
        (".", "is a folder"),
        ("text.wav", "not a sound file"),
        ("noise.mp3", "not a sound file"),
        ("picture.png", "no sound track"),
        ("empty.wav", "not a sound file"),
        ("nothing.wav", "is empty"),
        ("nan.wav", "NaN"),
    ],
)
def test_bad_sound_files_are_named_in_one_line(tmp_path, name, says):
    (tmp_path / "text.wav").write_text("this is no sound")
    (tmp_path / "noise.mp3").write_bytes(np.random.default_rng(0).bytes(50_000))
    Image.new("RGB", (32, 32)).save(tmp_path / "picture.png")
    (tmp_path / "empty.wav").touch()
    soundfile.write(tmp_path / "nothing.wav", np.zeros(0), 44100)
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan] * 1000), 16000, subtype="FLOAT")
    with pytest.raises(ValueError, match=says) as caught:
        audio.load_speech(tmp_path / name)
    assert "\n" not in str(caught.value) and str(tmp_path / name) in str(caught.value)


# ---- audio: what a director hears ----------------------------------------------------------------------------------


def talk(spans: list[tuple[float, float]], seconds: float, *, noise_db: float = -120.0, gain: float = 1.0) -> Speech:
    """Syllables at 5 Hz of a harmonic voice in the spans, over white noise: level about -14 dBFS at gain 1."""
    rng = np.random.default_rng(1)
    t = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    voice = sum(np.sin(2 * np.pi * 120 * k * t) / k for k in range(1, 20))
    syllables = 0.15 + 0.85 * np.sin(np.pi * 5 * t) ** 2
    inside = np.zeros(len(t))
    for start, end in spans:
        inside[int(start * SAMPLE_RATE) : int(end * SAMPLE_RATE)] = 1
    samples = 0.2 * voice * syllables * inside + 10 ** (noise_db / 20) * rng.standard_normal(len(t))
    return Speech(samples=(gain * samples).astype(np.float32))


@pytest.mark.parametrize("gain", [1.0, 0.08])
@pytest.mark.parametrize("noise_db", [-120.0, -60.0, -38.0])
def test_pauses_at_any_level_and_noise_floor(gain, noise_db):
    speech = talk([(0.5, 2.0), (2.1, 3.0), (3.6, 6.0)], 7.0, noise_db=noise_db, gain=gain)
    expected = [(0.0, 0.5), (3.0, 3.6), (6.0, 7.0)]
    np.testing.assert_allclose(audio.find_pauses(speech), expected, atol=0.05)
    short = audio.find_pauses(speech, min_seconds=0.05)
    np.testing.assert_allclose(short, [expected[0], (2.0, 2.1), *expected[1:]], atol=0.05)


def test_digital_silence_around_a_noisy_recording_hides_no_pause():
    speech = talk([(0.0, 2.0), (2.6, 5.0)], 5.0, noise_db=-38.0)
    padded = Speech(samples=np.pad(speech.samples, SAMPLE_RATE))
    np.testing.assert_allclose(audio.find_pauses(padded), [(0, 1), (3.0, 3.6), (6, 7)], atol=0.05)


def test_a_click_does_not_end_a_pause_and_hum_does_not_hide_it():
    speech = talk([(0.0, 2.0), (3.0, 5.0)], 5.0)
    speech.samples[int(2.5 * SAMPLE_RATE) : int(2.5 * SAMPLE_RATE) + 80] += 0.5
    speech.samples[:] += tone(5.0, SAMPLE_RATE, hz=20, peak=0.05).astype(np.float32)
    np.testing.assert_allclose(audio.find_pauses(speech), [(2.0, 3.0)], atol=0.05)


def test_one_word_in_a_long_silence():
    speech = talk([(30.0, 30.5)], 60.0, noise_db=-80.0)
    assert not audio.is_silent(speech)
    np.testing.assert_allclose(audio.find_pauses(speech), [(0, 30.0), (30.5, 60)], atol=0.05)


def test_sound_that_never_stops_has_no_pauses():
    music = tone(8.0, SAMPLE_RATE) * (0.6 + 0.4 * np.sin(2 * np.pi * np.arange(8 * SAMPLE_RATE) / SAMPLE_RATE))
    assert audio.find_pauses(Speech(samples=music.astype(np.float32))) == []


def test_silence_is_one_pause():
    quiet = np.random.default_rng(0).standard_normal(3 * SAMPLE_RATE).astype(np.float32)
    for samples in (0 * quiet, 1e-4 * quiet, 3e-3 * quiet):
        speech = Speech(samples=samples)
        assert audio.is_silent(speech) and audio.find_pauses(speech) == [(0.0, 3.0)]
        assert np.isnan(audio.pitch_contour(speech, hop=0.04)).all()
    assert not audio.is_silent(talk([(0.5, 2.5)], 3.0, gain=0.05))


@pytest.mark.parametrize("hop", [0.01, 1 / 25, 1 / 30])
def test_energy_is_rms_in_decibels_and_one_value_a_frame(hop):
    samples = np.concatenate([tone(1.0, SAMPLE_RATE, peak=0.5), np.zeros(SAMPLE_RATE)]).astype(np.float32)
    energy = audio.energy_contour(Speech(samples=samples), hop=hop)
    assert len(energy) == round(2 / hop) and energy.dtype == np.float32
    np.testing.assert_allclose(energy[: int(0.9 / hop)], 20 * np.log10(0.5 / np.sqrt(2)), atol=0.5)
    assert (energy[-int(0.9 / hop) :] == -120).all()


def test_long_recordings_are_measured_as_short_ones():
    """The energy is worked out a stretch at a time, and no edge of a stretch shows; nor does the filter start anew."""
    rng = np.random.default_rng(3)
    samples = (0.1 * rng.standard_normal(75 * SAMPLE_RATE) * rng.uniform(0, 1, 75).repeat(SAMPLE_RATE)).astype(
        np.float32
    )
    for contour in (lambda x: audio.energy_contour(x, hop=0.04), audio._energy_above_hum):
        whole, late = (contour(Speech(samples=x)) for x in (samples, samples[10 * SAMPLE_RATE :]))
        np.testing.assert_allclose(whole[len(whole) - len(late) :][10:], late[10:], atol=1e-3)


def test_pitch_follows_a_glide_and_is_nan_without_voice():
    t = np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE
    hz = 110 * 2**t  # two octaves: 110 to 440
    phase = 2 * np.pi * np.cumsum(hz) / SAMPLE_RATE
    voice = 0.1 * sum(np.sin(k * phase) / k for k in range(1, 8))
    hiss = 0.1 * np.random.default_rng(0).standard_normal(SAMPLE_RATE)
    speech = Speech(samples=np.concatenate([voice, hiss, np.zeros(SAMPLE_RATE)]).astype(np.float32))
    pitch = audio.pitch_contour(speech, hop=0.02)
    assert len(pitch) == 200 and pitch.dtype == np.float32
    truth = 110 * 2 ** ((np.arange(100) + 0.5) * 0.02)
    np.testing.assert_allclose(pitch[3:97], truth[3:97], rtol=0.01)
    assert np.isnan(pitch[103:147]).mean() > 0.95 and np.isnan(pitch[152:]).all()


def test_pauses_of_real_recordings(data):
    kennedy = audio.find_pauses(audio.load_speech(data / "audio/jfk_en_11s.flac"))  # seen in its spectrogram
    for start, end in [(2.2, 3.25), (4.35, 5.35), (7.65, 8.1)]:
        assert any(a <= start and end <= b for a, b in kennedy), (start, end, kennedy)
    for start, end in [(0.5, 1.9), (3.35, 3.65), (5.5, 7.4), (8.3, 10.3)]:
        assert not any(a < end and start < b for a, b in kennedy), (start, end, kennedy)
    man = audio.find_pauses(audio.load_speech(data / "audio/infinitetalk_1-man.wav"))
    woman = audio.find_pauses(audio.load_speech(data / "audio/infinitetalk_1-woman.wav"))
    np.testing.assert_allclose(man[-1], (4.6, 8.52), atol=0.05)  # a dialogue: one is silent while the other speaks
    np.testing.assert_allclose(woman[0], (0.0, 4.58), atol=0.05)


def test_gain_does_not_move_the_pauses_of_a_real_recording(data):
    speech = audio.load_speech(data / "audio/podcast_fr_214s.mp3")
    speech = replace(speech, samples=speech.samples[: 60 * SAMPLE_RATE])
    quiet = replace(speech, samples=speech.samples * np.float32(0.1))
    pauses = audio.find_pauses(speech)
    assert 10 < len(pauses) < 40
    np.testing.assert_allclose(audio.find_pauses(quiet), pauses, atol=0.011)


# ---- image ---------------------------------------------------------------------------------------------------------

RED = (200, 40, 30)


def _save(folder: Path, kind: str) -> Path:
    """A red picture, stored in one of the ways pictures are stored."""
    flat = Image.new("RGB", (48, 40), RED)
    path = folder / f"picture.{kind.split('-')[0]}"
    if kind == "png-palette":
        flat.quantize(8).save(path)
    elif kind == "png-rgba":
        flat.convert("RGBA").save(path)
    elif kind == "jpeg-cmyk":
        flat.convert("CMYK").save(path, quality=95)
    elif kind == "gif-animated":
        flat.save(path, save_all=True, append_images=[Image.new("RGB", (48, 40), (0, 0, 255))])
    elif kind == "tiff-float":
        Image.fromarray(np.full((40, 48), 0.5, np.float32)).save(path)
    elif kind == "png-16bit":
        Image.fromarray(np.full((40, 48), 0x8000, np.uint16)).save(path)
    elif kind == "png-grey":
        flat.convert("L").save(path)
    elif kind == "png-bilevel":
        Image.new("1", (48, 40), 1).save(path)
    else:
        flat.save(path, quality=95)
    return path


@pytest.mark.parametrize(
    "kind, colour",
    [
        ("png", RED),
        ("jpeg", RED),
        ("webp", RED),
        ("png-palette", RED),
        ("png-rgba", RED),
        ("jpeg-cmyk", RED),
        ("gif-animated", RED),
        ("png-grey", (87, 87, 87)),
        ("png-16bit", (128, 128, 128)),
        ("tiff-float", (128, 128, 128)),
        ("png-bilevel", (255, 255, 255)),
    ],
)
def test_any_picture_becomes_rgb(tmp_path, kind, colour):
    portrait = image.load_portrait(_save(tmp_path, kind), size=(48, 32))
    assert portrait.shape == (32, 48, 3) and portrait.dtype == np.uint8
    np.testing.assert_allclose(portrait.reshape(-1, 3), np.broadcast_to(colour, (32 * 48, 3)), atol=4)


def test_transparency_lies_on_mid_grey(tmp_path):
    picture = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    picture.paste((0, 255, 0, 255), (0, 16, 32, 32))
    picture.save(tmp_path / "clear.png")
    portrait = image.load_portrait(tmp_path / "clear.png", size=(32, 32))
    assert (portrait[:15] == 128).all() and (portrait[17:] == (0, 255, 0)).all()


def test_exif_rotation_is_applied(tmp_path):
    picture = Image.new("RGB", (64, 32), (0, 0, 255))
    picture.paste((255, 255, 0), (0, 0, 16, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: what is left comes to the top
    picture.save(tmp_path / "phone.jpg", exif=exif, quality=95)
    portrait = image.load_portrait(tmp_path / "phone.jpg", size=(32, 64)).astype(int)
    assert portrait[4, 16, 0] > 200 and portrait[60, 16, 2] > 200


def test_a_wide_gamut_profile_is_converted(tmp_path, data):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new("RGB", (16, 16), (128, 128, 128)).save(tmp_path / "broken.png", icc_profile=profile[:40])
    assert (image.load_portrait(tmp_path / "broken.png", size=(16, 16)) == 128).all()  # a broken profile is ignored
    wide = data / "images/painting_monalisa.jpg"  # Display P3
    with Image.open(wide) as opened:
        profile = ImageCms.getOpenProfile(io.BytesIO(opened.info["icc_profile"]))
        expected = ImageCms.profileToProfile(opened, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
        assert np.abs(np.asarray(expected).astype(int) - np.asarray(opened)).max() > 20
    np.testing.assert_array_equal(np.asarray(image._open(wide)), np.asarray(expected))


@pytest.mark.parametrize("source", [(300, 100), (100, 300), (640, 480)])
@pytest.mark.parametrize("size", [(64, 64), (208, 112), (112, 208)])
def test_fitting_never_squashes(source, size):
    rows, columns = np.ogrid[: source[1], : source[0]]
    radius = min(source) / 6
    disc = (rows - source[1] * 0.4) ** 2 + (columns - source[0] / 2) ** 2 < radius**2
    x, y = source[0] / 2, source[1] * 0.4
    face = (x - radius, y - radius, x + radius, y + radius)
    fitted = image.fit(Image.fromarray(disc.astype(np.uint8) * 255), size=size, boxes=[face])
    assert fitted.shape == (size[1], size[0], 3)
    inside = fitted[..., 0] > 127
    width, height = inside.any(axis=0).sum(), inside.any(axis=1).sum()
    expected = 2 * radius * max(size[0] / source[0], size[1] / source[1])
    assert width == pytest.approx(expected, abs=2) and height == pytest.approx(expected, abs=2)


def _rows_kept(boxes) -> tuple[int, int]:
    """Which rows of a 64 x 256 ramp a square crop keeps."""
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 64, axis=1)
    fitted = image.fit(Image.fromarray(ramp), size=(64, 64), boxes=boxes)
    return int(fitted[0, 0, 0]), int(fitted[-1, 0, 0])


def test_the_crop_follows_the_face():
    assert _rows_kept(None) == (48, 111)  # a quarter of the 192 rows that are over goes off the top
    top, bottom = _rows_kept([(20, 140, 40, 160)])
    assert (top, bottom) == pytest.approx((150 - 0.4 * 64, 150 + 0.6 * 64 - 1), abs=1)
    assert _rows_kept([(20, 0, 40, 20)]) == (0, 63) and _rows_kept([(20, 236, 40, 256)]) == (192, 255)
    both = [(20, 100, 40, 120), (20, 130, 40, 150)]
    assert _rows_kept(both)[0] == pytest.approx(125 - 0.4 * 64, abs=1)
    apart = [(20, 100, 40, 120), (20, 200, 40, 220)]
    assert _rows_kept(apart)[0] == pytest.approx(110 - 0.4 * 64, abs=1)  # both do not fit: the first is the largest


def test_downscaling_is_antialiased():
    board = (np.indices((256, 256)).sum(axis=0) % 2 * 255).astype(np.uint8)
    inner = image.fit(Image.fromarray(board), size=(48, 48))[4:-4, 4:-4]
    assert np.abs(inner.astype(int) - 127).max() <= 3


@pytest.mark.parametrize("name, says", [("no.png", "no such file"), (".", "is a folder"), ("zero.png", "is empty")])
def test_missing_pictures(tmp_path, name, says):
    (tmp_path / "zero.png").touch()
    with pytest.raises(ValueError, match=says):
        image.load_portrait(tmp_path / name, size=(32, 32))


@pytest.mark.parametrize("name", ["text.png", "half.png", "half.jpg"])
def test_broken_pictures(tmp_path, name):
    path = tmp_path / name
    if name.startswith("half"):
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.write_text("this is no picture")
    with pytest.raises(ValueError, match="not a picture that Pillow can read") as caught:
        image.load_portrait(path, size=(32, 32))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("side", [10_100, 13_300, 60_000])  # beyond ours, beyond Pillow's warning, beyond its error
def test_enormous_pictures_are_refused_before_decoding(tmp_path, side):
    Image.new("1", (16, 16)).save(tmp_path / "bomb.png")
    data = bytearray((tmp_path / "bomb.png").read_bytes())
    data[16:24] = side.to_bytes(4, "big") * 2  # width and height of the header, then its checksum
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(data)
    with pytest.raises(ValueError, match="too large to open .* 100 megapixels"):
        image.load_portrait(tmp_path / "bomb.png", size=(32, 32))


def test_sizes_that_are_no_multiple_of_16(tmp_path):
    path = _save(tmp_path, "png")
    with pytest.raises(ValueError, match="^size 500x512 is not a multiple of 16; the nearest is 496x512$"):
        image.load_portrait(path, size=(500, 512))
    assert image.fit_size(832, 480) == (832, 480) and image.fit_size(1, 1080) == (16, 1088)
    with pytest.raises(ValueError, match="nearest is 16x16"):
        image.check_size(0, -5)


def test_a_worn_picture_has_every_fault_of_drift():
    grey = np.full((64, 128, 3), 128, np.uint8)
    np.testing.assert_array_equal(wear(grey), grey.astype(int) + TINT)  # nothing else to wear
    halves = grey.copy()
    halves[:, :64], halves[:, 64:] = (110, 90, 90), (150, 170, 170)
    worn = wear(halves).astype(int) - TINT
    left, right = worn[32, 0], worn[32, -1]
    assert (right - left).mean() > CONTRAST * 60  # between the halves' means there were 67 levels
    assert left[0] - left[1] >= int(20 * SATURATION) and right[1] - right[0] >= int(20 * SATURATION)
    edge = np.diff(worn[32, :, 1])
    assert (edge >= 0).all() and np.count_nonzero(edge) > 3  # where there was one step
    assert (wear(np.zeros((8, 8, 3), np.uint8)) == (TINT[0], 0, 0)).all()  # no wrapping around


def test_bicubic_weights_worked_by_hand():
    impulse = np.zeros((8, 1, 1), np.float32)
    impulse[4] = 1
    # Doubling puts the samples at distances 1/4 and 3/4: the kernel with a = -3/4 at 1.75, 1.25, 0.75, 0.25 and back.
    kernel = [-0.03515625, -0.10546875, 0.26171875, 0.87890625]
    doubled = image.resize_bicubic_torch(impulse, 16, 1)[:, 0, 0]
    np.testing.assert_allclose(doubled, [0] * 5 + kernel + kernel[::-1] + [0] * 3, atol=1e-7)


def test_bicubic_keeps_constants_and_leading_axes():
    constant = np.full((2, 3, 20, 31, 4), 0.7, np.float32)
    resized = image.resize_bicubic_torch(constant, 33, 14)
    assert resized.shape == (2, 3, 33, 14, 4) and resized.dtype == np.float32
    np.testing.assert_allclose(resized, 0.7, rtol=1e-5)


@pytest.mark.parametrize("case", ["frame_up", "frame_down"])
def test_bicubic_golden(case):
    fixture = Fixture(Path(__file__).parent / "golden" / "clip_small")
    frame = np.ascontiguousarray(fixture.inputs(case)["image"].transpose(0, 2, 3, 1))
    pixels = image.resize_bicubic_torch(frame, 224, 224) * np.float32(0.5) + np.float32(0.5)
    mean = np.float32([0.48145466, 0.4578275, 0.40821073])  # CLIP (Radford et al. 2021)
    std = np.float32([0.26862954, 0.26130258, 0.27577711])
    fixture.check(f"{case}/pixels", ((pixels - mean) / std).transpose(0, 3, 1, 2), 1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("target", [(224, 224), (480, 832), (3, 11)])
def test_bicubic_equals_torch(target):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    frames = np.random.default_rng(0).standard_normal((2, 100, 333, 3)).astype(np.float32)
    channels_first = torch.from_numpy(frames.transpose(0, 3, 1, 2).copy())
    expected = torch.nn.functional.interpolate(channels_first, size=target, mode="bicubic", align_corners=False)
    resized = image.resize_bicubic_torch(frames, *target)
    np.testing.assert_allclose(resized, expected.numpy().transpose(0, 2, 3, 1), atol=2e-5)


# ---- video ---------------------------------------------------------------------------------------------------------


def scene(count: int, *, height: int = 64, width: int = 96):
    """Two colours, and a white bar that is as long as the frame's number."""
    for index in range(count):
        frame = np.empty((height, width, 3), np.uint8)
        frame[:, : width // 2], frame[:, width // 2 :] = (20, 90, 220), (200, 60, 30)
        frame[:16, : 2 * index] = 255
        yield frame


def bar_length(frame: np.ndarray) -> float:
    return float((frame[4:12].min(axis=-1) > 180).sum(axis=1).mean()) / 2


def click_track(at: float, seconds: float) -> Speech:
    samples = np.zeros(int(seconds * SAMPLE_RATE), np.float32)
    samples[int(at * SAMPLE_RATE) :][:32] = 0.9
    return Speech(samples=samples)


def test_frames_come_back_in_order_and_colour(tmp_path):
    video.write_video(tmp_path / "out.mp4", scene(30), fps=25, speech=None)
    info = video.probe(tmp_path / "out.mp4")
    assert info == video.VideoInfo(width=96, height=64, fps=25, frames=30, seconds=1.2, has_audio=False)
    frames = list(video.read_frames(tmp_path / "out.mp4"))
    assert [bar_length(frame) for frame in frames] == pytest.approx(range(30), abs=0.6)
    np.testing.assert_allclose(frames[7][40, 20], (20, 90, 220), atol=3)
    np.testing.assert_allclose(frames[7][40, 80], (200, 60, 30), atol=3)


@pytest.mark.parametrize("sound_seconds", [0.5, 5.0])
@pytest.mark.parametrize("from_file", [True, False])
def test_sound_is_in_time_and_as_long_as_the_picture(tmp_path, sound_seconds, from_file):
    speech = click_track(0.3, sound_seconds)
    if from_file:
        soundfile.write(tmp_path / "speech.mp3", speech.samples, SAMPLE_RATE)
        speech = audio.load_speech(tmp_path / "speech.mp3")
    video.write_video(tmp_path / "out.mp4", scene(50), fps=25, speech=speech)
    info = video.probe(tmp_path / "out.mp4")
    assert info.frames == 50 and info.has_audio
    heard = audio.load_speech(tmp_path / "out.mp4")
    assert heard.seconds == pytest.approx(2.0, abs=0.07)  # whole AAC frames of 1024 samples
    assert np.abs(heard.samples).argmax() / SAMPLE_RATE == pytest.approx(0.301, abs=0.003)


def test_seconds_stops_an_endless_iterable(tmp_path):
    def endless():
        while True:
            yield from scene(10)

    video.write_video(tmp_path / "out.mkv", endless(), fps=10, speech=click_track(0.5, 1.05), seconds=1.05)
    assert video.probe(tmp_path / "out.mkv").frames == 11  # the last begins at 1.0 s


def test_frames_are_not_kept(tmp_path):
    alive: list[weakref.ref] = []
    most = 0

    def watched():
        nonlocal most
        for frame in scene(60):
            alive.append(weakref.ref(frame))
            gc.collect(0)
            most = max(most, sum(ref() is not None for ref in alive))
            yield frame

    video.write_video(tmp_path / "out.mp4", watched(), fps=25, speech=None)
    assert most <= 4


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, BrokenPipeError])
def test_an_interrupted_video_leaves_nothing_and_harms_nothing(tmp_path, error):
    def interrupted():
        yield from scene(5)
        raise error

    (tmp_path / "out.mp4").write_bytes(b"from yesterday")
    with pytest.raises(error):
        video.write_video(tmp_path / "out.mp4", interrupted(), fps=25, speech=click_track(0.1, 1.0))
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]
    assert (tmp_path / "out.mp4").read_bytes() == b"from yesterday"


def test_the_encoders_last_words_are_passed_on(tmp_path, monkeypatch):
    fake = tmp_path / "bin" / "ffmpeg"
    fake.parent.mkdir()
    # More than a pipe holds, on both sides: neither may block the other.
    fake.write_text("#!/bin/sh\nhead -c 300000 /dev/zero | tr '\\0' '\\n' >&2\necho 'the disk is full' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(fake))
    with pytest.raises(OSError, match="out.mp4.*the disk is full"):
        video.write_video(tmp_path / "out.mp4", scene(200), fps=25, speech=None)
    assert [p.name for p in tmp_path.iterdir()] == ["bin"]


def test_sound_that_is_no_sound_fails_loudly(tmp_path):
    (tmp_path / "fake.wav").write_text("this is no sound")
    speech = replace(click_track(0.1, 1.0), path=tmp_path / "fake.wav")
    with pytest.raises(OSError, match="Invalid data"):
        video.write_video(tmp_path / "out.mp4", scene(200), fps=25, speech=speech)
    with pytest.raises(ValueError, match="has gone"):
        video.write_video(tmp_path / "out.mp4", scene(5), fps=25, speech=replace(speech, path=tmp_path / "x.wav"))
    assert [p.name for p in tmp_path.iterdir()] == ["fake.wav"]


@pytest.mark.parametrize(
    "name, says",
    [(".", "is a folder"), ("no/out.mp4", "does not exist"), ("out.webm", "must end in"), ("out", "must end in")],
)
def test_unwritable_paths_are_refused_before_any_frame_is_made(tmp_path, name, says):
    def untouched():
        raise AssertionError("a frame was asked for")
        yield

    with pytest.raises(ValueError, match=says):
        video.check_writable(tmp_path / name)
    with pytest.raises(ValueError, match=says):
        video.write_video(tmp_path / name, untouched(), fps=25, speech=None)
    assert video.check_writable(tmp_path / "new.mp4") == tmp_path / "new.mp4"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(ValueError, match="not writable"):
        video.check_writable(tmp_path / "locked" / "out.mp4")


def test_frames_that_cannot_be_encoded(tmp_path):
    with pytest.raises(ValueError, match="97x64 is odd"):
        video.write_video(tmp_path / "out.mp4", scene(3, width=97), fps=25, speech=None)
    with pytest.raises(ValueError, match="no frames"):
        video.write_video(tmp_path / "out.mp4", iter([]), fps=25, speech=None)
    with pytest.raises(ValueError, match="must be positive"):
        video.write_video(tmp_path / "out.mp4", scene(3), fps=0, speech=None)
    assert list(tmp_path.iterdir()) == []


def test_reading_what_is_no_video(tmp_path):
    (tmp_path / "text.mp4").write_text("this is no video")
    soundfile.write(tmp_path / "sound.wav", tone(0.1, 16000), 16000)
    for name in ("text.mp4", "sound.wav", "nowhere.mp4"):
        with pytest.raises(ValueError, match=name):
            video.probe(tmp_path / name)
        with pytest.raises(ValueError, match=name):
            list(video.read_frames(tmp_path / name))


def test_reading_can_stop_early_and_change_the_rate(tmp_path):
    video.write_video(tmp_path / "out.mp4", scene(40), fps=20, speech=None)
    frames = video.read_frames(tmp_path / "out.mp4")
    assert bar_length(next(frames)) == 0
    frames.close()
    halved = [bar_length(frame) for frame in video.read_frames(tmp_path / "out.mp4", fps=10)]
    assert len(halved) == 20 and np.diff(halved) == pytest.approx([2] * 19, abs=1)
    assert sum(1 for _ in video.read_frames(tmp_path / "out.mp4", fps=30)) == 60


def test_phone_videos_are_turned_upright(tmp_path):
    video.write_video(tmp_path / "plain.mp4", scene(5), fps=30000 / 1001, speech=None)
    ffmpeg("-display_rotation", 90, "-i", tmp_path / "plain.mp4", "-c", "copy", tmp_path / "turned.mp4")
    info = video.probe(tmp_path / "turned.mp4")
    assert (info.width, info.height) == (64, 96) and info.fps == pytest.approx(29.97, abs=0.01)
    assert next(video.read_frames(tmp_path / "turned.mp4")).shape == (96, 64, 3)


def test_real_video_is_counted_and_read(data):
    info = video.probe(data / "video/grid_bbaf2n.mpg")
    assert info == video.VideoInfo(width=360, height=288, fps=25, frames=75, seconds=3.0, has_audio=True)
    assert sum(1 for _ in video.read_frames(data / "video/grid_bbaf2n.mpg")) == 75


def test_contact_sheet_reads_left_to_right_and_down():
    tiles = [np.full((4, 6, 3), value, np.uint8) for value in (10, 20, 30, 40, 50)]
    sheet = video.contact_sheet(iter(tiles), columns=3)
    assert sheet.shape == (8, 18, 3)
    assert sheet[::4, ::6, 0].tolist() == [[10, 20, 30], [40, 50, 0]]
    assert video.contact_sheet(tiles[:2], columns=8).shape == (4, 12, 3)


# ---- faces ---------------------------------------------------------------------------------------------------------


def test_without_mediapipe_or_a_model_the_reason_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(faces.importlib.util, "find_spec", lambda name: None)
    assert faces.open_landmarker() == (None, "mediapipe is not installed; pip install 'kavatar-jax[faces]'")
    monkeypatch.setattr(faces.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("KAVATAR_FACE_MODEL", str(tmp_path / "from_env.task"))
    for argument, name in [(None, "from_env.task"), (tmp_path / "given.task", "given.task")]:
        landmarker, reason = faces.open_landmarker(argument)
        assert landmarker is None and name in reason and faces.MODEL_URL in reason
    monkeypatch.delenv("KAVATAR_FACE_MODEL")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"{tmp_path}/.cache/kavatar_jax/face_landmarker.task" in faces.open_landmarker()[1]


def _square_mouth() -> faces.Face:
    landmarks = np.full((478, 2), 20.0, np.float32)
    for upper, lower, x in zip(faces._UPPER_LIP, faces._LOWER_LIP, np.linspace(10, 30, 11), strict=True):
        landmarks[upper], landmarks[lower] = (x, 16), (x, 24)
    for corner, x in ((61, 10), (291, 30)):
        landmarks[corner] = (x, 20)
    return faces.Face(box=(-4.0, 5.5, 33.2, 27.0), landmarks=landmarks, blendshapes={})


def test_masks_of_a_drawn_face():
    face = _square_mouth()
    lips = faces.lip_mask(face, (40, 50))
    assert lips.shape == (40, 50) and lips.dtype == bool
    assert lips[16:25, 14:27].all()  # both halves, and what is between them
    assert not lips[:16].any() and not lips[25:].any() and not lips[:, :10].any() and not lips[:, 31:].any()
    box = faces.face_mask(face, (40, 50))
    expected = np.zeros((40, 50), bool)
    expected[5:27, :34] = True
    np.testing.assert_array_equal(box, expected)


@pytest.fixture(scope="module")
def landmarker(data):
    pytest.importorskip("mediapipe", reason="mediapipe is not installed (extra: faces)")
    opened, reason = faces.open_landmarker(data / "models/face_landmarker.task")
    assert opened is not None, reason
    with opened:
        yield opened


def test_a_broken_model_is_a_reason_too_and_nothing_is_logged(tmp_path, data, capfd):
    pytest.importorskip("mediapipe", reason="mediapipe is not installed (extra: faces)")
    (tmp_path / "broken.task").write_text("this is no model")
    opened, reason = faces.open_landmarker(tmp_path / "broken.task")
    assert opened is None and "broken.task" in reason and "\n" not in reason
    opened, _ = faces.open_landmarker(data / "models/face_landmarker.task")
    assert opened is not None
    opened.close()
    assert capfd.readouterr().err == ""


def test_a_face_is_found_and_measured(landmarker, data):
    pixels = {
        name: _pixels(data / "images" / name) for name in ("liveavatar_man_shouting.png", "closeup_woman_bob.png")
    }
    (shouting,), (calm,) = (faces.find_faces(landmarker, p) for p in pixels.values())
    assert shouting.landmarks.shape == (478, 2) and set(shouting.blendshapes) == set(faces.BLENDSHAPES)
    assert shouting.blendshapes["jawOpen"] > 0.3 > 0.1 > calm.blendshapes["jawOpen"]
    for face, picture in zip((shouting, calm), pixels.values(), strict=True):
        lips, box = faces.lip_mask(face, picture.shape[:2]), faces.face_mask(face, picture.shape[:2])
        assert box[lips].all() and 0.01 < lips.sum() / box.sum() < 0.2
        assert all(
            (np.diff(polygon[:, 0]) > 0).all() for polygon in face.lips
        )  # corner to corner, none left out of turn
        rows = np.flatnonzero(lips.any(axis=1))
        top, bottom = face.box[1], face.box[3]
        assert top + 0.5 * (bottom - top) < rows.mean() < bottom  # the mouth is in the lower half of the face


def test_faces_come_largest_first_and_a_dog_has_none(landmarker, data):
    assert faces.find_faces(landmarker, _pixels(data / "images/dog_portrait.png")) == []
    left, right = faces.find_faces(landmarker, _pixels(data / "images/two_people_car.png"))
    assert left.box[2] < right.box[0] and left.box[2] - left.box[0] > right.box[2] - right.box[0]


def test_a_portrait_is_cropped_around_its_face(landmarker, data):
    path = data / "images/liveavatar_boy.jpg"  # landscape, the boy stands right of the centre
    portrait = image.load_portrait(path, size=(240, 416), face_model=data / "models/face_landmarker.task")
    (face,) = faces.find_faces(landmarker, portrait)
    assert (face.box[0] + face.box[2]) / 2 == pytest.approx(120, abs=12)
    away = image.load_portrait(path, size=(240, 416), face_model=path.parent / "no_model_here")
    assert np.abs(away.astype(int) - portrait).mean() > 5


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB"))
