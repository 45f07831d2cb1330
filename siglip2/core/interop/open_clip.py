"""`CustomTextCLIP` of open_clip around a timm trunk: names, `open_clip_config.json`, training checkpoints.

Source: mlfoundations/open_clip, src/open_clip/model.py and factory.py; checked against the 3.3.0 wheel.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from siglip2.core.interop import timm_trunk
from siglip2.core.interop.contracts import read_contract, read_tokenizer_files, write_tokenizer_files
from siglip2.core.interop.files import (
    read_json,
    read_pickle,
    read_safetensors,
    state_dict_in,
    write_json,
    write_safetensors,
)
from siglip2.core.interop.names import SCALAR, Entry, depth_of, expanded, linear, read_names, write_names
from siglip2.core.interop.published import heads_of, known_trunk, nearest, nearest_to
from siglip2.core.interop.weights import (
    NO_HEAD,
    Sizes,
    Weights,
    assemble,
    check_pixels,
    compare,
    exact_gelu,
    identity_head,
    measure,
    native_pixels,
    square_pixels,
)
from siglip2.core.model.sizes import Gelu

CONFIG_FILE, TRUNK = "open_clip_config.json", "visual.trunk."
FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
TRUNK_FOLDER, HEAD = "trunk", "text.text_projection"
# what a configuration may leave out, from CLIPVisionCfg, CLIPTextCfg and torch's LayerNorm
IMAGES: dict[str, Any] = {"image_size": 224, "timm_pool": "avg", "timm_proj": "linear"}
WORDS: dict[str, Any] = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
WORDS |= {"mlp_ratio": 4.0, "no_causal_mask": False, "pool_type": "argmax", "proj_type": "linear"}
EPSILON, DEFAULT_EPSILON = 1e-6, 1e-5
# open_clip 3.3 has no timm_model_kwargs, and timm looks for a path that is not whole in the current directory
MEND = f"""sed -i.bak 's#local-dir:[^"]*#local-dir:'"$PWD/{TRUNK_FOLDER}"'#' {CONFIG_FILE}"""
TIED = (
    f"open_clip will not load this folder from another place: {CONFIG_FILE} names {TRUNK_FOLDER}/ by its whole path. "
    f"After a move run in the folder: {MEND}"
)
APPROXIMATE: dict[Gelu, str] = {"tanh": "tanh", "exact": "none"}


def _text() -> list[Entry]:
    ours, theirs = "text.blocks.{i}", "text.transformer.resblocks.{i}"
    parts = {"norm1": "ln_1", "norm2": "ln_2", "attn.proj": "attn.out_proj"}
    parts |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    qkv = [Entry((f"{ours}.attn.qkv.{kind}",), (f"{theirs}.attn.in_proj_{kind}",)) for kind in ("weight", "bias")]
    return [
        Entry(("text.token_embed.weight",), ("text.token_embedding.weight",)),
        Entry(("text.pos_embed",), ("text.positional_embedding",)),
        *qkv,
        *(entry for one, other in parts.items() for entry in linear(f"{ours}.{one}", f"{theirs}.{other}")),
        *linear("text.norm", "text.ln_final"),
        *linear("text.head", "text.text_projection"),
    ]


def text_table() -> list[Entry]:
    """Returns the names of the text tower, temperature and bias."""
    both = [Entry((name,), (name,), SCALAR) for name in ("logit_scale", "logit_bias")]
    return [*both, *_text()]


def table(*, native: bool) -> list[Entry]:
    """Returns all names of `CustomTextCLIP` around a trunk of timm."""
    return [*text_table(), *timm_trunk.table(native=native, prefix=TRUNK)]


def holds(names: Mapping[str, Any]) -> bool:
    """Says whether these are the names of open_clip, of any of its models."""
    return any(n.startswith(("visual.", "text.transformer.", "transformer.resblocks.")) for n in names)


def read_folder(folder: Path) -> Weights:
    """Returns the weights of a folder with an `open_clip_config.json`.

    Raises:
        ValueError: if it is of another architecture, incomplete or damaged.
    """
    whole = read_json(folder / CONFIG_FILE)
    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"{folder} has an {CONFIG_FILE} but no weights: expected {' or '.join(FILES)}")
    tensors = read_safetensors(file) if file.suffix == ".safetensors" else state_dict_in(read_pickle(file))
    return read(tensors, str(folder), folder=folder, config=whole)


def read(
    theirs: Mapping[str, Tensor], place: str, *, folder: Path | None = None, config: Mapping[str, Any] | None = None
) -> Weights:
    """Returns the weights in tensors of open_clip.

    Args:
        theirs: all of them, without `module.`.
        place: what messages call the file.
        folder: with tokenizer files.
        config: the `open_clip_config.json`; without it heads are looked up by shape.

    Raises:
        ValueError: if they are of another architecture, or incomplete.
    """
    model = (config or {}).get("model_cfg", {})
    images, words = model.get("vision_cfg") or {}, model.get("text_cfg") or {}
    images, words = images and IMAGES | images, words and WORDS | words
    trunk = {n: t for n, t in theirs.items() if n.startswith(TRUNK)}
    if not trunk or not {"logit_bias", "text.ln_final.weight"} <= set(theirs):
        raise ValueError(
            f"{place} is a model of open_clip, but no SigLIP: expected a trunk of timm (`{TRUNK}*`), a text tower of "
            f"its own, and a bias of the logits. {nearest_to(theirs)}"
        )
    _refuse_others(place, model, images, words)
    found = trunk_of(str(images.get("timm_model_name", "")), images.get("timm_model_kwargs"), folder)
    state, vision, notes = timm_trunk.read_trunk(trunk, found, place=place, prefix=TRUNK)
    # not as many as are there, where the configuration says: a file may have lost its last ones
    depths = {"text": words["layers"] if words else depth_of(theirs, "text.transformer.resblocks.{i}.")}
    rest = {n: t for n, t in theirs.items() if n not in trunk}
    if f"{HEAD}.weight" not in rest and words.get("proj_type", "none") == "none":
        rest |= {f"{HEAD}.{kind}": t for kind, t in identity_head(theirs["text.ln_final.weight"]).items()}
        notes.append(NO_HEAD)
    elif words.get("proj_type") == "none":
        raise ValueError(f"{place}: {CONFIG_FILE} says proj_type none of the text tower, the tensors have {HEAD}")
    state |= read_names(rest, expanded(text_table(), depths), place=place, like=nearest_to(trunk))
    exact = words and (words.get("act_kwargs") or {}).get("approximate") != "tanh"
    if exact:
        notes.append(exact_gelu("text"))
    sizes = measure(state, place)
    timm_trunk.compare_trunk(vision, sizes, place)
    _compare(place, model, images, words, sizes, native=timm_trunk.is_native(theirs, TRUNK))
    known_heads = heads_of(state["text.norm.weight"].shape[0], depths["text"])
    text_heads = words["heads"] if words else known_heads
    if text_heads is None:
        raise ValueError(
            f"{place} does not say how many attention heads its text tower has, and no tensor does: put the "
            f"{CONFIG_FILE} of the model beside it. {nearest_to(trunk)}"
        )
    tokenizer = None
    if folder is not None:
        clean = (words.get("tokenizer_kwargs") or {}).get("clean", "whitespace")
        tokenizer, about = read_tokenizer_files(folder, rows=sizes.vocab_size, length=sizes.context_length, clean=clean)
        notes += about
    native = timm_trunk.is_native(theirs, TRUNK)
    processed = _read_pixels(place, config or {}, sizes, native=native)
    pixels = read_contract(folder).get("pixels") if folder else None
    return assemble(
        "open_clip",
        state,
        place=place,
        heads={"vision": vision.heads, "text": text_heads},
        native=native,
        gelus={"vision": vision.gelu, "text": "exact" if exact else "tanh"},
        pixels=pixels or processed,
        tokenizer=tokenizer,
        notes=(*notes,),
    )


def _refuse_others(place: str, model: Mapping[str, Any], images: Mapping[str, Any], words: Mapping[str, Any]) -> None:
    """Raises ValueError where a configuration has open_clip compute something that our towers do not."""
    if model.get("quick_gelu"):
        raise ValueError(f"{place}: open_clip gives its text tower the QuickGELU, expected a GELU, as every SigLIP has")
    wanted: list[tuple[str, Mapping[str, Any], str, Any]]
    wanted = [("vision", images, "timm_pool", "map"), ("vision", images, "timm_proj", "none")]
    wanted += [("text", words, "no_causal_mask", True), ("text", words, "pool_type", "last")]
    for tower, said, key, value in wanted:
        if said and said[key] != value:
            raise ValueError(
                f"{place}: {key} of the {tower} tower is {said[key]!r} in {CONFIG_FILE}, or by open_clip where it is "
                f"left out; expected {value!r}, as every SigLIP has"
            )
    eps = (words.get("norm_kwargs") or {}).get("eps", DEFAULT_EPSILON)
    if words and not abs(eps - EPSILON) <= 1e-9:
        raise ValueError(
            f"{place}: norm_kwargs of the text tower give an eps of {eps} ({DEFAULT_EPSILON} where {CONFIG_FILE} has "
            f"none), every SigLIP has {EPSILON}"
        )


def _compare(
    place: str,
    model: Mapping[str, Any],
    images: Mapping[str, Any],
    words: Mapping[str, Any],
    sizes: Sizes,
    *,
    native: bool,
) -> None:
    """Raises ValueError where a configuration says another shape than the tensors have."""
    vision, text = sizes.vision, sizes.text
    like = nearest(vision.width, vision.depth, sizes.patch_size)
    if "embed_dim" in model:
        compare(place, CONFIG_FILE, "vision", said=model, found={"embed_dim": vision.width}, like=like)
    if images and not native:
        side = images["image_size"][0] if isinstance(images["image_size"], list) else images["image_size"]
        said = {"patches along a side": side // sizes.patch_size}
        compare(place, CONFIG_FILE, "vision", said=said, found={"patches along a side": sizes.grid[0]}, like=like)
    if words and text:
        said = {**words, "int(width * mlp_ratio)": int(words["width"] * words["mlp_ratio"])}
        found = {"width": text.width, "int(width * mlp_ratio)": text.mlp_dim}
        found |= {"vocab_size": sizes.vocab_size, "context_length": sizes.context_length}
        compare(place, CONFIG_FILE, "text", said=said, found=found, like=like)


def trunk_of(name: str, arguments: Any, folder: Path | None) -> timm_trunk.Trunk | None:
    """Returns what timm says of the trunk that a configuration names; of one in a folder what that folder says."""
    beside = folder / TRUNK_FOLDER / "config.json" if folder else None
    if name.startswith("local-dir:") and beside and beside.is_file():  # the folder may have been moved
        return timm_trunk.trunk_configured(read_json(beside))
    return timm_trunk.trunk_named(name, arguments)


def _read_pixels(place: str, config: Mapping[str, Any], sizes: Sizes, *, native: bool) -> dict[str, Any] | None:
    found = config.get("preprocess_cfg")
    side, patch = sizes.grid[0], sizes.patch_size
    if found is not None:  # left out, they are CLIP's
        check_pixels(place, {"mean": None, "std": None} | found, {"mean": 0.5, "std": 0.5})
    if native:
        return native_pixels(patch, side)
    if not found or found.get("resize_mode") != "squash" or found.get("interpolation") not in ("bilinear", "bicubic"):
        return None
    return square_pixels(side * patch, patch, filter=found["interpolation"])


def write(weights: Weights, folder: Path) -> list[str]:
    """Writes a folder that `open_clip.create_model("local-dir:...")` loads; returns notes.

    The trunks that open_clip knows by name have the shapes of released checkpoints, and some of them the exact GELU.
    For all others, and for these with the other GELU, `trunk/config.json` tells timm the shape and the activation, and
    is named by its whole path, since open_clip 3.3 hands names on as they are.

    Raises:
        ValueError: if there is no text tower, or the position table is no square.
    """
    weights.needs_text("open_clip")
    entries = expanded(table(native=weights.native), weights.depths)
    write_safetensors(folder / FILES[0], write_names(weights.state, entries, weights.heads))
    notes = write_config(weights, folder)
    if weights.tokenizer is None:
        return [*notes, "there is no tokenizer: open_clip.get_tokenizer will not load"]
    return notes + write_tokenizer_files(folder, weights.tokenizer)


def write_config(weights: Weights, folder: Path) -> list[str]:
    """Writes what open_clip builds the model from, without its weights; returns notes."""
    config, notes = config_of(weights, folder)
    write_json(folder / CONFIG_FILE, config)
    if config["model_cfg"]["vision_cfg"]["timm_model_name"].startswith("local-dir:"):
        (folder / TRUNK_FOLDER).mkdir()
        write_json(folder / TRUNK_FOLDER / "config.json", timm_trunk.config_of(weights))
    return notes


def config_of(weights: Weights, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Returns the content of `open_clip_config.json`, and notes."""
    text, notes = weights.text, []
    assert text is not None
    known = known_trunk(weights.vision, patch_size=weights.patch_size, grid=weights.grid, native=weights.native)
    named = timm_trunk.trunk_named(known.timm) if known else None
    if known and named and named.gelu == weights.vision.gelu:
        name = known.timm
    else:
        name = f"local-dir:{(folder / TRUNK_FOLDER).resolve()}"
        notes.append(TIED)
    contract = weights.tokenizer.contract if weights.tokenizer else None
    clean = "whitespace" if contract is None else _cleaning(contract)
    pixels = weights.pixels or {}
    images = {
        "image_size": weights.grid[0] * weights.patch_size,
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    }
    words = {
        "context_length": weights.context_length,
        "vocab_size": weights.vocab_size,
        "hf_tokenizer_name": "tokenizer.json",  # any name: with local-dir the folder itself is read
        "tokenizer_kwargs": {"clean": clean},
        "width": text.width,
        "heads": text.num_heads,
        "layers": text.depth,
        "mlp_ratio": (text.mlp_dim + 0.5) / text.width,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
        "act_kwargs": {"approximate": APPROXIMATE[text.gelu]},
    }
    resize = {"interpolation": pixels.get("filter", "bilinear"), "resize_mode": "squash"}
    if not weights.native and weights.image_size != images["image_size"]:
        notes.append(
            f"open_clip resizes pictures to {images['image_size']} px; these weights were trained on "
            f"{weights.image_size} px of which the patches leave out the rest"
        )
    if weights.native:
        notes.append("open_clip 3.3 has no NaFlex preprocessing: give the model timm's dict of patches, or squares")
    elif not pixels.get("antialias", True):
        notes.append("trained on a resize that is not antialiased, which open_clip does not have")
    model: dict[str, Any] = {"embed_dim": weights.embed_dim, "init_logit_bias": -10, "custom_text": True}
    model |= {"vision_cfg": images, "text_cfg": words}
    return {"model_cfg": model, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, **resize}}, notes


def _cleaning(contract: Any) -> str:
    """open_clip's cleaning that is nearest: each also repairs mojibake and joins runs of spaces."""
    if contract.canonicalize:
        return "canonicalize"
    return "lower" if contract.lowercase and not contract.lowercase_ascii_only else "whitespace"
