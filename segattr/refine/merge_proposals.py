"""Merging of unsupervised mask proposals: masks that follow the outlines of regions of the image."""

import torch
from torch import Tensor

from segattr.metrics.instances import intersections
from segloss.common.checks import check_has_values, check_like, check_real, shape_text

_CHUNK = 64  # proposals that are held as floating point at a time


def merge_proposals(mask: Tensor, proposals: Tensor) -> Tensor:
    r"""Replace a mask by the proposals that lie in it and the one that fits it best.

    .. math:: T_r = \bigcup_{i \in S} m_i, \qquad
        S = \{i \mid m_i \subseteq T\} \cup \{\arg\max_i \mathrm{IoU}(m_i, T)\}

    Of equally good proposals the first counts. Where no proposal shares a pixel with the mask, none of them is a better
    one, and the mask stays as it is.

    Args:
        mask: T, bool, ``[H, W]``, or the masks of n objects of one image, ``[n, H, W]``, each for itself.
        proposals: :math:`m_i`, bool, ``[P, H, W]``, those of the image, of MCG say.

    Returns:
        :math:`T_r`, bool, in the shape of ``mask``.

    Raises:
        TypeError: ``mask`` or ``proposals`` that are no bool tensors.
        ValueError: shapes or devices that do not fit each other.

    Source:
        *BBAM: Bounding Box Attribution Map for Weakly Supervised Semantic and Instance Segmentation*, the
        dissertation's eq. (5.4). The authors' released code differs: it sums the coordinates of pixels where it means
        to count them, so that pixels to the lower right weigh more, in its IoU and in its containment (a bug, not
        reproduced), calls a proposal contained from 95% on, looks only at proposals of which 95% lie in the object's
        box, cuts the result to the box, and leaves boxes below 32 x 32 pixels as they are.

    Example:
        >>> mask = torch.tensor([[True, True, True, False, False]])
        >>> proposals = torch.tensor([[[0, 1, 1, 1, 0]], [[1, 0, 0, 0, 0]], [[0, 0, 0, 1, 1]]], dtype=torch.bool)
        >>> merge_proposals(mask, proposals).int()
        tensor([[1, 1, 1, 1, 0]], dtype=torch.int32)
    """
    _check_masks("mask", mask, (2, 3), "[H, W] or [n, H, W]")
    _check_masks("proposals", proposals, (3,), "[P, H, W]")
    check_has_values("mask", mask)
    check_like("proposals", proposals, (len(proposals), *mask.shape[-2:]), "mask", mask)
    if not len(proposals):
        return mask.clone()
    masks = mask if mask.dim() == 3 else mask[None]
    shared = intersections(masks, proposals)
    areas = proposals.sum((1, 2))
    overlaps = shared / (masks.sum((1, 2))[:, None] + areas - shared).clamp(min=1)
    chosen = (shared == areas).scatter(1, overlaps.argmax(1, keepdim=True), True)
    merged = _unions(chosen, proposals)
    touched = (shared > 0).any(1)[:, None, None]
    return torch.where(touched, merged, masks).view_as(mask)


def _unions(chosen: Tensor, proposals: Tensor) -> Tensor:
    """Union of the proposals that are chosen for each object, ``[n, P]``."""
    union = torch.zeros(len(chosen), proposals[0].numel(), dtype=torch.bool, device=proposals.device)
    with torch.autocast(proposals.device.type, enabled=False):
        for of_chunk, chunk in zip(chosen.split(_CHUNK, 1), proposals.split(_CHUNK), strict=True):
            union |= of_chunk.float() @ chunk.flatten(1).float() > 0
    return union.view(len(chosen), *proposals.shape[1:])


def _check_masks(name: str, value: object, dims: tuple[int, ...], form: str) -> None:
    check_real(name, value)
    assert isinstance(value, Tensor)
    if value.dtype != torch.bool:
        raise TypeError(f"{name}: expected a bool tensor (scores > threshold), got {value.dtype}")
    if value.dim() not in dims:
        raise ValueError(f"{name}: expected {form}, got {shape_text(value.shape)}")
