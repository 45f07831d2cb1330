"""A detector that answers out of the regions stored with the sample, to try a pipeline without a model."""

# N boxes

from collections.abc import Sequence

import torch

from siglip2.annotation.detector import Detections, Question, plain
from siglip2.core.regions import regions


class Truth:
    """Finds a stored region wherever a query is one of its texts, punctuation and case aside.

    Its score is the stored one, or 1 where there is none, times the weight of the query; of several queries that fit,
    the one with the largest weight counts, then the first.
    """

    def detect(self, questions: Sequence[Question]) -> list[Detections]:
        """Returns the regions that were asked for, in stored order."""
        return [self._answer(question) for question in questions]

    def _answer(self, question: Question) -> Detections:
        numbers: dict[str, int] = {}
        weights = [query.weight for query in question.queries]
        for number in sorted(range(len(weights)), key=lambda k: -weights[k]):  # stable: the first of equal ones
            numbers.setdefault(plain(question.queries[number].text), number)
        boxes, scores, queries = [], [], []
        for region in regions(question.sample):
            names = [plain(text) for texts in region.captions.values() for text in texts]
            fitting = [numbers[name] for name in names if name in numbers]
            if fitting:
                best = max(fitting, key=lambda k: (weights[k], -k))
                boxes.append(region.box)
                scores.append((1.0 if region.score is None else region.score) * weights[best])
                queries.append(best)
        height, width = question.image.shape[1:]
        pixels_N4 = torch.tensor(boxes).reshape(-1, 4) * torch.tensor([width, height, width, height])
        return Detections(pixels_N4, torch.tensor(scores), torch.tensor(queries, dtype=torch.int64))
