"""What a pipeline folder of diffusers has beside its networks: model_index.json, scheduler/ and image_processor/."""

import json
from pathlib import Path

from rich.console import Console

from kavatar_jax.checkpoint.files import read_json
from kavatar_jax.config import DiTConfig
from kavatar_jax.diffusion.flow import TRAIN_STEPS
from kavatar_jax.models import clip

PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")
CLASSES = {  # as model_index.json has them: library and class
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
}
SEEING = {
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    "image_processor": ["transformers", "CLIPImageProcessor"],
}
SHIFT, BOTH_ENDS_SHIFT = 3.0, 16.0  # what diffusers' own converter gives Wan2.1, and its first-last-frame model


def check_pipeline(folder: Path, console: Console) -> None:
    """ValueError if there is a model_index.json of another pipeline than Wan2.1's; says how it shifts noise levels."""
    if not (folder / "model_index.json").is_file():
        return
    said = read_json(folder / "model_index.json")
    if said.get("_class_name") not in PIPELINES:
        raise ValueError(f"{folder} is a {said.get('_class_name')}; read are {' and '.join(PIPELINES)}")
    if any(said.get("transformer_2") or []):
        raise ValueError(f"{folder} has a second transformer: it is Wan2.2, and Wan2.1 is read")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    shift = read_json(scheduler).get("flow_shift") if scheduler.is_file() else None
    if shift is not None:
        console.print(f"its scheduler shifts by {shift}: kavatar generate --set sampling.shift={shift}", soft_wrap=True)


def complete_pipeline(folder: Path, dit: DiTConfig) -> None:
    """Write what makes a folder with every network of such a transformer a pipeline; nothing if a network is missing."""
    sees = dit.image_width is not None
    classes = CLASSES | (SEEING if sees else {})
    if any(not (folder / name).is_dir() for name in classes.keys() - {"scheduler", "image_processor"}):
        return
    tokenizer = folder / "tokenizer" / "tokenizer_config.json"
    named = read_json(tokenizer).get("tokenizer_class") if tokenizer.is_file() else None
    classes = classes | {"tokenizer": ["transformers", named or CLASSES["tokenizer"][1]]}
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():  # what it was made from
        classes["scheduler"] = ["diffusers", read_json(scheduler).get("_class_name", CLASSES["scheduler"][1])]
    else:
        _write(scheduler, {
            "_class_name": CLASSES["scheduler"][1], "num_train_timesteps": TRAIN_STEPS,
            "prediction_type": "flow_prediction", "use_flow_sigmas": True,
            "flow_shift": BOTH_ENDS_SHIFT if dit.image_positions else SHIFT,
        })  # fmt: skip
    processor = folder / "image_processor" / "preprocessor_config.json"
    if sees and not processor.is_file():
        side = read_json(folder / "image_encoder" / "config.json")["image_size"]
        _write(processor, {
            "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": side},
            "resample": 3, "do_center_crop": True, "crop_size": {"height": side, "width": side}, "do_rescale": True,
            "do_normalize": True, "image_mean": list(clip.MEAN), "image_std": list(clip.STD), "do_convert_rgb": True,
        })  # fmt: skip
    _write(folder / "model_index.json", {"_class_name": PIPELINES[sees]} | classes)


def _write(path: Path, content: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
