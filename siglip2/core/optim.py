"""Parameter rules by name, and optimizer state that travels by name."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

# SigLIP 2, section 2.1; beta2 from SigLIP, section 4.7. The paper's decay of 1e-4 is added after the learning rate, so
# torch's AdamW, which multiplies the decay by the learning rate of 1e-3, needs 0.1 for the same step.
PUBLISHED = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "fused": True}


def published_adamw(params: Any) -> Optimizer:
    """Returns AdamW as SigLIP 2 was trained with: lr 1e-3, betas 0.9 and 0.95, decoupled weight decay."""
    return AdamW(params, **PUBLISHED)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Rule:
    """What holds for the parameters whose name matches; of several rules the last that says something wins.

    Args:
        match: regular expression, searched in names like `model.vision.blocks.0.attn.qkv.weight`.
        lr: factor on the learning rate.
        decay: whether weight decay applies.
        frozen: whether the parameters stay as they are.
        layer_decay: factor on the learning rate for every layer that lies above a parameter in its tower, in (0, 1].
            The last norm, the pool and the text tower's head have the factor 1, the last block this number, the
            embeddings its power of the tower's depth + 1. Times `lr`, if that is given, too.

    Raises:
        ValueError: if layer_decay is not in (0, 1].
    """

    match: str
    lr: float | None = None
    decay: bool | None = None
    frozen: bool | None = None
    layer_decay: float | None = None

    def __post_init__(self) -> None:
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"rule match '{self.match}': layer_decay is a factor in (0, 1], found {self.layer_decay}")


# big_vision decays only what flax calls `kernel`: the matrices of Dense, conv and attention (optax.py, wd_mults)
KERNELS_ONLY = Rule(
    r"(\bbias|norm\d?\.weight|pos_embed|token_embed\.weight|latent|\w+_token|bias_table|logit_scale|logit_bias)$",
    decay=False,
)


# a parameter of a tower: in a block, of the input, or behind the blocks; timm's towers have a trunk
TOWER_LAYER = re.compile(
    r"model\.(?P<tower>vision|text)\.(?:trunk\.)?"
    r"(?:blocks\.(?P<block>\d+)\.|(?P<input>(?:patch_embed|embed|pos_embed|token_embed|cls_token|reg_token)\b))?"
)


@dataclass(frozen=True)
class Settled:
    """What the rules say about one parameter: learning-rate factor, weight decay, frozen."""

    lr: float = 1.0
    decay: bool = True
    frozen: bool = False


def settle(name: str, num_dims: int, rules: Iterable[Rule], *, above: int = 0) -> Settled:
    """Returns what the rules say about the parameter `name`; vectors and scalars never decay unless a rule says so.

    Args:
        name: of the parameter.
        num_dims: of the parameter.
        rules: the last that says something wins.
        above: layers above it in its tower, for rules with a `layer_decay`.
    """
    lr, decay, frozen = 1.0, num_dims > 1, False
    for rule in rules:
        if re.search(rule.match, name):
            if rule.lr is not None or rule.layer_decay is not None:
                lr = (1.0 if rule.lr is None else rule.lr) * (rule.layer_decay or 1.0) ** above
            decay = decay if rule.decay is None else rule.decay
            frozen = frozen if rule.frozen is None else rule.frozen
    return Settled(lr, decay, frozen)


def layers_above(names: Iterable[str]) -> dict[str, int]:
    """Returns for each parameter of the two towers how many layers lie above it; others are left out.

    A tower of depth d has d + 2 layers: what embeds and places its input, its blocks, and what follows them.

    Source: BEiT, https://arxiv.org/abs/2106.08254, run_class_finetuning's LayerDecayValueAssigner.
    """
    found = {name: match for name in names if (match := TOWER_LAYER.match(name))}
    depth: dict[str, int] = {}
    for match in found.values():
        depth[match["tower"]] = max(depth.get(match["tower"], 0), int(match["block"] or -1) + 1)
    return {name: _above(match, depth[match["tower"]]) for name, match in found.items()}


def _above(match: re.Match[str], depth: int) -> int:
    if match["block"] is not None:
        return depth - int(match["block"])
    return depth + 1 if match["input"] else 0


def check_rules(names: Iterable[str], rules: Iterable[Rule]) -> None:
    """Raises ValueError for a rule that is no regular expression or matches no parameter at all."""
    names = list(names)
    for rule in rules:
        try:
            pattern = re.compile(rule.match)
        except re.error as error:
            raise ValueError(f"rule match '{rule.match}' is not a regular expression: {error}") from error
        if not any(pattern.search(name) for name in names):
            examples = ", ".join(names[:: max(1, len(names) // 4)][:4])
            raise ValueError(f"rule match '{rule.match}' fits no parameter; names look like {examples}")


def freeze(module: nn.Module, rules: Iterable[Rule]) -> None:
    """Switches the gradient off for every parameter that the rules freeze."""
    rules = list(rules)
    for name, parameter in module.named_parameters():
        if settle(name, parameter.ndim, rules).frozen:
            parameter.requires_grad_(False)


def param_groups(module: nn.Module, rules: Iterable[Rule]) -> list[dict[str, Any]]:
    """Groups the trainable parameters by what the rules say of them.

    Returns:
        Groups for `torch.optim`, with `params` as (name, parameter) pairs, `lr_factor`, `weight_decay` 0.0 where none
        applies, and `fused` false on XLA.
    """
    rules = list(rules)
    above = layers_above(name for name, _ in module.named_parameters())
    groups: dict[Settled, dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        says = settle(name, parameter.ndim, rules, above=above.get(name, 0))
        empty: dict[str, Any] = {"params": [], "lr_factor": says.lr}
        group = groups.setdefault(says, empty if says.decay else {**empty, "weight_decay": 0.0})
        group["params"].append((name, parameter))
        if parameter.device.type == "xla":
            group["fused"] = False  # torch has no fused kernel there, and optimizers ask for it by default
    return list(groups.values())


def apply_lr_factors(optimizer: Optimizer) -> None:
    """Multiplies each group's learning rate by its `lr_factor`; call once, before any scheduler is made."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * group.get("lr_factor", 1.0)


def match_state_by_name(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Returns a loaded optimizer state dict reordered to this optimizer's parameters, matched by name.

    Parameters that the file does not know start with fresh state, those it has beyond are dropped. Use as
    `optimizer.register_load_state_dict_pre_hook(match_state_by_name)`.
    """
    saved = _numbers_by_name(state_dict)
    if not saved:
        return state_dict
    state, groups, count = {}, [], 0
    for group in optimizer.param_groups:
        names = group["param_names"]
        options = {
            k: v for k, v in group.items() if k not in ("params", "param_names")
        }  # this recipe's, not the file's
        numbers = list(range(count, count + len(names)))
        count += len(names)
        groups.append({**options, "params": numbers, "param_names": names})
        for number, name, parameter in zip(numbers, names, group["params"], strict=True):
            found = state_dict["state"].get(saved[name]) if name in saved else None
            if found is not None and _fits(found, parameter):
                state[number] = found
    return {**state_dict, "state": state, "param_groups": groups}


def without_state_of(state_dict: dict[str, Any], prefixes: tuple[str, ...]) -> dict[str, Any]:
    """Returns an optimizer state dict without the state of the parameters whose names begin with one of `prefixes`.

    Once loaded, they start fresh. Use it for parameters that start fresh themselves: moments of other values would push
    them about.
    """
    forgotten = {number for name, number in _numbers_by_name(state_dict).items() if name.startswith(prefixes)}
    return {**state_dict, "state": {n: state for n, state in state_dict["state"].items() if n not in forgotten}}


def _numbers_by_name(state_dict: dict[str, Any]) -> dict[str, int]:
    """The number of each parameter in a saved optimizer state dict; nothing if it was saved without names."""
    return {
        name: number
        for group in state_dict["param_groups"]
        for name, number in zip(group.get("param_names", ()), group["params"], strict=False)
    }


def _fits(state: dict[str, Any], parameter: Tensor) -> bool:
    """Whether saved moments have the parameter's shape; a parameter that changed its shape starts fresh."""
    return all(value.shape == parameter.shape for value in state.values() if isinstance(value, Tensor) and value.ndim)


class StepCountLR(LambdaLR):
    """A LambdaLR that takes from a checkpoint only how far the run is; its learning rates are this recipe's.

    torch's own restores learning rates by the number of the parameter group, and groups come and go with plugins: a new
    one would stay at the learning rate 0 where the warm-up begins.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues at the step of a saved schedule; call after the optimizer's state is loaded."""
        self.last_epoch, self._step_count = state_dict["last_epoch"], state_dict["_step_count"]
        for group, base, factor in zip(self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=True):
            group["initial_lr"], group["lr"] = base, base * factor(self.last_epoch)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
