"""How many bits each token of a caption has under a language model: one from a folder, or n-grams of the data."""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Token = str | int

# Scripts without spaces go letter by letter: kana, Han, Thai, Lao, Khmer, Myanmar.
WORD = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|"
    r"[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+|[^\w\s]"
)
START, UNKNOWN = "<start>", "<unknown>"


class Scorer(Protocol):
    """A language model that says how surprising each token is.

    Attributes:
        name: what it is called in the output.
    """

    name: str

    def bits(self, texts: Sequence[str]) -> list[Floats]:
        """Returns -log2 p of every scored token, one float64 array a text."""
        ...


def words(text: str) -> list[str]:
    """Words and punctuation marks of a text, lowercased; of scripts without spaces, letters."""
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


class NgramScorer:
    """An interpolated n-gram model with Witten-Bell smoothing: what can be had without a download.

    p(w | h) = (c(h w) + T(h) p(w | h')) / (c(h) + T(h)), with c counts, T(h) the number of different tokens seen after
    h, h' the history without its oldest token, and a uniform distribution over the vocabulary and one unknown token at
    the end. Source: Witten and Bell, The zero-frequency problem, IEEE Trans. Information Theory 37(4), 1991.

    Args:
        texts: what it is fitted on; score other ones.
        tokenize: text -> tokens.
        order: tokens that are looked at together, 3 for trigrams.
    """

    def __init__(
        self, texts: Iterable[str], *, tokenize: Callable[[str], Sequence[Token]] = words, order: int = 3
    ) -> None:
        self.order, self.tokenize = order, tokenize
        self.counts: dict[tuple[Token, ...], Counter[Token]] = {}
        self.vocabulary: set[Token] = set()
        num = 0
        for num, text in enumerate(texts, 1):  # noqa: B007
            self._count(tokenize(text))
        self.totals = {history: counts.total() for history, counts in self.counts.items()}
        unit = "word" if tokenize is words else "token"
        self.name = f"{unit} {order}-grams of {num} held-out captions of this data"

    def _count(self, tokens: Sequence[Token]) -> None:
        self.vocabulary.update(tokens)
        padded = [*[START] * (self.order - 1), *tokens]
        for end in range(self.order - 1, len(padded)):
            for size in range(self.order):
                self.counts.setdefault(tuple(padded[end - size : end]), Counter())[padded[end]] += 1

    def probability(self, token: Token, history: Sequence[Token]) -> float:
        """Returns p(token | history); an unknown token is `UNKNOWN`.

        Args:
            token: of the vocabulary, or `UNKNOWN`.
            history: the order - 1 tokens before it.
        """
        p = 1 / (len(self.vocabulary) + 1)
        for size in range(self.order):
            before = tuple(history[len(history) - size :])
            if (counts := self.counts.get(before)) is not None:
                kinds = len(counts)
                p = (counts[token] + kinds * p) / (self.totals[before] + kinds)
        return p

    def bits(self, texts: Sequence[str]) -> list[Floats]:
        """Returns -log2 p of every token, one float64 array a text."""
        return [self._bits(self.tokenize(text)) for text in texts]

    def _bits(self, tokens: Sequence[Token]) -> Floats:
        known = [token if token in self.vocabulary else UNKNOWN for token in tokens]
        padded = [*[START] * (self.order - 1), *known]
        reach = self.order - 1
        found = [-math.log2(self.probability(token, padded[i : i + reach])) for i, token in enumerate(known)]
        return np.array(found, dtype=np.float64)


class CausalScorer:
    """A causal language model of transformers, from a local folder.

    The first token is scored only where the tokenizer has a token that begins a text.

    Args:
        path: folder with model and tokenizer; nothing is downloaded.
        batch_size: texts scored at once.
        max_tokens: longer texts are cut.

    Raises:
        FileNotFoundError: if there is no such folder.
        ImportError: if transformers is not installed.
    """

    def __init__(self, path: str | Path, *, batch_size: int = 32, max_tokens: int = 256) -> None:
        if not Path(path).is_dir():
            raise FileNotFoundError(f"no folder {path}; expected a causal language model as transformers saves it")
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError:
            raise ImportError(
                "a scorer needs transformers; `pip install siglip2[hf]`, or leave --scorer out for n-grams of the data"
            ) from None
        import torch

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
        model: Any = AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
        self.model: Any = model.to(self.device).eval()
        self.batch_size, self.max_tokens = batch_size, max_tokens
        self.name = f"{type(model).__name__} in {path}"

    def bits(self, texts: Sequence[str]) -> list[Floats]:
        """Returns -log2 p of every scored token, one float64 array a text."""
        found: list[Floats] = []
        for begin in range(0, len(texts), self.batch_size):
            found += self._batch([self._ids(text) for text in texts[begin : begin + self.batch_size]])
        return found

    def _ids(self, text: str) -> list[int]:
        begin = self.tokenizer.bos_token_id
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"][: self.max_tokens]
        return [*([] if begin is None else [begin]), *ids]

    def _batch(self, rows: list[list[int]]) -> list[Floats]:
        import torch

        longest = max(2, *map(len, rows)) if rows else 2
        # Causal attention: what stands right of a row cannot be seen from it, so any id will do.
        ids_BT = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self.device)
        with torch.inference_mode():
            logits = self.model(input_ids=ids_BT).logits[:, :-1].float()
        bits_BT = -logits.log_softmax(-1).gather(-1, ids_BT[:, 1:, None])[..., 0] / math.log(2)
        return [bits_BT[i, : max(0, len(row) - 1)].cpu().numpy().astype(np.float64) for i, row in enumerate(rows)]
