"""What networks along their training, and fine-tuned ones, are compared at."""

import dataclasses

import pytest

from ldm_scaling.study.statistics import trends
from tests.study import paper_records as paper

SIZES = ("39m", "223m", "866m")


@pytest.mark.parametrize("steps, compared", [
    ((4, 50, 250), 50),  # The paper's, where all have it.
    ((4, 20, 250), 250),
    ((4, 20), 20),
])
def test_networks_are_compared_at_the_papers_steps(steps, compared):
    found = trends.networks(paper.grid(("ddim",), SIZES, steps, (2.0, 3.0)), paper.FID)
    assert {n.model for n in found} == set(SIZES)
    assert {n.point.steps for n in found} == {compared}


def test_what_most_networks_have_goes_before():
    """Of some lengths of training other steps were measured: those that all have are compared."""
    records = paper.grid(("ddim",), SIZES, (20, 50), (2.0, 3.0))
    early = [
        dataclasses.replace(r, identity=dataclasses.replace(r.identity, train_step=1000))
        for r in records if r.identity.steps == 20
    ]
    found = trends.networks([*records, *early], paper.FID)
    assert len(found) == 2 * len(SIZES) and {n.point.steps for n in found} == {20}
