"""Greedy decoding: the likeliest token at each position, for many images at once."""

# B images, T tokens, N image tokens, M their width

from collections.abc import Sequence

import torch
from torch import Tensor

from siglip2.plugins.locca.decoder import START, Decoder

FREE = -1


@torch.no_grad()
def greedy(
    decoder: Decoder,
    memory_BNM: Tensor,
    forced_BT: Tensor,
    *,
    eos_id: int,
    pad_id: int,
    valid_BN: Tensor | None = None,
) -> Tensor:
    """Returns the token ids that the decoder writes for each image, int64 [B, T], padded after their EOS.

    Args:
        decoder: T is its length.
        memory_BNM: image tokens, float.
        forced_BT: int64, ids that are given, such as a prefix, and `FREE` where the decoder chooses.
        eos_id: ends a sequence where the decoder chose it.
        pad_id: fills up.
        valid_BN: bool, false where an image token is padding; None where none is.
    """
    caches = decoder.start(memory_BNM.to(decoder.token_embed.weight.dtype))
    ids = torch.full_like(forced_BT, pad_id)
    previous = torch.full_like(forced_BT[:, 0], START)
    ended = torch.zeros_like(previous, dtype=torch.bool)
    for position in range(forced_BT.shape[1]):
        chosen = decoder.step(previous, caches, position=position, valid_BN=valid_BN).argmax(dim=-1)
        free = forced_BT[:, position] == FREE
        previous = torch.where(free, chosen, forced_BT[:, position])
        ids[:, position] = torch.where(ended, pad_id, previous)
        ended = ended | (free & (chosen == eos_id))
        if ended.device.type != "xla" and ended.all():  # there a look costs a program of its own for every position
            break
    return ids


def forced(prompts: Sequence[Sequence[int]], length: int) -> Tensor:
    """Returns prompts of different lengths as ids that are given, int64 [B, T], `FREE` after each; cut to T."""
    rows = [[*prompt[:length], *[FREE] * (length - len(prompt))] for prompt in prompts]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), length)
