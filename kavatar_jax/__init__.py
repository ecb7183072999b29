"""Audio-driven avatar video in JAX: one portrait, a speech recording and an instruction become a talking video.

A request becomes a video in six steps; each is a function from nouns (`types`) to a noun, and no step reaches back:

    Request -> director -> Storyline -> cascade/encode -> Conditions -> cascade/blueprint -> Blueprint
            -> cascade/keyframes -> Keyframes -> cascade/subclips -> Clips -> cascade/stitch -> Video

Read `cascade/pipeline.py` first: it is the whole flow on one screen.
"""

__version__ = "0.1.0"
