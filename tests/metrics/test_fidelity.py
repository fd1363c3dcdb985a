"""PSNR and SSIM against basicsr, torchmetrics and scikit-image, and at known truths."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import pytest

from ldm_scaling.errors import UserError
from ldm_scaling.metrics import fidelity
from tests.metrics import peers

NEEDED = "compares with peers: pip install -e '.[parity]'"


def _pictures(height=40, width=53, seed=0):
    """Smooth pictures and noisy ones of them, the last of which is of another brightness."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    phase = rng.uniform(0, 6, (3, 1, 1, 3))
    clean = 128 + 90 * np.sin(0.2 * x[..., None] + 0.13 * y[..., None] + phase)
    noisy = clean + rng.normal(size=clean.shape) * np.array([2, 15, 40])[:, None, None, None]
    noisy[-1] += 30
    return tuple(np.clip(v, 0, 255).round().astype(np.uint8) for v in (clean, noisy))


def _basicsr() -> SimpleNamespace:
    """basicsr's functions of pictures, BGR."""
    colours = peers.functions("basicsr", "utils/color_util.py")
    util = peers.functions("basicsr", "metrics/metric_util.py", bgr2ycbcr=colours.bgr2ycbcr)
    return peers.functions(
        "basicsr", "metrics/psnr_ssim.py", cv2=pytest.importorskip("cv2", reason=NEEDED),
        reorder_image=util.reorder_image, to_y_channel=util.to_y_channel,
        torch=pytest.importorskip("torch", reason=NEEDED),
        METRIC_REGISTRY=SimpleNamespace(register=lambda: lambda function: function),
    )


@pytest.mark.parametrize("luma", [False, True])
def test_both_equal_basicsr(luma):
    (a, b), theirs = _pictures(), _basicsr()
    for ours, name in ((fidelity.psnr, "calculate_psnr"), (fidelity.ssim, "calculate_ssim")):
        wanted = [
            getattr(theirs, name)(x[..., ::-1], y[..., ::-1], crop_border=0, test_y_channel=luma)
            for x, y in zip(a, b)
        ]
        # Their luma is in float32.
        np.testing.assert_allclose(ours(a, b, luma), wanted, rtol=1e-5 if luma else 1e-10)


def _torchmetrics() -> tuple[Callable, Callable]:
    torch = pytest.importorskip("torch", reason=NEEDED)
    there = {
        "torch": torch, "tensor": torch.tensor, "Tensor": torch.Tensor, "Sequence": Sequence,
        "F": torch.nn.functional, "_check_same_shape": lambda x, y: None,
        "reduce": lambda x, reduction: x,
    }
    given = vars(peers.functions("torchmetrics", "functional/image/utils.py", **there))
    ratio = peers.functions("torchmetrics", "functional/image/psnr.py", **given)
    return ratio.peak_signal_noise_ratio, peers.functions(
        "torchmetrics", "functional/image/ssim.py", **given
    ).structural_similarity_index_measure


def test_both_equal_torchmetrics():
    torch = pytest.importorskip("torch", reason=NEEDED)
    a, b = _pictures()
    x, y = (torch.from_numpy(v.astype(np.float64)).movedim(-1, 1) for v in (a, b))
    ratio, similarity = _torchmetrics()
    for i in range(len(a)):
        theirs = float(ratio(x[i], y[i], data_range=255.0))
        assert fidelity.psnr(a, b)[i] == pytest.approx(theirs, rel=1e-6)
    # Its mean takes in borders, which it reflects: the interior is what MATLAB's code has.
    _, map_NCHW = similarity(x, y, data_range=255.0, return_full_image=True)
    theirs = map_NCHW[..., 5:-5, 5:-5].mean((1, 2, 3))
    np.testing.assert_allclose(fidelity.ssim(a, b), theirs.numpy(), rtol=1e-6)


def test_both_equal_scikit_image():
    metrics = pytest.importorskip("skimage.metrics", reason=NEEDED)
    a, b = _pictures(seed=1)
    wanted = [metrics.peak_signal_noise_ratio(x, y, data_range=255) for x, y in zip(a, b)]
    np.testing.assert_allclose(fidelity.psnr(a, b), wanted, rtol=1e-12)
    wanted = [
        metrics.structural_similarity(
            x, y, data_range=255, channel_axis=-1, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )
        for x, y in zip(a, b)
    ]
    np.testing.assert_allclose(fidelity.ssim(a, b), wanted, rtol=1e-10)


def test_known_truths():
    a, b = _pictures()
    grey = np.full((1, 16, 16, 3), 100, np.uint8)
    assert fidelity.psnr(grey, grey + 5) == pytest.approx(10 * np.log10(255**2 / 25))
    # A level of grey is 219 / 255 of one of luma.
    less = 20 * np.log10(219 / 255)
    assert fidelity.psnr(grey, grey + 5, luma=True) == pytest.approx(
        fidelity.psnr(grey, grey + 5) - less
    )
    assert np.isinf(fidelity.psnr(a, a)).all()
    for luma in (False, True):
        np.testing.assert_allclose(fidelity.ssim(a, a, luma), 1, rtol=1e-12)
        # Neither has a first and a second side.
        for both in (fidelity.ssim, fidelity.psnr):
            np.testing.assert_allclose(both(a, b, luma), both(b, a, luma), rtol=1e-12)
        # More noise is worse.
        assert (np.diff(fidelity.psnr(a, b, luma)) < 0).all()
        assert (np.diff(fidelity.ssim(a, b, luma)) < 0).all()


def test_what_does_not_fit_is_refused():
    a, b = _pictures()
    with pytest.raises(UserError, match="SSIM of pictures of 10x53 pixels"):
        fidelity.ssim(a[:, :10], b[:, :10])
    assert fidelity.ssim(a[:, :11], b[:, :11]).shape == (3,)
    for wrong in (a[:, 1:], a[..., :1], a.astype(np.float32), a[:2]):
        with pytest.raises(ValueError, match="of one shape"):
            fidelity.psnr(wrong, b)
