"""`lora`: low-rank adapters in the blocks of the towers, which are all that is trained of them."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from siglip2.core.hooks import hookimpl
from siglip2.core.model.two_towers import TwoTowers
from siglip2.core.plugin import Plugin

ADAPTER = "default"  # as peft calls an adapter that was given no name
BLOCKS = r"(vision|text)\.(trunk\.)?blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))"


class LoRA(Plugin):
    """Low-rank adapters beside the matrices of both towers' blocks (LoRA, https://arxiv.org/abs/2106.09685), by peft.

    Of the towers only the adapters are trained, and temperature and bias: y = W x + alpha / rank * B A x with W frozen.
    A checkpoint holds the sum, W + alpha / rank * B A, under the towers' own names, so that it is an ordinary one to
    everything that reads checkpoints; W, A and B lie beside it, and a run is resumed from these, to the bit. Training
    goes on from a checkpoint with adapters as from any other: without this plugin with the sum.

    Args:
        rank: of the update of each matrix.
        alpha: the update is multiplied by alpha / rank.
        dropout: share of the adapters' inputs that are dropped, in [0, 1).
        match: regular expression that the whole name of a Linear must fit, such as `vision.blocks.0.attn.qkv`, for it
            to have an adapter. `text.*` leaves the image tower as it is.
        start: progress in [0, 1] from which the adapters do something.
        stop: 1; adapters stay part of the towers.

    Raises:
        ValueError: if a number is out of range, no Linear fits, or peft is not installed.
    """

    name = "lora"
    woken: Tensor

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        match: str = BLOCKS,
        start: float = 0.0,
        stop: float = 1.0,
    ):
        super().__init__(start=start, stop=stop)
        if rank < 1 or not 0 <= dropout < 1:
            raise ValueError(f"lora: expected a rank from 1 on and a dropout in [0, 1), found {rank} and {dropout}")
        if stop != 1:
            raise ValueError(f"lora: adapters stay part of the towers, so stop is 1, found {stop}")
        self.rank, self.alpha, self.dropout, self.match = rank, alpha, dropout, match
        self._layers: dict[str, Any] = {}
        self.register_buffer("woken", torch.tensor([start == 0]))

    @hookimpl
    def setup(self, model: TwoTowers) -> None:
        self._layers = _inject(model, self)
        for parameter in (model.logit_scale, model.logit_bias):
            parameter.requires_grad_(True)
        # The adapters belong to the towers' modules, and in checkpoints alone to this plugin. Were they parts of it,
        # FSDP2 would cut them twice: with their block, and with a plugin's module that it does not know to be there
        self.down = {key: layer.lora_A[ADAPTER] for key, layer in self._layers.items()}
        self.up = {key: layer.lora_B[ADAPTER] for key, layer in self._layers.items()}
        for layer in self._layers.values():
            layer.register_state_dict_post_hook(_merge)
            layer.register_load_state_dict_pre_hook(_split)
        self.register_state_dict_post_hook(_add_own)
        self.register_load_state_dict_pre_hook(_take_own)
        self.register_load_state_dict_post_hook(_switch_after_loading)
        self._switch(self.start == 0)

    @hookimpl
    def wake(self, model: TwoTowers) -> None:
        self.woken.fill_(True)
        self._switch(True)

    def _switch(self, on: bool) -> None:
        for layer in self._layers.values():
            layer._disable_adapters = not on  # `enable_adapters` would also say what is trained, which rules may change


def _inject(model: TwoTowers, options: LoRA) -> dict[str, Any]:
    """Puts adapters into the towers; returns peft's layers by name, with `-` for the dots."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora.layer import LoraLayer
    except ImportError as error:
        raise ValueError(
            "lora: peft is not installed: pip install 'siglip2[finetune]'. To use a checkpoint, and not to train on, "
            "--plugins.lora off does: the adapters are in its weights"
        ) from error
    config = LoraConfig(
        r=options.rank, lora_alpha=cast(int, options.alpha), lora_dropout=options.dropout, target_modules=options.match
    )
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:
        raise ValueError(
            f"lora: no Linear of the towers fits '{options.match}' (peft: {error}); whole names look like "
            f"vision.blocks.0.attn.qkv"
        ) from error
    return {name.replace(".", "-"): layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def merged(layer: Any) -> Tensor:
    """Returns the weight of peft's `layer` with its adapter: W + alpha / rank * B A."""
    weight: Tensor = layer.base_layer.weight.detach()
    return (weight.float() + layer.get_delta_weight(ADAPTER).detach().float()).to(weight.dtype)


def _merge(layer: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Saves a layer as the Linear it was, with its adapter inside."""
    for name in [n for n in state if n.startswith(f"{prefix}lora_")]:
        del state[name]
    for name in [n for n in state if n.startswith(f"{prefix}base_layer.")]:
        state[prefix + name.removeprefix(f"{prefix}base_layer.")] = state.pop(name)
    state[f"{prefix}weight"] = merged(layer)


def _split(layer: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Loads a Linear into the layer's base; the adapter stays as it is until the plugin loads it."""
    for name in ("weight", "bias"):
        if f"{prefix}{name}" in state:
            state[f"{prefix}base_layer.{name}"] = state.pop(f"{prefix}{name}")
    for name, tensor in layer.named_parameters():
        if name.startswith("lora_"):
            state[prefix + name] = tensor.detach()


def _names(key: str) -> tuple[str, str, str]:
    """What checkpoints call a layer's weight without adapter, A and B, behind the plugin's name."""
    return f"base.{key}", f"down.{key}.weight", f"up.{key}.weight"


def _add_own(plugin: LoRA, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key, layer in plugin._layers.items():
        own = layer.base_layer.weight, plugin.down[key].weight, plugin.up[key].weight
        state.update({prefix + name: tensor.detach() for name, tensor in zip(_names(key), own, strict=True)})


@torch.no_grad()
def _take_own(
    plugin: LoRA, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *_: Any
) -> None:
    """Loads adapters and the weights without them, behind the towers, which have been given the sums.

    An adapter that adds nothing has no base of its own: that of a run which starts from other weights is older than
    they are.
    """
    for key, layer in plugin._layers.items():
        names = [prefix + name for name in _names(key)]
        base, down, up = (state.pop(name, None) for name in names)
        if down is None or up is None:
            missing += names[1:]
            continue
        plugin.down[key].weight.copy_(down)
        plugin.up[key].weight.copy_(up)
        if base is not None and _says_something(up):
            layer.base_layer.weight.copy_(base)


def _says_something(up: Tensor) -> bool:
    """Whether a matrix has a number other than 0; of one that is cut, whether any rank has."""
    return bool((up.full_tensor() if isinstance(up, DTensor) else up).any())


def _switch_after_loading(plugin: LoRA, incompatible: Any) -> None:
    plugin._switch(bool(plugin.woken))
