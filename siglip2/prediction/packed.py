"""Linear layers on a CPU, stored the way its matrix products read them, for towers that only run forward."""

# D in, F out

import platform
from collections.abc import Callable
from typing import Any, Never

import torch
from timm.layers import GELUTanh, Mlp
from torch import Tensor, nn

ROWS = 256  # tokens that the layout is chosen for; others run as fast


class PackedLinear(nn.Module):
    """A linear layer, and the GELU behind it if there is one, as one call of oneDNN on weights it has reordered.

    Twice as fast in float32 where torch's own product does not use AVX-512 (MKL on AMD); in bf16 the GELU, which else
    takes as long as the product before it, costs a tenth. There is no gradient, and the weights are in memory that
    only oneDNN reads: they cannot be trained, moved, saved or copied, and a RuntimeError says so.

    Args:
        linear: the layer, on a CPU, float32 or bfloat16.
        gelu: "tanh" or "none" (exact), as torch's `approximate`; None for no GELU.
    """

    def __init__(self, linear: nn.Linear, gelu: str | None = None):
        super().__init__()
        self.bias, self.gelu = linear.bias, gelu
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)

    def forward(self, x: Tensor) -> Tensor:
        """Returns [..., F] from [..., D]; RuntimeError where a gradient would have to go through."""
        if x.requires_grad and torch.is_grad_enabled():
            _refuse("trained")  # torch would warn, and leave out what these layers pass on
        attr, algorithm = ("none", "") if self.gelu is None else ("gelu", self.gelu)
        x = x.to(self.packed.dtype)  # under autocast other layers may hand on half precision
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, attr, [], algorithm)
        return out

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        _refuse("saved")  # else a file without these weights, and no word of it

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        before = torch.empty(0, dtype=self.packed.dtype)
        after = fn(before)
        if (after.dtype, after.device) != (before.dtype, before.device):
            _refuse("given another precision or device")
        return super()._apply(fn, recurse)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedLinear":
        _refuse("copied")

    def __reduce_ex__(self, protocol: Any) -> Any:
        _refuse("copied or pickled")


def _refuse(what: str) -> Never:
    raise RuntimeError(
        f"packed towers cannot be {what}, only run: siglip2.load(..., packed=False) gives towers that can be"
    )


def can_pack(dtype: torch.dtype) -> bool:
    """Says whether this machine and build of torch have what `pack` needs: oneDNN on x86, for bf16 with AVX-512."""
    if not torch.backends.mkldnn.is_available() or platform.machine().lower() not in {"x86_64", "amd64"}:
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def pack(model: nn.Module) -> None:
    """Replaces every linear layer of a model in place, each with the GELU that follows it in an MLP.

    Args:
        model: on a CPU, all of one dtype for which `can_pack`. Its linear layers are gone afterwards: it runs forward,
            and cannot be trained, moved, copied or saved.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                gelu = _gelu_behind(parent, name)
                setattr(parent, name, PackedLinear(child, gelu))
                if gelu is not None:
                    parent.act = nn.Identity()


def _gelu_behind(parent: Any, name: str) -> str | None:
    """Which GELU follows a layer of a timm MLP."""
    if not isinstance(parent, Mlp) or name != "fc1":
        return None
    if isinstance(parent.act, GELUTanh):
        return "tanh"
    return parent.act.approximate if isinstance(parent.act, nn.GELU) else None
