"""`ldm-scaling evaluate`: its arguments, its table and its file of scores."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ldm_scaling import __version__, files
from ldm_scaling.data import image_folder
from ldm_scaling.data.image_folder import ImageFolder
from ldm_scaling.errors import UserError
from ldm_scaling.metrics.compare import Comparison
from ldm_scaling.parallel import hosts
from ldm_scaling.study import evaluate, protocols, scores, weights
from ldm_scaling.study.evaluate import Options, Score, Task
from ldm_scaling.study.features import ImageSet

FORMAT = 1
_DEFAULT = ("fid",)
_USAGE = """
  ldm-scaling evaluate A [B]                           images in A against those in B
  ldm-scaling evaluate --make-reference=OUT.npz A      statistics of A, to be given as B
  ldm-scaling evaluate --protocol=coco30k --data=DIR --images=A     a published protocol
  ldm-scaling evaluate --protocol=coco30k --data=DIR --workdir=DIR  draws the images first"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"evaluate: {message}; see  ldm-scaling evaluate --help")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _above_0(text: str) -> int:
    if not _count(text):
        raise argparse.ArgumentTypeError("give 1 or more")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "ldm-scaling evaluate", _USAGE, allow_abbrev=False, add_help=True,
        description="Scores images. Which scores there are: docs/evaluate.md.",
    )
    add = parser.add_argument
    add("a", nargs="?", metavar="A", help="folder of the images to be scored")
    add("b", nargs="?", metavar="B", help="folder of real images, or a file of statistics (.npz)")
    add("--metrics", action="append", metavar="NAMES",
        help=f"scores or groups of them, with commas; {', '.join(_DEFAULT)} if not given, or what "
        f"the protocol says: {', '.join([*scores.GROUPS, *scores.SCORES])}")
    add("--weights", metavar="DIR", help=f"published weights; ${weights.VARIABLE} if not given")
    add("--output", metavar="FILE", help="writes the scores as JSON")
    add("--cache", metavar="DIR", help="keeps features; ~/.cache/ldm_scaling if not given")
    add("--side", type=_above_0, metavar="N", help="first brings all images to N x N pixels by "
        f"{image_folder.SQUARE}")
    add("--captions", metavar="FILE", help=".txt, a line for each image, or .json by name")
    add("--prefix", default="", metavar="TEXT", help="before each caption for CLIP scores")
    add("--replicates", type=_count, default=100, metavar="N",
        help="of the bootstrap behind the intervals; 0 for none")
    add("--seed", type=_count, default=0, metavar="N", help="of the bootstrap")
    add("--versus", metavar="DIR", help="another model's images for the same captions and noise: "
        "differences with intervals and p-values")
    add("--skip-corrupt", action="store_true", help="leaves out images that cannot be read")
    add("--make-reference", metavar="FILE", help="writes statistics of A instead of scores")
    add("--protocol", metavar="NAME", help=f"{', '.join(protocols.PROTOCOLS)}")
    add("--protocols", action="store_true", help="prints what each protocol is")
    add("--data", metavar="DIR", help="the protocol's data as it was downloaded")
    add("--images", metavar="DIR", help="images drawn for the protocol")
    add("--reference", metavar="FILE", help="statistics instead of the protocol's real images")
    add("--limit", type=_above_0, metavar="N", help="only the first N of the protocol, to try out")
    add("--member", help="the network that draws")
    add("--sampler", help="the protocol's if not given")
    add("--steps", type=_above_0)
    add("--guidance", type=float)
    return parser


def run(arguments: Sequence[str], parse: Callable[[list[str]], Any]) -> None:
    """Runs the command.

    Args:
      arguments: after `evaluate`.
      parse: reads --config, its overrides and --workdir, which belong to every command.
    Raises:
      UserError: for what the user can mend.
    """
    given, rest = _parser().parse_known_args(list(arguments))
    common = parse(rest)
    if given.protocols:
        print(protocols.text())
        return
    hosts.use_cpu_cores()
    options = Options(
        weights.folder(given.weights), _cache(given.cache), given.replicates, given.seed,
        prefix=given.prefix,
    )
    if given.make_reference:
        _make_reference(given, options)
        return
    about: dict[str, Any] = {}
    if given.protocol:
        task, names = _protocol(given, common, about)
    else:
        task, names = _folders(given, common, about)
    rows = scores.rows(_names(given.metrics) or names)
    found = evaluate.score(rows, task, options)
    versus = None
    if given.versus:
        other = _other(given, task)
        versus = evaluate.score(rows, other, options)
        about["versus"] = _said(other.generated)
    differences = evaluate.compared(found, versus, options.level) if versus else {}
    _show(task, found, versus, differences, about)
    if given.output:
        body = _record(task, options, about, found, versus, differences)
        text = json.dumps(body, indent=1, allow_nan=False)
        files.atomic_write_text(Path(given.output).expanduser(), text + "\n")


# --- what is scored ---------------------------------------------------------------------------


def _names(given: list[str] | None) -> list[str]:
    pieces = [piece.strip() for text in given or () for piece in text.split(",")]
    if "" in pieces:
        raise UserError(f"--metrics={','.join(given)}: a name is missing")
    return pieces


def _cache(given: str | None) -> Path:
    if given:
        return Path(given).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "ldm_scaling" / "features"


def _listing(path: str | Path, skip: bool, about: dict[str, Any]) -> ImageFolder:
    folder = image_folder.listing(path)
    if skip:
        folder, broken = image_folder.sound(folder)
        if broken:
            about.setdefault("skipped", {})[str(folder.root)] = list(broken)
    return folder


def _refuse(given: argparse.Namespace, names: Sequence[str], why: str) -> None:
    for name in names:
        value = getattr(given, name)
        if value not in (None, False):
            shown = value if name in ("a", "b") else f"--{name.replace('_', '-')}"
            raise UserError(f"{shown} {why}")


_OF_PROTOCOLS = (
    "data", "images", "reference", "limit", "member", "sampler", "steps", "guidance"
)  # fmt: skip


def _folders(given, common, about) -> tuple[Task, Sequence[str]]:
    """A against B."""
    _refuse(given, _OF_PROTOCOLS, "belongs to --protocol=NAME")
    if common.workdir:
        raise UserError("--workdir belongs to --protocol=NAME: its network draws the images")
    if not given.a:
        raise UserError("evaluate needs a folder of images; see  ldm-scaling evaluate --help")
    if Path(given.a).suffix in (".npz", ".npy"):
        raise UserError(f"{given.a} holds statistics: give the folder of images first, then it")
    images = ImageSet(_listing(given.a, given.skip_corrupt, about), given.side)
    real: ImageSet | Path | None = None
    if given.b and Path(given.b).suffix in (".npz", ".npy"):
        real = Path(given.b).expanduser()
    elif given.b:
        real = ImageSet(_listing(given.b, given.skip_corrupt, about), given.side)
    captions = None
    if given.captions:
        path = Path(given.captions).expanduser()
        captions = protocols.captions_in(path, images.folder.names)
        about["captions"] = {"file": str(path), "hash": files.sha256_of(list(captions))}
    return Task(images, real, captions), _DEFAULT


def _make_reference(given, options: Options) -> None:
    _refuse(given, (*_OF_PROTOCOLS, "b", "protocol", "versus", "captions"),
            "does not go with --make-reference")
    if not given.a:
        raise UserError(f"--make-reference={given.make_reference} needs a folder of images")
    path = Path(given.make_reference).expanduser()
    if path.suffix != ".npz":
        raise UserError(f"--make-reference={path}: give a file that ends in .npz")
    about: dict[str, Any] = {}
    images = ImageSet(_listing(given.a, given.skip_corrupt, about), given.side)
    rows = scores.rows(_names(given.metrics) or _DEFAULT)
    _warn(about)
    for written in evaluate.make_reference(rows, images, options, path):
        print(written)


def _protocol(given, common, about) -> tuple[Task, Sequence[str]]:
    """The images of a protocol, drawn before or now."""
    protocol = protocols.get(given.protocol)
    _refuse(given, ("a", "b", "side"), "does not go with --protocol: give --data and --images")
    if given.skip_corrupt:
        raise UserError("--skip-corrupt does not go with --protocol, which scores every image")
    if not given.data:
        raise UserError(f"--protocol={protocol.name} needs --data=DIR; see docs/evaluate.md")
    if bool(given.images) == bool(common.workdir):
        raise UserError(
            f"--protocol={protocol.name} needs either --images=DIR, drawn before, or --workdir=DIR "
            "of a study whose network draws them"
        )
    reference = Path(given.reference).expanduser() if given.reference else None
    if reference and protocol.name not in ("coco30k", "coco5k"):
        raise UserError("--reference is for COCO's protocols: give the real images")
    texts = None
    if given.captions:
        texts = protocols.captions_in(Path(given.captions).expanduser())
    data = Path(given.data).expanduser()
    read = protocols.given(protocol, data, given.limit, reference is None, texts)
    about["protocol"] = read.about()
    if given.captions:
        about["protocol"]["captions"] |= {"file": given.captions, "selection": "as in the file"}
    if given.images:
        _refuse(given, ("member", "sampler", "steps", "guidance"), "needs --workdir=DIR to draw in")
        images = Path(given.images).expanduser()
    else:
        images = _draw(given, common, read, about)
    return protocols.task(read, images, reference), protocol.metrics


def _draw(given, common, read: protocols.Given, about: dict[str, Any]) -> Path:
    """Draws with a study's network; returns the folder."""
    if read.captions is None:
        raise UserError(
            f"the images of {read.protocol.name} are not drawn here: draw them, give --images=DIR"
        )
    from ldm_scaling import config
    from ldm_scaling.study import protocol_images, stages
    from ldm_scaling.study.workdir import Workdir

    workdir = Workdir(common.workdir)
    study = config.parse(common.config) if common.config else workdir.last_config()
    materials = stages.check(study, workdir)
    study = materials.study
    workdir.bind(study)
    if not given.member and len(study.members) > 1:
        raise UserError(f"--member: name the network that draws: {', '.join(study.members)}")
    p = read.protocol
    drawing = protocol_images.Drawing(
        given.member or study.members[0], given.sampler or p.sampler, given.steps or p.steps,
        p.guidance if given.guidance is None else given.guidance,
    )
    about["drawn"] = dataclasses.asdict(drawing) | {"workdir": str(workdir.path)}
    with workdir.lock(), workdir.log_to_file():
        folder = protocol_images.folder_of(materials, drawing, read.captions)
        protocol_images.draw(materials, drawing, read.captions, folder)
    return Path(os.fspath(folder))


def _other(given, task: Task) -> Task:
    """The second model's images, held against the same things."""
    if given.protocol:
        raise UserError("--versus compares two folders; give  evaluate A B --versus=A2")
    folder = _listing(given.versus, given.skip_corrupt, {})
    return dataclasses.replace(task, generated=ImageSet(folder, given.side))


# --- what is said of it -----------------------------------------------------------------------


def _said(images: ImageSet) -> dict[str, Any]:
    return {
        "path": str(images.folder.root), "count": len(images), "hash": images.list_hash,
        "sizes": images.describe_sizes(), "side": images.side,
    }


def _record(task, options, about, found, versus, differences) -> dict[str, Any]:
    real = task.real
    return {
        "format": FORMAT,
        "version": __version__,
        "device": hosts.describe(),
        "generated": _said(task.generated),
        "real": _said(real) if isinstance(real, ImageSet) else real and {"path": str(real)},
        **about,
        "interval": {"level": options.level, "replicates": options.replicates,
                     "seed": options.seed, "method": "bootstrap over images, centred"},
        "scores": [one.plain() for one in found],
        **({"versus_scores": [one.plain() for one in versus]} if versus else {}),
        **({"differences": {k: dataclasses.asdict(v) for k, v in differences.items()}}
           if differences else {}),
    }  # fmt: skip


def _warn(about: dict[str, Any]) -> None:
    for folder, names in about.get("skipped", {}).items():
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        print(f"left out {len(names)} broken images of {folder}: {shown}", file=sys.stderr)


def _digits(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.2f}"


def _span(interval: tuple[float, float] | None) -> str:
    return f"[{_digits(interval[0])}, {_digits(interval[1])}]" if interval else "-"


def _show(
    task: Task, found: Sequence[Score], versus: Sequence[Score] | None,
    differences: dict[str, Comparison], about: dict[str, Any],
) -> None:
    """The table on stdout; what went with it on stderr."""
    _warn(about)
    table = Table(box=box.SIMPLE_HEAD)
    heads = ["score", "value", "95% interval", "n", "real n", "better"]
    if versus:
        heads[3:3] = ["versus", "difference", "its 95% interval", "p"]
    for head in heads:
        table.add_column(head, justify="left" if head in ("score", "better") else "right")
    for i, one in enumerate(found):
        cells = [one.label, _digits(one.value), _span(one.interval)]
        if versus:
            d = differences.get(one.name)
            more = [f"{d.difference:+.4f}", _span((d.low, d.high)), f"{d.p_value:.3g}"] if d else []
            cells += [_digits(versus[i].value), *(more or "---")]
        real = "-" if one.reference_n is None else str(one.reference_n)
        table.add_row(*cells, str(one.n), real, one.better)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(table)
    for features in dict.fromkeys(f"{one.features} ({one.extractor})" for one in found):
        console.print(f"features: {features}", soft_wrap=True, markup=False)
    for one in found:
        if one.remark:
            console.print(f"{one.label}: {one.remark}", soft_wrap=True, markup=False)
    real, made = task.real, task.generated
    if made.side and any(min(size) < made.side for size in made.folder.sizes):
        console.print(
            f"Images of {made.describe_sizes()} were enlarged to {made.side}x{made.side}; a "
            "distance sees that too.", soft_wrap=True,
        )  # fmt: skip
    if isinstance(real, ImageSet) and real.side is None:
        sizes = [images.describe_sizes() for images in (made, real)]
        if sizes[0] != sizes[1]:
            console.print(
                f"The images are of different sizes, {sizes[0]} and {sizes[1]}; a distance sees "
                "that too. --side=N brings all to one size.", soft_wrap=True,
            )  # fmt: skip
