"""`ldm-scaling plan`: its arguments, and what they ask for."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ldm_scaling import config as config_lib
from ldm_scaling.config import Study
from ldm_scaling.errors import UserError
from ldm_scaling.study.arguments import Parser, above_0

_USAGE = """
  ldm-scaling plan --config=FILE --topology=v5e:16x16       what the job will need
  ldm-scaling plan --config=FILE --topology=h100:8 --kind=train
  ldm-scaling plan --all                                    the family, into launch/plans/"""
_ALL = "all-parts"


def _parser() -> Parser:
    parser = Parser(
        "ldm-scaling plan", _USAGE, allow_abbrev=False,
        description="Compiles what a job would run for TPUs or GPUs that are not here, on any CPU "
        "machine: memory, FLOPs, exchanges, the least time. What each number is: docs/plan.md.",
    )
    add = parser.add_argument
    add("--config", metavar="FILE[:argument]", help="of the study, with --config.KEY=VALUE to "
        "change its keys")
    add("--topology", metavar="NAME", help="of TPUs, chips along each side: v5e:16x16, "
        "v5p:4x8x8, v6e:16x16 (or v5e-256, as Google names it); of GPUs, how many: h100:8, h200:1, "
        "a100-80gb:64; with --all, in place of its own")
    add("--num-slices", "--num_slices", type=above_0, default=1, metavar="N",
        help="how many such slices of TPUs, joined by the data-centre network")
    add("--member", metavar="NAME", help="the network, where the config has several")
    add("--batch", type=above_0, metavar="N",
        help="examples a step; with --kind=sample, lanes of each process")
    add("--kind", choices=("train", "sample", "distill", "finetune", _ALL),
        help="the train step alone; a guided row of the sampler; the step of a distillation or of "
        "fine-tuning; or the first two, the autoencoder's encoder and decoder and the text encoder "
        "(what is planned without it, and --all; where members that were trained elsewhere are "
        "fine-tuned, that step)")
    add("--stage", metavar="NAME", help="with --kind=distill: student, imitation, s16, ...; the "
        "last one if not given")
    add("--format", choices=("text", "json"), default="text", help="how to print")
    add("--to", metavar="PATH", help="writes JSON to this file; with --all, the folder "
        "(launch/plans)")
    add("--all", action="store_true", help="every network of the paper's family on "
        "v5e:16x16, v5p:4x8x8 and v6e:16x16, train and sample, and the largest of other families "
        "on v5e:16x16; plans that are there and still hold are kept")
    add("--again", action="store_true", help="with --all or --to: compiles everything anew, also "
        "programs that are those of the plans that are there")
    add("--table", action="store_true", help="with --all: makes no plan, only the README.md of "
        "those that are there, which says how many no longer hold")
    add("--jobs", type=above_0, default=1, metavar="N",
        help="with --all: so many at a time; each takes one core and up to 8 GB")
    add("--baseline", metavar="DIR", help="plans of before: says what is worse, and fails if "
        "anything is")
    return parser


def run(arguments: Sequence[str], parse: Callable[[list[str]], Any]) -> None:
    """Runs the command, see `commands.OWN`; where something is worse than the baseline, that is a
    `UserError` too."""
    given, overrides = _parser().parse_with_config(arguments)

    def study_of(flag: str) -> Study:
        return config_lib.parse(parse([flag, *overrides]).config)

    import jax

    # The host only traces: whatever it has, programs are for the topology.
    jax.config.update("jax_platforms", "cpu")
    plans = _all(given, overrides, study_of) if given.all else _one(given, study_of)
    if given.baseline:
        from ldm_scaling.study import plan_family

        lines = plan_family.compare(plans, _folder(given.baseline))
        for line in lines:
            print(line, file=sys.stderr)
        if lines:
            raise UserError(f"{len(lines)} figures are worse than {given.baseline}'s")
        print(f"no worse than {given.baseline}", file=sys.stderr)


def _folder(path: str) -> Path:
    return Path(path).expanduser()


def _all(given: argparse.Namespace, overrides: list[str], study_of: Callable) -> list[dict]:
    from ldm_scaling.parallel import aot, aot_tpu
    from ldm_scaling.study import plan_family

    own = (aot_tpu.named(given.topology).lower(),) if given.topology else ()
    for name in ("config", "member"):
        if getattr(given, name):
            raise UserError(f"--{name} does not go with --all, which plans the whole family")
    if given.kind:
        raise UserError("--kind does not go with --all, which plans train and sample")
    folder = _folder(given.to or plan_family.FOLDER)
    if given.baseline and _folder(given.baseline).resolve() == folder.resolve():
        raise _overwritten(given)
    if not given.table:
        aot.check((own or plan_family.TOPOLOGIES)[0])
    plans = plan_family.run(
        study_of, Path("configs"), folder, overrides, given.num_slices, given.batch, given.again,
        given.jobs, say=lambda line: print(line, file=sys.stderr, flush=True), table=given.table,
        topologies=own,
    )
    print(json.dumps(plans, indent=1) if given.format == "json" else folder / "README.md")
    return plans


def _overwritten(given: argparse.Namespace) -> UserError:
    return UserError(
        f"--baseline={given.baseline} is where plans would be written: give another place by --to"
    )


def _one(given: argparse.Namespace, study_of: Callable) -> list[dict]:
    for name in ("config", "topology"):
        if not getattr(given, name):
            raise UserError(f"ldm-scaling plan needs --{name}; see  ldm-scaling plan --help")
    if given.table:
        raise UserError("--table goes with --all")
    if given.again and not given.to:
        raise UserError("--again goes with --all or --to")
    if given.jobs > 1:
        raise UserError("--jobs goes with --all")
    # Before anything is built: what is written is compared afterwards.
    if given.to and given.baseline and (
        _folder(given.to).resolve().parent == _folder(given.baseline).resolve()
    ):
        raise _overwritten(given)
    from ldm_scaling.parallel import aot, aot_tpu
    from ldm_scaling.study import plan, plan_family, plan_parts, plan_show

    given.topology = aot_tpu.named(given.topology)
    # What is wrong with it, or not installed, is told before anything is built.
    aot.check(given.topology)
    study = study_of(f"--config={given.config}")
    if not given.member and len(study.members) > 1:
        raise UserError(f"--member: name the network: {', '.join(study.members)}")
    member = given.member or study.members[0]
    target = plan.Target(given.topology.lower(), given.num_slices)
    if given.stage and given.kind != "distill":
        raise UserError("--stage goes with --kind=distill")
    tunes = plan_parts.FINETUNE if study.finetune.pretrained else _ALL
    asked = f"distill:{given.stage}" if given.stage else given.kind or tunes
    kinds = plan_parts.KINDS if asked == _ALL else (asked,)
    if study.data.text_weights and "text" in kinds:
        kinds = tuple(kind for kind in kinds if kind != "text")
        print("the text encoder of data.text_weights is not read, and not planned", file=sys.stderr)
    before = None
    if given.to and not given.again:
        with contextlib.suppress(UserError):  # Something else, which is written over.
            before = plan_family.read(_folder(given.to))
    make = functools.partial(
        plan.make, compile=functools.partial(plan.compile_part, known=plan.known(before, target)))
    plans = {}
    for kind in kinds:
        own = kind == "train" or asked.startswith(("sample", "distill", "finetune"))
        batch = given.batch if own else None
        made = plan_family.made()  # Before it is compiled: by then the code may be another.
        plans[kind] = make(plan.with_batch(study, kind, batch), member, target, kind) | {
            "made": made}
    share = plan.frozen_share(plans) if len(plans) == len(plan_parts.KINDS) else None
    body: Any = plans[asked] if asked != _ALL else {
        "member": member, "topology": target.topology, "num_slices": target.num_slices,
        "frozen_encoders_share_of_seconds": share, "parts": plans,
    }
    if given.to:
        plan_family.write(_folder(given.to), body)
    if given.format == "json":
        print(json.dumps(body, indent=1, allow_nan=False))
    else:
        print(plan_show.text(list(plans.values()), share))
    return [one for kind, one in plans.items() if asked != _ALL or kind in plan_family.KINDS]
