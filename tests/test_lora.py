"""LoRA files under every naming: the same sums as torch makes of them, at load, merged beforehand, and written again."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from configs import wan
from kavatar_jax import __main__
from kavatar_jax.cascade.weights import draw_untrained, parts_of, read_lora_files
from kavatar_jax.checkpoint.bridge import flatten, reference_shapes, to_kavatar, to_torch, unflatten
from kavatar_jax.checkpoint.files import Tensors
from kavatar_jax.checkpoint.lora import METADATA, Merged, parse, read_lora, write_lora
from kavatar_jax.checkpoint.weights import load_component, save_component
from kavatar_jax.media.text import ByteTokenizer
from kavatar_jax.media.video import read_frames
from kavatar_jax.models.components import abstract
from kavatar_jax.models.dit import AXES, TORCH
from kavatar_jax.models.names import DIFFUSERS, LORA
from kavatar_jax.parallel.mesh import make_mesh
from kavatar_jax.parallel.sharding import partition
from tools.convert_checkpoint import convert
from tools.inspect_checkpoint import main as inspect

CONFIG = wan.tiny_i2v().dit
WANTED = abstract("dit", CONFIG)
SHAPES = reference_shapes(TORCH, WANTED)
THEIRS = {  # modules -> what diffusers calls them
    "blocks.0.self_attn.q": "blocks.0.attn1.to_q",
    "blocks.0.self_attn.o": "blocks.0.attn1.to_out.0",
    "blocks.1.cross_attn.k_img": "blocks.1.attn2.add_k_proj",
    "blocks.1.cross_attn.v": "blocks.1.attn2.to_v",
    "blocks.1.ffn.0": "blocks.1.ffn.net.0.proj",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "head.head": "proj_out",
}
RANK, ALPHA = 4, 2.0
NAMINGS = {  # what stands before a module, what its two halves are called, whether there is an alpha
    "diffusers": ("transformer.", "lora_A", "lora_B", False),
    "peft": ("base_model.model.", "lora_A.default", "lora_B.default", False),
    "kohya": ("lora_unet_", "lora_down", "lora_up", True),
    "stableavatar": ("lora_transformer__", "lora_down", "lora_up", True),
    "comfy": ("diffusion_model.", "lora_A", "lora_B", True),
    "lightx2v": ("diffusion_model.", "lora_down", "lora_up", False),
}


def numbers(seed, shape, dtype=np.float32):
    """Whole and small: sums of their products are exact in whatever order they are made."""
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(dtype)


def branches(modules=THEIRS, dtype=np.float32):
    shapes = [SHAPES[f"{module}.weight"] for module in modules]
    drawn = (
        (numbers(i, (RANK, ins), dtype), numbers(i + 99, (outs, RANK), dtype)) for i, (outs, ins) in enumerate(shapes)
    )
    return dict(zip(modules, drawn, strict=True))


def in_naming(naming, found):
    """The tensors of a file as the programs of that naming write it."""
    (start, one, two, has_alpha), tensors = NAMINGS[naming], {}
    for module, (down, up) in found.items():
        name = THEIRS[module] if naming == "diffusers" else module
        stem = start + (name.replace(".", "_") if start.endswith("_") else name)
        tensors |= {f"{stem}.{one}.weight": down, f"{stem}.{two}.weight": up}
        tensors |= {f"{stem}.alpha": np.array(ALPHA, np.float32)} if has_alpha else {}
    return tensors


def write(path, tensors, **options):
    save_file({key: np.ascontiguousarray(x).reshape(np.shape(x)) for key, x in tensors.items()}, path, **options)
    return path


@pytest.fixture(scope="module")
def base():
    """A transformer under the reference's names, in bfloat16."""
    draw = np.random.default_rng(5)
    return {key: draw.standard_normal(shape).astype(ml_dtypes.bfloat16) for key, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    """The same as a component of ours."""
    folder = tmp_path_factory.mktemp("weights") / "dit"
    save_component(unflatten(to_kavatar(base, TORCH, WANTED)), CONFIG, folder)
    return folder


def merged(folder, *words, **options):
    """The reference's tensors after the files are added to ours."""
    found = Merged(
        Tensors(folder / "model.safetensors"), read_lora_files([str(word) for word in words], CONFIG, **options)
    )
    return dict(to_torch(unflatten(dict(found)), TORCH))


def check(found, base, added):
    """Found is base plus what is added, rounded once from float32; to the bit."""
    assert found.keys() == base.keys() and added.keys() <= base.keys()
    for key, values in base.items():
        wanted = values.astype(np.float32) + added[key].astype(np.float32) if key in added else values
        assert found[key].dtype == values.dtype and found[key].tobytes() == wanted.astype(values.dtype).tobytes(), key


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming(base, folder, tmp_path, naming, dtype):
    found = branches(dtype=dtype)
    path = write(tmp_path / "one.safetensors", in_naming(naming, found))
    scale = 0.5 * (ALPHA / RANK if NAMINGS[naming][3] else 1)
    added = {
        f"{name}.weight": scale * (up.astype(np.float32) @ down.astype(np.float32))
        for name, (down, up) in found.items()
    }
    check(merged(folder, f"{path}:0.5"), base, added)


def test_differences_and_convolutions(base, folder, tmp_path):
    """lightx2v's weights, biases, norms and modulations as they are; a branch of the patch embedding; a bias of peft's."""
    differ = {
        "head.head.diff": "head.head.weight", "blocks.0.norm3.diff": "blocks.0.norm3.weight",
        "blocks.1.self_attn.o.diff_b": "blocks.1.self_attn.o.bias", "blocks.0.diff_m": "blocks.0.modulation",
        "head.diff_m": "head.modulation", "img_emb.proj.0.diff_b": "img_emb.proj.0.bias",
    }  # fmt: skip
    diffs = {key: numbers(i, SHAPES[target]) for i, (key, target) in enumerate(differ.items())}
    outs, *ins = SHAPES["patch_embedding.weight"]
    patch = {"patch_embedding.lora_down.weight": numbers(1, (RANK, *ins)),
             "patch_embedding.lora_up.weight": numbers(2, (outs, RANK, 1, 1, 1))}  # fmt: skip
    biased = in_naming("diffusers", branches(["blocks.1.ffn.0"]))
    bias = "transformer.blocks.1.ffn.net.0.proj.lora_B.bias"
    biased[bias] = numbers(3, SHAPES["blocks.1.ffn.0.bias"])
    one = write(tmp_path / "one.safetensors", {f"diffusion_model.{key}": x for key, x in diffs.items()})
    two = write(tmp_path / "two.safetensors", patch | biased)
    down, up = branches(["blocks.1.ffn.0"])["blocks.1.ffn.0"]
    added = {target: diffs[key] for key, target in differ.items()} | {
        "patch_embedding.weight": 2 * np.einsum("or,rithw->oithw", numbers(2, (outs, RANK)), numbers(1, (RANK, *ins))),
        "blocks.1.ffn.0.weight": 2 * up @ down,
        "blocks.1.ffn.0.bias": 2 * biased[bias],
    }
    check(merged(folder, one, f"{two}:2"), base, added)


def test_several_are_summed_before_the_one_rounding(base, folder, tmp_path):
    module = "blocks.0.self_attn.q"
    down, up = branches([module])[module]
    one = write(tmp_path / "a.safetensors", in_naming("comfy", {module: (down, up)}))
    two = write(tmp_path / "b.safetensors", in_naming("lightx2v", {module: (2 * down, up)}))
    delta = (0.25 * ALPHA / RANK - 2 * 0.125) * (up @ down)
    assert (
        merged(folder, f"{one}:0.25", f"{two}:-0.125")[f"{module}.weight"].tobytes()
        != base[f"{module}.weight"].tobytes()
    )
    check(merged(folder, f"{one}:0.25", f"{two}:-0.125"), base, {f"{module}.weight": delta})


def test_what_peft_says_of_alpha(base, folder, tmp_path):
    """In the metadata of diffusers or in adapter_config.json: for all modules, for some, and by the root of the rank."""
    found = branches(["blocks.0.self_attn.q", "head.head"])
    said = {"r": RANK, "lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 2}}
    metadata = {METADATA: json.dumps({f"transformer.{key}": value for key, value in said.items()})}
    path = write(tmp_path / "one.safetensors", in_naming("diffusers", found), metadata=metadata)
    products = {f"{module}.weight": up @ down for module, (down, up) in found.items()}
    (query, head) = products
    check(merged(folder, path), base, {query: 0.5 * products[query], head: 2 * products[head]})
    path = write(tmp_path / "adapter_model.safetensors", in_naming("peft", found))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "use_rslora": True}))
    check(merged(folder, path), base, {key: 4 * delta for key, delta in products.items()})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"use_dora": True}))
    with pytest.raises(ValueError, match="is not a plain LoRA but a DoRA"):
        merged(folder, path)


def test_alpha_of_nothing_is_none(base, folder, tmp_path):
    tensors = in_naming("kohya", branches(["head.head"]))
    tensors["lora_unet_head_head.alpha"] = np.zeros((), np.float32)
    down, up = branches(["head.head"])["head.head"]
    path = write(tmp_path / "one.safetensors", tensors)
    check(merged(folder, path), base, {"head.head.weight": up @ down})


def test_on_a_mesh(folder, tmp_path):
    """Each device's own part is the part of the whole, and merging at load is loading what was merged."""
    changes = read_lora_files([str(write(tmp_path / "one.safetensors", in_naming("comfy", branches())))], CONFIG)
    whole = Merged(Tensors(folder / "model.safetensors"), changes)
    mesh = make_mesh(2, 2, 1, 2)
    loaded = flatten(load_component(folder, WANTED, partition(WANTED, AXES, mesh), changes=changes))
    assert not loaded["blocks/self_attn/q/kernel"].sharding.is_fully_replicated
    for name, leaf in loaded.items():
        np.testing.assert_array_equal(np.asarray(leaf), whole[name].astype(leaf.dtype), err_msg=name)


@pytest.mark.parametrize("naming", ["diffusers", "kohya"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_written_and_read_again(base, folder, tmp_path, naming, dtype):
    """The same bits, and the names of that naming; written from files of any."""
    draw = np.random.default_rng(1)
    found = {m: tuple(draw.standard_normal(x.shape).astype(dtype) for x in pair) for m, pair in branches().items()}
    tensors = in_naming("comfy", found)
    tensors["diffusion_model.head.head.alpha"] = np.array(3, np.float32)
    changes, _ = read_lora(write(tmp_path / "one.safetensors", tensors), LORA, WANTED)
    rows = DIFFUSERS["dit"].rows if naming == "diffusers" else TORCH
    write_lora(tmp_path / "two.safetensors", {home: one for home, (one,) in changes.items()}, rows, WANTED, naming)
    again, left = read_lora(tmp_path / "two.safetensors", LORA, WANTED)
    assert again.keys() == changes.keys() and not left
    for home, (one,) in changes.items():
        (two,) = again[home]
        assert (one.scale, one.layout) == (two.scale, two.layout)
        assert (
            one.down.tobytes() == two.down.tobytes() and one.up.tobytes() == two.up.tobytes() and two.up.dtype == dtype
        )
    stored = load_file(tmp_path / "two.safetensors")
    assert stored.keys() == in_naming(naming, found).keys()


def refused(folder, path, **options):
    with pytest.raises(ValueError) as caught:
        merged(folder, path, **options)
    assert "\n" not in str(caught.value) and path.name in str(caught.value)
    return str(caught.value)


def test_what_is_not_used(base, folder, tmp_path):
    """Named, all of it; or left out when told so; but never all of a file."""
    strange = {
        "blocks.7.self_attn.q": branches()["blocks.0.self_attn.q"],
        "blocks.0.cross_attn.k_vocal": branches()["head.head"],
    }
    tensors = in_naming("comfy", strange) | {
        "diffusion_model.blocks.9.diff_m": numbers(0, (1, 6, 3)),
        "step": numbers(0, (1,)),
    }
    path = write(tmp_path / "one.safetensors", in_naming("comfy", branches()) | tensors)
    said = refused(folder, path)
    assert f"has {len(tensors)} tensors that nothing here is for: {', '.join(sorted(tensors))}; leave them out" in said
    added = {f"{module}.weight": ALPHA / RANK * up @ down for module, (down, up) in branches().items()}
    check(merged(folder, path, unused="ignore"), base, added)
    path = write(tmp_path / "two.safetensors", tensors)
    assert "which is all of them" in refused(folder, path, unused="ignore")
    with pytest.raises(ValueError, match="--lora-unused keep is not one of refuse, ignore"):
        merged(folder, path, unused="keep")


def test_what_is_broken(folder, tmp_path):
    def refusal(change, **options):
        tensors = in_naming("kohya", branches())
        change(tensors)
        return refused(folder, write(tmp_path / "one.safetensors", tensors), **options)

    down, up, alpha = (f"lora_unet_head_head.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha"))
    assert f"has {down} without the other half" in refusal(lambda x: x.pop(up), unused="ignore")
    assert f"{down} is for (48, 3), and here it is (" in refusal(
        lambda x: x.update({down: numbers(0, (RANK, 3)), up: numbers(0, (48, RANK))})
    )
    assert "which make no product" in refusal(lambda x: x.update({down: numbers(0, (3, 24))}))
    assert f"{alpha} is (2,), expected one number" in refusal(lambda x: x.update({alpha: numbers(0, (2,))}))
    assert "says twice what" in refusal(lambda x: x.update({"head.head.lora_A.weight": x[down]}))
    assert "is not a plain LoRA: it has lora_unet_x.hada_w1_a" in refusal(
        lambda x: x.update({"lora_unet_x.hada_w1_a": x[down]})
    )
    (tmp_path / "none.safetensors").write_bytes(b"")
    assert "is not a readable safetensors file" in refused(folder, tmp_path / "none.safetensors")
    assert "there is no file" in refused(folder, tmp_path / "nowhere.safetensors")


def test_scales_as_typed(tmp_path):
    assert [(str(path), scale) for path, scale in map(parse, ("a.pt", "a.pt:0.5", "a:b.pt", "C:a.pt:-2"))] == [
        ("a.pt", 1.0), ("a.pt", 0.5), ("a:b.pt", 1.0), ("C:a.pt", -2.0)
    ]  # fmt: skip
    with pytest.raises(ValueError, match="a scale is a finite number"):
        parse("a.pt:nan")


# --- from the command line


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A weights directory of Wan at tiny size, and a LoRA of its transformer."""
    folder, config = tmp_path_factory.mktemp("drawn"), wan.tiny()
    drawn = draw_untrained(config, 0, ByteTokenizer())
    for name in parts_of(config.dit):
        save_component(getattr(drawn, name), getattr(config, name), folder / "weights" / name)
    (folder / "weights" / "tokenizer").mkdir()
    (folder / "weights" / "tokenizer" / "config.json").write_text('{"kind": "bytes"}')
    shapes, draw, tensors = reference_shapes(TORCH, drawn.dit), np.random.default_rng(3), {}
    for module in ("blocks.0.self_attn.v", "blocks.1.ffn.2"):
        outs, ins = shapes[f"{module}.weight"]
        tensors[f"diffusion_model.{module}.lora_down.weight"] = draw.standard_normal((2, ins), np.float32)
        tensors[f"diffusion_model.{module}.lora_up.weight"] = draw.standard_normal((outs, 2), np.float32)
    write(folder / "lora.safetensors", tensors)
    return folder


def generate(folder, *words, weights="weights"):
    out = folder / "video.mp4"
    order = ["--mode", "video", "--instruction", "a cat", "--config", "wan:tiny", "--weights", str(folder / weights)]
    done = CliRunner().invoke(__main__.app, ["generate", *order, "--out", str(out), *words])
    assert done.exit_code == 0, done.output
    return np.stack(list(read_frames(out)))


@pytest.mark.slow
def test_a_video_with_a_lora(drawn):
    """Another video than without, and the same as with the weights that it was merged into beforehand."""
    lora = f"{drawn / 'lora.safetensors'}:0.8"
    convert(drawn / "weights", drawn / "merged", loras=[lora])
    plain, added, beforehand = generate(drawn), generate(drawn, "--lora", lora), generate(drawn, weights="merged")
    assert (plain != added).mean() > 0.1
    np.testing.assert_array_equal(added, beforehand)
    assert inspect([str(drawn / "merged"), "--verify"]) == 0
    one, two = (Tensors(drawn / name / "dit" / "model.safetensors") for name in ("weights", "merged"))
    changed = {name for name in one if one[name].tobytes() != two[name].tobytes()}
    assert changed == {"blocks/self_attn/v/kernel", "blocks/down/kernel"}
    told = json.loads((drawn / "video.json").read_text())
    assert told["order"]["loras"] == []


def test_mistakes_on_the_command_line(drawn):
    def said(*words):
        done = CliRunner().invoke(__main__.app, ["generate", "--out", str(drawn / "no.mp4"), *words])
        assert done.exit_code == 2 and done.output.count("\n") == 1
        return done.output

    lora = str(drawn / "lora.safetensors")
    assert "is for weights that have been trained; give --weights DIR too" in said(
        "--config", "demo:tiny", "--lora", lora
    )
    weights = ["--mode", "video", "--instruction", "a cat", "--config", "wan:tiny", "--weights", str(drawn / "weights")]
    assert "there is no file" in said(*weights, "--lora", "nowhere.safetensors")
    assert "is not one of refuse, ignore" in said(*weights, "--lora", lora, "--lora-unused", "maybe")


# --- beside torch and diffusers


@pytest.mark.torch
def test_as_torch_adds_it(base, folder, tmp_path):
    """Numbers of any kind in StableAvatar's own .pt: W + scale * up @ down in float32, but for the order of its sums."""
    torch = pytest.importorskip("torch")
    draw = torch.Generator().manual_seed(0)
    state, wanted = {}, {}
    for module in THEIRS:
        outs, ins = SHAPES[f"{module}.weight"]
        down, up = torch.randn(RANK, ins, generator=draw), torch.randn(outs, RANK, generator=draw)
        stem = f"lora_transformer__{module.replace('.', '_')}"
        state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(ALPHA)}
        weight = torch.from_numpy(base[f"{module}.weight"].astype(np.float32))
        wanted[f"{module}.weight"] = weight + 0.7 * ALPHA / RANK * (up @ down)
    torch.save(state, tmp_path / "lora.pt")
    wide = {key: x.astype(np.float32) for key, x in base.items()}
    save_component(unflatten(to_kavatar(wide, TORCH, WANTED)), CONFIG, tmp_path / "dit")
    found = merged(tmp_path / "dit", f"{tmp_path / 'lora.pt'}:0.7")
    for key, values in found.items():
        np.testing.assert_allclose(values, wanted[key].numpy() if key in wanted else wide[key], rtol=0, atol=2e-6)


@pytest.mark.torch
@pytest.mark.parametrize("naming", ["kohya", "lightx2v"])
def test_as_diffusers_reads_it(folder, tmp_path, naming):
    """What diffusers makes of a file of another naming adds the same as the file itself."""
    torch = pytest.importorskip("torch")
    tools = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    modules = [key.removesuffix(".weight") for key in SHAPES if key.startswith("blocks.") and len(SHAPES[key]) == 2]
    modules = [module for module in modules if f"{module}.weight" in SHAPES]
    modules += [] if naming == "kohya" else ["time_projection.1", "text_embedding.0", "text_embedding.2", "head.head"]
    tensors = {}
    for module, (down, up) in branches(modules).items():
        start, one, two, has_alpha = NAMINGS[naming]
        stem = start + (module.replace(".", "_") if has_alpha else module)
        tensors |= {f"{stem}.{one}.weight": down, f"{stem}.{two}.weight": up}
        tensors |= {f"{stem}.alpha": np.array(ALPHA, np.float32)} if has_alpha else {}
        if not has_alpha and module.startswith("blocks."):
            tensors[f"{stem}.diff_b"] = numbers(7, SHAPES[f"{module}.bias"])
    path = write(tmp_path / "one.safetensors", tensors)
    convert = {
        "kohya": tools._convert_musubi_wan_lora_to_diffusers, "lightx2v": tools._convert_non_diffusers_wan_lora_to_diffusers,
    }[naming]  # fmt: skip
    theirs = {key: x.numpy() for key, x in convert({key: torch.from_numpy(x) for key, x in tensors.items()}).items()}
    ours, converted = merged(folder, path), merged(folder, write(tmp_path / "two.safetensors", theirs))
    assert all(ours[key].tobytes() == converted[key].tobytes() for key in ours)
