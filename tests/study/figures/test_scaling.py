"""Figures of scaling laws: planted laws stand in the numbers beside them."""

import csv
import dataclasses

import numpy as np
import pytest

from ldm_scaling.errors import UserError
from ldm_scaling.study import plot_style
from ldm_scaling.study.figures import catalogue, equal_compute, foretold, scaling
from ldm_scaling.study.figures.source import Source
from ldm_scaling.study.statistics.laws import Law
from tests.study import fake_records as fake

FD = "fd_effnetlite0"
SIZES = {f"s{k}": int(1e6 * 1.55**k) for k in range(7)}
LAST = 40_000
PER = 2e-6  # GFLOPs of a call, by parameters.
LAW = Law(0.1, (400.0, 20.0), (0.5, 0.5))


def _loss(params, step, law=LAW):
    return float(law(np.array([[params, step]]))[0])


def _losses(sizes=SIZES, noise=0.002, law=LAW, seed=0):
    """Validation losses by the law; in the warm-up, the first tenth, they are far off."""
    rng = np.random.default_rng(seed)
    steps = range(1000, LAST + 1, 1000)
    return {
        m: [[s, 1.0, _loss(n, s, law) * (3 if s < LAST / 10 else np.exp(noise * rng.normal()))]
            for s in steps]
        for m, n in sizes.items()
    }


def _records(sizes=SIZES, train_step=LAST, value=None):
    """One reported network of each size; its distance is 100 times its loss unless given."""
    base = fake.make(models=("c8",), samplers=("ddim",), steps={"ddim": (50,)}, guidance=(3.0,),
                     noise=0.3, shared=0.0)
    out = []
    for m, n in sizes.items():
        true = (value or (lambda n: 100 * _loss(n, LAST)))(n)
        for r in base:
            scale = true / r.metrics[FD]
            out.append(dataclasses.replace(
                r, params=n, gflops=PER * n, metrics={FD: true}, intervals={},
                identity=dataclasses.replace(r.identity, model=m, train_step=train_step),
                replicates={FD: [v * scale for v in r.replicates.get(FD, [])]}))
    return out


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("laws")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot_style, "DPI", 30)
        patch.setattr(plot_style, "FORMATS", {"png": {}})
        written = catalogue.write(folder, Source(_records(), FD, loss_curves=_losses()), ["law"])
    return folder, written


def _rows(folder, name, measure):
    with open(folder / f"{name}.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row["measure"] == measure]


def _within(row, name, true):
    return float(row[f"{name}_low"]) <= true <= float(row[f"{name}_high"])


def test_all_four_are_drawn(drawn):
    _, written = drawn
    assert written.names == ("law_compute", "law_size", "law_isoflop", "law_largest")
    assert written.skipped == ()


def test_the_law_of_compute_is_that_of_the_best_size(drawn):
    """In closed form: the exponent is alpha beta / (alpha + beta), the offset that of the law."""
    folder, _ = drawn
    rows = _rows(folder, "law_compute", "validation_loss")
    row = rows[0]
    assert float(row["alpha"]) == pytest.approx(0.25, abs=0.02) and _within(row, "alpha", 0.25)
    assert float(row["E"]) == pytest.approx(0.1, abs=0.01) and _within(row, "E", 0.1)
    for row in rows:
        c = float(row["compute"])
        assert c == pytest.approx(PER * int(row["params"]) * int(row["train_step"]))
        n = np.geomspace(1e5, 1e9, 4000)
        best = min(LAW(np.stack([n, c / (PER * n)], axis=1)))
        assert float(row["law"]) == pytest.approx(best, rel=0.01)
        assert float(row["law_low"]) <= float(row["law"]) <= float(row["law_high"])
    assert {int(row["train_step"]) for row in rows} == set(range(LAST // 10, LAST + 1, 1000))
    assert len(rows) == len(SIZES) * 37


def test_the_law_of_size_is_that_of_the_ends(drawn):
    folder, _ = drawn
    rows = _rows(folder, "law_size", "validation_loss")
    assert {int(row["train_step"]) for row in rows} == {LAST} and len(rows) == len(SIZES)
    left = 0.1 + 20 / LAST**0.5
    assert _within(rows[0], "alpha", 0.5) and _within(rows[0], "E", left)
    exact = _rows(folder, "law_size", FD)[0]  # Networks without noise: to the last digits.
    assert float(exact["alpha"]) == pytest.approx(0.5, rel=1e-3)
    assert float(exact["E"]) == pytest.approx(100 * left, rel=1e-3)
    for row in _rows(folder, "law_size", FD):
        assert float(row["loss"]) == pytest.approx(100 * _loss(int(row["params"]), LAST))


def test_the_law_of_size_has_its_sizes_as_ticks():
    with plot_style.style():
        fig = scaling.by_size(Source(_records(), FD))[""].figure
        fig.draw_without_rendering()
    for ax in fig.axes:
        assert ax.get_xticks().tolist() == list(SIZES.values())
        named = [t.get_text() for t in ax.get_xticklabels()]
        assert [named[0], named[-1]] == ["1M", "13.9M"]


def test_profiles_have_their_sizes_as_ticks():
    left, _ = equal_compute.profiles(Source(_records(), FD, loss_curves=_losses()))[
        ""].figure.axes
    assert left.get_xticks().tolist() == list(SIZES.values())


def test_the_line_goes_through_the_best_sizes(drawn):
    """In the numbers beside the figure, and as it is drawn."""
    rows = [r for r in _rows(drawn[0], "law_isoflop", "validation_loss") if r["best_size"]]
    assert rows
    for row in rows:
        line = float(row["factor"]) * float(row["compute"]) ** float(row["exponent"])
        assert line == pytest.approx(float(row["best_size"]), rel=0.2)
    (shown, *_) = equal_compute.profiles(Source(_records(), FD, loss_curves=_losses())).values()
    ax = next(ax for ax in shown.figure.axes if ax.get_ylabel() == "parameters at the least")
    line = max(ax.lines, key=lambda one: len(one.get_xdata()))
    for row in rows:
        at = np.interp(float(row["compute"]), line.get_xdata(), line.get_ydata())
        assert at == pytest.approx(float(row["best_size"]), rel=0.2)


def test_profiles_have_their_least_at_the_best_size(drawn):
    """Equal exponents: the best size grows as the root of the compute."""
    folder, _ = drawn
    rows = _rows(folder, "law_isoflop", "validation_loss")
    best = {float(r["compute"]): float(r["best_size"]) for r in rows if r["best_size"]}
    assert len(best) >= 3 and _within(rows[0], "exponent", 0.5)
    assert float(rows[0]["exponent"]) == pytest.approx(0.5, abs=0.15)
    for compute, size in best.items():
        true, _ = LAW.best_split(compute / PER, per=1.0)
        assert size == pytest.approx(true, rel=0.15)
    for row in rows:
        true = _loss(int(float(row["params"])), float(row["compute"]) / PER / float(row["params"]))
        assert float(row["loss"]) == pytest.approx(true, rel=0.01)
    # Networks at one length share no compute.
    assert _rows(folder, "law_isoflop", FD) == []


def test_computes_that_lie_close_together_are_curves_of_their_own():
    """Runs that meet over a ninth of their compute; two digits would name several alike."""
    sizes = {f"s{k}": int(1.4e6 * 2.08**k) for k in range(4)}
    source = Source(_records(sizes), FD, loss_curves=_losses(sizes, noise=0.0))
    drawn = equal_compute.profiles(source)[""]
    least, most = PER * max(sizes.values()) * LAST / 10, PER * min(sizes.values()) * LAST
    np.testing.assert_allclose(
        sorted({row["compute"] for row in drawn.rows}), np.geomspace(least, most, 5), rtol=1e-3)
    assert drawn.rows[0]["exponent"] == pytest.approx(0.5, abs=0.05)
    names = {text.get_text() for text in drawn.figure.axes[0].texts}
    assert len({name for name in names if "×10" in name}) == 5


def test_what_is_foretold_hides_nothing_that_was_measured():
    drawn = foretold.largest(Source(_records(), FD))[""]
    (circle,) = [line for line in drawn.figure.axes[0].lines
                 if len(line.get_xdata()) == 1 and line.get_markersize() == 9]
    assert circle.get_markerfacecolor() == "none"


def test_the_largest_is_foretold_and_one_that_is_off_is_outside(drawn, tmp_path, monkeypatch):
    folder, _ = drawn
    rows = _rows(folder, "law_largest", "validation_loss")
    assert {row["model"] for row in rows} == {"s6"} and rows[0]["law_of"] == "size and images"
    assert float(rows[0]["error"]) < 0.006 and float(rows[0]["covered"]) > 0.8
    row, = _rows(folder, "law_largest", FD)
    assert row["law_of"] == "compute" and float(row["predicted"]) == pytest.approx(
        100 * _loss(SIZES["s6"], LAST), rel=0.01)
    monkeypatch.setattr(plot_style, "DPI", 30)
    monkeypatch.setattr(plot_style, "FORMATS", {"png": {}})
    off = _losses()
    off["s6"] = [[s, a, 1.1 * b] for s, a, b in off["s6"]]
    catalogue.write(tmp_path, Source(_records(), FD, loss_curves=off), ["law_largest"])
    row = _rows(tmp_path, "law_largest", "validation_loss")[0]
    assert float(row["error"]) == pytest.approx(0.1, abs=0.02) and float(row["covered"]) < 0.1


def test_each_family_has_a_law_of_its_own(tmp_path, monkeypatch):
    """U-Nets and DiTs by one law, DiTs at twice its distance: neither's law bends to the other."""
    monkeypatch.setattr(plot_style, "DPI", 30)
    monkeypatch.setattr(plot_style, "FORMATS", {"png": {}})
    monkeypatch.setattr("ldm_scaling.study.statistics.scaling.REPLICATES", 40)
    unets = dict(zip(("c8", "c12", "c16", "c24", "c32"), SIZES.values()))
    dits = dict(zip(("dit_w40", "dit_w56", "dit_w72", "dit_w104"), SIZES.values()))
    twice = Law(0.2, (800.0, 40.0), (0.5, 0.5))
    losses = _losses(unets) | _losses(dits, law=twice, seed=1)
    records = _records(unets) + _records(dits, value=lambda n: 200 * _loss(n, LAST))
    written = catalogue.write(tmp_path, Source(records, FD, loss_curves=losses), ["law"])
    assert written.names == ("law_compute", "law_size", "law_isoflop", "law_largest")
    for name in ("law_compute", "law_size"):
        rows = _rows(tmp_path, name, "validation_loss")
        for family, sizes, least in (("U-Net", unets, 0.1), ("DiT", dits, 0.2)):
            own = [row for row in rows if row["family"] == family]
            assert {row["model"] for row in own} == set(sizes)
            if name == "law_compute":
                assert float(own[0]["E"]) == pytest.approx(least, rel=0.1)
                assert float(own[0]["alpha"]) == pytest.approx(0.25, abs=0.03)
            assert all(float(r["law"]) == pytest.approx(float(r["loss"]), rel=0.2) for r in own)
    foretold = _rows(tmp_path, "law_largest", "validation_loss")
    assert {(row["family"], row["model"]) for row in foretold} == {
        ("U-Net", "c32"), ("DiT", "dit_w104")}
    assert max(float(row["error"]) for row in foretold) < 0.05
    profiles = _rows(tmp_path, "law_isoflop", "validation_loss")
    assert {row["family"] for row in profiles} == {"U-Net", "DiT"}


def test_what_there_is_too_little_for_is_said_and_not_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(plot_style, "DPI", 30)
    monkeypatch.setattr(plot_style, "FORMATS", {"png": {}})

    def names(sizes, **more):
        some = {m: n for m, n in SIZES.items() if m in sizes}
        source = Source(more.pop("records", None) or _records(some), FD, **more)
        return catalogue.write(tmp_path, source, ["law"]).names

    assert names(("s0", "s1")) == ()
    assert names(("s0", "s1", "s2")) == ("law_compute", "law_size")
    assert names(("s0", "s1", "s2", "s3")) == ("law_compute", "law_size", "law_largest")
    # Each size trained to the same compute: nothing to fit over it, but a profile.
    alike = [
        dataclasses.replace(r, gflops=1e6 / step) for m, n in list(SIZES.items())[:4]
        for step in (int(1e11 / n),) for r in _records({m: n}, train_step=step)
    ]
    assert names((), records=alike) == ("law_size", "law_isoflop")
    # Published networks: how long they were trained is not known.
    assert names((), records=_records(train_step=0)) == ()
    # Losses of members without records have no size.
    assert names((), records=_records({"s0": 10**6}), loss_curves=_losses()) == ()


def test_losses_without_a_law_leave_the_page_whole(tmp_path, monkeypatch):
    """Losses that are flat, that rise with size, or infinite: the law through the ends is drawn."""
    monkeypatch.setattr(plot_style, "DPI", 30)
    monkeypatch.setattr(plot_style, "FORMATS", {"png": {}})
    some = {m: n for m, n in SIZES.items() if m in ("s0", "s1", "s2", "s3")}
    rng = np.random.default_rng(0)
    steps = range(4000, LAST + 1, 4000)
    flat = {m: [[s, 1.0, float(np.exp(0.003 * rng.normal()))] for s in steps] for m in some}
    worse = {m: [[s, 1.0, (0.3 + 20 / s**0.5) * 1.05**k] for s in steps]
             for k, m in enumerate(some)}
    lost = _losses(some)
    lost["s1"][20][2] = float("inf")
    for losses in (flat, worse, lost):
        source = Source(_records(some), FD, loss_curves=losses)
        assert catalogue.write(tmp_path, source, ["law_compute"]).names == ("law_compute",)
        rows = _rows(tmp_path, "law_compute", "validation_loss")
        assert len(rows) == (len(some) * 37 - 1 if losses is lost else len(some))


def test_a_measure_at_or_below_0_has_no_law_and_the_losses_keep_theirs(tmp_path, monkeypatch):
    """As a kernel distance without bias is of a network as good as the reference."""
    monkeypatch.setattr(plot_style, "DPI", 30)
    monkeypatch.setattr(plot_style, "FORMATS", {"png": {}})
    records = _records(value=lambda n: -0.01 if n == max(SIZES.values()) else 1.0)
    source = Source(records, FD, loss_curves=_losses())
    assert {one.name for one in scaling.measured(source)} == {scaling.VALIDATION_LOSS}
    assert scaling.left_out(Source(_records(), FD)) == []
    (line,) = scaling.left_out(source)
    assert line.startswith("no scaling law of FD is drawn: of s") and "it is -0.0100" in line
    assert catalogue.write(tmp_path, source, ["law_size"]).names == ("law_size",)


def test_a_figure_that_fails_is_skipped_unless_it_is_asked_for_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(plot_style, "DPI", 30)
    monkeypatch.setattr(plot_style, "FORMATS", {"png": {}})

    def fails(source):
        raise OverflowError("math range error")

    entries = [dataclasses.replace(e, draw=fails) if e.name == "law_compute" else e
               for e in catalogue.FIGURES]
    monkeypatch.setattr(catalogue, "FIGURES", tuple(entries))
    source = Source(_records(), FD)
    written = catalogue.write(tmp_path, source, ["law_compute", "law_size"])
    assert written.names == ("law_size",)
    assert written.skipped == ("law_compute failed: OverflowError: math range error",)
    with pytest.raises(UserError, match="law_compute failed: OverflowError"):
        catalogue.write(tmp_path, source, ["law_compute"])
