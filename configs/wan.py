"""Wan2.1 at its published sizes, for plain videos: from text, from a first frame, or from a first and a last one.

Settings are the defaults of Wan-Video/Wan2.1's generate.py; those of the 1.3B model are what its README advises. Nobody
speaks in a plain video: `speech`, `cascade` and the guidance by audio are StableAvatar's, and not used.
"""

from dataclasses import replace

from configs import demo, stableavatar
from kavatar_jax.config import Config, MeshConfig

# what the image tasks' negative prompts begin with, wan/configs/wan_i2v_14B.py
SHAKING, CUTTING = "镜头晃动，", "镜头切换，"


def config() -> Config:
    """Text to video with the 1.3B model, 832 x 480."""
    return t2v_1b()


def t2v_1b() -> Config:
    base = stableavatar.config()
    sampling = replace(
        base.sampling,
        solver="unipc",
        shift=8.0,
        double_shift=False,
        text_scale=6.0,
        audio_scale=1.0,
        overlap=0,
    )
    dit = replace(base.dit, in_channels=16, image_width=None, audio=None)
    mesh = MeshConfig(data=1, context=-1)  # one window: its tokens are spread over the devices
    return replace(base, name="wan:t2v_1b", width=832, height=480, fps=16, dit=dit, sampling=sampling, mesh=mesh)


def t2v_14b() -> Config:
    """Text to video, 1280 x 720."""
    base = t2v_1b()
    dit = replace(base.dit, width=5120, heads=40, layers=40, mlp=13824)
    sampling = replace(base.sampling, shift=5.0, text_scale=5.0)
    return replace(base, name="wan:t2v_14b", width=1280, height=720, dit=dit, sampling=sampling)


def i2v_720p() -> Config:
    """First frame to video, 1280 x 720."""
    base = t2v_14b()
    dit = replace(base.dit, in_channels=36, image_width=1280)
    negative, sampling = SHAKING + base.negative_prompt, replace(base.sampling, steps=40)
    return replace(base, name="wan:i2v_720p", dit=dit, negative_prompt=negative, sampling=sampling)


def i2v_480p() -> Config:
    """First frame to video, 832 x 480."""
    base = i2v_720p()
    sampling = replace(base.sampling, shift=3.0)
    return replace(base, name="wan:i2v_480p", width=832, height=480, sampling=sampling)


def flf2v_720p() -> Config:
    """First and last frame to video, 1280 x 720."""
    base = i2v_720p()
    dit = replace(base.dit, image_positions=514)
    negative, sampling = CUTTING + base.negative_prompt, replace(base.sampling, steps=50, shift=16.0)
    return replace(base, name="wan:flf2v_720p", dit=dit, negative_prompt=negative, sampling=sampling)


def tiny() -> Config:
    """Text to video for tests: 48 x 32 and 9 frames."""
    base, small = t2v_1b(), demo.tiny()
    return replace(
        small,
        name="wan:tiny",
        fps=base.fps,
        dit=replace(small.dit, in_channels=16, image_width=None, audio=None),
        negative_prompt=base.negative_prompt,
        sampling=replace(base.sampling, steps=2, window_frames=9),
        mesh=base.mesh,
    )


def tiny_i2v() -> Config:
    base = tiny()
    dit = replace(base.dit, in_channels=36, image_width=base.image.width)
    return replace(base, name="wan:tiny_i2v", dit=dit, negative_prompt=i2v_480p().negative_prompt)


def tiny_flf2v() -> Config:
    base = tiny_i2v()
    dit = replace(base.dit, image_positions=514)
    return replace(base, name="wan:tiny_flf2v", dit=dit, negative_prompt=flf2v_720p().negative_prompt)
