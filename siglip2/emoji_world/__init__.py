"""The emoji world: a small real data set of pictures, names in 27 languages, boxes, masks and depth, made on the spot.

    siglip2 data emoji-world --out data/emoji --scenes 8000 --singles 8000

`catalogue` holds the pictures and names, `scene` composes one sample as a pure function of (seed, split, index), `plan`
holds the options of a world and its planted noise, `write` writes WebDataset shards, `command` is the command line.
Nothing in here imports torch.
"""

from siglip2.emoji_world.catalogue import Emoji, known_languages, load_catalogue, select, sprite
from siglip2.emoji_world.plan import WorldOptions
from siglip2.emoji_world.scene import Region, Scene, SceneOptions, compose
from siglip2.emoji_world.write import write_emoji_world

__all__ = [
    "Emoji",
    "Region",
    "Scene",
    "SceneOptions",
    "WorldOptions",
    "compose",
    "known_languages",
    "load_catalogue",
    "select",
    "sprite",
    "write_emoji_world",
]
