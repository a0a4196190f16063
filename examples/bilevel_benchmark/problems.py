"""The problems of benchopt/benchmark_bilevel, stated as two losses each.

min over phi of outer(theta*(phi), phi), where theta*(phi) minimizes inner(theta, phi). The formulas
are those of the benchmark's README. Its data sets cannot be had without a network, so
scikit-learn's stand in for them. theta and phi are a vector each, as the benchmark's solvers want.

    problem = state("cleaning", draw("cleaning", seed=0), torch.float64)
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.func import grad, grad_and_value, jacrev
from torch.nn import functional as F

Arrays = dict[str, np.ndarray]
Rows = slice | Tensor | None  # a range or indices of samples; None: all
Loss = Callable[[Tensor, Tensor, Rows], Tensor]
Derivatives = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Bilevel:
    """A bilevel problem on samples.

    Args:
        name: Of the problem.
        inner: (theta, phi, rows) -> mean inner loss of these samples.
        outer: (theta, phi, rows) -> mean outer loss of these samples.
        num_inner: Inner samples.
        num_outer: Outer samples.
        theta0: Where theta starts.
        phi0: Where phi starts.
        solution: phi -> theta*(phi) in closed form, if there is one.
        test_error: theta -> share of wrong answers on samples that neither loss has, if it applies.
    """

    name: str
    inner: Loss
    outer: Loss
    num_inner: int
    num_outer: int
    theta0: Tensor
    phi0: Tensor
    solution: Callable[[Tensor], Tensor] | None = None
    test_error: Callable[[Tensor], float] | None = None

    def descend(self, phi: Tensor, start: Tensor, tolerance: float) -> tuple[Tensor, float, int]:
        """Minimize the inner loss of all samples by L-BFGS.

        Args:
            phi: Held fixed.
            start: Where theta starts.
            tolerance: Largest entry of the gradient to stop at.

        Returns:
            theta, the value there, and how many gradients were taken.
        """

        def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
            at = torch.from_numpy(theta).to(start.dtype).requires_grad_()
            value = self.inner(at, phi, None)
            gradient = torch.autograd.grad(value, at)[0]
            return float(value.detach()), gradient.double().numpy()

        options = {"maxiter": 2000, "maxfun": 4000, "gtol": tolerance, "ftol": 0.0, "maxcor": 20}
        found = minimize(loss, start.double().numpy(), jac=True, method="L-BFGS-B", options=options)
        theta = torch.from_numpy(found.x).to(start.dtype)
        return theta, float(found.fun), found.nfev

    @property
    def is_small(self) -> bool:
        """Whether the Hessian of the inner loss, a row for each entry of theta, is worth making."""
        return self.theta0.numel() <= 128

    def derivatives(self, theta: Tensor, phi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the inner loss of all samples, its gradient and its Hessian by theta."""
        slope, value = grad_and_value(self.inner)(theta, phi, None)
        return value, slope, jacrev(grad(self.inner))(theta, phi, None)

    def newton(
        self, phi: Tensor, start: Tensor, tolerance: float, derivatives: Derivatives | None = None
    ) -> tuple[Tensor, Tensor, int]:
        """Minimize the convex inner loss by Newton's method, halving steps that do not lower it.

        Args:
            phi: Held fixed.
            start: Where theta starts.
            tolerance: Largest entry of the gradient to stop at.
            derivatives: A compiled `self.derivatives`.

        Returns:
            theta, the Cholesky factor of the Hessian there, and how many gradients it all took.
        """
        derivatives, size = derivatives or self.derivatives, start.numel()
        theta, num_gradients = start, 0
        while True:
            value, slope, hessian = derivatives(theta, phi)
            factor = torch.linalg.cholesky_ex(hessian).L
            num_gradients += 1 + 2 * size
            if float(slope.abs().max()) <= tolerance or num_gradients > 100 * size:
                return theta, factor, num_gradients
            step, scale = torch.cholesky_solve(slope[:, None], factor)[:, 0], 1.0
            while scale > 1e-4 and not self.inner(theta - scale * step, phi, None) < value:
                scale, num_gradients = scale / 2, num_gradients + 1
            theta = theta - scale * step

    def value(self, phi: Tensor, start: Tensor | None = None) -> tuple[float, Tensor]:
        """Return the value function outer(theta*(phi), phi), and theta*(phi).

        Raises:
            ArithmeticError: The inner problem could not be solved.
        """
        if self.solution is not None:
            theta = self.solution(phi)
        else:
            solve = self.newton if self.is_small else self.descend
            theta = solve(phi, self.theta0 if start is None else start, 1e-8)[0]
            at = theta.detach().requires_grad_()
            norm = float(torch.autograd.grad(self.inner(at, phi, None), at)[0].norm())
            if not norm < 1e-5:
                raise ArithmeticError(f"{self.name}: inner gradient of {norm:.1e} is left")
        with torch.no_grad():
            return float(self.outer(theta, phi, None)), theta


# Simulated quadratics: each sample has its own matrices, of rank one. Eigenvalues of the mean
# matrices run from 0.1 to 1 (that of phi in the outer loss has a zero), the coupling is 0.1.


def draw_quadratic(seed: int, num: int = 1024, dim: int = 50) -> Arrays:
    rng = np.random.default_rng(seed)
    while True:
        arrays = {
            f"{level}_{part}": values
            for level in ("inner", "outer")
            for part, values in _matrices(rng, num, dim).items()
        }
        if _least_curvature({key: values.mean(0) for key, values in arrays.items()}) > 1e-6:
            break  # else phi has no minimum
    return {**arrays, "theta0": np.zeros(dim), "phi0": np.full(dim, -2.0)}


def _matrices(rng: np.random.Generator, num: int, dim: int) -> Arrays:
    """Draw samples of A, B and C, (num, dim, dim) each, and of a and b, (num, dim)."""

    def rotation() -> np.ndarray:
        return np.linalg.qr(rng.standard_normal((dim, dim), np.float32))[0]

    def outer_products(spectrum: np.ndarray) -> np.ndarray:
        turn = rotation()
        x = rng.standard_normal((num, dim), np.float32)
        x = x @ (turn * np.sqrt(spectrum).astype(np.float32)) @ turn.T
        return x[:, :, None] * x[:, None, :]

    spectrum = np.geomspace(0.1, 1.0, dim)
    x = rng.standard_normal((num, dim), np.float32)
    return {
        "A": outer_products(spectrum),
        "B": outer_products(np.append(0.0, spectrum[1:])),
        "C": 0.1 * (x @ rotation())[:, :, None] * (x @ rotation())[:, None, :],
        "a": rng.standard_normal((num, dim), np.float32),
        "b": rng.standard_normal((num, dim), np.float32),
    }


def _least_curvature(mean: Arrays) -> float:
    """Return the least curvature of the value function."""
    jacobian = -np.linalg.solve(mean["inner_A"], mean["inner_C"].T)
    cross = mean["outer_C"] @ jacobian
    hessian = jacobian.T @ mean["outer_A"] @ jacobian + mean["outer_B"] + cross + cross.T
    return float(np.linalg.eigvalsh(hessian)[0])


def state_quadratic(arrays: Arrays, dtype: torch.dtype) -> Bilevel:
    data = _tensors(arrays, dtype)
    mean = {key: value.mean(0) for key, value in data.items()}

    def loss(level: str) -> Loss:
        def evaluate(theta: Tensor, phi: Tensor, rows: Rows) -> Tensor:
            a, b, c, linear, phi_linear = (
                mean[f"{level}_{part}"] if rows is None else data[f"{level}_{part}"][rows].mean(0)
                for part in ("A", "B", "C", "a", "b")
            )
            return (a @ theta / 2 + phi @ c + linear) @ theta + (b @ phi / 2 + phi_linear) @ phi

        return evaluate

    def solution(phi: Tensor) -> Tensor:
        return torch.linalg.solve(mean["inner_A"], -(mean["inner_a"] + phi @ mean["inner_C"]))

    num, _ = arrays["inner_a"].shape
    return Bilevel(
        "quadratic", loss("inner"), loss("outer"), num, num, data["theta0"], data["phi0"], solution
    )


# Logistic regression with a penalty exp(phi_j) theta_j^2 / 2 of each feature.


def draw_breast_cancer(seed: int) -> Arrays:
    """30 penalties on scikit-learn's breast cancer data: 320 + 192 samples, 57 to test."""
    from sklearn.datasets import load_breast_cancer

    return _split(seed, *load_breast_cancer(return_X_y=True), 320, 192)


def draw_generated(seed: int, num: int = 19968) -> Arrays:
    """22 penalties, as many as ijcnn1 has features, on generated samples."""
    from sklearn.datasets import make_classification

    x, y = make_classification(
        2 * num + 5000, 22, n_informative=8, n_redundant=4, flip_y=0.05, class_sep=0.5,
        random_state=seed,
    )  # fmt: skip
    return _split(seed, x, y, num, num)


def _split(seed: int, x: np.ndarray, y: np.ndarray, num: int, num_outer: int) -> Arrays:
    rng = np.random.default_rng(seed)
    parts = np.split(rng.permutation(len(x)), [num, num + num_outer])
    x = (x - x[parts[0]].mean(0)) / x[parts[0]].std(0)
    arrays = {"theta0": rng.normal(size=x.shape[1]), "phi0": np.log(rng.uniform(size=x.shape[1]))}
    for level, part in zip(("inner", "outer", "test"), parts, strict=True):
        arrays |= {f"{level}_x": x[part], f"{level}_y": 2.0 * y[part] - 1}
    return arrays


def state_logistic(arrays: Arrays, dtype: torch.dtype) -> Bilevel:
    data = _tensors(arrays, dtype)

    def mean_loss(level: str, theta: Tensor, rows: Rows) -> Tensor:
        x, y = data[f"{level}_x"], data[f"{level}_y"]
        if rows is not None:
            x, y = x[rows], y[rows]
        return F.softplus(-y * (x @ theta)).mean()

    def inner(theta: Tensor, phi: Tensor, rows: Rows) -> Tensor:
        return mean_loss("inner", theta, rows) + (phi.exp() * theta * theta).sum() / 2

    def outer(theta: Tensor, phi: Tensor, rows: Rows) -> Tensor:
        return mean_loss("outer", theta, rows)

    def test_error(theta: Tensor) -> float:
        return float(((data["test_x"] @ theta).sign() != data["test_y"]).double().mean())

    num, num_outer = len(arrays["inner_x"]), len(arrays["outer_x"])
    return Bilevel(
        "logistic", inner, outer, num, num_outer, data["theta0"], data["phi0"], None, test_error
    )


# Weights sigmoid(phi_i) of 960 digits, of which half have a label drawn at random.


def draw_cleaning(seed: int, corrupted: float = 0.5, penalty: float = 0.2) -> Arrays:
    from sklearn.datasets import load_digits

    rng = np.random.default_rng(seed)
    x, y = load_digits(return_X_y=True)
    parts = np.split(rng.permutation(len(x)), [960, 960 + 448])
    spread = x[parts[0]].std(0)
    x = (x - x[parts[0]].mean(0)) / np.where(spread > 0, spread, 1.0)
    arrays = {
        "theta0": np.zeros(640), "phi0": np.full(960, -2.0), "penalty": np.array(penalty),
    }  # fmt: skip
    for level, part in zip(("inner", "outer", "test"), parts, strict=True):
        labels = y[part].copy()
        if level == "inner":
            wrong = rng.random(len(part)) < corrupted
            labels[wrong] = rng.integers(0, 10, int(wrong.sum()))
        arrays |= {f"{level}_x": x[part], f"{level}_y": np.eye(10)[labels]}
    return arrays


def state_cleaning(arrays: Arrays, dtype: torch.dtype) -> Bilevel:
    data, penalty = _tensors(arrays, dtype), float(arrays["penalty"])

    def logits(level: str, theta: Tensor, rows: slice | Tensor) -> Tensor:
        return data[f"{level}_x"][rows] @ theta.view(64, 10)

    def losses(level: str, theta: Tensor, rows: slice | Tensor) -> Tensor:
        return -(data[f"{level}_y"][rows] * logits(level, theta, rows).log_softmax(1)).sum(1)

    def inner(theta: Tensor, phi: Tensor, rows: Rows) -> Tensor:
        rows = slice(None) if rows is None else rows
        weighted = phi[rows].sigmoid() * losses("inner", theta, rows)
        return weighted.mean() + penalty * (theta * theta).sum()

    def outer(theta: Tensor, phi: Tensor, rows: Rows) -> Tensor:
        return losses("outer", theta, slice(None) if rows is None else rows).mean()

    def test_error(theta: Tensor) -> float:
        answers = logits("test", theta, slice(None)).argmax(1)
        return float((answers != data["test_y"].argmax(1)).double().mean())

    num, num_outer = len(arrays["inner_x"]), len(arrays["outer_x"])
    return Bilevel(
        "cleaning", inner, outer, num, num_outer, data["theta0"], data["phi0"], None, test_error
    )


def _tensors(arrays: Arrays, dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: torch.from_numpy(values).to(dtype) for key, values in arrays.items()}


PROBLEMS: dict[str, tuple[Callable[..., Arrays], Callable[[Arrays, torch.dtype], Bilevel]]] = {
    "quadratic": (draw_quadratic, state_quadratic),
    "breast_cancer": (draw_breast_cancer, state_logistic),
    "generated": (draw_generated, state_logistic),
    "cleaning": (draw_cleaning, state_cleaning),
}


def draw(name: str, seed: int) -> Arrays:
    """Return the data and the start of problem `name`, in float32."""
    arrays = PROBLEMS[name][0](seed)
    return {key: values.astype(np.float32) for key, values in arrays.items()}


def state(name: str, arrays: Arrays, dtype: torch.dtype) -> Bilevel:
    """State problem `name` on its arrays."""
    return PROBLEMS[name][1](arrays, dtype)
