"""`ldm-scaling cost`: what each member costs, counted, and measured on the device that is here."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from ldm_scaling import config as config_lib
from ldm_scaling import files, terminal
from ldm_scaling.config import Study
from ldm_scaling.errors import UserError
from ldm_scaling.models import analytic, autoencoder, cost, zoo
from ldm_scaling.models.unet import UNetSpec
from ldm_scaling.parallel import compiled
from ldm_scaling.study import caching_cost, cost_files, labels, plan_parts, timing
from ldm_scaling.study.arguments import Parser, pieces
from ldm_scaling.study.cost_files import CostFile, MemberCost, Skipped, Timing

_USAGE = """
  ldm-scaling cost                                  the family that suits the device
  ldm-scaling cost --member=39m,866m --batch=1,8
  ldm-scaling cost --config=configs/demo.py         a study's members and what is around them"""
_BATCHES = (1, 8, 64)
# What makes pictures of the latents of members without a config: Stable Diffusion's autoencoder, or
# one as configs/demo.py has it for the small ones.
_DECODERS = {
    64: autoencoder.AutoencoderSpec(),
    8: autoencoder.AutoencoderSpec(16, (1, 2, 2), 1, groups=8),
}
# The text encoder by the width that a member takes.
_TEXTS = {384: "minilm", 768: "clip_l", 1024: "clip_h"}


def _batches(text: str) -> tuple[int, ...]:
    pieces = [piece.strip() for piece in text.split(",")]
    if not all(piece.isdecimal() and int(piece) for piece in pieces):
        raise argparse.ArgumentTypeError(f"{text!r} are no batch sizes; write  --batch=1,8,64")
    return tuple(sorted({int(piece) for piece in pieces}))


def _parser() -> Parser:
    parser = Parser(
        "ldm-scaling cost", _USAGE, allow_abbrev=False,
        description="Counts parameters and FLOPs of each member, and measures seconds of a network "
        "call, a guided pair of calls, the decoder and the text encoder on this machine's first "
        "device, with random weights. What is measured is kept and not measured again: "
        "docs/advise.md.",
    )
    add = parser.add_argument
    add("--member", action="append", metavar="NAME,NAME", help="networks; all of the config's if "
        "not given, and without one the small members on a CPU and the paper's on an accelerator")
    add("--members", action="append", dest="member", help=argparse.SUPPRESS)  # As it was called.
    add("--batch", type=_batches, default=_BATCHES, metavar="1,8,64", help="batch sizes")
    add("--config", metavar="FILE[:argument]", help="of a study, whose autoencoder and captions "
        "are taken")
    add("--to", metavar="FILE", help=f"the file ({cost_files.FOLDER}/DEVICE.json)")
    add("--format", choices=("text", "json"), default="text", help="how to print")
    return parser


def run(arguments: Sequence[str], parse: Callable[[list[str]], Any]) -> None:
    """Runs the command, see `commands.OWN`."""
    given, overrides = _parser().parse_with_config(arguments)
    if overrides and not given.config:
        raise UserError(f"{overrides[0]} changes a key of --config=FILE: give that too")
    study = None
    if given.config:
        study = config_lib.parse(parse([f"--config={given.config}", *overrides]).config)
    compiled.keep()
    device = jax.local_devices()[0]
    found = measure(
        study, _members(pieces("--member", given.member or ()), study, device), given.batch, device,
        Path(given.to).expanduser() if given.to else None,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if given.format == "json":
        print(json.dumps(dataclasses.asdict(found[1]), indent=1, allow_nan=False))
    else:
        print(f"{text(found[1])}\n{found[0]}")


def _members(given: list[str], study: Study | None, device: jax.Device) -> list[str]:
    suits = zoo.SMALL if device.platform == "cpu" else zoo.PAPER
    names = given or (list(study.members) if study else [m.name for m in suits])
    if study and study.weights:
        raise UserError(
            f"weights={study.weights!r} is a published network: measure its member of the zoo "
            "instead, such as --member=sd15, without --config"
        )
    for name in names:
        zoo.get(name)
    return list(dict.fromkeys(names))


@dataclasses.dataclass(frozen=True, eq=False)
class Around:
    """What is around a member: `decoder` and, where it is known, `text`; and captions of `length`
    tokens, where the zoo counts the member at those of `zoo_length`."""

    decoder: autoencoder.AutoencoderSpec
    text: str | None
    length: int
    zoo_length: int

    @property
    def decoder_name(self) -> str:
        return f"autoencoder-{files.sha256_of(self.decoder)[:8]}"

    @property
    def text_name(self) -> str | None:
        return self.text and f"{self.text}-{self.length}"

    @property
    def tokens(self) -> int | None:
        return None if self.length == self.zoo_length else self.length

    @property
    def names(self) -> cost_files.Around:
        return (self.decoder_name, self.text_name, self.tokens)


def around(study: Study | None, name: str) -> Around:
    """What is around a member: of the study, or without one what suits it.

    Raises:
      UserError: where nothing suits it, it does not take the study's latents, or the study's
        autoencoder is a published one that is not here.
    """
    if study:
        plan_parts.spec_of(study, name)  # Raises where latents do not fit.
        text = None if study.data.text_weights else "minilm"
        return Around(plan_parts.autoencoder_of(study), text, study.data.text_length,
                      zoo.get(name).spec.context_length)
    spec = zoo.get(name).spec
    if spec.sample_size not in _DECODERS or spec.context_dim not in _TEXTS:
        raise UserError(
            f"member {name} takes latents of side {spec.sample_size} and text states of width "
            f"{spec.context_dim}, for which no autoencoder and text encoder are at hand: give "
            "--config=FILE of a study with it"
        )
    return Around(
        _DECODERS[spec.sample_size], _TEXTS[spec.context_dim], spec.context_length,
        spec.context_length,
    )


def member_cost(name: str, reference: str, around: Around) -> MemberCost:
    """What is counted of a member, in a few seconds."""
    spec, length = zoo.get(name).spec, around.length
    own = cost.of(spec, length)
    words, by_hand = around.text, None
    if isinstance(spec, UNetSpec):
        by_hand = analytic.gflops(dataclasses.replace(spec, context_length=length))
    return MemberCost(
        name=name, base_channels=spec.base_channels, params=own.params, gflops=own.gflops,
        analytic_gflops=by_hand,
        norm_cost=own.gflops / cost.gflops(zoo.get(reference).spec, length), reference=reference,
        decoder=around.decoder_name,
        decoder_gflops=caching_cost.decode_gflops(around.decoder, spec.latent_shape),
        text=around.text_name,
        text_gflops=caching_cost.text_gflops(caching_cost.TEXTS[words], length) if words else None,
        tokens=around.tokens,
    )


def measure(
    study: Study | None, members: Sequence[str], batches: Sequence[int], device: jax.Device,
    path: Path | None, say: Callable[[str], None],
) -> tuple[Path, CostFile]:
    """Measures what the file lacks, and writes it after each piece; where it is, and what is in it.

    Args:
      study: its autoencoder, text encoder and reference are taken; the zoo's if None.
      members: names in the zoo.
      batches: batch sizes.
      device: what is measured.
      path: of the file; `costs/DEVICE.json` if None.
      say: told what is done.
    Raises:
      UserError: where the file is of another device, cannot be written, or another process measures
        into it.
    """
    path = path or Path(cost_files.FOLDER) / cost_files.file_name(timing.device_kind(device))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = files.lock(
            path.with_name(f".{path.name}.lock"),
            f"another process measures into {path}: wait for it, and the same command measures "
            "what is missing then; two at once on a device spoil each other's seconds",
        )
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}") from e
    with held:
        return path, _measure(study, members, batches, device, path, say)


def _measure(
    study: Study | None, members: Sequence[str], batches: Sequence[int], device: jax.Device,
    path: Path, say: Callable[[str], None],
) -> CostFile:
    """See `measure`; the file is this process's."""
    kind = timing.device_kind(device)
    found = CostFile(kind, device.platform)
    if path.exists():
        found = cost_files.read(path)
        if found.device_kind != kind:
            raise UserError(
                f"{path} is of {found.device_kind!r}, and this is {kind!r}: a file for each kind, "
                "give another by --to"
            )

    def wanted(program: timing.Program) -> bool:
        there = found.timing(program.part, program.name, program.batch)
        return there is None or there.key != program.key

    def done(row: Timing | Skipped) -> None:
        nonlocal found
        found = found.plus(row)
        cost_files.write(path, found)
        what = f"{row.part} of {row.name}, batch size {row.batch}"
        if isinstance(row, Skipped):
            say(f"skipped: {what}: {row.why}")
        else:
            say(f"{what}: {labels.number(1e3 * row.seconds)} ms a call")

    for name in members:
        beside = around(study, name)
        reference = study.reference if study else zoo.get(name).reference
        was = {m.reference for m in found.members if (m.name, m.around) == (name, beside.names)}
        for other in was - {reference}:
            say(f"{name}: its cost is counted in calls of {reference} now, it was in {other}'s")
        own = member_cost(name, reference, beside)
        found = found.plus(own)
        cost_files.write(path, found)
        spec = zoo.get(name).spec
        groups = [
            timing.network(own.timed, spec, beside.length, batches, device),
            timing.decoder(beside.decoder_name, beside.decoder, spec.latent_shape, batches),
        ]
        if beside.text:
            groups.append(timing.text(
                beside.text_name, caching_cost.TEXTS[beside.text], beside.length, batches
            ))
        else:
            say(f"the text encoder of data.text_weights={study.data.text_weights!r} is not timed")
        for group in groups:
            timing.run(group, device, wanted, done)
    return found


def text(found: CostFile) -> str:
    """The file for a terminal; no line is longer than 100 characters."""
    batches = sorted({t.batch for t in (*found.timings, *found.skipped)})
    counted = terminal.table("name", "params", "GFLOPs", "by hand", "cost", "of", "decoder", "text",
                             left=("of",))
    for m in found.members:
        counted.add_row(
            m.name, labels.count(m.params), labels.number(m.gflops),
            "" if m.analytic_gflops is None else labels.number(m.analytic_gflops),
            labels.number(m.norm_cost), m.reference,
            labels.number(m.decoder_gflops),
            "" if m.text_gflops is None else labels.number(m.text_gflops),
        )
    timed = terminal.table("part", "name", *(f"batch {b}" for b in batches), left=("name",))
    rows = list(dict.fromkeys((t.name, t.part) for t in (*found.timings, *found.skipped)))
    for name, part in rows:
        cells = [found.timing(part, name, b) for b in batches]
        timed.add_row(part, name, *("" if t is None else _cell(t) for t in cells))
    console = terminal.console()
    console.print(
        f"{found.device_kind}\nGFLOPs: one call, batch 1, without guidance, by XLA; by hand: "
        "products alone; decoder, text: a picture."
    )
    console.print(counted)
    console.print("Median milliseconds of a call, and half the distance of its quartiles:")
    console.print(timed)
    for s in found.skipped:
        console.print(f"skipped: {s.part} of {s.name}, batch size {s.batch}: {s.why}")
    return terminal.text(console)


def _cell(t: Timing) -> str:
    return f"{labels.number(1e3 * t.seconds)} ±{labels.number(500 * (t.high - t.low))}"
