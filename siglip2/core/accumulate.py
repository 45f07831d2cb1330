"""One large batch in several parts: the gradients of the whole, with the activations of a part.

Losses over pairs need every embedding at once, but not every activation (Gao et al., GradCache,
https://arxiv.org/abs/2101.06983). So embeddings of all parts are made first, without gradient; the losses over pairs
give the gradient of each embedding; then each part is run again with gradient, and what its embeddings were found to
weigh is added to the losses that are means over rows.
"""

# B rows of the batch, b rows of a part, C copies of a view, D width, E embedding dimension

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from siglip2.core.batch import Batch
from siglip2.core.layout import Layout
from siglip2.core.model.two_towers import ImageFeatures, TextFeatures
from siglip2.core.plugin import Objective, Plugin
from siglip2.core.step import STUDENT, Step

Losses = Callable[[Step], dict[str, Tensor]]


def over_pairs(plugin: nn.Module) -> bool:
    """Says whether a plugin is an objective whose loss is no mean over rows."""
    return isinstance(plugin, Objective) and not plugin.accumulates


def check_accumulation(
    plugins: Mapping[str, Plugin], layouts: Sequence[Layout], *, parts: int, batches: int, world_size: int
) -> None:
    """Raises ValueError if accumulating would change a loss, or batches do not divide.

    Args:
        plugins: of the recipe, by name.
        layouts: that batches have.
        parts: of each batch, `model.accumulate`.
        batches: Lightning's `accumulate_grad_batches`.
        world_size: processes that share each batch.
    """
    inexact = [name for name, plugin in plugins.items() if over_pairs(plugin)]
    if batches > 1 and inexact:
        raise ValueError(
            f"trainer.accumulate_grad_batches is {batches}, but {', '.join(inexact)} would see only the pairs "
            f"inside each micro-batch, which is another loss: set it to 1, give the patchifier the whole "
            f"batch_size, and set model.accumulate to {batches}, which gives the large batch's gradients"
        )
    if parts == 1:
        return
    if batches > 1:
        raise ValueError("model.accumulate and trainer.accumulate_grad_batches are both above 1: set one of them to 1")
    shares = parts * world_size
    kept = {(n, x.batch_size): p.kept(x.batch_size) for x in layouts for n, p in plugins.items()}
    for (name, size), rows in kept.items():
        if rows is not None and rows % shares:
            raise ValueError(
                f"'{name}' keeps {rows} rows of a global batch of {size}, which do not divide into {parts} parts on "
                f"each of {world_size} processes: let it keep a multiple of {shares}, or set model.accumulate to less"
            )
    for layout in layouts:
        if layout.packed:
            raise ValueError("model.accumulate cannot cut rows that images share: use a patchifier that does not pack")
        if layout.batch_size % shares:
            raise ValueError(
                f"the global batch of {layout.batch_size} does not divide into {parts} parts on each of "
                f"{world_size} processes: set the patchifier's batch_size to a multiple of {shares}"
            )


def parts_of(batch: Batch, count: int, device: torch.device) -> list[Batch]:
    """Returns a batch on `device` cut into `count` parts of consecutive rows.

    Raises:
        ValueError: if they cannot be of one size; those of the loader can, so a curator has kept too many or too few.
    """
    if batch.size % count:
        raise ValueError(
            f"the curator keeps {batch.size} rows, which do not divide into {count} parts: let it keep a multiple of "
            f"{count}, or set model.accumulate to a divisor of {batch.size}"
        )
    size = batch.size // count
    return [batch.select(torch.arange(i * size, (i + 1) * size, device=device)) for i in range(count)]


class _NoTokens:
    """Stands where tokens were: those of a whole batch are what there is no memory for."""

    def __getattr__(self, name: str) -> Any:
        raise ValueError(
            "an objective reads tokens of the whole batch, which model.accumulate does not keep: set `accumulates = "
            "True` if its loss is a mean over rows, else read `pooled` or `embedding`, or set model.accumulate to 1"
        )


class WholeStep(Step):
    """A step over a large batch whose features were made part by part, without gradient to the towers.

    Args:
        whole: the step over the batch.
        parts: the steps over its parts, with nothing computed that is kept.
    """

    def __init__(self, whole: Step, parts: list[Step]):
        super().__init__(whole.model, whole.batch, progress=whole.progress, encoders=whole.encoders, heads=whole.heads)
        self.scalars, self.parts = whole.scalars, parts
        self.leaves: dict[tuple[str, str, str], Tensor] = {}

    def _encode_image(self, view: str, by: str) -> ImageFeatures:
        with torch.no_grad():
            made = [part._encode_image(view, by) for part in self.parts]
        pooled, embedding = (self._whole(view, by, field, made) for field in ("pooled", "embedding"))
        return ImageFeatures(cast(Tensor, _NoTokens()), pooled, embedding, None)

    def encode_text(self, view: str = "caption") -> TextFeatures:
        """Returns the pooled vectors and embeddings of a text view of the whole batch."""
        key = (view, STUDENT)
        if key not in self._features:
            with torch.no_grad():
                made = [part.model.encode_text(part.view(view)) for part in self.parts]
            pooled, embedding = (self._whole(view, "text", field, made) for field in ("pooled", "embedding"))
            self._features[key] = TextFeatures(cast(Tensor, _NoTokens()), pooled, embedding)
        features: TextFeatures = self._features[key]
        return features

    def _whole(self, view: str, by: str, field: str, made: list[Any]) -> Tensor:
        """One field of all parts, a leaf to which the losses over pairs give a gradient."""
        rows = [
            _by_copy(getattr(features, field), part.batch.size) for features, part in zip(made, self.parts, strict=True)
        ]
        joined = torch.cat(rows, dim=1).flatten(0, 1)  # [C, b, ...] each -> [C * B, ...]
        if by not in (STUDENT, "text"):
            return joined
        return self.leaves.setdefault((view, by, field), joined.requires_grad_())


def _by_copy(rows: Tensor, size: int) -> Tensor:
    return rows.unflatten(0, (-1, size))  # [C * b, ...] -> [C, b, ...]


@dataclass(frozen=True)
class Owed:
    """What the losses over pairs ask of each part.

    Args:
        terms: their values by name.
        features: (view, encoder, field) -> gradient of every row, as in `WholeStep.leaves`.
        parameters: name -> gradient of what they use directly, such as the temperature.
    """

    terms: dict[str, Tensor]
    features: dict[tuple[str, str, str], Tensor]
    parameters: dict[str, Tensor]


def owed_by_pairs(step: WholeStep, losses: Losses, module: nn.Module) -> Owed:
    """Returns values and gradients of the losses over pairs.

    Args:
        step: over the whole batch.
        losses: the weighted losses over pairs by name; may be none.
        module: has the parameters that they may use beside the features.
    """
    terms = losses(step)
    torch.clear_autocast_cache()  # casts that were made without gradient would be taken for those with it
    if not terms:
        return Owed({}, {}, {})
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    wanted = [*step.leaves.values(), *parameters.values()]
    grads = torch.autograd.grad(torch.stack(list(terms.values())).sum(), wanted, allow_unused=True)
    count = len(step.leaves)
    return Owed(
        {name: term.detach() for name, term in terms.items()},
        {key: grad for key, grad in zip(step.leaves, grads[:count], strict=True) if grad is not None},
        {name: grad for name, grad in zip(parameters, grads[count:], strict=True) if grad is not None},
    )


def part_loss(
    step: Step, number: int, count: int, terms: Mapping[str, Tensor], owed: Owed, module: nn.Module
) -> Tensor:
    """Returns the scalar whose gradient is this part's share of the whole batch's.

    Args:
        step: over the part.
        number: of the part.
        count: parts of the batch, equally large.
        terms: its weighted losses that are means over rows.
        owed: what the losses over pairs ask.
        module: has the parameters that they use beside the features, which the last part answers for.
    """
    shares = [term / count for term in terms.values()]
    for (view, by, field), grad in owed.features.items():
        features = step.encode_text(view) if by == "text" else step.encode_image(view, by)
        rows = slice(number * step.batch.size, (number + 1) * step.batch.size)
        own = _by_copy(grad, step.batch.size * count)[:, rows].flatten(0, 1)
        shares.append((getattr(features, field) * own).sum())
    if number == count - 1:
        named = dict(module.named_parameters())
        shares += [(named[name] * grad).sum() for name, grad in owed.parameters.items()]
    return torch.stack(shares).sum()


def mean_terms(all_terms: list[dict[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yields each loss term's name and mean over parts, without gradient."""
    for name in all_terms[0]:
        yield name, torch.stack([terms[name].detach() for terms in all_terms]).mean()
