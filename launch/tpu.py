"""TPU slices by topology: what each of Google's interfaces calls them, chips, hosts.

    python3 launch/tpu.py v5e:16x16      # prints what launch/tpu_vm.sh needs to know

Source: Cloud TPU's "TPU configurations" and GKE's "Plan TPUs" pages.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
import sys

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from launch.common import LaunchError, entry


@dataclasses.dataclass(frozen=True)
class Generation:
    """One kind of TPU.

    Attributes:
      axes: of a topology.
      accelerator: prefix of the TPU API's accelerator type.
      per_chip: what that type's number counts, cores (2 a chip) or chips (1).
      runtime: the TPU VM's image.
      gke: value of the node label `cloud.google.com/gke-tpu-accelerator`.
      machine: GKE's machine type without its `-4t`.
      most: chips of the largest slice.
      whole: chips of a slice that still is one host; larger slices have 4 chips on each.
    """

    axes: int
    accelerator: str
    per_chip: int
    runtime: str
    gke: str
    machine: str
    most: int
    whole: int


GENERATIONS = {
    #                 axes accelerator, per  runtime                 gke
    "v4": Generation(  3, "v4",         2, "tpu-ubuntu2204-base",  "tpu-v4-podslice",
                       "ct4p-hightpu",  4096, 4),
    "v5e": Generation( 2, "v5litepod",  1, "v2-alpha-tpuv5-lite",  "tpu-v5-lite-podslice",
                       "ct5lp-hightpu", 256, 8),
    "v5p": Generation( 3, "v5p",        2, "v2-alpha-tpuv5",       "tpu-v5p-slice",
                       "ct5p-hightpu",  6144, 4),
    "v6e": Generation( 2, "v6e",        1, "v2-alpha-tpuv6e",      "tpu-v6e-slice",
                       "ct6e-standard", 256, 8),
}  # fmt: skip

# Slices of two axes come in these shapes only.
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
# Small slices of three axes; from 64 chips on every axis is a multiple of 4.
SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")


@dataclasses.dataclass(frozen=True)
class Slice:
    """A TPU slice, as `v5e:16x16` names it.

    Raises:
      LaunchError: when there is no such kind or shape.
    """

    generation: str
    shape: str

    def __post_init__(self):
        kinds = ", ".join(GENERATIONS)
        if self.generation not in GENERATIONS:
            raise LaunchError(f"no TPU is called {self.generation!r}; write one of {kinds}")
        axes = self._axes()
        kind, chips = GENERATIONS[self.generation], math.prod(axes)
        if kind.axes == 2:
            fits, shapes = self.shape in FLAT, f"one of {', '.join(FLAT)}"
        else:
            fours = len(axes) == 3 and all(n % 4 == 0 and n > 0 for n in axes)
            fits = self.shape in SMALL or (fours and list(axes) == sorted(axes))
            shapes = f"one of {', '.join(SMALL)} or three ascending multiples of 4, as 4x8x8"
        if not fits or chips > kind.most:
            raise LaunchError(
                f"{self.generation}:{self.shape} is no slice: a {self.generation} topology is "
                f"{shapes}, of at most {kind.most} chips"
            )

    @classmethod
    def parse(cls, text: str) -> Slice:
        """`v5e:16x16` -> the slice; so `v5e-256` and `v5litepod-256`, whose number is the TPU
        API's: chips, or cores of v4 and v5p, whose shape is then what it gives them."""
        name, _, number = text.partition("-")
        for generation, kind in GENERATIONS.items():
            if number.isdecimal() and name in (generation, kind.accelerator):
                return cls(generation, _shape(text, kind, int(number)))
        generation, colon, shape = text.partition(":")
        if not colon:
            raise LaunchError(f"topology {text!r}: write KIND:SHAPE, for example v5e:16x16")
        return cls(generation, shape)

    def _axes(self) -> tuple[int, ...]:
        try:
            return tuple(int(n) for n in self.shape.split("x"))
        except ValueError:
            raise LaunchError(
                f"topology shape {self.shape!r}: write chips along each axis, for example 16x16"
            ) from None

    def __str__(self) -> str:
        return f"{self.generation}:{self.shape}"

    @property
    def kind(self) -> Generation:
        return GENERATIONS[self.generation]

    @property
    def chips(self) -> int:
        return math.prod(self._axes())

    @property
    def chips_per_host(self) -> int:
        return self.chips if self.chips <= self.kind.whole else 4

    @property
    def hosts(self) -> int:
        """Virtual machines; each runs one process."""
        return self.chips // self.chips_per_host

    @property
    def machine_type(self) -> str:
        """GKE's machine type of a host."""
        return f"{self.kind.machine}-{self.chips_per_host}t"

    def request(self) -> list[str]:
        """The flags by which `gcloud compute tpus queued-resources create` knows this slice.

        Raises:
          LaunchError: where the TPU API has no name for it.
        """
        if self.generation == "v4":
            return ["--type=v4", f"--topology={self.shape}"]
        # An accelerator type counts chips or cores; the service picks the shape, near a cube.
        if self.kind.axes == 3 and self.shape != _cube(self.chips):
            raise LaunchError(
                f"{self}: a TPU VM of {self.chips} {self.generation} chips has the shape "
                f"{_cube(self.chips)}; take that, or launch/gke.py for this one"
            )
        return [f"--accelerator-type={self.kind.accelerator}-{self.chips * self.kind.per_chip}"]


def _shape(text: str, kind: Generation, number: int) -> str:
    """Of the slice that the TPU API names by a number."""
    chips, odd = divmod(number, kind.per_chip)
    flat = {math.prod(int(n) for n in shape.split("x")): shape for shape in FLAT}
    if odd or (kind.axes == 2 and chips not in flat):
        what = "cores, 2 a chip" if kind.per_chip == 2 else f"chips: {', '.join(map(str, flat))}"
        raise LaunchError(f"{text} is no slice: its number counts {what}; or write KIND:SHAPE")
    return flat[chips] if kind.axes == 2 else _cube(chips)


def _cube(chips: int) -> str:
    """The shape that the TPU API gives a three-axis slice: of all there are, nearest a cube."""
    small = {math.prod(int(n) for n in shape.split("x")): shape for shape in SMALL}
    if chips in small:
        return small[chips]
    shapes = [
        (a, b, chips // (a * b))
        for a in range(4, chips + 1, 4) if a**3 <= chips and chips % a == 0
        for b in range(a, chips // a + 1, 4)
        if a * b * b <= chips and chips % (a * b) == 0 and chips // (a * b) % 4 == 0
    ]
    if not shapes:
        raise LaunchError(f"{chips} chips make no slice of three axes")
    return "x".join(str(n) for n in min(shapes, key=lambda shape: shape[2] - shape[0]))


def main(arguments: list[str]) -> int:
    """Prints four lines: the request's flags, the image, chips, hosts."""
    p = argparse.ArgumentParser("launch/tpu.py", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("topology", help="KIND:SHAPE, or as the TPU API has it, v5litepod-256")
    tpu = Slice.parse(p.parse_args(arguments).topology)
    print(" ".join(tpu.request()), tpu.kind.runtime, tpu.chips, tpu.hosts, sep="\n")
    return 0


if __name__ == "__main__":
    entry(main)
