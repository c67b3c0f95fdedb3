"""Distances between images, one by one and as sets. No metric here has learned weights.

Images are (B, C, H, W), floating point. Distances of sets compare two models on the same data; they
cannot be compared with published numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, stdev
from typing import Any, Final

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from fastvar_fx.errors import ArgumentError

_OPPONENT: Final = ((1 / 3, 1 / 3, 1 / 3), (0.5, -0.5, 0.0), (0.25, 0.25, -0.5))
"""Rows: grey, red against green, yellow against blue."""

_LEVELS: Final = 4
_ORIENTATIONS: Final = 4
_PARTS: Final = 4
"""Windows along each side of an image."""


# --- numbers with their uncertainty -----------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % confidence interval.

    Attributes:
        mean: Of the values.
        half: Half the width of the interval; NaN for a single value.
        count: How many values there are.
    """

    mean: float
    half: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Returns the interval of the mean of independent values, by Student's t.

        Raises:
            ArgumentError: If there is no value.

        Example:
            >>> str(Interval.of([1.0, 2.0, 3.0]))
            '2.00 ±2.48'
        """
        count = len(values)
        if not count:
            raise ArgumentError("a mean needs at least one value; found none")
        mean = fmean(values)
        if count == 1 or not math.isfinite(mean):
            return cls(mean, math.nan, count)
        return cls(mean, _t95(count - 1) * stdev(values) / math.sqrt(count), count)

    def __str__(self) -> str:
        return self.text()

    def text(self, digits: int = 2, sign: str = "") -> str:
        """Returns the mean and, if known, half the width."""
        half = "" if math.isnan(self.half) else f" ±{self.half:.{digits}f}"
        return f"{self.mean:{sign}.{digits}f}{half}"

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data, with None for numbers that are not finite."""
        numbers = {"mean": self.mean, "half": self.half}
        finite = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
        return finite | {"count": self.count}


@cache
def _t95(freedom: int) -> float:
    """Returns the 97.5 % quantile of Student's t by bisection of its distribution function.

    Args:
        freedom: Degrees of freedom, at least 1.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    low, high = 1.9, 12.8
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, freedom) < 0.95 else (low, middle)
    return high


def _t_within(limit: float, freedom: int) -> float:
    """Returns the probability that Student's t lies in [-limit, limit]."""
    angle = math.atan(limit / math.sqrt(freedom))
    odd = freedom % 2
    term, total = math.cos(angle) ** odd, 0.0
    for k in range(odd, freedom - 1, 2):
        total += term
        term *= (k + 1) / (k + 2) * math.cos(angle) ** 2
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


# --- pairs of images --------------------------------------------------------------------------


def psnr(images: Tensor, references: Tensor, span: float = 1.0) -> Tensor:
    """Returns the peak signal-to-noise ratio of each image (B,) in dB; infinite for equal ones.

    Args:
        images: (B, C, H, W).
        references: Of the same shape.
        span: Difference of the highest and the lowest possible value.

    Raises:
        ArgumentError: If the shapes differ.

    Example:
        >>> psnr(torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.1)).round().tolist()
        [20.0]
    """
    _check_pairs(images, references)
    error = reduce((images.double() - references.double()).square(), "b c h w -> b", "mean")
    return 10 * torch.log10(span**2 / error)


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """Returns the structural similarity of each image in [0, 1] to its reference, (B,), at most 1.

    Means and variances are weighted by a Gaussian of 11 x 11 pixels and standard deviation 1.5, for
    each colour separately, at all places where it fits into the image.

    Raises:
        ArgumentError: If the shapes differ, or a side is below 11.

    Source: Wang et al., Image quality assessment, IEEE TIP 2004, with its constants.
    """
    _check_pairs(images, references)
    if min(images.shape[-2:]) < 11:
        raise ArgumentError(f"ssim needs at least 11 x 11 pixels; found {tuple(images.shape[-2:])}")
    offsets = torch.arange(11, dtype=torch.float64, device=images.device) - 5
    weights = (-offsets.square() / (2 * 1.5**2)).exp()
    weights = weights / weights.sum()

    def blur(maps: Tensor) -> Tensor:
        flat = rearrange(maps, "b c h w -> (b c) 1 h w")
        flat = F.conv2d(F.conv2d(flat, weights.view(1, 1, 11, 1)), weights.view(1, 1, 1, 11))
        return rearrange(flat, "(b c) 1 h w -> b c h w", c=maps.shape[1])

    x, y = images.double(), references.double()
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _check_pairs(images: Tensor, references: Tensor) -> None:
    if images.dim() != 4 or images.shape != references.shape:
        raise ArgumentError(
            f"images are compared with references of their shape (B, C, H, W); found "
            f"{tuple(images.shape)} and {tuple(references.shape)}"
        )


# --- spectra ----------------------------------------------------------------------------------


def radial_spectrum(images: Tensor) -> Tensor:
    """Returns the mean power of each ring of spatial frequencies, float64 (B, R) in dB.

    Ring i of R = min(H, W) / 2 holds the waves that fit i + 1 times into the shorter side, in any
    direction. A Hann window keeps the borders out; channels are averaged.

    Source: FastVAR, arXiv 2503.23367, figure 3b.
    """
    images = images.double()
    height, width = images.shape[-2:]
    side = min(height, width)
    windows = [torch.hann_window(n, periodic=False).to(images) for n in (height, width)]
    centred = images - images.mean(dim=(2, 3), keepdim=True)
    waves = torch.fft.fft2(centred * torch.outer(*windows))
    power = waves.abs().square().mean(1)  # (B, H, W)
    rows = torch.fft.fftfreq(height).to(images) * side
    columns = torch.fft.fftfreq(width).to(images) * side
    ring = torch.hypot(rows.unsqueeze(1), columns.unsqueeze(0)).round().long().flatten() - 1
    inside = (ring >= 0) & (ring < side // 2)
    sums = power.new_zeros(len(images), side // 2)
    sums = sums.index_add(1, ring[inside], power.flatten(1)[:, inside])
    means = sums / torch.bincount(ring[inside], minlength=side // 2)
    return 10 * torch.log10(means.clamp_min(1e-12))


def spectrum_distance(spectrum: Tensor, reference: Tensor) -> Tensor:
    """Returns the root mean square difference over the rings, (..., R) -> (...), in dB."""
    return (spectrum - reference).square().mean(-1).sqrt()


# --- sets of images ---------------------------------------------------------------------------


def texture_features(images: Tensor) -> Tensor:
    """Returns features of texture and colour of 4 x 4 windows of each image, float64 (16 * B, 22).

    The features of a window are the logarithms of the mean energy of Gabor filters of four
    orientations (wavelength 4 pixels) on the grey image at four resolutions, each half the one
    before, and the mean and the logarithm of the standard deviation of grey and of two opponent
    colours. They are fixed, and nothing is downloaded.

    Args:
        images: (B, 3, H, W) in [0, 1], sides of at least 64.

    Raises:
        ArgumentError: If they have another shape.
    """
    if images.dim() != 4 or images.shape[1] != 3 or min(images.shape[-2:]) < 64:
        raise ArgumentError(
            f"texture features take images (B, 3, H, W) with sides of at least 64; found "
            f"{tuple(images.shape)}"
        )
    colors = torch.einsum("bchw,dc->bdhw", images.float(), images.new_tensor(_OPPONENT).float())
    means = F.adaptive_avg_pool2d(colors, _PARTS)
    squares = F.adaptive_avg_pool2d(colors.square(), _PARTS)
    features = [means, _log((squares - means.square()).clamp_min(0).sqrt())]
    grey, filters = colors[:, :1], _gabor_filters().to(colors)
    for level in range(_LEVELS):
        grey = F.avg_pool2d(grey, 2) if level else grey
        waves = F.conv2d(F.pad(grey, (4, 4, 4, 4), mode="reflect"), filters)
        energy = rearrange(waves, "b (o pair) h w -> b o pair h w", pair=2).square().sum(2).sqrt()
        features.append(_log(F.adaptive_avg_pool2d(energy, _PARTS)))
    return rearrange(torch.cat(features, 1), "b f h w -> (b h w) f").double()


def _log(values: Tensor) -> Tensor:
    return (values + 1e-3).log()


def _gabor_filters() -> Tensor:
    """Returns an even and an odd filter of mean zero per orientation, float64 (2 * O, 1, 9, 9)."""
    offsets = torch.arange(9, dtype=torch.float64) - 4
    y, x = torch.meshgrid(offsets, offsets, indexing="ij")
    bump = (-(x**2 + y**2) / (2 * 2.0**2)).exp()
    filters = []
    for turn in range(_ORIENTATIONS):
        angle = math.pi * turn / _ORIENTATIONS
        phase = 2 * math.pi / 4 * (x * math.cos(angle) + y * math.sin(angle))
        even = bump * phase.cos()
        even = even - bump * (even.sum() / bump.sum())
        filters += [even / bump.sum(), bump * phase.sin() / bump.sum()]
    return torch.stack(filters).unsqueeze(1)


def frechet_distance(features: Tensor, references: Tensor) -> float:
    """Returns the Frechet distance of two sets of features, taken as Gaussian; at least 0.

    Features are divided by their standard deviation in the reference set, and covariances are
    shrunk towards a multiple of the identity. The estimate is biased upwards for small sets, so
    compare only sets of the same size.

    Args:
        features: (N, F), N at least 2.
        references: (M, F), M at least 2.

    Raises:
        ArgumentError: If the sets have different widths, or fewer than two rows.

    Source: Dowson and Landau 1982; Ledoit and Wolf 2004 for the shrinkage. With
    `texture_features` this is not the FID, whose features are those of a trained network.
    """
    if features.shape[1:] != references.shape[1:] or min(len(features), len(references)) < 2:
        raise ArgumentError(
            f"the Frechet distance takes two sets (N, F) and (M, F) of at least two rows; found "
            f"{tuple(features.shape)} and {tuple(references.shape)}"
        )
    deviation = references.std(0).clamp_min(1e-6)
    a, b = features / deviation, references / deviation
    between = (a.mean(0) - b.mean(0)).square().sum()
    covariance_a, covariance_b = _shrunk_covariance(a), _shrunk_covariance(b)
    root = _matrix_root(covariance_a)
    cross = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp_min(0).sqrt().sum()
    distance = between + covariance_a.trace() + covariance_b.trace() - 2 * cross
    return max(float(distance), 0.0)


def _shrunk_covariance(x: Tensor) -> Tensor:
    count, width = x.shape
    x = x - x.mean(0)
    covariance = x.T @ x / count
    target = covariance.trace() / width * torch.eye(width, dtype=x.dtype, device=x.device)
    spread = (covariance - target).square().sum()
    noise = (x.square().sum(1).square().sum() / count - covariance.square().sum()) / count
    share = (noise / spread.clamp_min(1e-12)).clamp(0, 1)
    return (1 - share) * covariance + share * target


def _matrix_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root
