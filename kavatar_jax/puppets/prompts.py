"""Words for a clip: who is seen and what the script says go in, one instruction in varied English comes out."""

import numpy as np

from kavatar_jax.puppets.identity import Identity
from kavatar_jax.puppets.performance import Script

_PLACES = {
    "plain wall": "in a room with pictures on the wall",
    "striped wall": "in front of striped wallpaper",
    "bokeh lights": "with blurred lights behind {him}",
    "bookshelf": "in front of a bookshelf",
    "window": "beside a window",
    "hills": "outdoors with green hills behind {him}",
    "tiles": "before a tiled wall",
}
_HAIR = {
    "bald": ("a shaved head", "a bald head"),
    "buzz cut": ("a {hair} buzz cut",),
    "short": ("short {hair} hair",),
    "side parting": ("{hair} hair with a side parting", "neatly parted {hair} hair"),
    "spiky": ("spiky {hair} hair",),
    "curly": ("curly {hair} hair", "{hair} curls"),
    "bob": ("a {hair} bob", "{hair} hair cut to a bob"),
    "long": ("long {hair} hair",),
    "bun": ("{hair} hair in a bun", "a {hair} bun"),
    "ponytail": ("a {hair} ponytail",),
    "beanie": ("a knitted hat",),
}
_FEELINGS = {
    "smile": ("smiling", "with a warm smile", "happily", "with a cheerful look", "beaming with joy", "in good spirits"),
    "neutral": (
        "with a neutral expression",
        "with a calm face",
        "looking composed",
        "in a matter-of-fact way",
        "with a relaxed face",
    ),
    "frown": ("frowning", "with a sad look", "looking unhappy", "with a gloomy face", "with a troubled frown"),
}
_MANNERS = {
    "low": ("quietly", "softly", "in a calm voice", "without hurry"),
    "middle": ("", "", "clearly", "at an easy pace"),
    "high": ("excitedly", "with great energy", "in a loud voice", "animatedly"),
}
_ACTIONS = {
    "turn left": ("turns {his} head to the left", "looks over to the left", "glances left, turning {his} head"),
    "turn right": ("turns {his} head to the right", "looks over to the right", "glances right, turning {his} head"),
    "nod": ("nods", "nods a few times", "gives a nod"),
    "shake head": ("shakes {his} head", "shakes {his} head slowly"),
    "raise hand": ("raises a hand", "lifts one hand", "puts a hand up"),
    "wave": ("waves", "waves a hand", "waves at the viewer"),
    "lean in": ("leans in", "leans towards the camera", "comes closer"),
    "lean back": ("leans back", "moves back a little"),
    "tilt head": ("tilts {his} head", "tilts {his} head to one side"),
}
_CAMERAS = {
    "static": ("", "", "The camera stays still.", "Static shot.", "Fixed camera."),
    "zoom in": ("The camera slowly zooms in.", "Slow zoom in.", "The shot moves closer.", "The camera pushes in."),
    "zoom out": ("The camera slowly zooms out.", "Slow zoom out.", "The camera pulls back.", "The shot widens."),
    "pan left": ("The camera pans left.", "Pan to the left.", "The camera drifts to the left."),
    "pan right": ("The camera pans right.", "Pan to the right.", "The camera drifts to the right."),
}
_VERBS = (
    "talks",
    "speaks",
    "is speaking",
    "is talking",
    "talks to the camera",
    "speaks to the viewer",
    "tells a story",
)


def describe(identity: Identity, script: Script, rng: np.random.Generator) -> str:
    """One or more sentences that name the person, the emotion, every action in order and the camera's move."""

    def pick(options: tuple[str, ...]) -> str:
        return options[rng.integers(len(options))]

    who = _who(identity, rng)
    feeling = pick(_FEELINGS[script.emotion])
    manner = pick(_MANNERS["low" if script.arousal < 0.3 else "high" if script.arousal > 0.7 else "middle"])
    deeds = [pick(_ACTIONS[action.name]) for action in script.actions]
    camera = pick(_CAMERAS[script.camera])
    speaks = " ".join(part for part in (pick(_VERBS), manner) if part)
    doing = ", then ".join(deeds)
    shape = int(rng.integers(4))
    if shape == 0:
        text = f"{who} {speaks}, {feeling}" + (f", and {doing}." if deeds else ".")
    elif shape == 1:
        text = f"{who} {speaks} {feeling}." + (f" {{He}} {doing}." if deeds else "")
    elif shape == 2:
        text = f"A video of {who}, {feeling}. {{He}} {speaks}" + (f" and {doing}." if deeds else ".")
    else:
        text = f"{feeling}, {who} {speaks}." + (f" While speaking, {{he}} {doing}." if deeds else "")
    text = f"{camera} {text}" if camera and rng.random() < 0.25 else f"{text} {camera}".strip()
    return _finish(text, identity)


def _who(identity: Identity, rng) -> str:
    """The person with none, some or all of hair, glasses, beard, clothes and place."""
    hair = str(_HAIR[identity.hair_style][rng.integers(len(_HAIR[identity.hair_style]))]).format(
        hair=identity.hair_name
    )
    traits = [hair] if rng.random() < 0.6 else []
    if identity.glasses != "none" and rng.random() < 0.6:
        traits.append(f"{identity.glasses} glasses" if rng.random() < 0.5 else "glasses")
    if identity.beard != "none" and rng.random() < 0.6:
        traits.append(f"a {identity.beard.removeprefix('full ')}")
    text = f"a {identity.person}"
    if traits:
        text += " with " + (", ".join(traits[:-1]) + " and " + traits[-1] if len(traits) > 1 else traits[0])
    if rng.random() < 0.4:
        text += f" {'in' if rng.random() < 0.5 else 'wearing'} a {identity.clothes_name} {identity.garment}"
    if rng.random() < 0.35:
        text += f" {_PLACES[identity.place]}"
    return text


def _finish(text: str, identity: Identity) -> str:
    """Pronouns, the right article, and capitals at the beginning of sentences."""
    male = identity.person in ("man", "boy", "old man")
    he, him, his = ("he", "him", "his") if male else ("she", "her", "her")
    text = text.format(he=he, He=he.capitalize(), him=him, his=his)
    words = text.split(" ")
    for i in range(len(words) - 1):
        if words[i] == "a" and words[i + 1][:1].lower() in "aeio":
            words[i] = "an"
    text = " ".join(words)
    sentences = [part[:1].upper() + part[1:] for part in text.split(". ")]
    return ". ".join(sentences)
