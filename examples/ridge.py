# %% [markdown]
# # Hypergradients alone: the penalties of a ridge regression
#
# Learner theta: weights. Designer phi: a log penalty for each weight. Inner loss: training error
# and penalty; outer: validation error. Everything has a closed form, so each estimator can be
# compared with the truth.

# %%
import torch
from torch import Tensor

from metavpt import (
    SGD,
    ConjugateGradient,
    ExactProduct,
    Implicit,
    Neumann,
    OneStep,
    Params,
    Unrolled,
)

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
N, D = 40, 8
x, x_val = torch.randn(N, D), torch.randn(N, D)
truth = torch.cat([torch.randn(D // 2), torch.zeros(D // 2)])  # half of the inputs say nothing
y, y_val = x @ truth + torch.randn(N), x_val @ truth + torch.randn(N)
phi: Params = {"log_penalty": torch.zeros(D)}


# %% [markdown]
# ## Two closures


# %%
def inner(phi: Params):
    """Return theta -> training loss."""
    return lambda theta: (
        ((x @ theta["w"] - y) ** 2).mean() / 2
        + (phi["log_penalty"].exp() * theta["w"] ** 2).sum() / 2
    )


def outer(theta: Params) -> Tensor:
    return ((x_val @ theta["w"] - y_val) ** 2).mean() / 2


# %% [markdown]
# ## The closed form
# theta* = H^-1 X^T y / n with H = X^T X / n + diag(exp(phi)), and
# dF(theta*)/dphi = -exp(phi) * theta* * (H^-1 g_down).


# %%
def hessian(phi: Params) -> Tensor:
    return x.T @ x / N + torch.diag(phi["log_penalty"].exp())


def solution(phi: Params) -> Params:
    return {"w": torch.linalg.solve(hessian(phi), x.T @ y / N)}


def closed_form(phi: Params) -> Tensor:
    theta = solution(phi)
    g_down = x_val.T @ (x_val @ theta["w"] - y_val) / N
    return -phi["log_penalty"].exp() * theta["w"] * torch.linalg.solve(hessian(phi), g_down)


# %% [markdown]
# ## The estimators
# At the solution `Implicit` is exact, a long unroll converges to it, and a short one equals as many
# terms of Neumann's series. `OneStep` is the first term.

# %%
lr, exact = 0.2, ExactProduct()
estimators = {
    "OneStep": OneStep(product=exact, step_size=lr),
    "Unrolled(10)": Unrolled(10, SGD(lr), exact),
    "Unrolled(300)": Unrolled(300, SGD(lr), exact),
    "Implicit(Neumann(10))": Implicit(Neumann(10, lr), product=exact),
    "Implicit(CG)": Implicit(ConjugateGradient(tolerance=1e-12), product=exact),
}
errors = {}
for name, estimate in estimators.items():
    found = estimate([inner] * estimate.num_batches, outer, solution(phi), phi).by_phi[
        "log_penalty"
    ]
    errors[name] = float((found - closed_form(phi)).norm() / closed_form(phi).norm())
    print(f"{name:22s} relative error {errors[name]:.1e}")

# %% [markdown]
# ## Use it
# Descend the validation loss in the penalties. Penalties on irrelevant inputs should end higher.

# %%
optimizer = torch.optim.Adam([phi["log_penalty"].requires_grad_()], lr=0.1)
before = float(outer(solution(phi)).detach())
for _ in range(100):
    phi["log_penalty"].grad = estimators["Implicit(CG)"]([inner], outer, solution(phi), phi).by_phi[
        "log_penalty"
    ]
    optimizer.step()
after = float(outer(solution(phi)).detach())
penalties = phi["log_penalty"].detach().exp()
print(f"validation loss {before:.3f} -> {after:.3f}")
useful, others = (part.log().mean() for part in (penalties[: D // 2], penalties[D // 2 :]))
print(f"mean log penalty: useful inputs {useful:.2f}, others {others:.2f}")
