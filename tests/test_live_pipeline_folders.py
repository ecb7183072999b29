"""Whole pipeline folders of diffusers, to ours and back: the same bits in every network, and the pipeline opens them."""

import json
import shutil

import pytest
from test_live_layouts import fill, make_dit, make_others, same

from kavatar_jax.checkpoint.files import Tensors
from kavatar_jax.checkpoint.shards import open_tensors
from tools.convert_checkpoint import convert
from tools.export import export
from tools.inspect_checkpoint import main as inspect

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
GB = 10**9
PIPELINES = {"t2v": "WanPipeline", "i2v": "WanImageToVideoPipeline", "flf2v": "WanImageToVideoPipeline"}


def make_pipeline(kind):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "</s>": 1, "a": 2}, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    others = {name: fill(model, dtype) for name, (model, dtype) in make_others().items()}
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=7.0
    )
    parts = {
        "tokenizer": tokenizer, "text_encoder": others["text"], "vae": others["vae"], "scheduler": scheduler,
        "transformer": fill(make_dit(kind), torch.bfloat16),
    }  # fmt: skip
    if kind != "t2v":
        processor = transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
        parts |= {"image_encoder": others["image"], "image_processor": processor}
    return getattr(diffusers, PIPELINES[kind])(**parts)


def open_pipeline(kind, folder):
    """As users do; without accelerate diffusers cannot open this transformer, which is then handed over."""
    given = {}
    try:
        import accelerate  # noqa: F401
    except ImportError:
        model = diffusers.WanTransformer3DModel.from_config(
            diffusers.WanTransformer3DModel.load_config(folder / "transformer")
        )
        stored = open_tensors(folder / "transformer" / "diffusion_pytorch_model.safetensors")
        state = {key: torch.from_numpy(stored[key].astype("float32")) for key in stored}
        model.load_state_dict(state, strict=True)
        given = {"transformer": model}
    return getattr(diffusers, PIPELINES[kind]).from_pretrained(folder, **given)


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_pipeline_and_back(kind, tmp_path, capsys):
    make_pipeline(kind).save_pretrained(tmp_path / "one", max_shard_size="20KB")
    convert(tmp_path / "one", tmp_path / "ours")
    assert "--set sampling.shift=7.0" in capsys.readouterr().err
    export(tmp_path / "ours", tmp_path / "back", "diffusers", shard_size=GB)
    assert inspect([str(tmp_path / "back"), "--verify"]) == 0
    assert json.loads((tmp_path / "back" / "model_index.json").read_text())["_class_name"] == PIPELINES[kind]
    one, back = make_pipeline(kind), open_pipeline(kind, tmp_path / "back")
    assert type(back) is type(one) and type(back.scheduler) is type(one.scheduler)
    said, known = ({k: v for k, v in pipe.scheduler.config.items() if k[0] != "_"} for pipe in (back, one))
    assert said == known and said["flow_shift"] == 7
    for part in ("transformer", "vae", "text_encoder", *(["image_encoder"] if kind != "t2v" else [])):
        theirs, ours = getattr(one, part).state_dict(), getattr(back, part).state_dict()
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(x.float(), ours[key].float()) for key, x in theirs.items()), part
    assert back.tokenizer("a a").input_ids == one.tokenizer("a a").input_ids
    if kind != "t2v":
        assert back.image_processor.to_dict() == one.image_processor.to_dict()


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_pipeline_of_ours(kind, tmp_path):
    """What did not come from diffusers gets the scheduler and the image processor that its converter gives Wan2.1."""
    make_pipeline(kind).save_pretrained(tmp_path / "one")
    for part in ("scheduler", "image_processor"):
        shutil.rmtree(tmp_path / "one" / part, ignore_errors=True)
    convert(tmp_path / "one", tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back", "diffusers", shard_size=GB)
    back = open_pipeline(kind, tmp_path / "back")
    said = back.scheduler.config
    assert (said.flow_shift, said.prediction_type, said.use_flow_sigmas) == (
        16 if kind == "flf2v" else 3,
        "flow_prediction",
        True,
    )
    if kind != "t2v":
        theirs = transformers.CLIPImageProcessor().to_dict()
        mine = back.image_processor.to_dict()
        assert mine["size"]["shortest_edge"] == mine["crop_size"]["height"] == 28
        kept = ("image_mean", "image_std", "resample", "do_resize", "do_center_crop", "do_normalize", "rescale_factor")
        assert all(mine[name] == theirs[name] for name in kept)
    export(tmp_path / "ours", tmp_path / "part", "diffusers", shard_size=GB, only=["dit", "vae"])
    assert not (tmp_path / "part" / "model_index.json").exists()


def test_whisper_and_back(tmp_path):
    """Its encoder, as WhisperModel names it: the same bits, which the encoder's class loads strictly."""
    config = transformers.WhisperConfig(
        d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=24, decoder_layers=1, vocab_size=60,
        decoder_attention_heads=2, decoder_ffn_dim=24, max_source_positions=50, pad_token_id=0, num_mel_bins=80,
    )  # fmt: skip
    model = fill(transformers.WhisperModel(config), torch.float32)
    model.save_pretrained(tmp_path / "one")
    convert(tmp_path / "one", tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back", "transformers", shard_size=GB)
    theirs, back = (Tensors(tmp_path / name / "model.safetensors") for name in ("one", "back"))
    assert back.keys() == {key for key in theirs if key.startswith("encoder.")}
    assert all(back[key].tobytes() == theirs[key].tobytes() for key in back)
    state = {key.removeprefix("encoder."): torch.from_numpy(back[key].copy()) for key in back}
    type(model.encoder)(config).load_state_dict(state, strict=True)
    said = json.loads((tmp_path / "back" / "config.json").read_text())
    known = json.loads((tmp_path / "one" / "config.json").read_text())
    assert {
        key: value for key, value in said.items() if key in known and known[key] != value and key != "torch_dtype"
    } == {}
    convert(tmp_path / "back", tmp_path / "again")
    same(*(Tensors(tmp_path / name / "speech" / "model.safetensors") for name in ("ours", "again")))
