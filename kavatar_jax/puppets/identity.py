"""Who a puppet is: a seed goes in, a look (shape, colours, hair, clothes, surroundings) comes out.

The look never changes within a clip. Lengths are in world units, colours RGB 0..255.
"""

from dataclasses import dataclass

import numpy as np

PERSONS = ("man", "woman", "boy", "girl", "old man", "old woman")
SKINS = {
    "pale": (250, 222, 202),
    "fair": (243, 203, 174),
    "warm": (228, 180, 142),
    "olive": (208, 160, 116),
    "tan": (188, 134, 92),
    "brown": (158, 106, 72),
    "dark": (122, 80, 56),
}
HAIRS = {
    "black": (44, 38, 44),
    "dark brown": (78, 52, 40),
    "brown": (122, 80, 50),
    "red": (176, 78, 40),
    "blond": (226, 184, 102),
    "grey": (158, 158, 164),
    "white": (226, 226, 230),
    "blue": (70, 104, 190),
    "pink": (230, 126, 166),
    "green": (84, 158, 108),
}
EYES = {
    "brown": (96, 60, 34),
    "hazel": (134, 98, 48),
    "green": (72, 128, 82),
    "blue": (64, 118, 186),
    "grey": (98, 112, 126),
}
CLOTHES = {
    "red": (200, 58, 58),
    "orange": (232, 134, 52),
    "yellow": (238, 198, 74),
    "green": (72, 150, 94),
    "teal": (48, 148, 152),
    "blue": (58, 104, 190),
    "navy": (46, 58, 106),
    "purple": (130, 82, 168),
    "pink": (236, 142, 172),
    "brown": (132, 92, 66),
    "grey": (128, 132, 142),
    "black": (54, 54, 62),
    "cream": (232, 222, 198),
}
WALLS = {
    "beige": (214, 196, 168),
    "mint": (166, 206, 190),
    "sky blue": (156, 196, 226),
    "lavender": (192, 180, 222),
    "peach": (240, 192, 164),
    "grey": (170, 176, 184),
    "sage": (160, 176, 140),
    "rose": (224, 168, 176),
    "slate": (98, 112, 132),
    "mustard": (214, 178, 96),
}
HAIR_STYLES = (
    "bald",
    "buzz cut",
    "short",
    "side parting",
    "spiky",
    "curly",
    "bob",
    "long",
    "bun",
    "ponytail",
    "beanie",
)
GARMENTS = ("T-shirt", "V-neck", "shirt", "suit", "hoodie", "striped top", "dotted top")
PLACES = ("plain wall", "striped wall", "bokeh lights", "bookshelf", "window", "hills", "tiles")
GLASSES = ("none", "round", "square")
BEARDS = ("none", "full beard", "goatee", "moustache")


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A look. Names index the palettes above; `colour` and `trim` of the clothes are two colours of CLOTHES."""

    seed: int
    person: str
    skin: tuple
    hair_style: str
    hair_name: str
    hair: tuple
    eye: tuple
    lip: tuple
    face_width: float  # half width of the face
    face_height: float  # half height
    jaw: float  # 0 round .. 0.35 pointed
    eye_size: float
    eye_gap: float  # from the middle of the face to an eye
    brow_weight: float
    nose_size: float
    mouth_width: float  # half width at rest
    lip_fullness: float
    ear_size: float
    blush: float
    freckles: bool
    glasses: str
    beard: str
    garment: str
    clothes_name: str
    clothes: tuple
    trim: tuple
    shoulder_width: float
    place: str
    wall: tuple

    @property
    def brow(self) -> tuple:
        base = SKINS["brown"] if self.hair_style == "bald" else self.hair
        return tuple(0.62 * c for c in base)


def sample_identity(seed: int) -> Identity:
    """The look that belongs to a seed; the same on every machine."""
    rng = np.random.default_rng([seed, 0x1D])
    person = str(rng.choice(PERSONS, p=(0.27, 0.27, 0.13, 0.13, 0.1, 0.1)))
    child, old, male = person in ("boy", "girl"), person.startswith("old"), person in ("man", "boy", "old man")
    skin = _vary(rng, SKINS[str(rng.choice(list(SKINS)))], 6)
    hair_name = _hair_colour(rng, old)
    clothes_name, trim_name = (str(name) for name in rng.choice(list(CLOTHES), 2, replace=False))
    return Identity(
        seed=seed,
        person=person,
        skin=skin,
        hair_style=_hair_style(rng, male, child),
        hair_name=hair_name,
        hair=_vary(rng, HAIRS[hair_name], 8),
        eye=EYES[str(rng.choice(list(EYES)))],
        lip=_lip_colour(rng, skin, male),
        face_width=float(rng.uniform(0.45, 0.50) + 0.015 * child),
        face_height=float(rng.uniform(0.56, 0.61) - 0.03 * child),
        jaw=float(rng.uniform(0.08, 0.2) + 0.08 * (not male) - 0.04 * child),
        eye_size=float(rng.uniform(0.088, 0.104) + 0.012 * child),
        eye_gap=float(rng.uniform(0.188, 0.21)),
        brow_weight=float(rng.uniform(0.014, 0.024) + 0.006 * male),
        nose_size=float(rng.uniform(0.05, 0.075) - 0.012 * child),
        mouth_width=float(rng.uniform(0.158, 0.182)),
        lip_fullness=float(rng.uniform(0.022, 0.032) + 0.006 * (not male)),
        ear_size=float(rng.uniform(0.09, 0.115)),
        blush=float(rng.uniform(0.05, 0.25) + 0.15 * (not male)),
        freckles=bool(rng.random() < (0.35 if child else 0.12)),
        glasses=str(rng.choice(GLASSES, p=(0.7, 0.17, 0.13))),
        beard=str(rng.choice(BEARDS, p=(0.55, 0.2, 0.1, 0.15))) if male and not child else "none",
        garment=str(rng.choice(GARMENTS)),
        clothes_name=clothes_name,
        clothes=_vary(rng, CLOTHES[clothes_name], 8),
        trim=_vary(rng, CLOTHES[trim_name], 8),
        shoulder_width=float(rng.uniform(0.72, 0.82) + 0.06 * male - 0.08 * child),
        place=str(rng.choice(PLACES)),
        wall=_vary(rng, WALLS[str(rng.choice(list(WALLS)))], 8),
    )


def _vary(rng, colour, spread: float) -> tuple:
    return tuple(float(np.clip(c + d, 0, 255)) for c, d in zip(colour, rng.normal(0, spread, 3), strict=True))


def _hair_colour(rng, old: bool) -> str:
    if old:
        return str(rng.choice(["grey", "white"]))
    return str(rng.choice(list(HAIRS), p=(0.17, 0.19, 0.19, 0.13, 0.16, 0.02, 0.02, 0.04, 0.05, 0.03)))


def _hair_style(rng, male: bool, child: bool) -> str:
    if male:
        weights = (0.12 * (not child), 0.14, 0.24, 0.2, 0.14, 0.14, 0, 0.04, 0, 0, 0.1)
    else:
        weights = (0, 0.02, 0.08, 0.1, 0, 0.16, 0.2, 0.2, 0.1, 0.1, 0.08)
    weights = np.array(weights, float)
    return str(rng.choice(HAIR_STYLES, p=weights / weights.sum()))


def _lip_colour(rng, skin, male: bool) -> tuple:
    """Redder and darker than the skin, so that lips stand out on every skin."""
    strength = rng.uniform(0.5, 0.65) if male else rng.uniform(0.65, 0.85)
    paint = rng.uniform((190, 56, 70), (214, 84, 98)) * (0.62 + 0.38 * np.mean(skin) / 225)
    return tuple(float(c) for c in (1 - strength) * 0.9 * np.asarray(skin) + strength * paint)
