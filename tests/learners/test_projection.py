import torch

from metavpt.learners.projection import ProjectionHead


def head(width: int = 6, num_prototypes: int = 5) -> ProjectionHead:
    torch.manual_seed(0)
    return ProjectionHead(width, num_prototypes, hidden=8, bottleneck=4).double()


def test_projection_head_gives_cosines_with_prototypes() -> None:
    made, x = head(), torch.randn(3, 2, 6).double()
    z = made.mlp(x)
    expected = torch.cosine_similarity(z[..., None, :], made.prototypes, dim=-1)
    assert expected.shape == (3, 2, 5)
    torch.testing.assert_close(made(x), expected, rtol=1e-12, atol=1e-12)


def test_projection_head_ignores_the_length_of_prototypes() -> None:
    made, x = head(), torch.randn(3, 6).double()
    before = made(x)
    with torch.no_grad():
        made.prototypes *= torch.tensor([0.1, 1.0, 2.0, 5.0, 9.0])[:, None]
    torch.testing.assert_close(made(x), before, rtol=1e-12, atol=1e-12)
