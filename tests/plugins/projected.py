"""A projection head computed apart from the package's own forward."""

import torch


def project(head, x):
    """Returns the head's output in float64 (linear layers, GELU between, unit norm) and its unit-norm prototypes."""
    layers = [m for m in head.modules() if isinstance(m, torch.nn.Linear)]
    x = x.double()
    for i, layer in enumerate(layers):
        x = x @ layer.weight.double().T + layer.bias.double()
        x = torch.nn.functional.gelu(x) if i < len(layers) - 1 else x
    rows = head.prototype_weight.double()
    return x / x.norm(dim=-1, keepdim=True), rows / rows.norm(dim=-1, keepdim=True)
