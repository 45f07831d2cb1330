"""`SiglipModel` and `Siglip2Model` of transformers: names, configurations, processor files.

Source: huggingface/transformers, models/siglip and models/siglip2; checked against 5.23.
"""

# B batch, N patches, P patch values

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from siglip2.core.interop.contracts import is_plain_bpe, read_contract, read_tokenizer_files, write_tokenizer_files
from siglip2.core.interop.files import (
    read_json,
    read_pickle,
    read_safetensors,
    read_sharded,
    state_dict_in,
    write_json,
    write_safetensors,
)
from siglip2.core.interop.names import CELLS, CONVOLUTION, Entry, depth_of, expanded, linear, read_names, write_names
from siglip2.core.interop.published import nearest
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

MODEL_TYPES = {"siglip": False, "siglip2": True}  # -> whether images keep their aspect ratio
ACTS: dict[str, Gelu] = {"gelu_pytorch_tanh": "tanh", "gelu_new": "tanh", "gelu": "exact"}
HIDDEN_ACT: dict[Gelu, str] = {"tanh": "gelu_pytorch_tanh", "exact": "gelu"}
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
EPSILON = 1e-6
# what a config.json may leave out, from configuration_siglip.py and configuration_siglip2.py
COMMON: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
COMMON |= {"num_attention_heads": 12, "hidden_act": HIDDEN_ACT["tanh"], "layer_norm_eps": EPSILON}
DEFAULTS: dict[str, dict[str, Any]] = {
    "vision": COMMON | {"image_size": 224, "patch_size": 16, "num_patches": 256, "num_channels": 3},
    "text": COMMON | {"vocab_size": 32000, "max_position_embeddings": 64, "projection_size": None},
}
PROCESSED = {"image_mean": 0.5, "image_std": 0.5, "rescale_factor": 1 / 255, "do_rescale": True, "do_normalize": True}
PROCESSOR_SAYS = (16, 256)  # patch_size and max_num_patches of Siglip2Processor, whatever its image processor has
IGNORED = ("position_ids",)  # buffers that older versions saved
OTHER_CLASS = (
    "AutoTokenizer and AutoProcessor will give other ids: transformers has a tokenizer class of its own for siglip2, a "
    "BPE without normalisation, and this vocabulary is none. PreTrainedTokenizerFast.from_pretrained gives right ones"
)
FILES, HEAD = ("model.safetensors", "pytorch_model.bin"), "text_model.head"


def _blocks(tower: str) -> list[Entry]:
    ours, theirs = f"{tower}.blocks.{{i}}", f"{tower}_model.encoder.layers.{{i}}"
    attention = [f"{theirs}.self_attn.{part}_proj" for part in ("q", "k", "v")]
    return [
        *linear(f"{ours}.norm1", f"{theirs}.layer_norm1"),
        *linear(f"{ours}.norm2", f"{theirs}.layer_norm2"),
        *(
            Entry((f"{ours}.attn.qkv.{kind}",), tuple(f"{part}.{kind}" for part in attention))
            for kind in ("weight", "bias")
        ),
        *linear(f"{ours}.attn.proj", f"{theirs}.self_attn.out_proj"),
        *linear(f"{ours}.mlp.fc1", f"{theirs}.mlp.fc1"),
        *linear(f"{ours}.mlp.fc2", f"{theirs}.mlp.fc2"),
    ]


def table(*, native: bool) -> list[Entry]:
    """Returns the names of `Siglip2Model` (native) or `SiglipModel`."""
    images, text, head = "vision_model.embeddings", "text_model.embeddings", "vision_model.head"
    kernel = Entry(("vision.embed.weight",), (f"{images}.patch_embedding.weight",))
    if not native:
        kernel = Entry(kernel.ours, kernel.theirs, CONVOLUTION)
    return [
        Entry(("logit_scale",), ("logit_scale",)),
        Entry(("logit_bias",), ("logit_bias",)),
        kernel,
        Entry(("vision.embed.bias",), (f"{images}.patch_embedding.bias",)),
        Entry(("vision.pos_embed",), (f"{images}.position_embedding.weight",), CELLS),
        *_blocks("vision"),
        *linear("vision.norm", "vision_model.post_layernorm"),
        Entry(("vision.pool.latent",), (f"{head}.probe",)),
        *(
            Entry(
                (f"vision.pool.q.{kind}", f"vision.pool.kv.{kind}"), (f"{head}.attention.in_proj_{kind}",), parts=(1, 2)
            )
            for kind in ("weight", "bias")
        ),
        *linear("vision.pool.proj", f"{head}.attention.out_proj"),
        *linear("vision.pool.norm", f"{head}.layernorm"),
        *linear("vision.pool.mlp.fc1", f"{head}.mlp.fc1"),
        *linear("vision.pool.mlp.fc2", f"{head}.mlp.fc2"),
        Entry(("text.token_embed.weight",), (f"{text}.token_embedding.weight",)),
        Entry(("text.pos_embed",), (f"{text}.position_embedding.weight",)),
        *_blocks("text"),
        *linear("text.norm", "text_model.final_layer_norm"),
        *linear("text.head", "text_model.head"),
    ]


def read(folder: Path) -> Weights:
    """Returns the weights in a folder that `save_pretrained` wrote, of either class, by any version.

    Raises:
        ValueError: if it is of another architecture, incomplete or damaged.
    """
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(f"{folder} holds a model of type '{kind}', expected {' or '.join(MODEL_TYPES)}")
    native = MODEL_TYPES[str(kind)]
    towers = {name: default | (config.get(f"{name}_config") or {}) for name, default in DEFAULTS.items()}
    gelus = {name: _gelu(folder, name, tower) for name, tower in towers.items()}
    notes = [exact_gelu(name) for name, gelu in gelus.items() if gelu == "exact"]
    theirs = {n: t for n, t in _tensors(folder).items() if not n.endswith(IGNORED)}
    if f"{HEAD}.weight" not in theirs and "text_model.final_layer_norm.bias" in theirs:
        theirs |= {f"{HEAD}.{kind}": t for kind, t in identity_head(theirs["text_model.final_layer_norm.bias"]).items()}
        notes.append(NO_HEAD)
    depths = {name: depth_of(theirs, f"{name}_model.encoder.layers.{{i}}.") for name in towers}
    vision = towers["vision"]
    like = nearest(vision["hidden_size"], depths["vision"] or None, _side(folder, vision["patch_size"]))
    # not as many as are there: a file may have lost its last ones
    depths = {name: tower["num_hidden_layers"] for name, tower in towers.items()}
    state = read_names(theirs, expanded(table(native=native), depths), place=str(folder), like=like)
    sizes = measure(state, str(folder))
    _check_config(folder, towers, sizes, like, native=native)
    tokenizer, about = read_tokenizer_files(folder, rows=sizes.vocab_size, length=sizes.context_length)
    processed = _read_pixels(folder, sizes, native=native)
    pixels = read_contract(folder).get("pixels") or processed
    heads = {name: int(tower["num_attention_heads"]) for name, tower in towers.items()}
    found = {"gelus": gelus, "pixels": pixels, "tokenizer": tokenizer, "notes": (*notes, *about)}
    return assemble("hf", state, place=str(folder), heads=heads, native=native, **found)


def _tensors(folder: Path) -> dict[str, Any]:
    for name in FILES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            return read_sharded(index)
        if (folder / name).is_file():
            whole = folder / name
            return read_safetensors(whole) if whole.suffix == ".safetensors" else state_dict_in(read_pickle(whole))
    raise ValueError(f"{folder} has a config.json but no weights: expected {' or '.join(FILES)}, or their index")


def _gelu(folder: Path, name: str, tower: Mapping[str, Any]) -> Gelu:
    """A tower's activation; raises ValueError where the tower computes something that ours cannot."""
    act, eps = tower["hidden_act"], tower["layer_norm_eps"]
    if not tower.get("vision_use_head", True):
        raise ValueError(f"{folder}: the {name} tower has no MAP head (vision_use_head is false), expected one")
    if not abs(eps - EPSILON) <= 1e-9:
        raise ValueError(f"{folder}: layer_norm_eps of the {name} tower is {eps}, every SigLIP has {EPSILON}")
    if act not in ACTS:
        raise ValueError(f"{folder}: the {name} tower's hidden_act is '{act}', expected {' or '.join(ACTS)}")
    return ACTS[act]


def _side(folder: Path, value: Any) -> Any:
    """A side in pixels, which may be written as two."""
    rows, columns = value if isinstance(value, list) else (value, value)
    if rows != columns:
        raise ValueError(f"{folder}: config.json says {rows} x {columns} px, expected squares")
    return rows


def _check_config(
    folder: Path, towers: Mapping[str, Mapping[str, Any]], sizes: Sizes, like: str, *, native: bool
) -> None:
    shapes, said = {"vision": sizes.vision, "text": sizes.text or sizes.vision}, towers["text"]
    for name, tower in towers.items():
        found = {"hidden_size": shapes[name].width, "intermediate_size": shapes[name].mlp_dim}
        compare(str(folder), "config.json", name, said=tower, found=found, like=like)
    said = {**said, "projection_size": said["projection_size"] or said["hidden_size"]}
    words: dict[str, Any] = {"vocab_size": sizes.vocab_size, "max_position_embeddings": sizes.context_length}
    words |= {"projection_size": sizes.vision.width}
    compare(str(folder), "config.json", "text", said=said, found=words, like=like)
    said = {**towers["vision"], "patch_size": _side(folder, towers["vision"]["patch_size"])}
    images = {"patch_size": sizes.patch_size, "num_channels": 3}
    images |= {"num_patches": sizes.grid[0] * sizes.grid[1]} if native else {}
    compare(str(folder), "config.json", "vision", said=said, found=images, like=like)
    if not native and _side(folder, said["image_size"]) // sizes.patch_size != sizes.grid[0]:
        raise ValueError(
            f"{folder}: config.json says image_size {said['image_size']} of the vision tower, the tensors have a "
            f"position table of {sizes.grid[0]} x {sizes.grid[1]} patches of {sizes.patch_size} px. {like}"
        )


def _read_pixels(folder: Path, sizes: Sizes, *, native: bool) -> dict[str, Any] | None:
    """The pixel contract out of the processor files of either generation."""
    nested, older = folder / "processor_config.json", folder / "preprocessor_config.json"
    found = read_json(nested).get("image_processor") if nested.is_file() else None
    if found is None:
        if not older.is_file():
            return None
        found = read_json(older)
    side, patch_size = sizes.grid[0], sizes.patch_size
    check_pixels(str(folder), {key: value for key, value in found.items() if value is not None}, PROCESSED)
    if native:
        return native_pixels(patch_size, side)
    size = found.get("size") or side * patch_size
    # an int in older files
    rows, columns = (size.get("height"), size.get("width")) if isinstance(size, Mapping) else (size, size)
    filter = RESAMPLE.get(found.get("resample", 3))
    if filter is None or not rows or rows != columns or not found.get("do_resize", True):
        return None  # a resize that we do not have
    return square_pixels(rows, patch_size, filter=filter)


def write(weights: Weights, folder: Path) -> list[str]:
    """Writes a folder that `AutoModel` and `AutoProcessor` load; returns notes.

    Raises:
        ValueError: if there is no text tower, or the position table is no square.
    """
    weights.needs_text("transformers")
    entries = expanded(table(native=weights.native), weights.depths)
    theirs = write_names(weights.state, entries, weights.heads)
    write_safetensors(folder / "model.safetensors", theirs)
    write_json(folder / "config.json", config_of(weights))
    name = "Siglip2" if weights.native else "Siglip"
    image, notes = _image_processor(weights)
    processor = f"{name}Processor"
    # both generations: readers before transformers 5 want the second file
    write_json(folder / "processor_config.json", {"image_processor": image, "processor_class": processor})
    write_json(folder / "preprocessor_config.json", {**image, "processor_class": processor})
    if weights.tokenizer is None:
        return [*notes, "there is no tokenizer: AutoProcessor will not load"]
    contract = weights.tokenizer.contract
    if weights.native and (contract.canonicalize or contract.lowercase_ascii_only or not contract.lowercase):
        notes.append("transformers gives siglip2 its own tokenizer class, which lowers all capitals and cleans no more")
    odd = weights.native and (weights.patch_size, weights.grid[0] ** 2) != PROCESSOR_SAYS
    budget = {"patch_size": weights.patch_size, "max_num_patches": weights.grid[0] ** 2} if odd else None
    notes += write_tokenizer_files(folder, weights.tokenizer, processor, budget)
    if weights.native and (folder / "tokenizer.json").is_file() and not is_plain_bpe(folder):
        notes.append(OTHER_CLASS)
    return notes


def config_of(weights: Weights) -> dict[str, Any]:
    """Returns the content of `config.json`."""
    kind, name = ("siglip2", "Siglip2Model") if weights.native else ("siglip", "SiglipModel")
    text = weights.text
    assert text is not None

    def tower(shape: Any, which: str) -> dict[str, Any]:
        return {
            "model_type": f"{kind}_{which}_model",
            "hidden_size": shape.width,
            "intermediate_size": shape.mlp_dim,
            "num_hidden_layers": shape.depth,
            "num_attention_heads": shape.num_heads,
            "hidden_act": HIDDEN_ACT[shape.gelu],
            "layer_norm_eps": EPSILON,
            "attention_dropout": 0.0,
        }

    contract = weights.tokenizer.contract if weights.tokenizer else None
    # written even where nothing is known: left out, the classes have CLIP's
    ids = {f"{name}_token_id": getattr(contract, f"{name}_id", None) for name in ("pad", "eos", "bos")}
    images: dict[str, Any] = {"patch_size": weights.patch_size, "num_channels": 3, "vision_use_head": True}
    images |= {"num_patches": weights.grid[0] ** 2} if weights.native else {"image_size": weights.image_size}
    words = {"vocab_size": weights.vocab_size, "max_position_embeddings": weights.context_length}
    return {
        "architectures": [name],
        "model_type": kind,
        "initializer_factor": 1.0,
        "dtype": str(weights.state["logit_scale"].dtype).removeprefix("torch."),
        "vision_config": tower(weights.vision, "vision") | images,
        "text_config": tower(text, "text") | words | {"projection_size": weights.embed_dim} | ids,
    }


def _image_processor(weights: Weights) -> tuple[dict[str, Any], list[str]]:
    pixels, notes = dict(weights.pixels or {}), []
    if not pixels:
        notes.append("the weights do not say how pictures were resized: bilinear and antialiased was written")
    if not pixels.get("antialias", True):
        notes.append("trained on a resize that is not antialiased, which transformers does not have")
    if pixels.get("max_scale") is not None:
        notes.append(f"trained without enlarging pictures beyond {pixels['max_scale']}: transformers fills the budget")
    common = {
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    if weights.native:
        budget = {"resample": 2, "patch_size": weights.patch_size, "max_num_patches": weights.grid[0] ** 2}
        return {"image_processor_type": "Siglip2ImageProcessor", **common, **budget}, notes
    filters = {name: number for number, name in RESAMPLE.items()}
    side = weights.image_size
    how = {"resample": filters[pixels.get("filter", "bilinear")], "size": {"height": side, "width": side}}
    return {"image_processor_type": "SiglipImageProcessor", **common, **how}, notes
