"""What must hold of the rows that curators keep: as many in every step, and the same number on every rank."""

from torch import Tensor

from siglip2.core.distributed import gather, world_size
from siglip2.core.layout import Phase


class KeptCounts:
    """Remembers how many rows of a batch size were kept in a phase, and refuses any other number.

    Shapes then stay static, and ranks, which compare their numbers the first time, agree for good.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, Phase], int] = {}

    def check(self, size: int, kept: Tensor, phase: Phase) -> None:
        """Notes that the rows `kept`, int64 [b'], of this rank's `size` rows are trained on.

        Every rank calls this in the same steps, with the same `size` and `phase`.

        Raises:
            ValueError: if ranks keep different numbers, or this one kept another number before.
        """
        count, known = kept.shape[0], self._known.get((size, phase))
        if known is None:
            counts = gather(kept.new_tensor([count])).tolist() if world_size() > 1 else [count]
            if len(set(counts)) > 1:
                raise ValueError(
                    f"the curator keeps different numbers of rows on the ranks: {counts} of {size} each. Losses are "
                    f"means over ranks of equal size: `curate` has to return the same number of indices on each"
                )
            self._known[size, phase] = known = count
        if count != known:
            raise ValueError(
                f"the curator keeps {count} of {size} rows, in an earlier step {known}: shapes have to stay the same "
                f"throughout a phase, so `curate` has to return the same number of indices for a batch of one size"
            )
