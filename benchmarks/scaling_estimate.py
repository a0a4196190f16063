"""The estimates of docs/scaling.md from their formulas. Nothing is measured.

The tests compare the bytes of `sent` with what small learners send.
"""

from dataclasses import dataclass
from typing import NamedTuple

FLOAT = 4  # bytes: gradients and parameters travel in float32
MACHINE = 8  # devices
# Assumed bytes/s that a device sends: inside a machine, and between machines (400 Gb/s each).
NVLINK, NETWORK = 300e9, 50e9
# Assumed FLOP/s that a device sustains: in the learner's step, and in a designer update.
BF16, TF32 = 400e12, 200e12
META_EVERY = 8


@dataclass(frozen=True)
class Model:
    """Numbers of parameters, of tokens per sample, and of passes through the trunk.

    The learner has N, of which S are aligned and H stay whole where the trunk is sharded. The
    designer has P.

    Attributes:
        passes: Of the student through its trunk in a step: one for each size of crop.
        steered_passes: Those whose inputs the designer changes; they have `steered_tokens`.
        heads: Steps that fit heads in a designer update: 0 in closed form, 4 for `feedback=dense`.
            Four share a pass.
        features: Numbers of a labelled sample that heads are fitted to by steps.
        moments: Numbers of the moments, in float64, that heads in closed form are fitted to: upper
            halves of matrices as wide as a feature, for 5 folds of 2 tasks.
        batch: Samples of a step on a device. A designer update and its feedback take a quarter.
    """

    name: str
    learner: float
    aligned: float
    others: float
    designer: float
    block: float = 0
    student_tokens: float = 0
    steered_tokens: float = 0
    teacher_tokens: float = 0
    feedback_tokens: float = 0
    passes: int = 1
    steered_passes: int = 1
    heads: int = 0
    features: float = 0
    moments: float = 0
    batch: int = 0


# 2 crops of 201 tokens, of which a designer hides patches and a teacher reads all, and 6 of 41
CROPS = {"student_tokens": 648, "steered_tokens": 402, "teacher_tokens": 402, "passes": 2}
VIT_L = Model(
    "ViT-L", 304e6, 50e6, 9e6, 0.5e6, 12.6e6, feedback_tokens=201, batch=64,
    moments=10 * 1024**2 / 2, **CROPS,
)  # fmt: skip
VIT_7B = Model(
    "ViT-7B", 6.7e9, 336e6, 30e6, 0.5e6, 168e6, feedback_tokens=201, batch=16,
    moments=10 * 4096**2 / 2, **CROPS,
)  # fmt: skip
LM_7B = Model(
    "7B LM", 6.74e9, 405e6, 131e6, 14.5e6, 202e6, 1024, 1024, feedback_tokens=256, batch=16
)
ROWS = ((VIT_L, "ddp"), (VIT_7B, "fsdp"), (VIT_7B, "hsdp"), (LM_7B, "fsdp"), (LM_7B, "hsdp"))


class Sent(NamedTuple):
    """Bytes that a device sends.

    Attributes:
        step_trunk: In a step, to gather the trunk and to reduce and scatter its gradient.
        step_shards: In a step, to average gradients of shards over machines.
        step_whole: In a step, to average gradients of what every device holds.
        reductions: In an update, to average g_down and gradients by phi.
        gathers: In an update, to gather the trunk.
        heads: In an update, to gather features that heads are fitted to, or to sum their moments,
            there and back.
    """

    step_trunk: float
    step_shards: float
    step_whole: float
    reductions: float
    gathers: float
    heads: float


def sent(
    model: Model, parallel: str, devices: int, machine: int = MACHINE, number: int = FLOAT
) -> Sent:
    """What a device sends in a step, and in a designer update by `OneStep(Dot)`.

    Args:
        model: The learner.
        parallel: ddp, fsdp or hsdp.
        devices: All of them.
        machine: Devices in a machine.
        number: Bytes of a number.
    """
    shards = {"ddp": 1, "fsdp": devices, "hsdp": min(machine, devices)}[parallel]
    trunk = model.learner - model.aligned - model.others if parallel != "ddp" else 0
    teacher = int(model.teacher_tokens > 0)
    gather = number * trunk * _ring(shards)
    reduction = 2 * number * _ring(devices)
    head_passes, frames = -(-model.heads // 4), devices * model.batch / 4
    return Sent(
        # there and back for each pass, and one sum of gradients
        step_trunk=gather * (2 * model.passes + 1 + teacher),
        step_shards=2 * number * trunk / shards * _ring(devices // shards) if trunk else 0,
        step_whole=reduction * (model.learner - trunk),
        # phi from the product and from the regularizer
        reductions=reduction * (model.aligned + 2 * model.designer),
        # heads, feedback, the meta batch there and, where the designer changes it, back
        gathers=gather * (head_passes + 1 + model.passes + teacher + model.steered_passes),
        heads=reduction / 2 * model.heads * frames * model.features
        + 2 * 2 * 8 * _ring(devices) * model.moments,
    )


def _ring(devices: int) -> float:
    return (devices - 1) / devices


def flops(model: Model) -> tuple[float, float]:
    """Of a device: of a plain step, and of a designer update by OneStep."""
    teacher = 2 * model.learner * model.teacher_tokens
    step = model.batch * (6 * model.learner * model.student_tokens + teacher)
    product = (
        2 * model.learner * (model.student_tokens + model.steered_tokens)
        + teacher
        + 4 * model.aligned * model.student_tokens
    )  # the tail a second time
    feedback = (2 * model.learner * (1 + model.heads) + 4 * model.aligned) * model.feedback_tokens
    return step, model.batch / 4 * (product + feedback)


def memory(model: Model, parallel: str, devices: int) -> tuple[float, float]:
    """Bytes that a device holds beside activations: of the plain run, and what OneStep adds."""
    copies = 5 if model.teacher_tokens else 4  # weights, gradients, two moments; the teacher
    added = FLOAT * (
        5 * model.aligned + 4 * model.designer
    )  # g_down, its flat copy, theta + eps w, theta - eps w, w; designer with Adam
    if parallel == "ddp":
        return FLOAT * copies * model.learner, added
    whole = model.aligned + model.others
    shards = devices if parallel == "fsdp" else min(MACHINE, devices)
    return FLOAT * (copies * ((model.learner - whole) / shards + whole) + 2 * model.block), added


def row(model: Model, parallel: str, devices: int) -> str:
    across = NVLINK if devices <= MACHINE else NETWORK
    trunk = NVLINK if parallel == "hsdp" else across
    bytes_of = sent(model, parallel, devices)
    step_flops, update_flops = flops(model)
    step_s, update_s = step_flops / BF16, update_flops / TF32
    traffic_s = bytes_of.step_trunk / trunk + (bytes_of.step_shards + bytes_of.step_whole) / across
    exposed = max(0.0, traffic_s - step_s)  # what the plain step cannot hide behind computation
    # No communication of an update overlaps: reductions follow it, and gathers count likewise.
    sends_s = bytes_of.gathers / trunk + (bytes_of.reductions + bytes_of.heads) / across
    overhead = (update_s + sends_s) / META_EVERY / (step_s + exposed)
    plain, added = memory(model, parallel, devices)
    cells = [
        model.name, parallel, f"{devices:,}",
        *(f"{sum(some) / 1e9:.1f}" for some in (bytes_of[:3], bytes_of[3:4], bytes_of[4:])),
        f"{plain / 2**30:.1f}", f"{added / 2**30:.2f}", f"{1e3 * step_s:.0f}",
        f"{1e3 * exposed:.0f}", f"{1e3 * update_s:.0f}", f"{1e3 * sends_s:.0f}",
        f"{overhead:.1%}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    for model, parallel in ROWS:
        for devices in (64, 1024) if parallel == "hsdp" else (8, 64, 1024):
            print(row(model, parallel, devices))
