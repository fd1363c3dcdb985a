"""`ldm-scaling upscale`: pictures four times larger."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ldm_scaling.data import image_folder
from ldm_scaling.data.image_folder import ImageFolder
from ldm_scaling.errors import UserError
from ldm_scaling.parallel import hosts
from ldm_scaling.study.arguments import Parser, above_0, guidance_rate, whole

_USAGE = """
  ldm-scaling upscale IN --to=DIR --by=bicubic               a picture, or a folder of them
  ldm-scaling upscale IN --to=DIR --by=RealESRGAN_x4plus.pth  a published network
  ldm-scaling upscale IN --to=DIR --workdir=DIR --member=NAME  a member fine-tuned for it"""


def _parser() -> Parser:
    parser = Parser(
        "ldm-scaling upscale", _USAGE, allow_abbrev=False, add_help=True,
        description="Makes pictures four times larger, of any size. What is there is not made "
        "again. See docs/super_resolution.md.",
    )
    add = parser.add_argument
    add("given", nargs="*", metavar="IN", help="pictures, or one folder of them")
    add("--to", metavar="DIR", help="the folder to make: PNG files named as what is given")
    add("--by", metavar="WAY", help="bicubic, or a file of an ESRGAN's weights: .pth, .safetensors "
        "or ncnn's .param")
    add_drawing(add)
    return parser


def run(arguments: Sequence[str], parse: Callable[[list[str]], Any]) -> None:
    """Runs the command, see `commands.OWN`."""
    given, common = _parser().parse_with_common(arguments, parse)
    if not given.given or not given.to:
        raise UserError("upscale needs a picture and --to=DIR; see  ldm-scaling upscale --help")
    if bool(given.by) == bool(common.workdir):
        raise UserError(
            "upscale needs either --by=bicubic or a file of weights, or --workdir=DIR of a study "
            "with members that are fine-tuned for it"
        )
    drawn = ("member", "sampler", "steps", "guidance", "seed", "config")
    for name in drawn if given.by else ():
        if getattr(given, name) is not None:
            raise UserError(f"--{name} needs --workdir=DIR, not --by={given.by}")
    pictures = listing(given.given, given.to)
    hosts.begin()
    from ldm_scaling.study import upscaling

    to = Path(given.to).expanduser()
    if given.by:
        way = upscaling.bicubic() if given.by == "bicubic" else upscaling.esrgan(given.by)
        print(upscaling.write(way, pictures, to))
        return
    with drawing(common, given, enlarges=True) as way:
        print(upscaling.write(way, pictures, to))


def add_drawing(add: Callable[..., Any]) -> None:
    """Adds the flags that say which member draws, and how."""
    add("--workdir", metavar="DIR", help="of a study whose members are fine-tuned for it")
    add("--config", metavar="FILE[:argument]", help="of the study; the workdir knows the one that "
        "was last used in it")
    add("--member", metavar="NAME", help="the network")
    add("--sampler", metavar="NAME", help="the config's finetune.sample's if not given")
    add("--steps", type=above_0, metavar="N", help="how many; 50 if not given, as the paper")
    add("--guidance", type=guidance_rate, metavar="RATE", help="away from what is drawn without "
        "the picture, by a member that was fine-tuned with finetune.condition_dropout; 1, none, if "
        "not given")
    add("--seed", type=whole, metavar="N", help="of the noise; 0 if not given")


@contextlib.contextmanager
def drawing(common: Any, given: Any, enlarges: bool) -> Iterator[Any]:
    """The way of the member that is named, while its workdir is held."""
    from ldm_scaling.study import upscaling

    tuned, workdir, study = opened(common)
    settings = upscaling.Settings(
        chosen(given.member, study.members), given.sampler or study.finetune.sample.sampler,
        given.steps or 50, given.seed or 0, 1.0 if given.guidance is None else given.guidance,
    )
    with workdir.held(study):
        yield upscaling.member(tuned, settings, enlarges)


def opened(common: Any) -> tuple[Any, Any, Any]:
    """The fine-tuned members, workdir and study that --workdir and --config name."""
    from ldm_scaling.study import study_checks
    from ldm_scaling.study.finetuned import FineTuned
    from ldm_scaling.study.workdir import Workdir

    workdir = Workdir(common.workdir)
    materials = study_checks.check(
        workdir.study(common.config), workdir, measured=False, trains=False
    )
    return FineTuned(materials), workdir, materials.study


def chosen(member: str | None, members: Sequence[str]) -> str:
    """The member that is named, or the only one."""
    if not member and len(members) > 1:
        raise UserError(f"--member: name the network that draws: {', '.join(members)}")
    return member or members[0]


def listing(given: Sequence[str], to: str) -> ImageFolder:
    """One folder's images, or those named.

    Args:
      given: the folder, or pictures.
      to: where others are drawn, which may lie in the folder, and is left out.
    """
    paths, out = [Path(path).expanduser() for path in given], Path(to).expanduser().resolve()
    folders = [path for path in paths if path.is_dir()]
    if folders and len(paths) > 1:
        raise UserError(f"{folders[0]} is a folder: give one folder, or pictures")
    if out in {(path if path.is_dir() else path.parent).resolve() for path in paths}:
        raise UserError(f"--to={to} is where the pictures are that are given: name another folder")
    if folders:
        found, root = image_folder.listing(folders[0]), folders[0].resolve()
        some = [i for i, n in enumerate(found.names) if not (root / n).is_relative_to(out)]
        if not some:
            raise UserError(f"all pictures in {folders[0]} lie in --to={to}: name another folder")
        return found.take(some)
    for path in paths:
        if not path.is_file():
            raise UserError(f"there is no image {path}")
    if len({path.stem for path in paths}) < len(paths):
        raise UserError("two of the pictures have one name: give them apart, into folders")
    root = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    if any(path.absolute().parent != root for path in paths):
        raise UserError("the pictures lie in several folders: give those of one at a time")
    return ImageFolder(root, tuple(path.name for path in paths))
