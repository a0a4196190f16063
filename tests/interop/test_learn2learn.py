"""learn2learn's unroll against ours, in float64 on ridge regression."""

import pytest
import torch
from helpers.ridge import Ridge

from metavpt.errors import MetaVPTError
from metavpt.hypergradients.estimators import Unrolled
from metavpt.hypergradients.mixed_products import ExactProduct
from metavpt.hypergradients.optimizer_updates import SGD
from metavpt.interop.learn2learn import MAMLUnroll

pytestmark = pytest.mark.peers
pytest.importorskip("learn2learn")


@pytest.mark.parametrize("num_steps", [1, 3, 10])
def test_equals_unrolled_sgd(num_steps):
    ridge = Ridge.random()
    theta = {
        "a.dotted.name": torch.randn(
            6, generator=torch.Generator().manual_seed(7), dtype=torch.float64
        )
    }
    before = theta["a.dotted.name"].clone()

    def renamed(loss):
        return lambda theta: loss({"theta": theta["a.dotted.name"]})

    arguments = (
        [lambda phi: renamed(ridge.inner(phi))] * num_steps,
        renamed(ridge.outer),
        theta,
        ridge.phi,
    )
    ours, theirs = (
        Unrolled(num_steps, SGD(0.2), ExactProduct())(*arguments),
        MAMLUnroll(num_steps, 0.2)(*arguments),
    )
    torch.testing.assert_close(theirs.by_phi, ours.by_phi, rtol=1e-12, atol=1e-14)
    assert theirs.value == pytest.approx(ours.value, rel=1e-12)
    assert torch.equal(theta["a.dotted.name"], before)


def test_bad_input_is_named():
    with pytest.raises(MetaVPTError, match="num_steps=0"):
        MAMLUnroll(0)
