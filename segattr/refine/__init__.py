"""Refinement: from localisation maps to masks."""

from segattr.refine.dense_crf import BBAM_CRF, DEEPLAB_CRF, IRN_CRF, CRFSettings, dense_crf, label_probabilities
from segattr.refine.grow_seeds import grow_seeds
from segattr.refine.instance_masks import instance_masks, semantic_labels
from segattr.refine.merge_proposals import merge_proposals
from segattr.refine.pseudo_labels import pseudo_labels
from segattr.refine.random_walk import random_walk

__all__ = [
    "BBAM_CRF",
    "DEEPLAB_CRF",
    "IRN_CRF",
    "CRFSettings",
    "dense_crf",
    "grow_seeds",
    "instance_masks",
    "label_probabilities",
    "merge_proposals",
    "pseudo_labels",
    "random_walk",
    "semantic_labels",
]
