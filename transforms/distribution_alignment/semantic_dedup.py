"""Semantic deduplication: of samples with nearly equal embeddings, the best is kept.

`duplicate_search` finds the duplicates. Source: paper (semantic duplicates within a cluster are removed; SemDeDup,
arXiv 2303.09540). The rank and the exact definition are our choice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from transforms.core.catalogue import DISTRIBUTION_ALIGNMENT, Rule
from transforms.core.settings import Settings

if TYPE_CHECKING:
    from transforms.core.records import Annotation


class SemanticDedupSettings(Settings):
    """Within a cluster x is dropped if a better-ranked y has cosine > 1 - `epsilon`. With `after_duplication`, copies
    are counted over all samples first, and duplicates are dropped afterwards: the paper's order, in which the
    duplicates' copies are lost."""

    epsilon: float = Field(0.05, gt=0.0, lt=1.0)
    after_duplication: bool = False


def _keeps(annotation: Annotation, settings: SemanticDedupSettings) -> bool:
    return annotation.semantic_duplicate_of is None


SEMANTIC_DEDUP = Rule(
    name="semantic_dedup",
    stage=DISTRIBUTION_ALIGNMENT,
    settings=SemanticDedupSettings,
    summary="no better-ranked image of its cluster has cosine > 0.95",
    source="paper, SemDeDup",
    columns={"semantic_duplicate_of": "string"},
    order=10,
    keeps=_keeps,
)
