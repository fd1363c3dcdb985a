"""Cost files: what `ldm-scaling cost` measured, one JSON file for each kind of device."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from etils import epath

from ldm_scaling import files
from ldm_scaling.errors import UserError
from ldm_scaling.parallel import chips
from ldm_scaling.study.costing import PARTS, Price

FORMAT = 2  # of 1, which held one row for each name, are read too
FOLDER = "costs"


Around = tuple[str, str | None, int | None]
"""Names of a decoder and of a text encoder, None where that is not known, and tokens of a caption,
as `MemberCost` has them."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Measured seconds of one program.

    Attributes:
      part: see `costing.PARTS`.
      name: the member, see `MemberCost.timed`, decoder or text encoder.
      batch: pictures or captions of one call; a guided pair is one.
      key: hash of all that decides the program: the spec, the types, the versions.
      dtype: what it computes in.
      seconds: median of a call.
      low, high: its quartiles.
      first: seconds of the first call, which warms up; compilation is not in it.
      runs: timed calls behind the median.
      bytes: that the program needs on the device, by its compiler; on a CPU at least what its
        largest operation holds.
    """

    part: str
    name: str
    batch: int
    key: str
    dtype: str
    seconds: float
    low: float
    high: float
    first: float
    runs: int
    bytes: int

    @property
    def place(self) -> tuple[str, str, int]:
        """What has one timing in a file."""
        return (self.part, self.name, self.batch)


@dataclasses.dataclass(frozen=True)
class Skipped:
    """What was not measured.

    Attributes:
      part, name, batch: as `Timing`'s.
      why: in words.
    """

    part: str
    name: str
    batch: int
    why: str

    @property
    def place(self) -> tuple[str, str, int]:
        """As `Timing.place`."""
        return (self.part, self.name, self.batch)


@dataclasses.dataclass(frozen=True)
class MemberCost:
    """What is known of a member without measuring.

    Attributes:
      name, base_channels: of the member.
      params: parameters.
      gflops: XLA's count of a call, see `models.cost`.
      analytic_gflops: of its products by hand, see `models.analytic`; None of what is no U-Net.
      norm_cost: gflops over those of `reference`.
      reference: the member of cost 1.
      decoder, decoder_gflops: name of what makes pictures of its latents; FLOPs of one picture.
      text, text_gflops: name of what makes states of its captions, None where it is not known
        here; FLOPs of one caption.
      tokens: of a caption; None where those are as many as the zoo counts the network at.
    """

    name: str
    base_channels: int
    params: int
    gflops: float
    analytic_gflops: float | None
    norm_cost: float
    reference: str
    decoder: str
    decoder_gflops: float
    text: str | None
    text_gflops: float | None
    tokens: int | None = None

    @property
    def timed(self) -> str:
        """Name of its network's timings."""
        return self.name if self.tokens is None else f"{self.name}-{self.tokens}"

    @property
    def around(self) -> Around:
        """What is around it."""
        return (self.decoder, self.text, self.tokens)


@dataclasses.dataclass(frozen=True)
class CostFile:
    """All that was measured on one kind of device.

    Attributes:
      device_kind: as JAX calls it; a CPU's with its model and number of cores.
      platform: `cpu`, `gpu` or `tpu`.
      members: one for each name, decoder, text encoder and length of captions.
      timings, skipped: one of either for each part, name and batch size.
    """

    device_kind: str
    platform: str
    members: Sequence[MemberCost] = ()
    timings: Sequence[Timing] = ()
    skipped: Sequence[Skipped] = ()

    def timing(self, part: str, name: str | None, batch: int) -> Timing | None:
        """One of them."""
        place = (part, name, batch)
        return next((t for t in self.timings if t.place == place), None)

    def plus(self, *new: Timing | Skipped | MemberCost) -> CostFile:
        """With these in place of what there was."""
        members = {(m.name, m.around): m for m in self.members}
        members |= {(m.name, m.around): m for m in new if isinstance(m, MemberCost)}
        rows = {r.place: r for r in (*self.skipped, *self.timings)}
        for row in new:
            if not isinstance(row, MemberCost):
                rows[row.place] = row
        own = list(dict.fromkeys(m.timed for m in members.values()))
        names = [*own, *sorted({name for _, name, _ in rows} - set(own))]
        order = sorted(rows, key=lambda p: (names.index(p[1]), PARTS.index(p[0]), p[2]))
        return dataclasses.replace(
            self, members=tuple(members.values()),
            timings=tuple(rows[p] for p in order if isinstance(rows[p], Timing)),
            skipped=tuple(rows[p] for p in order if isinstance(rows[p], Skipped)),
        )

    def prices(
        self, around: Mapping[str, Collection[Around]] | None = None,
        names: Collection[str] | None = None,
    ) -> dict[str, Price]:
        """Member -> what its parts cost, for `costing.sampling`.

        Args:
          around: of each member only with these decoders, text encoders and lengths of captions;
            with any if None.
          names: of members; all if None.

        Raises:
          UserError: where a member was measured with several that are meant.
        """
        out: dict[str, Price] = {}
        for m in self.members:
            if (names is not None and m.name not in names) or (
                    around is not None and m.around not in around.get(m.name, ())):
                continue
            if m.name in out:
                several = [
                    " ".join(filter(None, [o.decoder, o.text, o.tokens and f"{o.tokens} tokens"]))
                    for o in self.members if o.name == m.name]
                raise UserError(
                    f"{m.name} was measured on {self.device_kind} with several autoencoders, "
                    f"text encoders or lengths of captions ({', '.join(several)}), and which is "
                    "meant is not known: give the workdir as --records, or measure one of them "
                    "into a file of its own (ldm-scaling cost --to=FILE) and give --costs=FILE"
                )
            own = {"network": m.timed, "guided": m.timed, "decoder": m.decoder, "text": m.text}
            timings = [t for t in self.timings if t.name == own[t.part]]
            seconds = {(t.part, t.batch): t.seconds / t.batch for t in timings}
            out[m.name] = Price(
                m.name, m.gflops, m.norm_cost, m.decoder_gflops, m.text_gflops, self.device_kind,
                seconds, {(t.part, t.batch): t.bytes for t in timings},
            )
        return out


def file_name(device_kind: str) -> str:
    """`NVIDIA H100 80GB HBM3` is `nvidia-h100-80gb-hbm3.json`."""
    return re.sub(r"[^a-z0-9.]+", "-", device_kind.lower()).strip("-") + ".json"


def write(path: epath.PathLike, found: CostFile) -> None:
    """Whole or not at all."""
    body: dict[str, Any] = {"format": FORMAT, **dataclasses.asdict(found)}
    files.write_json(path, body, allow_nan=False)


def read(path: epath.PathLike) -> CostFile:
    """Reads a file. Raises `UserError` where there is none or it is something else."""
    path = epath.Path(path)
    try:
        body = json.loads(path.read_text())
        if (number := body.pop("format")) not in (1, FORMAT):
            raise ValueError("another format")
        rows = body.pop("members")
        members = tuple(MemberCost(**m) for m in (rows.values() if number == 1 else rows))
        timings = tuple(Timing(**t) for t in body.pop("timings"))
        skipped = tuple(Skipped(**s) for s in body.pop("skipped"))
        return CostFile(members=members, timings=timings, skipped=skipped, **body)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from e
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise UserError(
            f"{path} is not what  ldm-scaling cost  writes ({type(e).__name__}: {e}): remove it "
            "and measure again"
        ) from e


def _there(place: epath.PathLike) -> list[CostFile]:
    """Those of a folder, or the one of a file; [] where there is no such place."""
    place = epath.Path(place)
    if place.is_dir():
        return [read(p) for p in sorted(place.glob("*.json"))]
    return [read(place)] if place.exists() else []


def _meant(found: CostFile, device: str) -> int:
    """How well a name fits a device: 3 is JAX's kind, 2 the short name of `parallel.chips`, 1 a
    part of the kind or the platform, 0 not at all."""
    kind, asked = found.device_kind.lower(), device.strip().lower()
    chip = chips.by_kind(found.device_kind)
    if asked == kind:
        return 3
    if chip is not None and asked == chip.name:
        return 2
    return int(bool(asked) and (asked in kind or asked == found.platform))


def of_device(place: epath.PathLike, device: str) -> CostFile:
    """The file of a device.

    Raises:
      UserError: where nothing was measured on such a device, or several kinds are meant.
    """
    there = _there(place)
    fits = [_meant(f, device) for f in there]
    found = [f for f, fit in zip(there, fits) if fit and fit == max(fits)]
    if len(found) == 1:
        return found[0]
    if found:
        kinds = ", ".join(repr(f.device_kind) for f in found)
        raise UserError(f"--device={device}: {kinds} are all meant; write one of them whole")
    have = ", ".join(repr(f.device_kind) for f in there) or "nothing"
    raise UserError(
        f"--device={device}: there are no measured seconds of it in {place} (there is {have}): run "
        "ldm-scaling cost on such a machine and bring the file here, or say by --costs= where it "
        "lies"
    )
