"""What views and patchifiers promise, so that loader workers, ranks and a resumed run agree."""

import json
import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from siglip2.core.views import IMAGE, Context, View
from siglip2.testing.case import ROWS, Case, require
from siglip2.testing.tiny import TinySource, fake_batch, same, tiny_tokenizer


def check_views_are_descriptions(case: Case) -> None:
    """Its views are frozen, picklable, equal by description, and pure functions of sample and context."""
    for view, again in zip(declared(case), declared(case), strict=True):
        shown = f"view '{view.name}' of '{case.name}'"
        require(view == again, f"{shown} is not equal to itself made again: make it a frozen dataclass")
        require(is_frozen(view), f"{shown} can be changed: make it a frozen dataclass (@dataclass(frozen=True))")
        try:
            copy = pickle.loads(pickle.dumps(view))
        except Exception as error:
            raise AssertionError(f"{shown} cannot go to a loader worker ({error}): give it plain fields") from error
        require(copy == view, f"{shown} is another one after pickling: make it a frozen dataclass")
        with other_global_seeds(0):
            first = fake_batch([view], ROWS).views[view.name]
        with other_global_seeds(1):
            second = fake_batch([copy], ROWS).views[view.name]
        require(same(first, second), f"{shown} gives different values for the same sample: draw only from context.rng")
        rows = first.shape[0] if isinstance(first, Tensor) else first.num_images
        require(rows == ROWS * view.copies, f"{shown} says copies={view.copies}, but makes {rows // ROWS} of a sample")


def declared(case: Case) -> list[View]:
    """Returns the views of a fresh instance of the plugin."""
    views: list[View] = case.plugin().views()  # type: ignore[operator]
    return views


def is_frozen(description: Any) -> bool:
    """Says whether assigning to an attribute fails."""
    name = next(iter(getattr(description, "__dataclass_fields__", {"name": None})))
    try:
        setattr(description, name, getattr(description, name))
    except AttributeError:
        return True
    return False


@contextmanager
def other_global_seeds(seed: int) -> Iterator[None]:
    """Gives torch, numpy and random another state, and puts them back."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


def check_patchifier_is_pure(case: Case) -> None:
    """Its patchifier is frozen and picklable, its layout a pure function, and its patches have the layout's length."""
    patchifier, again = case.plugin().patchifier(), case.plugin().patchifier()  # type: ignore[operator]
    shown = f"the patchifier of '{case.name}'"
    require(patchifier == again, f"{shown} is not equal to itself made again: make it a frozen dataclass")
    require(is_frozen(patchifier), f"{shown} can be changed: make it a frozen dataclass")
    copy = pickle.loads(pickle.dumps(patchifier))
    numbers = list(range(24))
    layouts = {i: patchifier.layout(i) for i in numbers}
    backwards = {i: copy.layout(i) for i in reversed(numbers)}
    require(layouts == backwards, f"{shown} has a layout that depends on more than the index")
    require(bool(json.dumps(patchifier.contract())), f"{shown} has an empty pixel contract: exports would guess")
    sample, view = TinySource().read(3), IMAGE
    trained = {replace(layout, batch_size=ROWS) for layout in layouts.values()}
    for layout in {*trained, patchifier.eval_layout(ROWS)}:
        contexts = [Context((0,), patchifier, layout, tiny_tokenizer()) for _ in range(2)]
        with other_global_seeds(0):
            one = view(sample, contexts[0])
        with other_global_seeds(1):
            other = copy(sample.image(), view, layout, contexts[1].rng)
        require(same(one, other), f"{shown} makes different patches of the same picture: draw only from its `rng`")
        values = patchifier.patch_size**2 * 3
        length = one.patches.shape[1] if layout.packed else layout.seq_len
        require(
            tuple(one.patches.shape) == (1, length, values) and one.patches.dtype == torch.uint8,
            f"{shown} makes {list(one.patches.shape)} {one.patches.dtype}, not [1, {length}, {values}] uint8",
        )
        require(length <= layout.seq_len, f"{shown} makes {length} patches of an image, a row has {layout.seq_len}")
