"""What three libraries do with the same weights that our contracts do not, and how far their embeddings are from ours.

Facts: transformers 5.23 (`SiglipProcessor`, `Siglip2Tokenizer`), open_clip 3.3 with timm 1.0.31, and
google-research/big_vision, configs/proj/image_text/SigLIP2_demo.ipynb.
"""

# B images or texts, T tokens of a text, E embedding dimension

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from siglip2.core.data.text import KNOWN_CONTRACTS, TextContract, Tokenizer
from siglip2.core.interop.published import C4, GEMMA, MC4, known_trunk
from siglip2.core.interop.timm_trunk import trunk_named
from siglip2.core.interop.weights import Weights
from siglip2.core.layout import Patchifier
from siglip2.core.model.blocks import GELUS, key_mask
from siglip2.core.model.sizes import Gelu
from siglip2.core.model.two_towers import unit_norm
from siglip2.plugins.fixed import PROTOCOLS, FixedPatchifier
from siglip2.prediction.inputs import Picture
from siglip2.prediction.model import Model

TANH, EXACT = "tanh approximation", "exact"
CONTRACT_OF = {"transformers": "hf", "open_clip": "open_clip", "big_vision": "big_vision"}  # keys of KNOWN_CONTRACTS
DROPPED, WHITE = "dropped, colours under it stay", "white"  # what becomes of transparency
TRAINED, ALONE, BARE = "padded on the right, EOS", "EOS, no padding", "padded on the left, no EOS, a mask"


@dataclass(frozen=True)
class Way:
    """One way from pictures and texts to embeddings with given weights.

    Args:
        patchifier: makes patches of pictures.
        contract: cleans texts; None where there is no tokenizer.
        exact: towers (vision, text) in which the GELU is exact.
        rows: how ids are laid out: `TRAINED`, `ALONE` or `BARE`.
    """

    patchifier: Patchifier
    contract: TextContract | None
    exact: frozenset[str] = frozenset()
    rows: str = TRAINED


@dataclass(frozen=True)
class Habit:
    """What a library does in one respect, beside what the weights were trained with.

    Args:
        library: transformers, open_clip or big_vision.
        part: what it is about.
        tower: image or text.
        ours: what the weights were trained with.
        theirs: what it does.
        way: ours with that alone changed; None where it cannot be computed here.
        note: when it is so, or why it costs what it does.
        usual: whether it happens unless one prevents it; else only with some calls.
    """

    library: str
    part: str
    tower: str
    ours: str
    theirs: str
    way: Way | None = field(default=None, repr=False)
    note: str = ""
    usual: bool = True

    @property
    def differs(self) -> bool:
        """Whether the library does something else."""
        return self.ours != self.theirs


@dataclass(frozen=True)
class Cost:
    """Cosine between embeddings of one sample under two ways.

    Args:
        mean: over the sample.
        worst: the smallest.
        at: number of the input with the smallest.
        changed: share of the inputs whose embedding is another at all.
    """

    mean: float
    worst: float
    at: int
    changed: float


def our_way(model: Model, weights: Weights) -> Way:
    """Returns the way that the weights were trained with."""
    exact = frozenset(tower for tower, gelu in weights.gelus.items() if gelu == "exact")
    return Way(model.patchifier, weights.tokenizer.contract if weights.tokenizer else None, exact)


def habits(model: Model, weights: Weights) -> list[Habit]:
    """Returns what each library does in each respect, whether it differs or not.

    Args:
        model: as `siglip2.load` returns it.
        weights: the same, as `read_weights` returns them.
    """
    ours = our_way(model, weights)
    found = [*_gelu(weights, ours), *_resize(weights, ours), *_normalisation(weights), *_transparency(weights)]
    if not isinstance(ours.patchifier, FixedPatchifier):
        found += _one_column()
    if ours.contract is not None:
        found += [*_cleaning(model.tokenizer, ours), *_rows(weights, ours), *_vocabulary(weights)]
    order = list(CONTRACT_OF)
    return sorted(found, key=lambda habit: order.index(habit.library))


def _gelu(weights: Weights, ours: Way) -> Iterator[Habit]:
    known = known_trunk(weights.vision, patch_size=weights.patch_size, grid=weights.grid, native=weights.native)
    trunk = trunk_named(known.timm) if known else None
    why = f"as timm has {known.timm}" if known else "timm's default: no trunk of this shape is known by name"
    image = EXACT if trunk is None or trunk.gelu == "exact" else TANH
    # open_clip's configurations of SigLIP 1 have no act_kwargs
    text = EXACT if weights.vocab_size in (C4, MC4) else TANH
    for library in CONTRACT_OF:
        theirs = (image, text) if library == "open_clip" else (TANH, TANH)
        for tower, name, act in (("image", "vision", theirs[0]), ("text", "text", theirs[1])):
            note = why if library == "open_clip" and tower == "image" else ""
            here = EXACT if name in ours.exact else TANH
            if library == "transformers" and here == EXACT:
                note = 'under a released name; hidden_act "gelu" in its configuration, as our exports have it, mends it'
            changed = replace(ours, exact=ours.exact - {name} if act == TANH else ours.exact | {name})
            yield Habit(library, f"GELU of the {tower} tower", tower, here, act, changed, note)


def _resize(weights: Weights, ours: Way) -> Iterator[Habit]:
    pixels, patchifier = weights.pixels or {}, ours.patchifier
    for library, (filter, antialias) in PROTOCOLS.items():
        if not isinstance(patchifier, FixedPatchifier):
            yield _native_resize(library, pixels.get("max_scale"), ours)
            continue
        here = f"{patchifier.filter}, {_antialias(patchifier.antialias)}, {patchifier.image_size} px"
        # open_clip leaves out what no whole patch covers before the resize: 378 px where the others have 384
        side = weights.grid[0] * weights.patch_size if library == "open_clip" else patchifier.image_size
        changed = replace(patchifier, filter=filter, antialias=antialias, image_size=side)
        there = f"{filter}, {_antialias(antialias)}, {side} px"
        note = "PIL's resize, up to three grey levels from torchvision's, which is in the cost"
        note = note if library == "open_clip" else ""
        yield Habit(library, "resize", "image", here, there, replace(ours, patchifier=changed), note)


def _native_resize(library: str, max_scale: float | None, ours: Way) -> Habit:
    whole = "largest grid within the budget"
    here = whole if max_scale is None else f"{whole}, enlarged at most {max_scale:g} times"
    if library == "open_clip":
        return Habit(library, "resize", "image", here, "none for NaFlex", note="give the model timm's dict of patches")
    if library == "big_vision":
        note = "pixels are up to 0.007 of [-1, 1] away, since here they are rounded to whole grey levels"
        return Habit(library, "resize", "image", here, f"{whole}, in floats", note=note)
    return Habit(library, "resize", "image", here, whole, None if max_scale is None else _unlimited(ours))


def _unlimited(ours: Way) -> Way:
    changed: Any = replace(ours.patchifier, max_scale=None)  # type: ignore[type-var]
    return replace(ours, patchifier=changed)


def _antialias(antialias: bool) -> str:
    return "antialiased" if antialias else "not antialiased"


def _normalisation(weights: Weights) -> Iterator[Habit]:
    pixels = weights.pixels or {}
    ours = f"mean {pixels.get('mean', 0.5)}, std {pixels.get('std', 0.5)}"
    for library in CONTRACT_OF:
        yield Habit(library, "normalisation", "image", ours, "mean 0.5, std 0.5")


def _transparency(weights: Weights) -> Iterator[Habit]:
    note = "for pictures with an alpha channel; samples are measured without it"
    if weights.native:
        note += ". Siglip2ImageProcessor fails on them unless do_convert_rgb is set, as our exports have it"
    for library in CONTRACT_OF:
        there = WHITE if library == "transformers" else DROPPED
        yield Habit(library, "transparency", "image", DROPPED, there, note=note if there == WHITE else "")


def _one_column() -> Iterator[Habit]:
    right, wrong = "of every row", "all rows have the first one's"
    note = (
        "only pictures one patch wide, more than half as many times taller than wide as there are patches: torch 2.9 "
        "resizes position tables to width 1 wrongly when it antialiases"
    )
    part = "positions, one column"
    yield Habit("transformers", part, "image", right, wrong, note=note)
    yield Habit("big_vision", part, "image", right, right)


def _cleaning(tokenizer: Tokenizer, ours: Way) -> Iterator[Habit]:
    contract = tokenizer.contract
    for library, key in CONTRACT_OF.items():
        known: dict[str, Any] = {**KNOWN_CONTRACTS[key]}
        changed = replace(contract, **known)
        try:
            Tokenizer(tokenizer.file, changed)
        except ValueError:  # the tokenizer file lowers all scripts by itself, whoever loads it
            changed = replace(changed, lowercase_ascii_only=False)
        note = "it also repairs mojibake and HTML, which is not in the cost" if library == "open_clip" else ""
        way = replace(ours, contract=changed)
        yield Habit(library, "text cleaning", "text", _said(contract), _said(changed), way, note)


def _said(contract: TextContract) -> str:
    if contract.canonicalize:
        return "lower case, no punctuation"
    if not contract.lowercase:
        return "none"
    return "lower case of A to Z" if contract.lowercase_ascii_only else "lower case"


def _rows(weights: Weights, ours: Way) -> Iterator[Habit]:
    if weights.native:
        note = "Siglip2Tokenizer made of a vocabulary alone; tokenizer files that say otherwise mend it"
        way = replace(ours, rows=BARE)
        yield Habit("transformers", "padding and EOS", "text", TRAINED, BARE, way, note, usual=False)
    else:
        note = 'SiglipProcessor, unless the caller asks for padding="max_length" or the tokenizer files do'
        way = replace(ours, rows=ALONE)
        yield Habit("transformers", "padding and EOS", "text", TRAINED, ALONE, way, note, usual=False)
    for library in ("open_clip", "big_vision"):
        yield Habit(library, "padding and EOS", "text", TRAINED, TRAINED)
    if weights.native:
        here = f"{weights.context_length} ids"
        yield Habit(
            "transformers", "length", "text", here, "64 ids", note="Siglip2Processor, unless the files say more"
        )


def _vocabulary(weights: Weights) -> Iterator[Habit]:
    released = {GEMMA: "Gemma's", C4: "SigLIP 1's", MC4: "SigLIP 1's, multilingual"}
    theirs = released.get(weights.vocab_size, "Gemma's")
    rows = f"{weights.vocab_size} ids"
    for library in CONTRACT_OF:
        note = "" if weights.vocab_size in released else "under a released name; take the tokenizer of the checkpoint"
        there = rows if weights.vocab_size in released else f"{GEMMA} ids ({theirs})"
        yield Habit(library, "tokenizer", "text", rows, there, note=note)


def altogether(library: str, tower: str, found: Sequence[Habit], ours: Way) -> Way:
    """Returns the way of a library in all that it does unless one prevents it, for one tower.

    Args:
        library: whose.
        tower: image or text.
        found: what `habits` returned.
        ours: the way of the weights.
    """
    way = ours
    for habit in found:
        if (habit.library, habit.tower) == (library, tower) and habit.usual and habit.differs and habit.way:
            there = habit.way
            way = Way(
                there.patchifier if there.patchifier != ours.patchifier else way.patchifier,
                there.contract if there.contract != ours.contract else way.contract,
                way.exact ^ (there.exact ^ ours.exact),
                there.rows if there.rows != ours.rows else way.rows,
            )
    return way


@torch.inference_mode()
def embed_images(model: Model, way: Way, pictures: Sequence[Picture]) -> Tensor:
    """Returns unit-norm embeddings [B, E] of pictures, one way."""
    with _gelus(model, way):
        return Model(model.model, way.patchifier, None).encode_image(list(pictures)).cpu()


@torch.inference_mode()
def embed_texts(model: Model, way: Way, texts: Sequence[str]) -> Tensor:
    """Returns unit-norm embeddings [B, E] of texts, one way, in float32."""
    assert way.contract is not None
    tokenizer = Tokenizer(model.tokenizer.file, way.contract)
    with _gelus(model, way):
        return torch.cat([_embed_row(model, *_row(tokenizer, text, way.rows)) for text in texts]).cpu()


def _row(tokenizer: Tokenizer, text: str, rows: str) -> tuple[list[int], list[bool] | None]:
    """The ids of a text, and which of them are no padding where a mask says so."""
    contract, ids = tokenizer.contract, tokenizer.ids(text)
    if rows == ALONE:
        return [*ids[: contract.room], contract.eos_id], None
    if rows == BARE:
        kept = ids[: contract.length]
        missing = contract.length - len(kept)
        # a text without ids would leave nothing to attend to: torch answers that with NaN, so nothing is masked
        return [contract.pad_id] * missing + kept, [not kept] * missing + [True] * len(kept)
    return contract.fit(ids), None


def _embed_row(model: Model, ids: list[int], valid: list[bool] | None) -> Tensor:
    """The text tower on any number of ids, under any mask, as other libraries run it."""
    tower = model.model.text
    x = tower.token_embed(torch.tensor([ids], device=model.device)) + tower.pos_embed[: len(ids)]
    mask = key_mask(None if valid is None else torch.tensor([valid], device=model.device))
    for block in tower.blocks:
        x = block(x, attn_mask=mask)
    return unit_norm(tower.head(tower.norm(x)[:, -1]))


@contextmanager
def _gelus(model: Model, way: Way) -> Iterator[None]:
    """The GELU of a way in both towers, for as long as the block lasts."""
    mlps: dict[Any, Gelu] = {
        mlp: "exact" if name in way.exact else "tanh"
        for name in ("vision", "text")
        for mlp in getattr(model.model, name).modules()
        if isinstance(getattr(mlp, "act", None), (*GELUS.values(),))
    }
    before = [mlp.act for mlp in mlps]
    try:
        for mlp, gelu in mlps.items():
            mlp.act = GELUS[gelu]()
        yield
    finally:
        for mlp, act in zip(mlps, before, strict=True):
            mlp.act = act


def cost(ours_BE: Tensor, theirs_BE: Tensor) -> Cost:
    """Returns how far unit-norm embeddings of the same inputs are from one another."""
    cosine_B = (ours_BE.double() * theirs_BE.double()).sum(-1).clamp(max=1)
    worst = int(cosine_B.argmin())
    changed = (ours_BE - theirs_BE).abs().amax(-1) > 1e-6  # more than another order of summation does
    return Cost(cosine_B.mean().item(), cosine_B[worst].item(), worst, changed.double().mean().item())
