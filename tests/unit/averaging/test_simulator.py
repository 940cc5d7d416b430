"""The simulator of K workers gives the values that the equations give by hand, and its gradients are the derivatives.

Two workers with the constant gradients 1 and 3 and one parameter that starts at 0, if nothing else is stated; the rate is 1.
"""

import numpy as np
import pytest
import torch
from support.simulated import SGD, AdamW, Network, OuterAdam, OuterSGD, Quadratic, Workers

GRADIENTS = (np.array([1.0]), np.array([3.0]))


def two_workers(period, momentum=0.0, **settings):
    return Workers(np.zeros(1), [SGD(1, momentum) for _ in range(2)], lambda lr, steps: period, **settings)


def take(workers, steps, lr=1.0):
    """Takes steps; returns the replicas."""
    for _ in range(steps):
        workers.step(GRADIENTS, lr)
    return replicas(workers)


def replicas(workers):
    return [theta.item() for theta in workers.thetas]


def test_plain_averages():
    workers = two_workers(2)
    assert take(workers, 1) == [-1, -3]
    assert take(workers, 1) == [-4, -4], "the mean of −2 and −6"
    assert take(workers, 2) == [-8, -8]


@pytest.mark.parametrize(
    ("outer", "normalize", "phi"),
    [
        # Δ = 4: m = 4, φ₁ = −0.7(4 + 0.9·4); m = 0.9·4 + 4 = 7.6, φ₂ = φ₁ − 0.7(4 + 0.9·7.6).
        (OuterSGD(0.7, 0.9, nesterov=True), False, (-5.32, -12.908)),
        # The same, since S = 2 in both rounds.
        (OuterSGD(0.7, 0.9, nesterov=True), True, (-5.32, -12.908)),
        # SlowMo, α = 1: Δ/S = 2: u = 2, φ₁ = −2·2; u = 0.5·2 + 2 = 3, φ₂ = −4 − 2·3.
        (OuterSGD(1.0, 0.5), True, (-4.0, -10.0)),
        # Plain averaging.
        (OuterSGD(1.0), False, (-4.0, -8.0)),
    ],
)
def test_outer_optimizers(outer, normalize, phi):
    workers = two_workers(2, outer=outer, normalize=normalize)
    assert take(workers, 2) == pytest.approx([phi[0]] * 2)
    assert take(workers, 2) == pytest.approx([phi[1]] * 2)


@pytest.mark.parametrize(
    ("normalize", "phi"),
    [
        # Δ/S = 2 both times: φ₁ = −0.7·2(2 + 0.9·2); m = 0.9·2 + 2 = 3.8, φ₂ = φ₁ − 0.7·4(2 + 0.9·3.8).
        (True, -20.496),
        # Δ = 4, then 8: m = 0.9·4 + 8 = 11.6, φ₂ = −5.32 − 0.7(8 + 0.9·11.6).
        (False, -18.228),
    ],
)
def test_rounds_of_two_lengths(normalize, phi):
    workers = Workers(
        np.zeros(1),
        [SGD(1), SGD(1)],
        lambda lr, steps: 4 if steps else 2,
        outer=OuterSGD(0.7, 0.9, nesterov=True),
        normalize=normalize,
    )
    assert take(workers, 2) == pytest.approx([-5.32, -5.32])
    assert take(workers, 4) == pytest.approx([phi, phi])


def test_the_path_is_the_sum_of_the_rates():
    """Rates 1 and 3: θ = −4, −12, so Δ = 8 and S = 4: γS·Δ/S = 0.5·8."""
    workers = two_workers(2, outer=OuterSGD(0.5), normalize=True)
    take(workers, 1, lr=1)
    assert take(workers, 1, lr=3) == [-4, -4]


def test_adam_outside():
    """Its first step has the length γs whatever Δ is: 0.1, or 0.1·2 if normalised (ε aside)."""
    assert take(two_workers(2, outer=OuterAdam(1, 0.1)), 2) == pytest.approx([-0.1] * 2)
    assert take(two_workers(2, outer=OuterAdam(1, 0.1), normalize=True), 2) == pytest.approx([-0.2] * 2)


def test_overlap_carried():
    workers = two_workers(2, overlap=1)
    assert take(workers, 2) == [-2, -6], "the average is under way"
    assert take(workers, 1) == [-5, -7], "−4 − 1 and −4 − 3"
    assert take(workers, 1) == [-6, -10]
    assert take(workers, 1) == [-9, -11], "−8 − 1 and −8 − 3"
    take(workers, 1)
    workers.synchronize()
    assert replicas(workers) == [-12, -12]


def test_overlap_mixed():
    """θ = −3, −9 after step 3: half of that and half of the mean −4."""
    assert take(two_workers(2, overlap=1, mixing=0.5), 3) == [-3.5, -6.5]


def test_overlap_with_an_outer_optimizer():
    """φ₁ = −5.32 − 1 and −5.32 − 3; the next mean is (−7.32 − 11.32)/2 = −9.32, so Δ = 4 again."""
    workers = two_workers(2, overlap=1, outer=OuterSGD(0.7, 0.9, nesterov=True))
    assert take(workers, 3) == pytest.approx([-6.32, -8.32])
    take(workers, 1)
    workers.synchronize()
    assert replicas(workers) == pytest.approx([-12.908] * 2)


def test_a_round_that_is_no_longer_than_the_overlap():
    """H = 1, τ = 3: each average is applied at the end of the next round, before that one's is begun."""
    workers = two_workers(1, overlap=3)
    assert take(workers, 1) == [-1, -3]
    assert take(workers, 1) == [-3, -5], "−2 and −6, carried to the mean −2 of the step before"
    assert take(workers, 1) == [-5, -7], "−4 and −8, carried from −3 and −5 to their mean −4"
    assert workers.rounds == 3


@pytest.mark.parametrize("mixing", [None, 0.5])
def test_synchronizing_leaves_nothing_pending(mixing):
    workers = two_workers(2, overlap=1, mixing=mixing)
    take(workers, 2)
    workers.synchronize()
    assert (replicas(workers), workers.pending, workers.rounds) == ([-4, -4], None, 1)
    workers.synchronize()
    assert workers.rounds == 1, "no round has begun"
    take(workers, 1)
    workers.synchronize()
    assert (replicas(workers), workers.rounds) == ([-6, -6], 2), "−5 and −7, in the middle of a round"


def test_synchronizing_while_an_average_is_under_way():
    """τ = 2, after step 3: −4 − 1 and −4 − 3 first, then their mean."""
    workers = two_workers(3, overlap=2)
    take(workers, 4)
    workers.synchronize()
    assert (replicas(workers), workers.rounds) == ([-8, -8], 2)


def test_a_budget_shortens_the_last_round_and_ends_it_without_overlap():
    workers = two_workers(4, overlap=2, budget=6)
    assert take(workers, 6) == [-12, -12]
    assert (workers.rounds, workers.pending) == (2, None)


def test_moments_at_their_own_period():
    """β = 0.5, H = 1, every second round: m = 1, 3, then 1.5, 4.5, whose mean is 3, then 2.5, 4.5."""
    workers = two_workers(1, 0.5, moment_periods={"momentum_buffer": 2})
    assert take(workers, 1) == [-2, -2], "of −1, −3"
    assert take(workers, 1) == [-5, -5], "of −2 − 1.5, −2 − 4.5"
    assert [inner.moments["momentum_buffer"].item() for inner in workers.inner] == [3, 3]
    assert take(workers, 1) == [-8.5, -8.5], "of −5 − 2.5, −5 − 4.5"


def test_moments_that_start_anew():
    workers = two_workers(1, 0.5, reset=True)
    assert take(workers, 3) == [-6, -6]


def test_averaged_moments_are_carried():
    """β = 0.5, H = 2: m = 1.5, 4.5 at θ = −2.5, −7.5. From the means, 3 and −5, the third step has m = 2.5, 4.5."""
    workers = two_workers(2, 0.5, overlap=1, moment_periods={"momentum_buffer": 1})
    take(workers, 3)
    assert [inner.moments["momentum_buffer"].item() for inner in workers.inner] == [2.5, 4.5]
    assert replicas(workers) == [-6.75, -10.25], "−5 − 1.75 and −5 − 5.25: the step itself was taken with the old m"


# -- gradients and inner steps against torch ---------------------------------------------------------------------------


def test_the_networks_gradient_is_the_derivative():
    network = Network(seed=3)
    theta = torch.from_numpy(network.start.copy()).requires_grad_()
    w1, b1, w2, b2 = (
        part.view(shape)
        for part, shape in zip(theta.split([int(np.prod(s)) for s in network.shapes]), network.shapes, strict=True)
    )
    x, target = map(torch.from_numpy, network.data(rank=1, batch=2))
    loss = 0.5 * ((torch.tanh(x @ w1.T + b1) @ w2.T + b2 - target) ** 2).sum(1).mean()
    loss.backward()
    np.testing.assert_allclose(network.gradient(network.start, 1, 2), theta.grad.numpy(), rtol=1e-12)


def test_the_quadratics_gradient():
    quadratic = Quadratic(seed=1)
    np.testing.assert_array_equal(quadratic.gradient(quadratic.minimum, 0, 5), quadratic.noise(0, 5))


@pytest.mark.parametrize(
    ("inner", "build"),
    [
        (SGD(7, 0.9, 0.1), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1)),
        (SGD(7), lambda p: torch.optim.SGD(p, lr=0.1)),
        (AdamW(7, (0.8, 0.95), 0.1), lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.8, 0.95), weight_decay=0.1)),
    ],
)
def test_inner_steps_are_those_of_torch(inner, build):
    quadratic = Quadratic(seed=2)
    theta = quadratic.start
    parameter = torch.nn.Parameter(torch.from_numpy(theta.copy()))
    optimizer = build([parameter])
    for batch in range(5):
        gradient = quadratic.gradient(theta, 0, batch)
        parameter.grad = torch.from_numpy(gradient)
        optimizer.step()
        theta = inner.step(theta, gradient, 0.1)
        np.testing.assert_allclose(theta, parameter.detach().numpy(), rtol=1e-12)
