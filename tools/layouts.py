"""Where each layout keeps what: the parts of a checkpoint folder, found and told apart.

kavatar        dit/model.safetensors, dit/config.json, vae/..., as every other part of this package reads it
stableavatar   StableAvatar-1.3B/, Wan2.1-Fun-V1.1-1.3B-InP/, wav2vec2-base-960h/
wan            diffusion_pytorch_model*.safetensors, Wan2.1_VAE.pth, models_t5_*.pth, models_clip_*.pth, google/
diffusers      transformer/, vae/, text_encoder/, image_encoder/, tokenizer/, scheduler/, image_processor/, model_index.json
file           one file with a transformer of Wan or StableAvatar alone, its names perhaps behind "model.diffusion_model."
run            checkpoints/, config.json: what `kavatar train` leaves
transformers   the folder of one model alone, its config.json naming the model: a speech encoder, or one of the others
               (written: a speech encoder)
"""

from pathlib import Path
from typing import NamedTuple

from kavatar_jax.checkpoint.files import read_json
from kavatar_jax.checkpoint.shards import is_there, open_tensors
from kavatar_jax.models.components import COMPONENTS
from kavatar_jax.models.names import DIFFUSERS, ORIGINAL, PLAIN_DIT, SPEECH, WHISPER, Names

PARTS = (*COMPONENTS, "tokenizer", "scheduler", "image_processor")  # the last three are copied as they are
PREFIXES = ("model.diffusion_model.", "diffusion_model.")
BASE = "Wan2.1-Fun-V1.1-1.3B-InP"
RELEASE = "wav2vec2-base-960h"
TRANSFORMERS = {name: f"StableAvatar-1.3B/transformer3d-{name}.pt" for name in ("square", "rec-vec")}
WEIGHTS = {  # the other parts as Wan-AI/Wan2.1-I2V-14B-480P has them
    "vae": "Wan2.1_VAE.pth",
    "text": "models_t5_umt5-xxl-enc-bf16.pth",
    "image": "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    "tokenizer": "google/umt5-xxl/tokenizer.json",
}
FILES = {  # part of the StableAvatar release -> its file, the first that is there
    "dit": [TRANSFORMERS["square"]],
    **{name: [f"{BASE}/{path}"] for name, path in WEIGHTS.items() if name != "tokenizer"},
    "speech": [f"{RELEASE}/model.safetensors", f"{RELEASE}/pytorch_model.bin"],
    "tokenizer": [f"{BASE}/{WEIGHTS['tokenizer']}"],
}
CONFIGS = {"dit": f"{BASE}/config.json", "speech": f"{RELEASE}/config.json"}
DIT = "diffusion_pytorch_model.safetensors"
CLASSES = {  # what a config.json calls itself -> the part it is, and its names
    "WanTransformer3DModel": ("dit", DIFFUSERS["dit"], DIT),
    "AutoencoderKLWan": ("vae", DIFFUSERS["vae"], DIT),
    "umt5": ("text", DIFFUSERS["text"], "model.safetensors"),
    "clip_vision_model": ("image", DIFFUSERS["image"], "model.safetensors"),
    **{kind: ("speech", names, "model.safetensors") for kind, names in SPEECH.items()},
}


class Place(NamedTuple):
    """Where a part lies, from the folder on. names, config: None for what is copied, and where there is no config.json.

    also: other names of the file, to be read; more: whether it also has tensors that our networks have no use for
    kinds: names of the other networks that the part may be; prefix: what tensors' names may begin with
    """

    path: str
    names: Names | None = None
    config: str | None = None
    also: tuple[str, ...] = ()
    more: bool = False
    kinds: tuple[Names, ...] = ()
    prefix: str = ""

    def locate(self, folder: Path) -> Path:
        """Its file under the first name that there is, or else the first of all."""
        paths = [folder / path for path in (self.path, *self.also)]
        return next(filter(is_there, paths), paths[0])


def places(layout: str, transformer: str = "square") -> dict[str, Place]:
    """What a layout consists of; for "stableavatar" with one of the release's transformers."""
    if layout == "stableavatar":
        names = ORIGINAL
        found = {
            part: Place(paths[0], names.get(part), CONFIGS.get(part), tuple(paths[1:])) for part, paths in FILES.items()
        }
        found["dit"] = found["dit"]._replace(path=TRANSFORMERS[transformer])
        return found | {part: found[part]._replace(more=True) for part in ("image", "speech")}
    if layout == "wan":
        found = {part: Place(path, ORIGINAL.get(part)) for part, path in WEIGHTS.items()}
        found["image"] = found["image"]._replace(more=True)
        return {"dit": Place(DIT, PLAIN_DIT, "config.json", ("diffusion_pytorch_model.bin",))} | found
    if layout == "transformers":
        return {"speech": Place("model.safetensors", SPEECH["wav2vec2"], "config.json", kinds=(WHISPER,))}
    assert layout == "diffusers", layout
    folders = {"dit": "transformer", "vae": "vae", "text": "text_encoder", "image": "image_encoder"}
    files = {part: DIT if part in ("dit", "vae") else "model.safetensors" for part in folders}
    older = {part: "diffusion_pytorch_model.bin" if files[part] == DIT else "pytorch_model.bin" for part in folders}
    found = {
        part: Place(f"{name}/{files[part]}", DIFFUSERS[part], f"{name}/config.json", (f"{name}/{older[part]}",))
        for part, name in folders.items()
    }
    copied = {"tokenizer": "tokenizer", "scheduler": "scheduler_config", "image_processor": "preprocessor_config"}
    return found | {part: Place(f"{part}/{file}.json") for part, file in copied.items()}


def detect(source: Path) -> tuple[str, str, dict[str, Place]]:
    """(layout, what tells, where its parts lie); ValueError tells all that was looked for."""
    if source.is_file():
        return _detect_file(source)
    if not source.is_dir():
        raise ValueError(f"there is no folder {source}")
    ours = [f"{part}/model.safetensors" for part in COMPONENTS]
    there = [path for path in ours if (source / path).is_file()]
    if there:
        return "kavatar", f"there is {there[0]}", {}
    if (source / "checkpoints").is_dir() and "trained" in _says(source / "config.json"):
        return "run", "there is checkpoints/, and config.json describes a training run", {}
    tops = [top for top in (Path(TRANSFORMERS["square"]).parts[0], BASE, RELEASE) if (source / top).is_dir()]
    if tops:
        return "stableavatar", f"there is {tops[0]}/", places("stableavatar")
    said = _says(source / "config.json")
    named = [(name, said[name]) for name in ("_class_name", "model_type") if said.get(name) in CLASSES]
    if named and "dim" not in said:  # in which Wan's own config.json, of the same class in places, gives its width
        (key, kind), *_ = named
        part, names, file = CLASSES[kind]
        place = Place(file, names, "config.json", ("pytorch_model.bin", "diffusion_pytorch_model.bin"))
        return "transformers", f"config.json has {key} {kind}", {part: place}
    for layout in ("diffusers", "wan"):
        found = places(layout)
        there = [place.locate(source) for place in found.values() if is_there(place.locate(source))]
        if there:
            return layout, f"there is {there[0].relative_to(source)}", found
    looked = [
        f"{ours[0]} and the like of ours",
        "checkpoints/ of a training run",
        f"{TRANSFORMERS['square']}, {BASE}/ or {RELEASE}/ of StableAvatar",
    ]
    looked += [
        f"{', '.join(place.path for place in places(layout).values())} of {layout}" for layout in ("diffusers", "wan")
    ]
    looked += [f"a config.json of {', '.join(CLASSES)}"]
    raise ValueError(f"{source} has no layout that is known; looked for {'; '.join(looked)}")


def _detect_file(source: Path) -> tuple[str, str, dict[str, Place]]:
    tensors = open_tensors(source)
    prefix = next((prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in tensors)), "")
    keys = tensors.stripped(prefix)
    theirs = next((key for key in ("patch_embedding.weight", "head.head.weight") if key in keys), None)
    if theirs is None:
        raise ValueError(
            f"{source} is one file, and no transformer of Wan: it has neither patch_embedding nor head.head"
        )
    speaks = any("vocal" in key for key in keys)
    place = Place(source.name, ORIGINAL["dit"] if speaks else PLAIN_DIT, prefix=prefix)
    return "file", f"it has {prefix}{theirs}", {"dit": place}


def _says(path: Path) -> dict:
    return read_json(path) if path.is_file() else {}
