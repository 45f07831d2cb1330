"""Subcommands of `siglip2`."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from siglip2.cli.messages import essence

TRAINING = {
    "fit": ("siglip2.cli.training", "fit", "train a recipe"),
    "validate": ("siglip2.cli.training", "validate", "score a checkpoint on the recipe's evaluation sets"),
    "test": ("siglip2.cli.training", "test", "the same through the test loop"),
    "predict": ("siglip2.cli.predicting", "predict", "rank free texts for pictures"),
    "caption": ("siglip2.cli.decoding", "caption", "write a caption for pictures"),
    "locate": ("siglip2.cli.decoding", "locate", "find texts in pictures"),
    "describe": ("siglip2.cli.decoding", "describe", "write what is in boxes of pictures"),
}
COMMANDS = {
    ("plugins",): ("siglip2.cli.plugins", "list plugins and their options"),
    ("index",): ("siglip2.cli.index", "count the samples of tar shards and note where each one is"),
    ("embed",): ("siglip2.cli.embedding", "write image and text embeddings beside the shards"),
    ("search",): ("siglip2.cli.searching", "find pictures by text or picture in the embeddings of a data set"),
    ("annotate",): ("siglip2.cli.annotating", "write shards again with pseudo-boxes for locca"),
    ("inspect",): ("siglip2.cli.inspecting", "look into a data set: languages, lengths, copies, sizes, faults"),
    ("balance",): ("siglip2.cli.balancing", "write example weights that take bias out of a data set"),
    ("soup",): ("siglip2.cli.soup", "interpolate the weights of two models"),
    ("export",): ("siglip2.cli.exporting", "write a model for transformers, open_clip, timm, big_vision, ONNX, torch"),
    ("doctor",): ("siglip2.cli.doctor", "what other libraries would do otherwise with a model, and what it costs"),
    ("tokenizer", "train"): ("siglip2.cli.tokenizer", "train a tokenizer on the captions of a data set"),
    ("data", "emoji-world"): ("siglip2.emoji_world.command", "write the emoji world as shards"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a subcommand; errors that a user can mend are printed without a traceback, with exit status 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    traceback = "--traceback" in arguments
    try:
        _dispatch([a for a in arguments if a != "--traceback"])
    except (ValueError, ImportError, RuntimeError, OSError) as error:
        if traceback:
            raise
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
        where = "" if isinstance(error, ValueError | FileNotFoundError) else "\n  --traceback shows where it happened"
        print(f"siglip2: error: {essence(str(error))}{notes}{where}", file=sys.stderr)
        sys.exit(2)


def _dispatch(arguments: list[str]) -> None:
    if arguments and arguments[0] in TRAINING:
        module, function, _ = TRAINING[arguments[0]]
        getattr(importlib.import_module(module), function)(arguments[1:])
        return
    for words, (module, text) in COMMANDS.items():
        if tuple(arguments[: len(words)]) == words:
            command = importlib.import_module(module)
            parser = argparse.ArgumentParser(prog=f"siglip2 {' '.join(words)}", description=text)
            command.add_arguments(parser)
            command.run(parser.parse_args(arguments[len(words) :]))
            return
    _help(arguments)


def _help(arguments: list[str]) -> None:
    lines = [f"  {name:20} {text}" for name, (_, _, text) in TRAINING.items()]
    lines += [f"  {' '.join(words):20} {text}" for words, (_, text) in COMMANDS.items()]
    text = (
        "usage: siglip2 COMMAND [options]\n\n"
        + "\n".join(lines)
        + "\n\n`siglip2 COMMAND --help` says more; --traceback shows where an error came from."
    )
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(text)
        return
    if arguments[0] == "--version":
        from siglip2 import __version__

        print(__version__)
        return
    import difflib

    known = [*TRAINING, *(" ".join(words) for words in COMMANDS)]
    close = difflib.get_close_matches(" ".join(arguments[:2]), known, 1) or difflib.get_close_matches(
        arguments[0], known, 1
    )
    hint = f", did you mean '{close[0]}'?" if close else ""
    sys.exit(f"siglip2: no command '{arguments[0]}'{hint}\n\n{text}")
