"""The family table as people and programs read it: computed figures beside the printed ones."""

from __future__ import annotations

from typing import Any

from ldm_scaling import terminal
from ldm_scaling.errors import UserError
from ldm_scaling.models import backbone_tables, cost, zoo

_NOTES = (
    f"cost: GFLOPs over those of {zoo.PAPER_REFERENCE}; for the small members c8 to c64, over "
    f"those of {zoo.SMALL_REFERENCE}; of _s16, which are for latents of side 16, over "
    f"{zoo.SMALL_REFERENCE}_s16's.",
    "GFLOPs: one forward pass, batch 1, float32, without guidance, counted by XLA.",
    "'paper' columns, FID and CLIP: arXiv 2404.01367, Table 1; the parameters of sd15 are Stable "
    "Diffusion v1.5's.",
    "39m_s32 to 5b_s32, not listed: the paper's networks for latents of side 32, see "
    "docs/cascades.md, at 16% to 23% of the GFLOPs.",
    "39m: the paper's 25.3 GFLOPs are a misprint (they repeat its FID, 25.30): its own cost 0.07 "
    "needs about 56.6.",
)
_TRANSFORMER_NOTES = (
    "cost: GFLOPs over those of the family's reference; a study's own reference may be any member.",
    "GFLOPs: one forward pass, batch 1, float32, without guidance, counted by XLA; the papers' "
    "Gflops are multiply-adds, and stand here doubled.",
    "*: as its paper has it, with its own text or classes and latents; the member of the same name "
    "has the text and the latents of the U-Nets.",
)


def rows(family: str = "unet") -> list[dict[str, Any]]:
    """One dict a member of a family, in the zoo's order, ready for JSON; of transformers those that
    their papers printed come first, for the papers' own text and latents.

    Both `params` and `published_params` are plain counts (38800580 and 38800000, the latter as
    exact as it was printed); what was not published is None. Costs are those of the member's own
    family, see `zoo.Member.reference`.
    """
    if family not in zoo.FAMILIES:
        raise UserError(f"--family={family}: choose one of {', '.join(zoo.FAMILIES)}")
    # Of the paper's at another side nothing but the GFLOPs differs, which take long to count.
    members = [m for m in zoo.FAMILIES[family] if m not in zoo.PAPER_32]
    printed = [
        _printed(name, printed)
        for name, printed in (backbone_tables.PRINTED | backbone_tables.PRINTED_EDM2).items()
        if name.startswith(f"{family}_") or (family, name) == ("dit", "pixart_xl2")
    ]
    return [*printed, *map(_row, members)]


def _printed(name: str, printed: backbone_tables.Printed) -> dict[str, Any]:
    spent = cost.of(printed.spec)
    return {
        "name": f"{name}*",
        "base_channels": printed.spec.base_channels,
        "context_dim": printed.spec.context_dim,
        "params": spent.params,
        "gflops": spent.gflops,
        "norm_cost": None,
        "published_params": round(printed.params * 1e6),
        # Papers on transformers count multiply-adds.
        "published_gflops": printed.gmacs and 2 * printed.gmacs,
        "published_norm_cost": None, "published_fid": None, "published_clip": None,
    }


def _row(member: zoo.Member) -> dict[str, Any]:
    spent, published = cost.of(member.spec), member.published
    figures = {
        "gflops": published and published.gflops,
        "norm_cost": published and published.norm_cost,
        "fid": published and published.fid,
        "clip": published and published.clip,
    }
    return {
        "name": member.name,
        "base_channels": member.spec.base_channels,
        "context_dim": member.spec.context_dim,
        "params": spent.params,
        "gflops": spent.gflops,
        "norm_cost": zoo.norm_costs([member.name], member.reference)[member.name],
        "published_params": published and round(published.params * 1e6),
        **{f"published_{name}": value for name, value in figures.items()},
    }


def _millions(count: int | None) -> str:
    if count is None:
        return ""
    return f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count / 1e6:.3f}M"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def text(family: str = "unet") -> str:
    """The table for a terminal, with its notes; no line is longer than 100 characters."""
    table = terminal.table("name", "c", "context", "params", "paper", "GFLOPs", "paper", "cost",
                           "paper", "FID", "CLIP")
    for row in rows(family):
        table.add_row(
            row["name"], str(row["base_channels"]), str(row["context_dim"]),
            _millions(row["params"]), _millions(row["published_params"]),
            _number(row["gflops"], 1 if row["gflops"] > 10 else 3),
            _number(row["published_gflops"], 1),
            _number(row["norm_cost"], 2), _number(row["published_norm_cost"], 2),
            _number(row["published_fid"], 2), _number(row["published_clip"], 3),
            end_section=row["name"] in ("5b", "sd15"),
        )
    console = terminal.console()
    console.print(table)
    for note in _NOTES if family == "unet" else _TRANSFORMER_NOTES:
        console.print(note)
    return terminal.text(console)
