"""`ldm-scaling evaluate`: its arguments, and what they ask for."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ldm_scaling import files
from ldm_scaling.config import plugins
from ldm_scaling.data import image_folder, pairs
from ldm_scaling.data.image_folder import ImageFolder
from ldm_scaling.errors import UserError
from ldm_scaling.parallel import hosts
from ldm_scaling.study import evaluate, evaluate_checks, evaluate_show, protocols, scores, weights
from ldm_scaling.study.arguments import COMMON, Parser, above_0, guidance_rate, pieces, whole
from ldm_scaling.study.evaluate import Options, Task
from ldm_scaling.study.features import ImageSet
from ldm_scaling.study.workdir import Workdir

_DEFAULT = ("fid",)
# Replicates: an interval of fewer is chance.
_FEWEST = 20
_USAGE = """
  ldm-scaling evaluate A [B]                           images in A against those in B
  ldm-scaling evaluate --make-reference=OUT.npz A      statistics of A, to be given as B
  ldm-scaling evaluate --protocol=coco30k --data=DIR --images=A     a published protocol
  ldm-scaling evaluate --protocol=coco30k --data=DIR --workdir=DIR  draws the images first"""


def _replicates(text: str) -> int:
    if 0 < whole(text) < _FEWEST:
        raise argparse.ArgumentTypeError(f"give 0 for no intervals, or {_FEWEST} or more")
    return int(text)


def _parser() -> Parser:
    parser = Parser(
        "ldm-scaling evaluate", _USAGE, allow_abbrev=False, add_help=True,
        description="Scores images. Which scores there are: docs/evaluate.md.",
    )
    add = parser.add_argument_group("what is scored").add_argument
    add("a", nargs="?", metavar="A", help="folder of the images to be scored")
    add("b", nargs="?", metavar="B", help="folder of real images, or a file of statistics (.npz)")
    add("--metrics", action="append", metavar="NAMES",
        help=f"scores or groups of them, with commas; {', '.join(_DEFAULT)} if not given, or what "
        f"the protocol says. Groups: {', '.join(scores.GROUPS)}. Scores: "
        f"{', '.join(scores.SCORES)}")
    add("--plugins", action="append", metavar="FILES", help="code of your own that has scores, "
        "files or modules with commas; docs/extending.md")
    add("--side", type=above_0, metavar="N", help="first brings all images to N x N pixels by "
        f"{image_folder.SQUARE}")
    add("--captions", metavar="FILE", help=".txt, a line for each image in the order of names "
        "(of numbers, where names are numbers), or .json by name")
    add("--prefix", default="", metavar="TEXT", help="before each caption for CLIP scores")
    add("--versus", metavar="DIR", help="another model's images for the same captions and noise, "
        "named alike: differences with intervals and p-values")
    add("--skip-corrupt", action="store_true", help="leaves out images that cannot be "
        "read, and their partners where images are compared in pairs")
    add("--make-reference", metavar="FILE", help="writes statistics of A instead of scores")
    add = parser.add_argument_group("how").add_argument
    add("--weights", metavar="DIR", help=f"published weights; ${weights.VARIABLE} if not given")
    add("--cache", metavar="DIR",
        help="keeps features; ~/.cache/ldm_scaling/features if not given")
    add("--output", metavar="FILE", help="writes the scores as JSON")
    add("--replicates", type=_replicates, default=100, metavar="N",
        help="of the bootstrap behind the intervals; 0 for none")
    add("--seed", type=whole, default=0, metavar="N", help="of the bootstrap")
    add = parser.add_argument_group("protocols").add_argument
    add("--protocol", metavar="NAME", help=f"{', '.join(protocols.PROTOCOLS)}")
    add("--protocols", action="store_true", help="prints what each protocol is")
    add("--data", metavar="DIR", help="the protocol's data as it was downloaded")
    add("--images", metavar="DIR", help="images drawn for the protocol")
    add("--reference", metavar="FILE", help="statistics instead of the protocol's real images")
    add("--limit", type=above_0, metavar="N", help="only the first N of the protocol, to try out")
    add = parser.add_argument_group("drawing a protocol's images").add_argument
    add("--workdir", metavar="DIR", help="of the study whose network draws; what is drawn is kept")
    add("--config", metavar="FILE[:argument]", help="of the study, with --config.KEY=VALUE to "
        "change its keys; the workdir knows the one that was last used in it")
    add("--member", metavar="NAME", help="the network that draws, or a cascade's name")
    add("--stage", metavar="NAME", help="of a config that distils: the student that draws, the "
        "last if not given; 'member' is the network undistilled")
    add("--sampler", metavar="NAME", help="the protocol's if not given, of students their "
        "config's; so are the next two")
    add("--steps", type=above_0, metavar="N", help="how many")
    add("--guidance", type=guidance_rate, metavar="RATE", help="1 is none")
    add("--spacing", metavar="NAME", help="timestep spacing; that of the config's sample if not "
        "given")
    return parser


def run(arguments: Sequence[str], parse: Callable[[list[str]], Any]) -> None:
    """Runs the command, see `commands.OWN`."""
    given, common = _parser().parse_with_common(arguments, parse)
    if given.protocols:
        print(protocols.text())
        return
    plugins.load(pieces("--plugins", given.plugins or ()))
    if given.protocol and common.workdir:
        with contextlib.suppress(UserError):  # What is wrong with it is said with the protocol.
            Workdir(common.workdir).study(common.config)  # Its plugins may have the scores.
    hosts.begin()
    options = Options(
        weights.folder(given.weights), _cache(given.cache), given.replicates, given.seed,
        prefix=given.prefix,
    )
    if given.make_reference:
        _make_reference(given, options)
        return
    _check_writable(options, "output", given.output)
    if given.versus and given.protocol:
        raise UserError("--versus compares two folders; give  evaluate A B --versus=A2")
    about: dict[str, Any] = {}
    default = protocols.get(given.protocol).metrics if given.protocol else _DEFAULT
    rows = scores.rows(pieces("--metrics", given.metrics or ()) or default)
    _check_used(given, rows)
    other = None
    if given.protocol:
        task = _protocol(given, common, about, lambda: evaluate.require(rows, options))
    else:
        task, other = _folders(given, rows, about)
    found = evaluate.score(rows, task, options)
    versus = None
    if other:
        versus = evaluate.score(rows, other, options)
        about["versus"] = evaluate_show.said(other.generated)
    differences = evaluate.compared(found, versus, task.freedom, options.level) if versus else {}
    evaluate_show.show(task, rows, found, versus, differences, about)
    if given.output:
        body = evaluate_show.record(task, options, about, found, versus, differences)
        text = json.dumps(body, indent=1, allow_nan=False)
        files.atomic_write_text(Path(given.output).expanduser(), text + "\n")


def _check_writable(options: Options, flag: str, given: str | None) -> None:
    """Before hours are spent: the cache, and the file that a flag names."""
    output = Path(given).expanduser() if given else None
    if output and output.is_dir():
        raise UserError(f"--{flag}={output} is a folder: name a file")
    for place, by in ((options.cache, "cache"), (output and output.parent, flag)):
        try:
            if place:
                place.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(
                f"cannot write to {place} ({e.strerror or e}): name another place by --{by}"
            ) from e
    if output and not os.access(output.parent, os.W_OK):
        raise UserError(f"cannot write to {output.parent}: name another place by --{flag}")


def _check_used(given, rows: Sequence[scores.Row]) -> None:
    """What is given must be of use."""
    names = ", ".join(row.name for row in rows)
    if given.b and not any(map(evaluate_checks.takes_real, rows)):
        raise UserError(f"{given.b}: {names} hold images against no others: leave it out")
    if given.captions and not given.protocol and not any(row.captioned for row in rows):
        raise UserError(f"--captions={given.captions}: {names} look at no captions: leave it out")
    if given.prefix and not any(row.metric == "clip_score" for row in rows):
        raise UserError(f"--prefix={given.prefix!r}: it is for CLIP scores, not for {names}")


# --- what is scored ---------------------------------------------------------------------------


def _cache(given: str | None) -> Path:
    if given:
        return Path(given).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "ldm_scaling" / "features"


def _listings(
    given: argparse.Namespace, rows: Sequence[scores.Row], about: dict[str, Any]
) -> dict[str, ImageFolder]:
    """The folders that A, B and --versus name. With --skip-corrupt they lack the images that cannot
    be read, and those that are matched by name these images' partners."""
    out = {
        name: image_folder.listing(place) for name in ("a", "b", "versus")
        if (place := getattr(given, name)) and not (name == "b" and _is_statistics(place))
    }
    if not given.skip_corrupt:
        return out
    found = {name: image_folder.sound(folder) for name, folder in out.items()}
    paired = any(row.paired for row in rows)
    matched = [name for name in out if name != "b" or paired]
    stems = {name: pairs.by_stem(out[name]) for name in matched if len(matched) > 1}
    lost = {s for name, own in stems.items() for s, file in own.items() if file in found[name][1]}
    for name, (folder, broken) in found.items():
        own = stems.get(name, {})
        alone = {own[stem] for stem in lost & own.keys()}.difference(broken)
        out[name] = folder.take(i for i, n in enumerate(folder.names) if n not in alone)
        for key, names in (("skipped", broken), ("skipped_partners", sorted(alone))):
            if names:
                about.setdefault(key, {})[str(folder.root)] = list(names)
    return out


def _is_statistics(place: str) -> bool:
    return Path(place).suffix in (".npz", ".npy", ".pkl")


def _refuse(given: argparse.Namespace, names: Sequence[str], why: str) -> None:
    for name in names:
        value = getattr(given, name)
        if value not in (None, False):
            shown = value if name in ("a", "b") else f"--{name.replace('_', '-')}"
            raise UserError(f"{shown} {why}")


_OF_DRAWING = ("member", "stage", "sampler", "steps", "guidance", "spacing")
_OF_PROTOCOLS = (
    "data", "images", "reference", "limit", *_OF_DRAWING
)  # fmt: skip


def _folders(given, rows, about) -> tuple[Task, Task | None]:
    """A against B, and the second model's images against the same."""
    _refuse(given, (*_OF_PROTOCOLS, *COMMON), "belongs to --protocol=NAME")
    if not given.a:
        raise UserError("evaluate needs a folder of images; see  ldm-scaling evaluate --help")
    if Path(given.a).suffix in (".npz", ".npy"):
        raise UserError(f"{given.a} holds statistics: give the folder of images first, then it")
    listed = _listings(given, rows, about)
    real: ImageSet | Path | None = None
    if given.b:
        real = ImageSet(listed["b"], given.side) if "b" in listed else Path(given.b).expanduser()
    task = _captioned(given, Task(ImageSet(listed["a"], given.side), real), about)
    if not given.versus:
        return task, None
    folder = pairs.match(listed["versus"], task.generated.folder)
    return task, dataclasses.replace(task, generated=ImageSet(folder, given.side))


def _captioned(given, task: Task, about: dict[str, Any]) -> Task:
    """With the captions of a file, if one is given."""
    if not given.captions:
        return task
    images = task.generated
    path = Path(given.captions).expanduser()
    if path.suffix != ".json":
        images = dataclasses.replace(images, folder=image_folder.by_number(images.folder))
    captions = protocols.captions_in(path, images.folder.names)
    task = dataclasses.replace(task, generated=images, captions=captions)
    about["captions"] = {"file": str(path), "hash": files.sha256_of(list(captions)),
                         "first": evaluate_show.first_pairs(task)}
    return task


def _make_reference(given, options: Options) -> None:
    _refuse(given, (*_OF_PROTOCOLS, *COMMON, "b", "protocol", "versus", "captions", "output"),
            "does not go with --make-reference")
    if not given.a:
        raise UserError(f"--make-reference={given.make_reference} needs a folder of images")
    path = Path(given.make_reference).expanduser()
    if path.suffix != ".npz":
        raise UserError(f"--make-reference={path}: give a file that ends in .npz")
    _check_writable(options, "make-reference", given.make_reference)
    about: dict[str, Any] = {}
    rows = scores.rows(pieces("--metrics", given.metrics or ()) or _DEFAULT)
    images = ImageSet(_listings(given, rows, about)["a"], given.side)
    evaluate_show.warn(about)
    for written in evaluate.make_reference(rows, images, options, path):
        print(written)


def _protocol(given, common, about, check: Callable[[], Any]) -> Task:
    """The images of a protocol, drawn before or now; `check` is called before any is drawn."""
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
    if given.images:
        _refuse(given, (*_OF_DRAWING, "config"), "needs --workdir=DIR to draw in")
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
        images = Path(given.images).expanduser()
    else:
        check()
        images = _draw(given, common, read, about)
    return protocols.task(read, images, reference)


def _draw(given, common, read: protocols.Given, about: dict[str, Any]) -> Path:
    """Draws with a study's network; returns the folder."""
    if read.low is not None:
        return _upscale(given, common, read, about)
    if read.captions is None:
        raise UserError(
            f"the images of {read.protocol.name} are not drawn here: draw them, give --images=DIR"
        )
    from ldm_scaling.config import Sample
    from ldm_scaling.sampling import solvers
    from ldm_scaling.study import protocol_images, study_checks

    workdir = Workdir(common.workdir)
    study = workdir.study(common.config)
    # Pictures of the protocol's captions: of the study's own data nothing is needed.
    materials = study_checks.check(study, workdir, measured=False, trains=False)
    p = read.protocol
    network = protocol_images.network_of(
        materials, given.member, given.stage, Sample(p.sampler, p.steps, "", p.guidance))
    drawing = network.drawing(given.sampler, given.steps, given.guidance, given.spacing)
    about["drawn"] = dataclasses.asdict(drawing) | {
        "spacing": solvers.spacing_of(drawing.sampler, drawing.spacing),
        "train_step": network.subject.train_step, "workdir": str(workdir.path),
    }
    with workdir.held(materials.study):
        folder = protocol_images.folder_of(materials, network, drawing, read.captions)
        protocol_images.draw(materials, network, drawing, read.captions, folder)
    return Path(os.fspath(folder))


def _upscale(given, common, read: protocols.Given, about: dict[str, Any]) -> Path:
    """Enlarges the protocol's low-resolution images with a fine-tuned member; returns the folder.
    """
    from ldm_scaling.study import upscale_cli, upscaling

    _refuse(given, ("stage", "spacing"), f"is not for {read.protocol.name}, whose images "
            "fine-tuned members draw: the spacing is --config.finetune.sample.spacing=NAME")
    tuned, workdir, study = upscale_cli.opened(common)
    settings = upscaling.Settings(
        upscale_cli.chosen(given.member, study.members),
        given.sampler or read.protocol.sampler, given.steps or read.protocol.steps, 0,
        read.protocol.guidance if given.guidance is None else given.guidance,
    )
    way = upscaling.member(tuned, settings)
    about["drawn"] = way.about | {"workdir": str(workdir.path)}
    decides = [way.about, str(read.low.root), read.low.hashes]
    name = f"{settings.member}_{settings.sampler}_{settings.steps}steps".replace(":", "-")
    folder = workdir.path / "evaluate" / f"{name}_{files.sha256_of(decides)[:8]}"
    with workdir.held(study):
        upscaling.write(way, read.low, folder)
    return Path(os.fspath(folder))
