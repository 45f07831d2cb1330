"""A look at the first samples of a source, before training relies on them."""

from collections.abc import Callable, Sequence
from typing import Any

from siglip2.core.data.fields import BadSample, Sample
from siglip2.core.data.source import Source


def check_source(
    source: Source,
    fields_needed: Sequence[str] = ("image", "caption"),
    num: int = 2,
    use: Callable[[int], Any] | None = None,
) -> None:
    """Read the first samples of the first and last shard, so that a wrong field name fails now, not never.

    Args:
        source: what to check.
        fields_needed: fields that training will ask for.
        num: samples to read of each of the two shards.
        use: what training does with sample i: makes its views. Its own errors pass, BadSample is forgiven to all but
            one sample of a shard.

    Raises:
        ValueError: if a field can be read from none of a shard's samples, or none can be used; lists what they have and
            a fix.
    """
    sizes = source.shard_sizes()
    filled = [shard for shard, size in enumerate(sizes) if size]
    for shard in dict.fromkeys([filled[0], filled[-1]]):
        start = sum(sizes[:shard])
        indices = range(start, start + min(num, sizes[shard]))
        samples, errors = _readable(source, indices)
        for name in fields_needed:
            reasons = errors + [str(error) for sample in samples if (error := _unusable(sample, name))]
            if len(reasons) == len(errors) + len(samples):
                raise ValueError(_explain(source, name, samples, reasons))
        if use is not None:
            _try_out(source, indices, use)


def check_captions(source: Source, captions: Sequence[str], num: int = 64) -> None:
    """Read more samples of the same two shards for captions that not every sample has.

    Args:
        source: what to check.
        captions: the fields that captions are drawn from.
        num: samples to read of each of the two shards.

    Raises:
        ValueError: if none of these samples has a caption in one of the fields; names it, and lists what they have.
    """
    sizes = source.shard_sizes()
    filled = [shard for shard, size in enumerate(sizes) if size]
    starts = {sum(sizes[:shard]): min(num, sizes[shard]) for shard in (filled[0], filled[-1])}
    reasons: dict[str, list[str]] = {name: [] for name in captions}
    samples: list[Sample] = []
    for start, count in starts.items():
        readable, errors = _readable(source, range(start, start + count))
        samples += readable
        for name in captions:
            found = [_unusable(sample, name, captions=True) for sample in readable]
            reasons[name] += errors + [str(error) for error in found if error]
    for name, refused in reasons.items():
        if len(refused) == sum(starts.values()):
            raise ValueError(_explain(source, name, samples, refused))


def _try_out(source: Source, indices: range, use: Callable[[int], Any]) -> None:
    refused: list[BadSample] = []
    for i in indices:
        try:
            use(i)
        except BadSample as error:
            refused.append(error)
    if len(refused) == len(indices):
        how = "; ".join(getattr(refused[0], "__notes__", ()))
        raise ValueError(
            f"{source.name}: none of the first {len(indices)} samples of a shard can be used. {refused[0]}"
            + (f" ({how})" if how else "")
        )


def _readable(source: Source, indices: range) -> tuple[list[Sample], list[str]]:
    samples, errors = [], []
    for i in indices:
        try:
            samples.append(source.read(i))
        except BadSample as error:
            errors.append(str(error))
    return samples, errors


def _unusable(sample: Sample, name: str, *, captions: bool = False) -> BadSample | None:
    try:
        if name == "image":
            sample.image()
        elif captions or name == "caption":
            sample.captions(name)
        else:
            sample.get(name)
    except BadSample as error:
        return error
    return None


def _present(sample: Sample, name: str) -> bool:
    try:
        return sample.has(name)
    except BadSample:
        return True  # it is there, in a file that cannot be read


def _explain(source: Source, name: str, samples: list[Sample], reasons: list[str]) -> str:
    message = f"{source.name}: no {name} in the first {len(reasons)} samples of a shard. {reasons[0]}"
    if not samples or _present(samples[0], name):
        return message
    available = samples[0].available()
    wanted = {
        "image": ("jpg", "png", "webp", "jpeg", "img", "image"),
        "caption": ("caption", "text", "title", "alt"),
    }
    likely = [key for word in wanted.get(name, (name,)) for key in available if word in key.lower()] or available
    option = f"data.fields.{name}" if name in ("image", "caption", "label", "regions") else f"data.fields.extra.{name}"
    return f"{message}. Say where it is, for example {option}: {likely[0]}"
