"""Every discovered plugin keeps the contract, and a plugin that breaks it is told what to do."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import siglip2.testing.contract
from siglip2 import CAPTION, IMAGE, Objective, Plugin, hookimpl
from siglip2.registry import Entry, catalogue
from siglip2.testing import Case, checks_for, differences_over_ranks, no_host_sync
from siglip2.testing.contract import check_documented, check_registered
from siglip2.testing.data_checks import check_patchifier_is_pure, check_views_are_descriptions
from siglip2.testing.ranks import compares
from siglip2.testing.training_checks import (
    check_asleep_costs_nothing,
    check_curator_keeps_rows,
    check_device_never_waits,
    check_encoders_are_frozen,
    check_loss_reaches_parameters,
    check_state_round_trips,
)

SMALL = {"hidden": 32, "bottleneck": 16, "prototypes": 64, "freeze_prototypes": 0.0}
OPTIONS = {
    "acid": {"score": "hard_learner", "n_chunks": 2, "groups": 2, "watch": ["label"]},
    "fixed": {"image_size": 64, "batch_size": 8},
    "locca": {"length": 40},
    "silc": {"local_crops": 2, "local_size": 16, **SMALL},
    "tips": SMALL,
}
"""Options for plugins whose defaults are too large for a test."""
CASES = [Case(entry.cls, OPTIONS.get(name, {})) for name, entry in catalogue(third_party=False).items()]


@pytest.mark.parametrize(
    ("check", "case"), [pytest.param(c, p, id=f"{p.name}-{c.__name__[6:]}") for p in CASES for c in checks_for(p.cls)]
)
def test_plugin_keeps_the_contract(check, case):
    check(case)


@pytest.fixture(scope="module")
def over_ranks():
    """In what each plugin differs on two processes, which are started once for all."""
    return differences_over_ranks([*CASES, Case(LocalPairs), Case(UnevenCurator)])


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in CASES if compares(c)])
def test_two_processes_have_the_gradients_of_one(case, over_ranks):
    assert over_ranks[case.name] == []


# Plugins that break one promise each.


class Works(Objective):
    """A loss that keeps every promise.

    Args:
        weight: factor.
        start: wakes here.
        stop: sleeps here.
    """

    name = "works"

    def loss(self, step):
        return step.encode_image("image").embedding.pow(4).sum(1).mean()

    @hookimpl
    def views(self):
        return [IMAGE, CAPTION]


class LocalPairs(Works):
    name = "local_pairs"

    def loss(self, step):  # the pairs of this rank only
        return (step.encode_image("image").embedding @ step.encode_text("caption").embedding.T).pow(2).mean()


class UnevenCurator(Plugin):
    name = "uneven"

    @hookimpl
    def views(self):
        return [IMAGE]

    @hookimpl
    def curate(self, step):
        return torch.tensor([row for row, key in enumerate(step.batch.keys) if key != "0001"])


class ColdParameter(Works):
    name = "cold"

    @hookimpl
    def setup(self, model):
        self.head = nn.Linear(model.embed_dim, 2)


class PerSample(Works):
    name = "per_sample"

    def loss(self, step):
        return step.encode_image("image").embedding.pow(4).sum(1)


class Detached(Works):
    name = "detached"

    def loss(self, step):
        return super().loss(step).detach()


class NotFinite(Works):
    name = "not_finite"

    def loss(self, step):
        return super().loss(step).log() * torch.inf


class Readout(Works):
    name = "readout"

    def loss(self, step):
        loss = super().loss(step)
        return loss if loss.item() > 0 else -loss


class Hidden(Works):
    name = "hidden"

    @hookimpl
    def setup(self, model):
        self.centre = [torch.rand(())]  # in a list: not a buffer, so no checkpoint has it

    def loss(self, step):
        return super().loss(step) * self.centre[0]


class Intruder(Works):
    name = "intruder"

    @hookimpl
    def setup(self, model):
        model.extra = nn.Linear(2, 2)


class Insomniac(Works):
    name = "insomniac"

    def awake(self, progress):
        return True


class NoStart(Works):
    name = "no_start"

    def __init__(self, weight: float = 1.0):
        super().__init__(weight=weight)


class Undocumented(Works):
    """A loss.

    Args:
        weight: factor.
    """

    name = "undocumented"


class Dice:
    """A view that rolls the global dice and can be changed."""

    name, copies = "dice", 1

    def __eq__(self, other):
        return isinstance(other, Dice)

    def __call__(self, sample, context):
        return torch.rand(1, 3)


@dataclass(frozen=True)
class FrozenDice:
    name: str = "dice"
    copies: int = 1

    def __call__(self, sample, context):
        return torch.rand(1, 3)


@dataclass(frozen=True)
class TwoForOne:
    name: str = "two"
    copies: int = 1

    def __call__(self, sample, context):
        return torch.zeros(2, 3)


class Views(Plugin):
    name = "views"
    declared: ClassVar = None

    @hookimpl
    def views(self):
        return [self.declared]


class Moody(Plugin):
    name = "moody"

    @hookimpl
    def patchifier(self):
        return object()


class Teacher(Plugin):
    name = "teaching"

    @hookimpl
    def setup(self, model):
        self.copy = model.vision

    @hookimpl
    def encoders(self):
        return {"trainee": self.copy}


class Twice(UnevenCurator):
    name = "twice"

    @hookimpl
    def curate(self, step):
        return torch.tensor([1, 1])


BROKEN = [
    (check_registered, Works, "not in the catalogue.*entry-points"),
    (check_documented, Undocumented, "option start, stop of 'undocumented'"),
    (check_loss_reaches_parameters, ColdParameter, r"no gradient reaches head.weight, head.bias"),
    (check_loss_reaches_parameters, PerSample, r"shape \[4\]: reduce it"),
    (check_loss_reaches_parameters, Detached, "no gradient: was it"),
    (check_loss_reaches_parameters, NotFinite, "should be finite"),
    (check_state_round_trips, Hidden, "register_buffer"),
    (check_state_round_trips, Intruder, "`setup` should assign to self"),
    (check_asleep_costs_nothing, Insomniac, "sleeps at progress 0"),
    (check_asleep_costs_nothing, NoStart, "take `start` and `stop`"),
    (check_device_never_waits, Readout, "plugin 'readout': Tensor.item"),
    (check_encoders_are_frozen, Teacher, r"requires_grad_\(False\)"),
    (check_curator_keeps_rows, UnevenCurator, "shapes should not depend"),
    (check_curator_keeps_rows, Twice, "keeps a row twice"),
    (check_patchifier_is_pure, Moody, "make it a frozen dataclass"),
]


@pytest.mark.parametrize(("check", "cls", "advice"), [pytest.param(*b, id=b[1].name) for b in BROKEN])
def test_broken_promise_is_named_with_advice(check, cls, advice):
    with pytest.raises(AssertionError, match=advice):
        check(Case(cls))


@pytest.mark.parametrize(
    ("view", "advice"),
    [
        (Dice(), "can be changed"),
        (FrozenDice(), "draw only from context.rng"),
        (TwoForOne(), "says copies=1, but makes 2"),
    ],
    ids=["changeable", "random", "copies"],
)
def test_view_that_is_no_description_is_named(view, advice, monkeypatch):
    monkeypatch.setattr(Views, "declared", view)
    with pytest.raises(AssertionError, match=advice):
        check_views_are_descriptions(Case(Views))


def test_pairs_of_one_rank_only_are_found_by_two_processes(over_ranks):
    assert any("model.vision" in line for line in over_ranks["local_pairs"])


def test_curator_that_keeps_different_counts_is_found_by_two_processes(over_ranks):
    assert "ranks keep" in over_ranks["uneven"][0]


def test_plugin_that_keeps_every_promise_passes(monkeypatch):
    monkeypatch.setattr(siglip2.testing.contract, "catalogue", lambda: {"works": Entry(Works, "here")})
    for check in checks_for(Works):
        check(Case(Works))


X = torch.arange(4.0)
SYNCS = {
    "item": lambda: X.sum().item(),
    "float": lambda: float(X.sum()),
    "bool": lambda: bool(X.sum() > 0),
    "tolist": lambda: X.tolist(),
    "numpy": lambda: X.numpy(),
    "cpu": lambda: X.cpu(),
    "equal": lambda: torch.equal(X, X + 1),
    "nonzero": lambda: X.nonzero(),
    "where": lambda: torch.where(X > 1),
    "masked_select": lambda: torch.masked_select(X, X > 1),
    "mask index": lambda: X[X > 1],
    "mask assignment": lambda: X.clone().index_put_((X > 1,), torch.tensor(0.0)),
    "unique": lambda: X.unique(),
    "bincount": lambda: X.long().bincount(),
    "repeat by values": lambda: X.repeat_interleave(X.long()),
}


@pytest.mark.parametrize("operation", SYNCS.values(), ids=SYNCS)
def test_host_sync_is_found(operation):
    with pytest.raises(AssertionError, match="accelerator|sync|output_size"), no_host_sync():
        operation()


def test_static_operations_are_no_host_sync():
    with no_host_sync():
        kept = X[X.topk(2).indices] + torch.where(X > 1, X, 0)[:2] + X.repeat_interleave(2)[:2]
    assert kept.shape == (2,)
