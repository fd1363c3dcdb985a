"""Reference statistics on disk: our files say what they are of, the field's do not."""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Iterable

import numpy as np
from etils import epath

from ldm_scaling import files
from ldm_scaling.errors import UserError
from ldm_scaling.metrics import arrays
from ldm_scaling.metrics.frechet import ReferenceStats
from ldm_scaling.metrics.moments import Moments

_KIND = "reference statistics"


@dataclasses.dataclass(frozen=True)
class Origin:
    """What reference statistics are of. Values of different origins do not compare.

    Attributes:
      extractor: hash of the feature network, its weights and its input transform.
      resizer: name of the resize to the network's side, e.g. "tf2015" or "clean".
      resolution: side in pixels of the images before that resize.
      count: how many images.
      images: `list_hash` of the images.
    """

    extractor: str
    resizer: str
    resolution: int
    count: int
    images: str


def list_hash(images: Iterable[str]) -> str:
    """Hash of a set of images by their names or content hashes, whatever their order."""
    return files.sha256_of(sorted(images))


def save(path: epath.PathLike, moments: Moments, origin: Origin) -> None:
    """Writes reference statistics to an .npz, whole or not at all.

    Raises:
      UserError: when the file cannot be written or `origin` counts other images than `moments`.
    """
    if origin.count != moments.n:
        raise UserError(
            f"{path}: statistics of {moments.n} images cannot be saved as those of {origin.count}"
        )
    values = {"mean_D": moments.mean_D, "M2_DD": moments.M2_DD}
    arrays.save(path, _KIND, values, dataclasses.asdict(origin))


def origin_of(path: epath.PathLike) -> Origin:
    """What a file written by `save` says that it is of."""
    return Origin(**arrays.load(path, _KIND)[1])


def load(path: epath.PathLike, expected: Origin) -> ReferenceStats:
    """Reads statistics written by `save`.

    Raises:
      UserError: when the file is missing or damaged, or differs from `expected` in anything; the
        message gives the file's and the expected value of all that differs.
    """
    values, meta = arrays.load(path, _KIND)
    wanted = dataclasses.asdict(expected)
    differ = [f"{k} {meta[k]!r} instead of {wanted[k]!r}" for k in wanted if meta[k] != wanted[k]]
    if differ:
        raise UserError(
            f"{path} has {', '.join(differ)}: name the reference made in the same way as the "
            "images to be scored, or make it anew"
        )
    return ReferenceStats(Moments(n=meta["count"], **values), meta["extractor"])


def _read(path: epath.PathLike) -> dict[str, np.ndarray]:
    try:
        with epath.Path(path).open("rb") as file:
            whole = np.load(file, allow_pickle=False)
            if isinstance(whole, np.ndarray):
                return {"feats": whole}
            return {name: whole[name] for name in whole.files}
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from e
    except (ValueError, EOFError, zipfile.BadZipFile) as e:
        if epath.Path(path).suffix == ".pkl":
            raise UserError(
                f"{path} is a pickle, as EDM2 writes statistics, and is not read: it may run code. "
                "Convert one that you trust: held = pickle.load(open(PKL, 'rb'))['fid']; "
                "numpy.savez(NPZ, mu=held['mu'], sigma=held['sigma'])"
            ) from e
        raise UserError(f"{path} is no file of numpy arrays, or is damaged: {e}") from e


def _entry(path: epath.PathLike, wanted: str, held: dict[str, np.ndarray]) -> np.ndarray:
    if wanted not in held:
        raise UserError(
            f"{path} holds no {wanted!r}, only {sorted(held)}: statistics have 'mu' and 'sigma', "
            "features 'feats'"
        )
    return np.asarray(held[wanted], np.float64)


def load_published(path: epath.PathLike, *, extractor: str) -> ReferenceStats:
    """Reads an .npz with `mu` and `sigma`, as pytorch-fid, clean-fid, ADM and EDM write it.

    Such a file does not say how many images it is of, nor which network and which resize: the
    caller does, and answers for it.

    Args:
      path: the file.
      extractor: hash of the network that made it.

    Raises:
      UserError: when the file is missing, holds other arrays, or no mean and covariance.
    """
    held = _read(path)
    mean_D, sigma_DD = (_entry(path, name, held) for name in ("mu", "sigma"))
    d = mean_D.size
    if mean_D.shape != (d,) or sigma_DD.shape != (d, d):
        raise UserError(
            f"{path}: 'mu' {mean_D.shape} and 'sigma' {sigma_DD.shape} are no mean and covariance"
        )
    finite = np.isfinite(mean_D).all() and np.isfinite(sigma_DD).all()
    if not finite or np.diagonal(sigma_DD).min() < 0:
        raise UserError(f"{path}: 'mu' or 'sigma' is not finite, or a variance is negative")
    if not np.allclose(sigma_DD, sigma_DD.T, rtol=1e-3, atol=1e-5 * np.abs(sigma_DD).max()):
        raise UserError(f"{path}: 'sigma' is not symmetric, so it is no covariance")
    return ReferenceStats(
        Moments(2, mean_D, (sigma_DD + sigma_DD.T) / 2), extractor, counted=False)


def load_features(path: epath.PathLike) -> np.ndarray:
    """Reads features (N, D) of real images: clean-fid's `feats` in an .npz, or a plain .npy."""
    return arrays.rows(_entry(path, "feats", _read(path)), f"features in {path}")
