"""Names and numbers of slices, beside what Google's pages print for them."""

import pytest

from launch.common import LaunchError
from launch.tpu import Slice
from tests.launch.programs import call


@pytest.mark.parametrize("text, chips, hosts, request_flag, machine", [
    # Cloud TPU's "TPU configurations": accelerator types, chips, VMs.
    ("v5e:1x1", 1, 1, "--accelerator-type=v5litepod-1", "ct5lp-hightpu-1t"),
    ("v5e:2x4", 8, 1, "--accelerator-type=v5litepod-8", "ct5lp-hightpu-8t"),
    ("v5e:4x4", 16, 4, "--accelerator-type=v5litepod-16", "ct5lp-hightpu-4t"),
    ("v5e:16x16", 256, 64, "--accelerator-type=v5litepod-256", "ct5lp-hightpu-4t"),
    ("v5p:2x2x1", 4, 1, "--accelerator-type=v5p-8", "ct5p-hightpu-4t"),
    ("v5p:2x4x4", 32, 8, "--accelerator-type=v5p-64", "ct5p-hightpu-4t"),
    ("v5p:4x4x8", 128, 32, "--accelerator-type=v5p-256", "ct5p-hightpu-4t"),
    ("v5p:4x8x8", 256, 64, "--accelerator-type=v5p-512", "ct5p-hightpu-4t"),
    ("v5p:8x16x16", 2048, 512, "--accelerator-type=v5p-4096", "ct5p-hightpu-4t"),
    ("v5p:16x16x24", 6144, 1536, "--accelerator-type=v5p-12288", "ct5p-hightpu-4t"),
    ("v6e:2x4", 8, 1, "--accelerator-type=v6e-8", "ct6e-standard-8t"),
    ("v6e:16x16", 256, 64, "--accelerator-type=v6e-256", "ct6e-standard-4t"),
    ("v4:4x4x8", 128, 32, "--topology=4x4x8", "ct4p-hightpu-4t"),
])  # fmt: skip
def test_slices_as_published(text, chips, hosts, request_flag, machine):
    tpu = Slice.parse(text)
    assert (tpu.chips, tpu.hosts, tpu.machine_type) == (chips, hosts, machine)
    assert request_flag in tpu.request()
    assert str(tpu) == text


@pytest.mark.parametrize("google, text", [
    ("v5e-64", "v5e:8x8"), ("v5litepod-256", "v5e:16x16"), ("v6e-8", "v6e:2x4"),
    ("v5p-8", "v5p:2x2x1"), ("v5p-512", "v5p:4x8x8"), ("v4-64", "v4:2x4x4"),
])  # fmt: skip
def test_googles_own_names(google, text):
    from ldm_scaling.parallel import aot_tpu

    tpu = Slice.parse(google)
    assert str(tpu) == text == aot_tpu.named(google) == aot_tpu.named(text)
    asked = tpu.request()[-1].partition("=")[2]
    assert asked in (google.replace("v5e", "v5litepod"), tpu.shape)


@pytest.mark.parametrize("text, part", [
    ("v5e", "KIND:SHAPE"),
    ("v5e-63", "chips: 1, 4, 8, 16"),
    ("v5p-7", "cores, 2 a chip"),
    ("v7:4x4", "no TPU is called 'v7'"),
    ("v5e:3x3", "16x16"),
    ("v5e:32x32", "at most 256"),
    ("v5p:4x4", "4x8x8"),
    ("v5p:8x8x4", "ascending"),
    ("v5p:0x4x4", "multiples of 4"),
    ("v6e:axb", "chips along each axis"),
])  # fmt: skip
def test_what_is_no_slice_is_refused(text, part):
    with pytest.raises(LaunchError, match=part):
        Slice.parse(text)


def test_its_help_says_what_it_takes():
    ran = call("tpu.py", "--help")
    assert ran.returncode == 0 and not ran.stderr
    assert "prints what launch/tpu_vm.sh needs to know" in ran.stdout


def test_a_shape_that_the_tpu_api_would_not_give_is_refused():
    # v5p-512 is 4x8x8 there: asking for 4x4x16 by chips alone would give other wires.
    with pytest.raises(LaunchError, match=r"4x8x8.*gke\.py"):
        Slice.parse("v5p:4x4x16").request()
