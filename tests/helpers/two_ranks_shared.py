"""What ranks share beside the training step: probes, and losses of the whole batch.

Numbers that one process and two must agree on.
"""

import torch
from helpers.tiny_lm import packed, tiny_lm
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from metavpt.data.frames import Frame
from metavpt.data.lazy import Lazy
from metavpt.data.tokens import Encoder
from metavpt.dense_tasks.depth import DepthTask
from metavpt.dense_tasks.segmentation import SegmentationTask
from metavpt.designers.choice import balanced
from metavpt.distributed import collectives
from metavpt.feedback.cross_fitted import CrossFitted, PatchLabels
from metavpt.feedback.dense import RidgeFeedback
from metavpt.hypergradients.distributed_losses import averaged
from metavpt.objectives.spread import spread
from metavpt.probes.generation import Generator
from metavpt.probes.perplexity import mean_nll
from metavpt.probes.summaries import summarise


def derivatives(loss, x):
    """Value and gradient of the ranks' mean loss({"x": x}), and its Hessian times ones."""
    x = x.clone().requires_grad_()
    value = averaged(loss)({"x": x})
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    (product,) = torch.autograd.grad(gradient.sum(), x)
    return [value.detach(), gradient.detach(), product]


def ridge():
    """Heads refitted to the other fold of the batch, on features that x makes of inputs."""
    rng = torch.Generator().manual_seed(0)
    inputs = torch.randn(8, 5, 2, 3, generator=rng, dtype=torch.float64)
    frames = Frame(
        torch.zeros(8, 1),
        torch.rand(8, 4, 6, generator=rng) * 9,
        torch.randint(0, 3, (8, 4, 6), generator=rng),
    )
    frames.depth[0] = 0  # shares unlike in valid pixels
    feedback, inputs, frames = (
        RidgeFeedback(4, [DepthTask(), SegmentationTask(3)], penalty=0.1),
        collectives.own(inputs),
        collectives.own(frames),
    )

    def loss(theta):
        features = torch.einsum("bchw,cd->bdhw", inputs, theta["x"])
        return sum(feedback(features, frames).values())

    return derivatives(loss, torch.randn(5, 4, generator=rng, dtype=torch.float64))


def cross_fitted():
    """Three folds of eight frames: the middle one has frames of both processes."""
    rng = torch.Generator().manual_seed(1)
    inputs = torch.randn(8, 5, 2, 3, generator=rng, dtype=torch.float64)
    target, share = torch.rand(2, 8, 4, 2, 3, generator=rng, dtype=torch.float64)
    heads = CrossFitted(4, [DepthTask(), SegmentationTask(3)], penalty=0.1, num_folds=3)
    labels = PatchLabels(torch.zeros(8, 3, 1, 1), target, share)
    inputs, labels = collectives.own(inputs), collectives.own(labels)

    def features(x):
        return torch.einsum("bchw,cd->bdhw", inputs, x)

    x = torch.randn(5, 4, generator=rng, dtype=torch.float64)
    found = derivatives(lambda theta: sum(heads(features(theta["x"]), labels).values()), x)
    residuals = heads.residuals(features(x), labels)
    return [*found, *map(collectives.gather, residuals[:2]), residuals.directions]


def token_shares():
    """The first rank's rows have three tokens, the second's one."""
    logits, costs = (
        torch.tensor([0.5, -1.0, 2.0, 0.3], dtype=torch.float64),
        torch.tensor([1.0, 3.0, -2.0, 5.0], dtype=torch.float64),
    )
    mine = (
        slice(None) if collectives.size() == 1 else (slice(0, 3), slice(3, 4))[collectives.rank()]
    )

    def loss(theta):
        weights = balanced((logits * theta["x"])[mine])
        return collectives.weighed((weights * costs[mine]).mean(), len(weights))

    return derivatives(loss, torch.ones(4, dtype=torch.float64))


def tilt_scale():
    rng = torch.Generator().manual_seed(0)
    values, log_probs = torch.randn(2, 4, 6, generator=rng, dtype=torch.float64)
    mine = (
        slice(None) if collectives.size() == 1 else (slice(0, 3), slice(3, 4))[collectives.rank()]
    )
    return [spread(values[mine], log_probs[mine])]


def language():
    """Five batches, which two ranks cannot share alike; and sampled texts."""
    learner = tiny_lm()
    nll = mean_nll(learner, [packed([[5 + k], [3]], seed=k) for k in range(5)])
    words = {f"w{k}": k for k in range(40)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w1")),
        eos_token="w0",
        pad_token="w0",
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    generator = Generator(Encoder(tokenizer, 64), max_new_tokens=6, batch_size=2, stop=())
    return nll, generator(
        learner, ["w3 w4", "w5", "w6 w7 w8", "w9", "w2 w2"], temperature=1.0, seed=3
    )


def summaries():
    """Which images each rank read, and summaries of all of them."""
    read = []

    def image(k):
        read.append(k)
        return torch.full((1, 3, 2, 2), float(k))

    def describe(images):
        return type("Features", (), {"patches": torch.cat([images, images**2], dim=1)})

    found = summarise(describe, Lazy(image, range(5)))
    return found, collectives.every(sorted(set(read)))


def dense(trainer):
    """The probes of a dense problem, whose trunk may be sharded: head fits and their scores."""
    return type(trainer.problem).evaluate(trainer.problem)


def numbers():
    return {
        "ridge": ridge(),
        "cross_fitted": cross_fitted(),
        "token_shares": token_shares(),
        "tilt_scale": tilt_scale(),
        "language": language(),
        "summaries": summaries(),
    }
