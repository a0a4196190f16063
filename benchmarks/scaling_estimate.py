"""The estimates of docs/scaling.md from their formulas. Nothing is measured."""

from dataclasses import dataclass

FLOAT = 4  # bytes: gradients and parameters travel in float32
# Assumed bytes/s that a device sends: inside a machine of 8, and between machines (400 Gb/s each).
NVLINK, NETWORK = 300e9, 50e9
# Assumed FLOP/s that a device sustains: in the learner's step, and in a designer update.
BF16, TF32 = 400e12, 200e12
HEAD_STEPS = 0  # heads in closed form need no passes of their own; feedback=dense takes 4
META_EVERY = 8


@dataclass(frozen=True)
class Model:
    """Numbers of parameters and of tokens per sample.

    The learner has N, of which S are aligned and H stay whole under fsdp. The designer has P.
    """

    name: str
    learner: float
    aligned: float
    others: float
    designer: float
    block: float
    student_tokens: float
    teacher_tokens: float
    feedback_tokens: float
    heads: int
    batch: int  # samples of a step on a device; a designer update and its feedback take a quarter
    parallel: str


VIT_L = Model("ViT-L", 304e6, 50e6, 9e6, 0.5e6, 12.6e6, 648, 402, 201, HEAD_STEPS, 64, "ddp")
VIT_7B = Model("ViT-7B", 6.7e9, 336e6, 30e6, 0.5e6, 168e6, 648, 402, 201, HEAD_STEPS, 16, "fsdp")
LM_7B = Model("7B LM", 6.74e9, 405e6, 131e6, 14.5e6, 202e6, 1024, 0, 256, 0, 16, "fsdp")


def sent(model: Model, devices: int) -> tuple[float, float, float]:
    """Bytes that a device sends in a step, in an update's reductions and in its gathers."""
    ring = (devices - 1) / devices
    trunk, teacher = model.learner - model.aligned - model.others, float(model.teacher_tokens > 0)
    reductions = (
        2 * ring * FLOAT * (model.aligned + 2 * model.designer)
    )  # g_down; phi from the product and from the regularizer
    if model.parallel == "ddp":
        return 2 * ring * FLOAT * model.learner, reductions, 0.0
    step = ring * FLOAT * (trunk * (3 + teacher) + 2 * (model.aligned + model.others))
    gathers = (
        ring * FLOAT * trunk * (model.heads + 1 + 2 + teacher)
    )  # heads, feedback, the meta batch there and back, its teacher
    return step, reductions, gathers


def flops(model: Model) -> tuple[float, float]:
    """Of a device: of a plain step, and of a designer update by OneStep."""
    teacher = 2 * model.learner * model.teacher_tokens
    step = model.batch * (6 * model.learner * model.student_tokens + teacher)
    product = (
        4 * model.learner * model.student_tokens
        + teacher
        + 4 * model.aligned * model.student_tokens
    )  # the tail a second time
    feedback = (2 * model.learner * (1 + model.heads) + 4 * model.aligned) * model.feedback_tokens
    return step, model.batch / 4 * (product + feedback)


def memory(model: Model, devices: int) -> tuple[float, float]:
    """Bytes that a device holds beside activations: of the plain run, and what OneStep adds."""
    copies = 5 if model.teacher_tokens else 4  # weights, gradients, two moments; the teacher
    added = FLOAT * (
        5 * model.aligned + 4 * model.designer
    )  # g_down, its flat copy, theta + eps w, theta - eps w, w; designer with Adam
    if model.parallel == "ddp":
        return FLOAT * copies * model.learner, added
    whole = model.aligned + model.others
    return FLOAT * (copies * ((model.learner - whole) / devices + whole) + 2 * model.block), added


def row(model: Model, devices: int) -> str:
    speed = NVLINK if devices <= 8 else NETWORK
    step, reductions, gathers = sent(model, devices)
    step_flops, update_flops = flops(model)
    step_s, update_s = step_flops / BF16, update_flops / TF32
    exposed = max(0.0, step / speed - step_s)  # what the plain step cannot hide behind computation
    # No communication of an update overlaps: reductions follow it, and gathers count likewise.
    overhead = (update_s + (reductions + gathers) / speed) / META_EVERY / (step_s + exposed)
    plain, added = memory(model, devices)
    cells = [
        model.name, model.parallel, f"{devices:,}", f"{step / 1e9:.2f}", f"{reductions / 1e9:.2f}",
        f"{gathers / 1e9:.1f}",
        f"{plain / 2**30:.1f}", f"{added / 2**30:.2f}", f"{1e3 * step_s:.0f}",
        f"{1e3 * exposed:.0f}", f"{1e3 * update_s:.0f}",
        f"{1e3 * (reductions + gathers) / speed:.0f}", f"{overhead:.0%}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    for model in (VIT_L, VIT_7B, LM_7B):
        for devices in (8, 64, 1024):
            print(row(model, devices))
