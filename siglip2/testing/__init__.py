"""Helpers for the tests of plugin authors: tiny real objects, and the contract that every plugin keeps.

`def test_koleo_keeps_the_contract(): check_plugin(KoLeo)` is a whole test file but for its imports.
"""

from siglip2.testing.case import Case
from siglip2.testing.contract import check_plugin, checks_for
from siglip2.testing.host_sync import no_host_sync
from siglip2.testing.ranks import check_over_ranks, differences_over_ranks
from siglip2.testing.tiny import (
    TinyModule,
    TinySource,
    fake_batch,
    rehearse,
    tiny_model,
    tiny_module,
    tiny_step,
    tiny_tokenizer,
)

__all__ = [
    "Case",
    "TinyModule",
    "TinySource",
    "check_over_ranks",
    "check_plugin",
    "checks_for",
    "differences_over_ranks",
    "fake_batch",
    "no_host_sync",
    "rehearse",
    "tiny_model",
    "tiny_module",
    "tiny_step",
    "tiny_tokenizer",
]
