"""Refinement: from localisation maps to masks."""

from segattr.refine.dense_crf import BBAM_CRF, IRN_CRF, CRFSettings, dense_crf, label_probabilities
from segattr.refine.grow_seeds import grow_seeds
from segattr.refine.pseudo_labels import pseudo_labels
from segattr.refine.random_walk import random_walk

__all__ = [
    "BBAM_CRF",
    "IRN_CRF",
    "CRFSettings",
    "dense_crf",
    "grow_seeds",
    "label_probabilities",
    "pseudo_labels",
    "random_walk",
]
