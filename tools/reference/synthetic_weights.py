"""Deterministic synthetic tensors for the golden parity fixtures.

No weights are stored anywhere.  Every tensor is a pure function of (tag, key, shape):

    seed  = zlib.crc32((tag + ":" + key).encode("utf-8"))
    u     = numpy.random.Generator(numpy.random.Philox(key=seed)).random(shape, float32)   # C order
    value = (u - 0.5) * float32(sqrt(12) * std) + float32(mean)                            # float32

where ``key`` is the tensor's name in the original PyTorch checkpoint, ``shape`` its original PyTorch shape
(Linear weights are (out, in), convolutions (out, in/groups, k...)), and (mean, std) come from ``rule``.

Inputs use the same draw with key ``"input:" + name`` and an explicit mean/std (see ``synthesize_input``).

Only numpy and the standard library are needed.  ``python synthetic_weights.py`` runs a self test.
"""

import json
import math
import os
import re
import zlib

import numpy as np

__all__ = [
    "rule",
    "raw_uniform",
    "synthesize_tensor",
    "iter_synthesize",
    "synthesize",
    "synthesize_input",
    "chirp",
    "Fixture",
    "self_test",
]


def raw_uniform(key, shape, tag):
    """float32 uniforms on [0, 1) (multiples of 2**-24), C order, fully determined by tag and key."""
    seed = zlib.crc32((tag + ":" + key).encode("utf-8"))
    rng = np.random.Generator(np.random.Philox(key=seed))
    size = int(np.prod(shape, dtype=np.int64)) if len(shape) else 1
    return rng.random(size, dtype=np.float32).reshape(shape)


_EMBEDDING = re.compile(r"(^|\.)(token_embedding|word_embeddings|type_embedding|pos_embedding(\.embedding)?)\.weight$")
_QK_GAIN = re.compile(r"(^|\.)norm_(q|k|k_img)\.weight$")
_T5_QUERY = re.compile(r"(^|\.)blocks\.\d+\.attn\.q\.weight$")


def rule(key, shape):
    """(mean, std) of a parameter, decided by the key and the shape.  First match wins."""
    leaf = key.rsplit(".", 1)[-1]
    ndim = len(shape)
    fan_in = int(np.prod(shape[1:], dtype=np.int64)) if ndim >= 2 else 1
    if leaf == "modulation":  # AdaLN tables of blocks and heads
        return 0.0, 0.3
    if _QK_GAIN.search(key):  # query/key RMS gains: sharper attention
        return 1.5, 0.15
    if leaf == "gamma" or (leaf == "weight" and ndim == 1):  # every other normalisation gain
        return 1.0, 0.1
    if leaf == "bias":
        return 0.0, 0.1
    if leaf in ("weight_g", "original0"):  # magnitude of a weight-normalised convolution
        return 2.0, 0.2
    if _EMBEDDING.search(key):  # lookup tables, umT5 relative-position table included
        return 0.0, 1.0
    if leaf in ("cls_embedding", "pos_embedding", "emb_pos", "masked_spec_embed"):
        return 0.0, 0.5
    if leaf == "log_scale":
        return 2.66, 0.1
    if leaf == "head" and ndim == 2:  # CLIP projection, stored (in, out)
        return 0.0, 1.0 / math.sqrt(shape[0])
    if _T5_QUERY.search(key):  # umT5 attention has no 1/sqrt(d): keep the logits O(1)
        return 0.0, 0.125 / math.sqrt(fan_in)
    if ndim >= 2:  # all other matrices and convolutions
        return 0.0, 1.0 / math.sqrt(fan_in)
    return 0.0, 0.1


def _affine(u, mean, std):
    v = (u - np.float32(0.5)) * np.float32(math.sqrt(12.0) * std)
    if mean:
        v = v + np.float32(mean)
    return v.astype(np.float32, copy=False)


def synthesize_tensor(key, shape, tag):
    mean, std = rule(key, tuple(shape))
    return _affine(raw_uniform(key, tuple(shape), tag), mean, std)


def iter_synthesize(shapes, tag):
    """Yield (key, float32 array) one at a time.  ``shapes``: dict or list of (key, shape)."""
    items = shapes.items() if hasattr(shapes, "items") else shapes
    for key, shape in items:
        yield key, synthesize_tensor(key, tuple(shape), tag)


def synthesize(shapes, tag):
    return dict(iter_synthesize(shapes, tag))


def synthesize_input(spec, tag):
    """Build one input from its description in meta.json.

    spec = {"name", "shape", "kind"}; kind "normal" (default): uniform values with given "mean" (0) and "std" (1);
    kind "ids": integers floor(u * high), int64, optionally + "low"; kind "unit": raw uniforms on [0, 1);
    kind "chirp": see ``chirp`` (shape = (samples,)).
    """
    name, shape, kind = "input:" + spec["name"], tuple(spec["shape"]), spec.get("kind", "normal")
    if kind == "chirp":
        return chirp(shape[0], name, tag, **spec.get("args", {}))
    u = raw_uniform(name, shape, tag)
    if kind == "unit":
        return u
    if kind == "ids":
        return np.floor(u.astype(np.float64) * spec["high"]).astype(np.int64) + int(spec.get("low", 0))
    return _affine(u, spec.get("mean", 0.0), spec.get("std", 1.0))


def chirp(samples, name, tag, rate=16000, f0=80.0, slope=220.0, am=1.3, level=0.3, noise=0.02):
    """Amplitude-modulated linear chirp plus uniform noise; float64 arithmetic, returned as float32."""
    t = np.arange(samples, dtype=np.float64) / rate
    tone = level * np.sin(2 * np.pi * (f0 * t + slope * t * t)) * (0.5 + 0.5 * np.sin(2 * np.pi * am * t))
    u = raw_uniform(name, (samples,), tag).astype(np.float64)
    return (tone + noise * math.sqrt(12.0) * (u - 0.5)).astype(np.float32)


class Fixture:
    """Reader for one fixture folder (meta.json + outputs.npz)."""

    def __init__(self, folder):
        self.folder = folder
        with open(os.path.join(folder, "meta.json"), encoding="utf-8") as f:
            self.meta = json.load(f)
        self.tag = self.meta["tag"]
        self.arrays = np.load(os.path.join(folder, "outputs.npz"))

    def shapes(self, group="params"):
        return [(k, tuple(s)) for k, s in self.meta.get(group, [])]

    def weights(self, group="params"):
        return synthesize(self.shapes(group), self.tag)

    def iter_weights(self, group="params"):
        return iter_synthesize(self.shapes(group), self.tag)

    def inputs(self, case):
        return {s["name"].split("/")[-1]: synthesize_input(s, self.tag) for s in self.meta["cases"][case]["inputs"]}

    def expected(self, name):
        """Stored values of an output: the full array, or its flat[::stride] subsample."""
        return self.arrays[name]

    def compare(self, name, value):
        """Errors of ``value`` (full array in the documented layout) against the stored reference.

        rel_max: max|diff| over stored elements / max|reference|;  rel_l2: relative L2 over stored elements;
        rel_stats: worst relative deviation of the whole array's mean, std and L2 norm (detects errors in elements
        that were not stored; the mean is measured in units of the reference std; 0 for outputs stored in full).
        """
        info = self.meta["outputs"][name]
        value = np.asarray(value, dtype=np.float64)
        if list(value.shape) != list(info["shape"]):
            raise ValueError("{}: shape {}, expected {}".format(name, value.shape, tuple(info["shape"])))
        ref = np.asarray(self.arrays[name], dtype=np.float64)
        got = value if info["stored"] == "full" else value.reshape(-1)[:: info["stride"]]
        diff = got - ref
        top = max(info["absmax"], 1e-30)
        std = max(info["std"], 1e-30)
        stats = 0.0
        if info["stored"] != "full":
            stats = max(
                abs(value.mean() - info["mean"]) / std,
                abs(value.std() - info["std"]) / std,
                abs(math.sqrt(float((value * value).sum())) - info["l2"]) / max(info["l2"], 1e-30),
            )
        return {
            "rel_max": float(np.abs(diff).max() / top),
            "rel_l2": float(np.sqrt((diff * diff).sum()) / max(np.sqrt((ref * ref).sum()), 1e-30)),
            "rel_stats": float(stats),
        }

    def check(self, name, value, tol=None):
        tol = self.meta["tolerance"] if tol is None else tol
        tol = tol.get(name, tol["default"]) if isinstance(tol, dict) else tol
        err = self.compare(name, value)
        bad = {k: v for k, v in err.items() if not v <= tol}
        if bad:
            raise AssertionError("{}/{}: {} exceeds {:g}".format(self.meta["fixture"], name, bad, tol))
        return err


_PINNED = {  # first three values of a few draws with tag "self-test"
    ("blocks.0.self_attn.q.weight", (8, 6)): ["0x1.6b85920000000p-3", "0x1.ff4d820000000p-2", "-0x1.1f63a20000000p-7"],
    ("blocks.0.norm3.weight", (5,)): ["0x1.dc571c0000000p-1", "0x1.0d41920000000p+0", "0x1.01df960000000p+0"],
    ("blocks.0.modulation", (1, 6, 4)): ["-0x1.5a80b80000000p-2", "0x1.6df3720000000p-2", "0x1.efb0040000000p-2"],
    ("token_embedding.weight", (4, 4)): ["0x1.9611f40000000p-1", "0x1.7d5d280000000p+0", "0x1.d090b80000000p-2"],
    ("conv1.bias", (7,)): ["0x1.a5f4fe0000000p-6", "0x1.60e5420000000p-5", "-0x1.ff52020000000p-7"],
    ("decoder.head.0.gamma", (4, 1, 1, 1)): ["0x1.1fcf7c0000000p+0", "0x1.dcaa780000000p-1", "0x1.e393f60000000p-1"],
    ("blocks.1.attn.q.weight", (4, 4)): ["-0x1.abe4c00000000p-4", "0x1.6238000000000p-7", "-0x1.6bcefe0000000p-4"],
    ("wav2vec2.encoder.pos_conv_embed.conv.weight_g", (1, 1, 4)): [
        "0x1.b15d440000000p+0",
        "0x1.fa5f840000000p+0",
        "0x1.f99b760000000p+0",
    ],
}


def self_test():
    for (key, shape), want in _PINNED.items():
        got = synthesize_tensor(key, shape, "self-test").reshape(-1)[:3]
        assert [float(x).hex() for x in got] == want, (key, [float(x).hex() for x in got])
    return True


if __name__ == "__main__":
    print("ok" if self_test() else "bad")
