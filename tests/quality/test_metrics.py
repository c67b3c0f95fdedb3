"""Metrics against cases whose value is known."""

import doctest
import math

import pytest
import torch
from torch import Tensor

from fastvar_fx.quality import metrics
from fastvar_fx.quality.metrics import (
    Interval,
    frechet_distance,
    psnr,
    radial_spectrum,
    spectrum_distance,
    ssim,
    texture_features,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def waves(side: int, cycles: int, height: int | None = None) -> Tensor:
    """An image of stripes that fit `cycles` times into its width."""
    phase = 2 * math.pi * cycles * torch.arange(side) / side
    return (0.5 + 0.4 * phase.sin()).expand(1, 3, height or side, side)


def test_docstrings() -> None:
    result = doctest.testmod(metrics)
    assert result.attempted > 0
    assert result.failed == 0


# -- intervals ----------------------------------------------------------------------------------


def test_an_interval_is_students() -> None:
    found = Interval.of([4.0, 6.0])
    assert found.mean == 5
    assert found.half == pytest.approx(12.706, rel=1e-4)
    many = Interval.of([math.sin(i) for i in range(1000)])
    assert many.half == pytest.approx(1.962 * math.sqrt(0.5 / 1000), rel=0.01)


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (6, 2.44691), (30, 2.04227), (120, 1.97993)],
)
def test_the_quantiles_are_those_of_published_tables(freedom: int, quantile: float) -> None:
    values = [0.0] * freedom + [1.0]
    standard_error = math.sqrt(1 / (freedom + 1) / (freedom + 1))
    assert Interval.of(values).half == pytest.approx(quantile * standard_error, rel=1e-5)


def test_what_has_no_interval_says_so() -> None:
    assert Interval.of([3.0]).text() == "3.00"
    assert Interval.of([math.inf, 3.0]).as_dict() == {"mean": None, "half": None, "count": 2}
    with pytest.raises(ValueError, match="at least one"):
        Interval.of([])


# -- pairs --------------------------------------------------------------------------------------


def test_psnr_of_each_image_by_itself() -> None:
    reference = torch.zeros(2, 3, 4, 4)
    images = reference.clone()
    images[1] = 0.01
    assert psnr(images, reference).tolist() == pytest.approx([math.inf, 40.0])
    assert psnr(images, reference, span=10.0)[1] == pytest.approx(60.0)


def test_ssim_tells_structure_from_brightness() -> None:
    image = noise(1, 3, 24, 24)
    assert ssim(image, image) == pytest.approx(1.0)
    brighter, shuffled = image * 0.9 + 0.05, image.flip(-1)
    assert ssim(brighter, image) > 0.95
    assert ssim(shuffled, image) < 0.2


def test_ssim_of_constant_images_is_the_papers_formula() -> None:
    dark, bright = torch.full((1, 1, 11, 11), 0.2), torch.full((1, 1, 11, 11), 0.6)
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert ssim(dark, bright) == pytest.approx(expected)


def test_pairs_must_fit() -> None:
    for metric in (psnr, ssim):
        with pytest.raises(ValueError, match=r"found \(1, 3, 8, 8\) and \(1, 3, 9, 8\)"):
            metric(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 9, 8))
    with pytest.raises(ValueError, match="11 x 11"):
        ssim(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))


# -- spectra ------------------------------------------------------------------------------------


@pytest.mark.parametrize("height", [32, 48])
@pytest.mark.parametrize("cycles", [3, 9])
def test_stripes_are_in_the_ring_of_their_frequency(cycles: int, height: int) -> None:
    spectrum = radial_spectrum(waves(32, cycles, height))
    assert spectrum.shape == (1, 16)
    assert abs(int(spectrum.argmax()) - (cycles - 1)) <= 1, "the window spreads it to the next"
    turned = radial_spectrum(waves(32, cycles, height).mT)
    torch.testing.assert_close(spectrum, turned)


def test_white_noise_has_a_flat_spectrum_and_blur_lowers_its_end() -> None:
    image = noise(8, 3, 64, 64)
    spectrum = radial_spectrum(image).mean(0)
    assert spectrum[4:].max() - spectrum[4:].min() < 3
    blurred = radial_spectrum(torch.nn.functional.avg_pool2d(image, 3, 1, 1)).mean(0)
    assert spectrum[-1] - blurred[-1] > 6
    assert spectrum_distance(blurred, spectrum) > 3
    assert spectrum_distance(spectrum, spectrum) == 0


def test_half_the_amplitude_is_six_decibels_everywhere() -> None:
    image = noise(2, 3, 32, 32)
    apart = spectrum_distance(radial_spectrum(image / 2), radial_spectrum(image))
    assert apart.tolist() == pytest.approx([6.02, 6.02], abs=0.01)


# -- sets ---------------------------------------------------------------------------------------


def test_texture_features_tell_orientation_scale_and_color() -> None:
    def oriented(image: Tensor) -> Tensor:
        """Energies by level and orientation, of all windows."""
        return texture_features(image)[:, 6:].mean(0).view(4, 4)

    fine = oriented(waves(64, 16))
    assert fine.argmax() == 0, "the finest level, vertical stripes"
    assert oriented(waves(64, 16).mT)[0].argmax() == 2
    assert oriented(waves(64, 8))[:, 0].argmax() == 1
    red = torch.zeros(1, 3, 64, 64)
    red[:, 0] = 1.0
    torch.testing.assert_close(
        texture_features(red)[0, :3].float(), torch.tensor([1 / 3, 0.5, 0.25])
    )
    with pytest.raises(ValueError, match="at least 64"):
        texture_features(torch.zeros(1, 3, 32, 64))


def test_frechet_distance_of_gaussians_is_known() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 20_000, 3, generator=generator, dtype=torch.float64)
    assert frechet_distance(a, b) < 0.01
    shifted = b * torch.tensor([1.0, 2.0, 0.5]) + torch.tensor([3.0, 0.0, 0.0])
    assert frechet_distance(shifted, a) == pytest.approx(9 + 1 + 0.25, rel=0.03)


def test_frechet_distance_grows_with_blur_even_for_few_images() -> None:
    held_out, others = noise(4, 3, 64, 64), noise(4, 3, 64, 64, seed=1)
    blurred = torch.nn.functional.avg_pool2d(others, 3, 1, 1)
    reference = texture_features(held_out)
    near, far = (frechet_distance(texture_features(x), reference) for x in (others, blurred))
    assert 0 <= near < far / 3


def test_sets_of_features_must_fit() -> None:
    with pytest.raises(ValueError, match=r"found \(5, 3\) and \(5, 4\)"):
        frechet_distance(torch.zeros(5, 3), torch.zeros(5, 4))
    with pytest.raises(ValueError, match="at least two"):
        frechet_distance(torch.zeros(1, 3), torch.zeros(5, 3))
