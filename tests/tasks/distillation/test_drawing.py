"""A distilled network's lanes tell it its rate, by its spec alone."""

import jax
import numpy as np
import pytest

from ldm_scaling.models import unet
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.tasks import drawing


@pytest.mark.parametrize("dim", [0, 8])
def test_the_program_of_a_network_with_a_guidance_embedding(dim):
    """It traces with the context alone, for the rate comes from the lane; one call a row."""
    spec = unet.UNetSpec(
        4, 16, (1,), (False,), 1, heads=2, groups=2, sample_size=4, context_length=3,
        guidance_dim=dim,
    )
    mesh = mesh_lib.make(devices=jax.devices()[:1])
    lanes = drawing.lanes(spec, spec.latent_shape, 2, mesh, "float32")
    assert lanes.told == (dim > 0)
    program, rest = lanes.abstract(
        {"context": jax.ShapeDtypeStruct((1, 3, 16), np.float16)}, guided=False
    )
    text = str(jax.make_jaxpr(program)(unet.param_shapes(spec), *rest))
    # One of the timestep's embedding, one of the rate's.
    assert text.count(" sin ") == (2 if dim else 1)
