"""Features on disk, in shards: written as they come, by any host, and merged by image index.

A run that is stopped goes on where it was: `done` says which images are there. A shard is written
under a temporary name and renamed, so that one half written is never read. In memory are one
shard while writing, and all features, in the type they were stored in, while merging: 245 MB for
30,000 images of 2048 float32 numbers.
"""

from __future__ import annotations

import hashlib

import numpy as np
from etils import epath

from ldm_scaling.errors import UserError
from ldm_scaling.metrics import arrays

_KIND = "feature shard"
_GLOB = "features-*.npz"


def write(
    folder: epath.PathLike, index_N: np.ndarray, features_ND: np.ndarray, extractor: str
) -> epath.Path:
    """Writes features (N, D) of the images `index_N` as one shard; returns its file.

    Raises:
      UserError: when an index repeats or is negative, there is not one for each row, or a feature
        is not finite.
    """
    index_N, features_ND = np.asarray(index_N), np.asarray(features_ND)
    arrays.rows(features_ND, "features")
    fits = index_N.ndim == 1 and len(index_N) == len(features_ND) > 0
    if not fits or index_N.dtype.kind not in "iu" or index_N.min() < 0:
        raise UserError(
            f"{len(features_ND)} rows of features need as many image indices (0, 1, ...), got "
            f"{index_N.dtype} {index_N.shape}"
        )
    if len(np.unique(index_N)) < len(index_N):
        raise UserError("an image index is twice in one shard: give each image once")
    # Named by its images: the same ones written again replace their file.
    name = hashlib.sha256(np.sort(index_N).astype("<i8").tobytes()).hexdigest()[:12]
    path = epath.Path(folder) / f"features-{index_N.min():09d}-{name}.npz"
    meta = {"extractor": extractor}
    arrays.save(path, _KIND, {"index_N": index_N, "features_ND": features_ND}, meta)
    return path


def _shards(folder: epath.PathLike, extractor: str):
    folder = epath.Path(folder)
    for path in sorted(folder.glob(_GLOB)) if folder.exists() else ():
        values, _ = arrays.load_of(
            path, _KIND, extractor, "use another folder, or delete this one")
        yield path, values["index_N"], values["features_ND"]


def done(folder: epath.PathLike, extractor: str) -> np.ndarray:
    """Sorted indices of the images whose features are in the folder; none where it is missing.

    Raises:
      UserError: when a shard is damaged or of another `extractor`.
    """
    found = [index_N for _, index_N, _ in _shards(folder, extractor)]
    return np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)


def merge(folder: epath.PathLike, extractor: str, count: int) -> np.ndarray:
    """Features (count, D) of images 0 to count - 1, in their order.

    Raises:
      UserError: when a shard is damaged or of another `extractor`, widths differ, an image is
        missing or surplus, or is in two shards with different features.
    """
    whole_ND, have_N = None, np.zeros(count, bool)
    for path, index_N, features_ND in _shards(folder, extractor):
        if index_N.max() >= count:
            raise UserError(
                f"{path} holds image {index_N.max()} of {count}: it belongs to another evaluation"
            )
        if whole_ND is None:
            whole_ND = np.zeros((count, features_ND.shape[1]), features_ND.dtype)
        if features_ND.shape[1] != whole_ND.shape[1]:
            raise UserError(
                f"{path} holds features of width {features_ND.shape[1]}, the shards before it of "
                f"{whole_ND.shape[1]}: delete the folder and run again"
            )
        again_N = have_N[index_N]
        # Another batch size rounds differently; another image is further away.
        if not np.allclose(whole_ND[index_N[again_N]], features_ND[again_N], rtol=1e-3, atol=1e-4):
            raise UserError(
                f"{path} and an earlier shard hold different features of the same image: delete "
                "the folder and run again"
            )
        whole_ND[index_N[~again_N]] = features_ND[~again_N]
        have_N[index_N] = True
    if not have_N.all() or whole_ND is None:
        missing = int((~have_N).sum())
        raise UserError(
            f"{folder} lacks features of {missing} of {count} images, the first is "
            f"{int(have_N.argmin()) if count else 0}: run the extraction again, it does what is "
            "missing"
        )
    return whole_ND
