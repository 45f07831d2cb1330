"""`AutoProcessor` and open_clip's own loaders make of an export's files the ids and pixels that were trained on."""

import io
import json
import random
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from open_clip.tokenizer import get_clean_fn
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, SiglipTokenizer
from transformers.image_transforms import convert_to_rgb

from siglip2.core.data.image_io import decode_image
from siglip2.core.data.text import Tokenizer
from siglip2.core.data.train_tokenizer import train_tokenizer
from siglip2.core.functional import unpatchify
from siglip2.core.interop.contracts import read_tokenizer_files
from siglip2.core.interop.detect import read_weights
from siglip2.core.interop.export import write
from siglip2.core.interop.parity import SAMPLES
from siglip2.core.interop.weights import assemble, native_pixels, square_pixels
from siglip2.core.layout import Layout
from siglip2.core.model.sizes import ShapeOptions
from siglip2.core.model.two_towers import build_two_towers
from siglip2.core.model.vision import to_unit_range
from siglip2.core.views import IMAGE
from siglip2.plugins.fixed import PROTOCOLS, Fixed
from siglip2.plugins.naflex import NaFlex

pytestmark = pytest.mark.parity
GREY_LEVEL = 2 / 255
MODES = ("RGB", "L", "RGBA", "P", "LA", "1", "CMYK")
PHRASES = [
    "A Red Disc, number 3!",
    "",
    " ",
    "  two  spaces  ",
    "tab\tand\nline",
    "UPPER lower MiXeD",
    "don't; stop: (really?) [yes] {no} <tag> & co.",
    "snake_case and kebab-case",
    "<eos> hello <pad> <bos> <unk>",
    "</s>",
    "Größe, Maßstab, ÄÖÜ",
    "ÉCOLE À LA CARTE",
    "日本語のキャプション",
    "中文说明，带标点。",
    "한국어 설명",
    "ภาษาไทย",
    "हिन्दी में वर्णन",
    "עברית מימין לשמאל",
    "العربية من اليمين",
    "РУССКИЙ текст",
    "ΕΛΛΗΝΙΚΑ",
    "İstanbul ıssız",
    "🙂 🐈‍⬛ 👩🏽‍🚀 🇩🇪",
    "e\u0301 combining, \u00e9 composed",
    "ﬁ ligature, ① circled, ｆｕｌｌ",
    "zero\u200bwidth\u00adsoft\u00a0hard",
    "1234567890 3.14159 1e-5 50%",
    "http://example.com/a?b=c#d",
    "\u2581 the piece itself",
    "emoji🙂in🙂words",
]


def texts():
    """Two hundred odd ones: the phrases, and random runs of them, many too long."""
    draw = random.Random(0)
    runs = ["".join(draw.choices(PHRASES, k=draw.choice([2, 3, 20]))) for _ in range(200 - len(PHRASES))]
    return PHRASES + runs


def pictures():
    """Two hundred odd ones, [(mode, size, bytes)]: every mode that PIL has files for, opaque, every aspect ratio."""
    draw = np.random.default_rng(0)
    for number in range(200):
        mode, (height, width) = MODES[number % len(MODES)], draw.integers(1, 140, size=2).tolist()
        y, x = np.mgrid[:height, :width]
        waves = [np.sin(x * draw.uniform(0.02, 0.3) + y * draw.uniform(0.02, 0.3)) for _ in range(3)]
        colours = 127 + 80 * np.stack(waves, axis=-1) + 40 * (x > y)[..., None] + draw.normal(0, 8, (height, width, 3))
        image = Image.fromarray(colours.clip(0, 255).astype(np.uint8)).convert(mode)
        stored = io.BytesIO()
        image.save(stored, "TIFF" if mode == "CMYK" else "PNG")
        yield mode, (height, width), stored.getvalue()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A vocabulary that keeps capitals, so that whoever does not lower them is found out."""
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.json"
    return Tokenizer.load(train_tokenizer(PHRASES * 3, vocab_size=600, out=path, lowercase=False), length=12)


@pytest.fixture
def export(tokenizer, tmp_path):
    """Writes weights with a text contract and a pixel contract, and returns the folder."""

    def make(format, contract, pixels, patch_size=16, check=False):
        text = Tokenizer(tokenizer.file, replace(tokenizer.contract, **contract))
        model = build_two_towers(
            {16: "tiny/16", 14: "So400m/14"}[patch_size],
            patch_size=patch_size,
            grid=(4, 4),
            vocab_size=text.vocab_size,
            context_length=12,
            vision=ShapeOptions(32, 1, 32, 2),
            text=ShapeOptions(32, 1, 32, 2),
        )
        state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        found = {"pixels": pixels, "native": "table" in pixels, "tokenizer": text}
        weights = assemble("siglip2", state, place="test", heads={"vision": 2, "text": 2}, **found)
        return write(weights, format, tmp_path / format, check=check).folder, text

    return make


SQUARES, NATIVE = square_pixels(64, 16, filter="bilinear"), native_pixels(16, 4)
TEXTS = {
    "lower case": {"lowercase": True},
    "canonical": {"lowercase": True, "canonicalize": True},
    "as it is": {"lowercase": False},
    "ASCII": {"lowercase": True, "lowercase_ascii_only": True},
    "with BOS": {"lowercase": True, "bos": True},
}


@pytest.mark.parametrize("contract", list(TEXTS))
def test_processor_of_fixed_models_makes_the_trained_ids(export, contract):
    folder, tokenizer = export("hf", TEXTS[contract], SQUARES)
    found = AutoProcessor.from_pretrained(folder)(text=texts(), return_tensors="pt")
    assert set(found) == {"input_ids"}
    assert torch.equal(found["input_ids"].int(), tokenizer.encode(texts()))


@pytest.mark.parametrize("contract", ["lower case", "with BOS"])
def test_processor_of_naflex_models_makes_the_trained_ids(export, contract):
    folder, tokenizer = export("hf", TEXTS[contract], NATIVE)
    found = AutoProcessor.from_pretrained(folder)(text=texts(), return_tensors="pt")
    assert set(found) == {"input_ids"}
    assert torch.equal(found["input_ids"].int(), tokenizer.encode(texts()))


@pytest.mark.parametrize("contract", ["lower case", "canonical", "as it is", "ASCII"])
def test_card_says_where_the_naflex_processor_reads_other_texts_than_were_trained(export, contract):
    """transformers 5 gives every siglip2 its `Siglip2Tokenizer`, which lowers all capitals, whatever the files say."""
    folder, tokenizer = export("hf", TEXTS[contract], NATIVE, check=True)
    lowered = replace(tokenizer.contract, lowercase=True, lowercase_ascii_only=False, canonicalize=False)
    apart = tokenizer.encode(SAMPLES) != Tokenizer(tokenizer.file, lowered).encode(SAMPLES)
    other = int(apart.any(dim=-1).sum())
    assert (other > 0) == (contract != "lower case")
    card = (folder / "README.md").read_text()
    assert ("which lowers all capitals and cleans no more" in card) == (other > 0)
    assert f"other ids for {other} of {len(SAMPLES)} odd texts" in card


def test_only_the_final_sigma_is_lowered_otherwise(export):
    """`str.lower` knows the end of a Greek word, a tokenizer file does not; transformers' own files have it so too."""
    folder, tokenizer = export("hf", TEXTS["lower case"], SQUARES)
    found = AutoTokenizer.from_pretrained(folder)("ΟΔΟΣ", padding="max_length", truncation=True)["input_ids"]
    assert tokenizer("ΟΔΟΣ").tolist() == tokenizer("οδος").tolist() != found
    assert found == Tokenizer(tokenizer.file, replace(tokenizer.contract, lowercase=False))("οδοσ").tolist()


@pytest.mark.parametrize("contract", ["lower case", "canonical"])
def test_tokenizer_of_open_clip_makes_the_trained_ids(export, contract):
    """open_clip also repairs mojibake and HTML and joins runs of spaces, before anything else."""
    folder, tokenizer = export("open_clip", TEXTS[contract], SQUARES)
    clean, repaired = get_clean_fn("whitespace"), [get_clean_fn("whitespace")(text) for text in texts()]
    found = open_clip.get_tokenizer(f"local-dir:{folder}")(texts())
    assert torch.equal(found.int(), tokenizer.encode(repaired))
    assert sum(clean(text) == text for text in PHRASES) > 20  # most are the same without that


@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
def test_processor_of_fixed_models_makes_the_trained_pixels(export, filter):
    folder, _ = export("hf", {}, square_pixels(67, 16, filter=filter))
    processor = AutoProcessor.from_pretrained(folder)
    patchifier = Fixed(image_size=67, patch_size=16, filter=filter).patchifier()
    for mode, size, data in pictures():
        expected = processor(images=Image.open(io.BytesIO(data)), return_tensors="pt")["pixel_values"]
        found = patchifier(decode_image(data), IMAGE, Layout(16, 1))
        pixels = to_unit_range(unpatchify(found.patches, (4, 4)))
        assert (pixels - expected[..., :64, :64]).abs().max() < 0.01 * GREY_LEVEL, (mode, size)


@pytest.mark.parametrize("patch_size", [16, 14])
def test_processor_of_naflex_models_makes_the_trained_pixels(export, patch_size):
    """Whatever Siglip2Processor's class says of patch size and budget."""
    folder, _ = export("hf", {}, native_pixels(patch_size, 4), patch_size)
    processor = AutoProcessor.from_pretrained(folder)
    patchifier = NaFlex(patch_size=patch_size, table=4, eval_seq_len=16).patchifier()
    for mode, size, data in pictures():
        expected = processor(images=Image.open(io.BytesIO(data)), return_tensors="pt")
        found = patchifier(decode_image(data), IMAGE, patchifier.eval_layout(1))
        assert found.sizes[:, 0].tolist() == expected["spatial_shapes"].tolist(), (mode, size)
        assert torch.equal(found.valid.int(), expected["pixel_attention_mask"]), (mode, size)
        apart = (to_unit_range(found.patches) - expected["pixel_values"])[found.valid]
        assert apart.abs().max() < 0.01 * GREY_LEVEL, (mode, size)


def test_transparency_is_dropped_here_and_white_in_transformers():
    """open_clip drops it as well."""
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    stored = io.BytesIO()
    clear.save(stored, "PNG")
    assert decode_image(stored.getvalue())[:, 0, 0].tolist() == [10, 20, 30]
    assert convert_to_rgb(clear, return_numpy=True)[0, 0].tolist() == [255, 255, 255]


def test_older_readers_find_the_same_image_processor(export):
    folder, _ = export("hf", {}, NATIVE)
    now = AutoImageProcessor.from_pretrained(folder)
    (folder / "processor_config.json").unlink()
    then = AutoImageProcessor.from_pretrained(folder)
    assert type(now) is type(then)
    picture = Image.new("RGB", (50, 30), (1, 200, 30))
    for key, value in now(picture, return_tensors="pt").items():
        assert torch.equal(value, then(picture, return_tensors="pt")[key]), key


@pytest.mark.parametrize("protocol", ["transformers", "open_clip"])
def test_preprocessing_of_open_clip_makes_the_trained_pixels(export, protocol):
    filter = PROTOCOLS[protocol].filter
    folder, _ = export("open_clip", {}, square_pixels(64, 16, filter=filter))
    _, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    patchifier = Fixed(image_size=64, patch_size=16, protocol=protocol).patchifier()
    for mode, size, data in pictures():
        if mode in ("P", "1"):
            continue  # which open_clip resizes before it makes RGB of them, so without any filter
        expected = preprocess(Image.open(io.BytesIO(data)))
        found = to_unit_range(unpatchify(patchifier(decode_image(data), IMAGE, Layout(16, 1)).patches, (4, 4)))[0]
        apart = (found - expected).abs() / GREY_LEVEL
        assert apart.max() < 3.01, (mode, size)  # PIL and torch round otherwise, see test_pixels.py
        assert apart.mean() < 0.35, (mode, size)


@pytest.mark.parametrize("pixels", [SQUARES, NATIVE, square_pixels(64, 16, filter="bicubic")])
@pytest.mark.parametrize("format", ["hf", "open_clip"])
def test_contracts_are_read_from_the_librarys_own_files_too(export, format, pixels):
    folder, tokenizer = export(format, TEXTS["lower case"], pixels)
    (folder / "siglip2_contract.json").unlink()
    weights = read_weights(str(folder))
    assert weights.pixels == pixels
    assert weights.tokenizer.contract == tokenizer.contract
    assert torch.equal(weights.tokenizer.encode(texts()), tokenizer.encode(texts()))


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    """A small SentencePiece model with the special pieces of SigLIP 1's: pad 0, eos 1, unk 2."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    model = io.BytesIO()
    trainer.train(
        sentence_iterator=iter([text.lower() for text in PHRASES if text.strip()] * 20),
        model_writer=model,
        vocab_size=260,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


def test_tokenizer_of_siglip_1_is_read_with_its_own_contract(sentencepiece_model, tmp_path):
    """Punctuation stripped, padded with </s>: transformers' SiglipTokenizer, which drops underscores as well."""
    (tmp_path / "spiece.model").write_bytes(sentencepiece_model)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "SiglipTokenizer"}))
    theirs = SiglipTokenizer(str(tmp_path / "spiece.model"))
    found, notes = read_tokenizer_files(tmp_path, rows=300, length=16)
    assert notes == []
    assert (found.contract.canonicalize, found.contract.pad_id, found.contract.eos_id) == (True, 1, 1)
    assert found.vocab_size == 300
    plain = [text for text in texts() if not any(name in text for name in ("</s>", "<unk>", "<pad>", "_"))]
    expected = theirs(plain, padding="max_length", truncation=True, max_length=16, return_tensors="pt")["input_ids"]
    assert len(plain) > 80
    assert torch.equal(found.encode(plain), expected.int())
