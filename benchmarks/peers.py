"""Other libraries' bilateral filters behind one call, and those that cannot be compared, with the reason.

Every adapter maps ``values [K, H, W]`` and ``image [3, H, W]``, RGB in [0, 1], to the filtered values, ``[K, H, W]``,
from the image on: what a library prepares for an image is part of its time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from segloss.bilateral import guide_features

Filter = Callable[..., Tensor]  # (values, image, sigma_rgb, sigma_xy); with ``by_rows`` a fifth argument, the pixels


@dataclass(frozen=True)
class Peer:
    """How to get a filter from a package, and what kind of filter it is."""

    package: str
    load: Callable[[], Filter]  # imports the package; ImportError if it cannot
    note: str
    normalised: bool = False  # gives (W v)_p / (W 1)_p, from which W v cannot be had back
    by_rows: bool = False  # visits all pairs of pixels, so that a share of the rows tells the time of all


def _rows(image: Tensor, sigma_rgb: float, sigma_xy: float) -> Tensor:
    return guide_features(image[None], sigma_rgb, sigma_xy)[0].t().contiguous()


def keops() -> Filter:
    lazy = import_module("pykeops.torch").LazyTensor

    def run(values: Tensor, image: Tensor, sigma_rgb: float, sigma_xy: float, pixels: Tensor | None = None) -> Tensor:
        features, columns = _rows(image, sigma_rgb, sigma_xy), values.flatten(1).t().contiguous()
        queries = features if pixels is None else features[pixels]
        squares = ((lazy(queries[:, None]) - lazy(features[None])) ** 2).sum(-1)
        rows: Tensor = (-squares / 2).exp() @ columns
        return rows if pixels is not None else rows.t().reshape(values.shape)

    return run


def krahenbuhl() -> Filter:
    crf, eigen = import_module("pydensecrf.densecrf"), import_module("pydensecrf.eigen")

    def run(values: Tensor, image: Tensor, sigma_rgb: float, sigma_xy: float) -> Tensor:
        features = guide_features(image[None], sigma_rgb, sigma_xy)[0].contiguous()
        columns = values.flatten(1).contiguous().numpy()
        model = crf.DenseCRF(columns.shape[1], columns.shape[0])
        # A step of inference without unary energies leaves W v, negated twice, in its second argument.
        kind = {"kernel": crf.CONST_KERNEL, "normalization": crf.NO_NORMALIZATION}
        model.addPairwiseEnergy(features.numpy(), compat=1, **kind)
        belief, filtered, scratch = (eigen.matrixXf(columns) for _ in range(3))
        model.stepInference(belief, filtered, scratch)
        return torch.from_numpy(np.array(filtered)).view(values.shape)

    return run


def simplex() -> Filter:
    package: Any = import_module("gpytorch_lattice_kernel.bilateral_kernel")
    stencil = package.DiscretizedKernelFN(package.rbf, 2)  # the package's own order
    lattice = _simplex_extension(str(Path(package.__file__).parent / "cpp" / "lattice.cpp"))

    def run(values: Tensor, image: Tensor, sigma_rgb: float, sigma_xy: float) -> Tensor:
        features = _rows(image, sigma_rgb, sigma_xy) / 2**0.5  # its kernel is exp(-d^2)
        filtered: Tensor = lattice(values.flatten(1).t().contiguous(), features, stencil.get_coeffs())
        return filtered.t().reshape(values.shape)

    return run


@cache
def _simplex_extension(source: str) -> Any:
    """The package compiles its C++ source when first used, but without optimisation."""
    from torch.utils.cpp_extension import load

    return load(name="simplex_lattice_o3", sources=[source], extra_cflags=["-O3", "-w"]).filter


def kornia() -> Filter:
    filters = import_module("kornia.filters")

    def run(values: Tensor, image: Tensor, sigma_rgb: float, sigma_xy: float) -> Tensor:
        window = 2 * int(sigma_xy) + 1
        spread = (sigma_xy, sigma_xy)
        blurred: Tensor = filters.joint_bilateral_blur(
            values[None], image[None], window, sigma_rgb, spread, color_distance_type="l2"
        )
        return blurred[0]

    return run


def opencv() -> Filter:
    cv2 = import_module("cv2")
    if not hasattr(cv2, "ximgproc"):
        raise ImportError("cv2 has no ximgproc: it comes with opencv-contrib-python-headless")
    cv2.setNumThreads(1)

    def run(values: Tensor, image: Tensor, sigma_rgb: float, sigma_xy: float) -> Tensor:
        guide = image.permute(1, 2, 0).contiguous().numpy()
        window = 2 * int(sigma_xy) + 1
        filtered = []
        for part in values.split(3):  # 1 or 3 channels at a time
            full = torch.cat([part, part[:1]]) if len(part) == 2 else part
            source = full.permute(1, 2, 0).contiguous().numpy()
            blurred = cv2.ximgproc.jointBilateralFilter(guide, source, window, sigma_rgb, sigma_xy)
            filtered.append(torch.from_numpy(blurred).view(*source.shape).permute(2, 0, 1)[: len(part)])
        return torch.cat(filtered)

    return run


PEERS = {
    "KeOps": Peer("pykeops", keops, "exact, over all pairs", by_rows=True),
    "pydensecrf lattice": Peer("pydensecrf2", krahenbuhl, "the permutohedral lattice of dense CRF inference, C++"),
    "Simplex-GP lattice": Peer(
        "gpytorch-lattice-kernel", simplex, "a permutohedral lattice with a wider stencil, C++, compiled here with -O3"
    ),
    "kornia window": Peer(
        "kornia", kornia, "pixels within one sigma_xy in x and in y only, mirrored at the border", normalised=True
    ),
    "OpenCV window": Peer(
        "opencv-contrib-python-headless",
        opencv,
        "pixels within one sigma_xy only, and the L1 instead of the Euclidean distance of colours",
        normalised=True,
    ),
}

UNUSABLE = {
    "monai 1.6.1": "BilateralFilter, PHLFilter and the trainable ones need the extension monai._C, which is neither in "
    "the wheel nor can be built from the source distribution, which lacks its C++ files",
    "pydensecrf 1.0rc3": "does not build: its source distribution lacks eigen.pxd; pydensecrf2, its fork, is compared",
    "simplecrf 0.2.1.1": "does not build with NumPy 2 (NPY_IN_ARRAY is gone)",
    "simplecrf-binaries 0.2.1.2": "no file for Linux with this Python",
    "seg-crf 1.0.0": "a wrapper of pydensecrf that needs TensorFlow",
    "crfseg 1.0.0": "its CRF takes no image: smoothing in space only",
    "bilateralfilter-torch 1.1.0, jointbilateralfilter-torch 1.0.0": "do not build without CUDA",
    "guaskdtreefiltering 0.1.1": "random, normalised, and Python code for each pixel, about 1 ms: slower than brute "
    "force up to 128x128",
    "scikit-image denoise_bilateral": "the image is its own guide: no other values can be filtered",
    "OpenCV dtFilter, fastBilateralSolverFilter": "other filters: geodesic distances, a smoothness solver",
}
