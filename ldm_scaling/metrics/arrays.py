"""Checked float64 features, their linear algebra's threads, and files that tell their damage."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import scipy
import threadpoolctl
from etils import epath

from ldm_scaling import files
from ldm_scaling.errors import UserError

_DIGEST = hashlib.sha256().digest_size


@functools.cache
def _blas() -> threadpoolctl.ThreadpoolController:
    _ = scipy.linalg  # Loads its BLAS, another than numpy's: only those that are there are held.
    return threadpoolctl.ThreadpoolController()


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Decompositions of matrices as small as ours: in one thread, as context or decorator.

    OpenBLAS's threads wait for each other by spinning. On a machine that does anything else at
    the same time, or whose container may use fewer cores than it shows, an eigenvalue problem of
    size 64 then takes fifty times as long. It also rounds differently with their number.
    """
    with _blas().limit(limits=1, user_api="blas"):
        yield


def rows(values: Any, what: str) -> np.ndarray:
    """`values` as a finite float64 matrix (N, D). Raises `UserError` that names `what`."""
    matrix_ND = np.asarray(values, np.float64)
    if matrix_ND.ndim != 2 or matrix_ND.shape[1] == 0:
        raise UserError(
            f"{what} have shape {matrix_ND.shape}: give a matrix with one row per image"
        )
    bad_N = ~np.isfinite(matrix_ND).all(axis=1)
    if bad_N.any():
        raise UserError(
            f"{what} are not finite in {int(bad_N.sum())} of {len(matrix_ND)} rows, the first is "
            f"row {int(bad_N.argmax())}: check the images or the network they come from"
        )
    return matrix_ND


def freeze(array: Any) -> np.ndarray:
    """A read-only float64 copy."""
    array = np.array(array, np.float64, order="C")
    array.flags.writeable = False
    return array


def content_hash(arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> str:
    """Hash of the values of some arrays and of what is said about them."""
    return files.sha256_of({"arrays": dict(sorted(arrays.items())), "meta": dict(meta)})


def save(
    path: epath.PathLike, kind: str, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]
) -> None:
    """Writes arrays and a JSON-able `meta` to one .npz by atomic rename.

    The SHA-256 of the archive follows it; `np.load` reads the file all the same.
    """
    buffer = io.BytesIO()
    header = json.dumps({"kind": kind, "meta": dict(meta)}, sort_keys=True)
    np.savez(buffer, header=np.array(header), **arrays)
    data = buffer.getvalue()
    files.atomic_write_bytes(path, data + hashlib.sha256(data).digest())


def load(path: epath.PathLike, kind: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads what `save` wrote: arrays and meta.

    Raises `UserError` when the file is missing, damaged or of another kind.
    """
    path = epath.Path(path)
    mend = "delete it and run the same command again to have it made anew"
    try:
        whole = path.read_bytes()
    except OSError as e:
        raise UserError(f"cannot read {path} ({kind}): {e.strerror or e}") from e
    data, digest = whole[:-_DIGEST], whole[-_DIGEST:]
    if hashlib.sha256(data).digest() != digest:
        raise UserError(f"{path} ({kind}) is damaged (its contents do not fit its hash): {mend}")
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    header = json.loads(str(arrays.pop("header")))
    if header["kind"] != kind:
        raise UserError(f"{path} holds {header['kind']}, not {kind}: {mend}")
    return arrays, header["meta"]


def load_of(
    path: epath.PathLike, kind: str, extractor: str,
    remedy: str = "delete the file to have it made anew, or use another workdir",
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """As `load`, where the meta names the feature network (`extractor`) that made the arrays.

    Raises `UserError` as `load`, and with the remedy where that is another.
    """
    values, meta = load(path, kind)
    if meta["extractor"] != extractor:
        raise UserError(
            f"{path} was made with feature network {meta['extractor']}, this run uses "
            f"{extractor}: {remedy}"
        )
    return values, meta
