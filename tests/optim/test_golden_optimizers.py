"""Optimizers against rows that the authors' code gave: five updates of a 4 x 3 matrix, in float64, by given gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch
from torch import Tensor

from fnrecipe import optim, tree
from fnrecipe.optim import NEWTON_SCHULZ, Transform
from fnrecipe.optim.schedule import constant
from fnrecipe.tree import Tree

RATE, FASTER = constant(0.01), constant(0.02)
decaying = partial(optim.descent, schedule=RATE, weight_decay=0.1)
fast = partial(optim.descent, schedule=FASTER, weight_decay=0.1)
SCHEDULE_FREE = optim.schedule_free_adamw(constant(0.01, num_warmup_steps=2), betas=(0.9, 0.95), weight_decay=0.1)


def begin(dtype: torch.dtype = torch.float64) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(3), indexing="ij")
    return torch.sin(1 + 3 * rows.double() + columns).to(dtype)


def gradient(step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    k = torch.arange(12, dtype=torch.float64).view(4, 3)
    return (torch.cos(0.7 * k + 1.3 * step) + 0.5 * torch.sin(1.1 * k**2 + 0.3 * step)).to(dtype)


def after(transform: Transform, steps: int = 5) -> Tensor:
    params: Tree = {"matrix": begin()}
    state = transform.init(params)
    for step in range(1, steps + 1):
        updates, state, _ = transform.update({"matrix": gradient(step)}, state, params, torch.tensor(step))
        params = optim.apply_updates(params, updates)
    (found,) = tree.leaves(params)
    return found


ROWS: Mapping[str, tuple[Transform, tuple[float, float, float, float]]] = {
    "AdamW": (
        optim.adamw(RATE, betas=(0.9, 0.95), weight_decay=0.1),
        (-0.134151466017, 0.826150845576, -0.529679756493, 2.452809128153),
    ),
    "NAdamW": (
        decaying(optim.scale_by_nadam(0.9, 0.95)),
        (-0.153232532726, 0.820490108732, -0.540770095009, 2.468469322270),
    ),
    "Adafactor": (optim.adafactor(RATE), (-0.124761410930, 0.827354422047, -0.552604890615, 2.489714592096)),
    "SGD": (
        optim.sgd(RATE, decay=0.9, nesterov=True, weight_decay=0.1),
        (-0.123320736175, 0.789600757277, -0.575326563121, 2.399160877933),
    ),
    "Lion": (
        decaying(optim.scale_by_lion(0.9, 0.99)),
        (-0.104769132021, 0.827272016213, -0.543935333827, 2.468801472074),
    ),
    "AdEMAMix": (
        decaying(optim.scale_by_ademamix(0.9, 0.999, 0.9999, 2.0)),
        (-0.135286343381, 0.825943429375, -0.530028979158, 2.453040704601),
    ),
    "AdEMAMix warming up": (
        decaying(optim.scale_by_ademamix(0.9, 0.999, 0.9999, 8.0, num_alpha_steps=10, num_b3_steps=10)),
        (-0.135245062045, 0.825897642387, -0.530003331959, 2.452820162400),
    ),
    "Muon": (
        fast(optim.scale_by_muon(method=NEWTON_SCHULZ)),
        (-0.080684037259, 0.811828488995, -0.559332254214, 2.433207935982),
    ),
    "NorMuon": (
        fast(optim.scale_by_normuon(method=NEWTON_SCHULZ)),
        (-0.074493165803, 0.810650837079, -0.556108560641, 2.433461673573),
    ),
    "MARS": (
        decaying(optim.scale_by_mars(0.95, 0.99)),
        (-0.128163961849, 0.829982718831, -0.531392056390, 2.463155184482),
    ),
    "MuonH": (
        optim.chain(optim.scale_by_muon(method=NEWTON_SCHULZ), optim.hyperball(FASTER)),
        (-0.073036338451, 0.835478441186, -0.585433117628, 2.507851977892),
    ),
    "schedule-free AdamW": (
        SCHEDULE_FREE,
        (-0.129700714670, 0.837087413143, -0.545340986029, 2.495025899320),
    ),
    "cautious decay": (
        optim.adamw(RATE, betas=(0.9, 0.95), weight_decay=0.1, cautious_weight_decay=True),
        (-0.134358471997, 0.827810050788, -0.531240113430, 2.457093914401),
    ),
    "C-AdamW": (
        decaying(optim.cautious(optim.scale_by_adam(0.9, 0.95))),
        (-0.148948435558, 0.827793882857, -0.536859395775, 2.464348814408),
    ),
}


def shown(found: Tensor) -> list[float]:
    return [found.sum().item(), found[0, 0].item(), found[3, 2].item(), torch.linalg.vector_norm(found).item()]


@pytest.mark.parametrize(("transform", "row"), ROWS.values(), ids=ROWS.keys())
def test_the_row_of_the_authors_code(transform: Transform, row: tuple[float, ...]) -> None:
    assert shown(after(transform)) == pytest.approx(row, rel=0, abs=1e-9)


def averages(transform: Transform) -> Tensor:
    params: Tree = {"matrix": begin()}
    state = transform.init(params)
    for step in range(1, 6):
        updates, state, _ = transform.update({"matrix": gradient(step)}, state, params, torch.tensor(step))
        params = optim.apply_updates(params, updates)
    assert transform.shown is not None
    found: Tensor = transform.shown(state, params)["matrix"]
    return found


def test_the_average_of_schedule_free_adamw_is_that_of_the_authors_code_and_of_optax() -> None:
    authors = (-0.126833447684, 0.839017020255, -0.544041306776, 2.496181327999)
    assert shown(averages(SCHEDULE_FREE)) == pytest.approx(authors, rel=0, abs=1e-9)
    of_optax = (-0.138014742990, 0.833164713640, -0.536872140554, 2.482629341285)
    assert shown(averages(OPTAX["schedule-free AdamW"][0])) == pytest.approx(of_optax, rel=0, abs=1e-9)


OPTAX: Mapping[str, tuple[Transform, tuple[float, float, float, float]]] = {
    "AdamW": (
        optim.adamw(RATE, betas=(0.9, 0.95), weight_decay=0.1),
        (-0.134151466017, 0.826150845576, -0.529679756493, 2.452809128153),
    ),
    "NAdamW of one momentum": (
        decaying(optim.scale_by_nadam(0.9, 0.95, momentum_decay=1e9)),
        (-0.146120384006, 0.821357768269, -0.532770613700, 2.449553647504),
    ),
    "SGD": (
        optim.sgd(RATE, decay=0.7, nesterov=True),
        (-0.137470720502, 0.808110835322, -0.577239718084, 2.463020289614),
    ),
    "Lion": (
        decaying(optim.scale_by_lion(0.8, 0.95)),
        (-0.124709192001, 0.827272016213, -0.543935333827, 2.460675490228),
    ),
    "AdEMAMix": (
        decaying(optim.scale_by_ademamix(alpha=5.0)),
        (-0.135288839655, 0.825935780468, -0.530036334626, 2.453014366072),
    ),
    "schedule-free AdamW": (
        optim.schedule_free_adamw(RATE, betas=(0.8, 0.95), weight_decay=0.1),
        (-0.143488826243, 0.829397428518, -0.539855527439, 2.480388157885),
    ),
    "adaptive clipping": (
        optim.chain(optim.clip_adaptively(0.5), optim.scale_by_learning_rate(constant(0.1))),
        (-0.195254084433, 0.796688377162, -0.612356389936, 2.456837392550),
    ),
}
"""Rows that `tests/optim/optax_rows.py` prints. Adafactor and Muon are below: they bound what is next to 0 otherwise."""


@pytest.mark.parametrize(("transform", "row"), OPTAX.values(), ids=OPTAX.keys())
def test_the_row_of_optax(transform: Transform, row: tuple[float, ...]) -> None:
    assert shown(after(transform)) == pytest.approx(row, rel=0, abs=1e-9)


def test_the_rows_of_optax_whose_bounds_near_zero_are_others() -> None:
    adafactor = (-0.124761410760, 0.827354421850, -0.552604890611, 2.489714592021)
    assert shown(after(optim.adafactor(RATE))) == pytest.approx(adafactor, rel=0, abs=1e-9)
    muon = (-0.059237474499, 0.815284400195, -0.552130343279, 2.424544918596)
    assert shown(after(fast(optim.scale_by_muon(nesterov=False)))) == pytest.approx(muon, rel=0, abs=1e-7)


@pytest.mark.parametrize(
    ("scale", "row"),
    [("jordan", (-0.06819, 0.81816, -0.55698, 2.42983)), ("match_rms", (-0.10475, 0.82792, -0.54015, 2.46367))],
)
def test_muon_with_jordans_coefficients_is_torchs_whose_products_are_bfloat16(
    scale: optim.Scale, row: tuple[float, ...]
) -> None:
    assert shown(after(fast(optim.scale_by_muon(scale=scale)))) == pytest.approx(row, rel=0, abs=3e-3)


MATRIX = torch.tensor([[1, 2, 0, -1], [0, 1, 3, 2], [2, -1, 1, 0], [1, 1, 1, 1], [0, 2, -2, 1]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("method", "values"),
    [
        (optim.JORDAN, [1.13396523, 1.08051711, 0.69968115, 0.68220554]),
        (optim.POLAR_EXPRESS, [1.1235227, 1.0347344, 0.87996344, 0.86665069]),
        (NEWTON_SCHULZ, [1, 1, 1, 1]),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_singular_values_after_the_iterations_are_those_of_the_reference(
    method: optim.PolarMethod, values: list[float], turned: bool
) -> None:
    found = optim.polar_factor(MATRIX.mT if turned else MATRIX, method)
    assert sorted(torch.linalg.svdvals(found).tolist(), reverse=True) == pytest.approx(sorted(values, reverse=True), abs=1e-8)
    u, _, v = torch.linalg.svd(MATRIX, full_matrices=False)
    diagonal = u.mT @ (found.mT if turned else found) @ v.mT  # of the same singular vectors
    assert (diagonal - diagonal.diagonal().diag()).abs().max() < 1e-12
    assert (diagonal.diagonal() > 0).all()


def test_the_exact_polar_factor() -> None:
    u, _, v = torch.linalg.svd(MATRIX, full_matrices=False)
    found = optim.polar_factor(MATRIX, NEWTON_SCHULZ)
    assert found[0, 0].item() == pytest.approx(0.298467653617886, abs=1e-12)
    assert (found - u @ v).abs().max() < 1e-12
    several = torch.stack([MATRIX, 2 * MATRIX, -MATRIX])
    assert (optim.polar_factor(several, NEWTON_SCHULZ) - torch.stack([found, found, -found])).abs().max() < 1e-12
    assert not optim.polar_factor(torch.zeros(3, 2), optim.JORDAN).any()


def torchs(make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer], steps: int) -> Tensor:
    parameter = torch.nn.Parameter(begin())
    optimizer = make([parameter])
    for step in range(1, steps + 1):
        parameter.grad = gradient(step)
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize(
    ("transform", "make"),
    [
        (optim.sgd(RATE), lambda p: torch.optim.SGD(p, lr=0.01)),
        (optim.sgd(RATE, decay=0.7), lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.7)),
        (
            optim.sgd(RATE, decay=0.7, nesterov=True, weight_decay=0.3),
            lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.7, nesterov=True, weight_decay=0.3),
        ),
        (
            decaying(optim.scale_by_nadam(0.8, 0.99, 1e-3, 0.1)),
            lambda p: torch.optim.NAdam(
                p, lr=0.01, betas=(0.8, 0.99), eps=1e-3, momentum_decay=0.1, weight_decay=0.1, decoupled_weight_decay=True
            ),
        ),
        (
            optim.adafactor(RATE, beta2_decay=-0.6, eps=(1e-4, 0.1), d=1.1, weight_decay=0.2),
            lambda p: torch.optim.Adafactor(p, lr=0.01, beta2_decay=-0.6, eps=(1e-4, 0.1), d=1.1, weight_decay=0.2),
        ),
        (optim.adafactor(constant(0.9)), lambda p: torch.optim.Adafactor(p, lr=0.9)),
    ],
)
def test_thirty_updates_are_torchs(transform: Transform, make: Callable[..., torch.optim.Optimizer]) -> None:
    """NAdam's to less, since torch keeps the product of its momenta in float32."""
    error = (after(transform, 30) - torchs(make, 30)).abs().max()
    assert error < (1e-9 if "NAdam" in make.__code__.co_names else 1e-12)


def test_a_vector_has_all_its_squares_in_adafactor() -> None:
    vector, transform = torch.linspace(-1, 2, 7, dtype=torch.float64), optim.adafactor(RATE)
    parameter, params = torch.nn.Parameter(vector.clone()), {"vector": vector}
    optimizer, state = torch.optim.Adafactor([parameter], lr=0.01), transform.init(params)
    for step in range(1, 9):
        parameter.grad = torch.sin(vector * step)
        optimizer.step()
        updates, state, _ = transform.update({"vector": parameter.grad}, state, params, torch.tensor(step))
        params = optim.apply_updates(params, updates)
    assert (params["vector"] - parameter.detach()).abs().max() < 1e-12


@pytest.mark.parametrize("shape", [(3, 12), (12, 3), (4, 4)])
def test_the_three_scales(shape: tuple[int, int]) -> None:
    rows, columns = shape
    expected = {
        "jordan": (rows / columns) ** 0.5 if rows > columns else 1.0,
        "spectral": (rows / columns) ** 0.5,
        "match_rms": 0.2 * max(rows, columns) ** 0.5,
    }
    for scale, factor in expected.items():
        updates, _, _ = optim.scale_by_shape(scale).update({"a": torch.ones(shape)}, (), {}, torch.tensor(1))  # type: ignore[arg-type]
        torch.testing.assert_close(updates["a"], torch.full(shape, factor))


def test_an_update_that_matches_adamws_has_the_root_mean_square_of_one_fifth() -> None:
    wide = {"a": torch.randn(8, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))}
    transform = optim.scale_by_muon(method=NEWTON_SCHULZ, scale="match_rms")
    updates, _, _ = transform.update(wide, transform.init(wide), wide, torch.tensor(1))
    assert updates["a"].square().mean().sqrt().item() == pytest.approx(0.2, rel=1e-6)


def one(transform: Transform, values: Tensor) -> Tensor:
    params = {"a": values}
    updates, _, _ = transform.update(params, transform.init(params), params, torch.tensor(1))
    found: Tensor = updates["a"]
    return found


def test_identities() -> None:
    """Those in which one optimizer is another."""
    matrix = gradient(1)
    spectral = one(optim.scale_by_muon(0.0, method=NEWTON_SCHULZ, scale="spectral"), matrix)
    left, right = (torch.linalg.eigh(square) for square in (matrix @ matrix.mT, matrix.mT @ matrix))
    root = right.eigenvectors @ right.eigenvalues.pow(-0.5).diag() @ right.eigenvectors.mT
    assert (spectral - (4 / 3) ** 0.5 * matrix @ root).abs().max() < 1e-9  # Shampoo without a memory
    assert len(left.eigenvalues) == 4
    assert torch.equal(one(optim.scale_by_lion(0.0, 0.0), matrix), matrix.sign())
    alike = torch.linalg.qr(torch.randn(5, 3, dtype=torch.float64)).Q.mT  # three rows of one norm
    muon, normuon = (one(make(method=NEWTON_SCHULZ), alike) for make in (optim.scale_by_muon, optim.scale_by_normuon))
    assert (muon - normuon).abs().max() < 1e-7
    same = optim.cautious(optim.scale_by_adam())  # in the first update Adam's direction has the gradient's sign
    assert torch.equal(one(same, matrix), one(optim.scale_by_adam(), matrix))
    assert torch.equal(after(decaying(optim.scale_by_ademamix(alpha=0.0))), after(decaying(optim.scale_by_adam())))


def test_matrices_by_muon_and_the_rest_by_adamw() -> None:
    params = {"embedding": begin(), "layers": {"0": {"key": begin(), "norm": torch.ones(3, dtype=torch.float64)}}}
    gradients = {"embedding": gradient(1), "layers": {"0": {"key": gradient(2), "norm": gradient(3)[0]}}}
    muon, adamw = fast(optim.scale_by_muon()), decaying(optim.scale_by_adam())
    both = optim.split(lambda path, parameter: path.startswith("layers.") and parameter.ndim > 1, muon, adamw)
    state, step = both.init(params), torch.tensor(1)
    updates, state, report = both.update(gradients, state, params, step)
    matrix = {"layers.0.key": begin()}
    assert torch.equal(
        updates["layers"]["0"]["key"],
        muon.update({"layers.0.key": gradient(2)}, muon.init(matrix), matrix, step)[0]["layers.0.key"],
    )
    rest = {"embedding": params["embedding"], "layers.0.norm": params["layers"]["0"]["norm"]}
    expected, _, _ = adamw.update({"embedding": gradient(1), "layers.0.norm": gradient(3)[0]}, adamw.init(rest), rest, step)
    assert torch.equal(updates["embedding"], expected["embedding"])
    assert torch.equal(updates["layers"]["0"]["norm"], expected["layers.0.norm"])
    assert {name: rate.item() for name, rate in report.items()} == {"lr": 0.02, "lr/others": 0.01}
    only = optim.split(lambda path, parameter: True, adamw, muon)
    assert only.init(params)[1] == ()
    assert tree.paths(only.update(gradients, only.init(params), params, step)[0]).keys() == tree.paths(params).keys()


@pytest.mark.parametrize(
    ("every", "row"),
    [(1, (-0.0609209, 0.8394518, -0.5690925, 2.5000887)), (10, (-0.0865302, 0.8465485, -0.5709189, 2.4985154))],
)
def test_soap_is_the_authors_which_is_float32_and_decays_after_each_update(every: int, row: tuple[float, ...]) -> None:
    matrix = begin()
    transform = optim.scale_by_soap(every=every)
    state = transform.init({"a": matrix})
    for step in range(1, 6):
        updates, state, _ = transform.update({"a": gradient(step)}, state, {"a": matrix}, torch.tensor(step))
        assert updates["a"].any() == (step > 1)
        matrix = matrix - 0.01 * updates["a"]
        matrix = matrix * (1 - 0.01 * 0.01) if step > 1 else matrix
    assert shown(matrix) == pytest.approx(row, rel=0, abs=1e-6)


def test_soap_without_bases_is_adam_that_has_not_seen_the_first_gradient() -> None:
    soap, adam, params = optim.scale_by_soap(0.9, 0.99, max_dim=2), optim.scale_by_adam(0.9, 0.99), {"a": begin()}
    of_soap, of_adam = soap.init(params), adam.init(params)
    _, of_soap, _ = soap.update({"a": gradient(1)}, of_soap, params, torch.tensor(1))
    for step in range(2, 9):
        found, of_soap, _ = soap.update({"a": gradient(step)}, of_soap, params, torch.tensor(step))
        expected, of_adam, _ = adam.update({"a": gradient(step)}, of_adam, params, torch.tensor(step))
        assert (found["a"] - expected["a"]).abs().max() < 1e-12


def test_soap_turns_with_its_gradients() -> None:
    """Rotated gradients have rotated updates, however often bases are renewed; those of Adam are others."""
    rows, columns = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q for n in (4, 3))
    for transform, same in ((optim.scale_by_soap(every=2), True), (optim.scale_by_adam(), False)):
        plain, turned = ({"a": begin()}, {"a": rows @ begin() @ columns})
        states = transform.init(plain), transform.init(turned)
        for step in range(1, 8):
            g, number = gradient(step), torch.tensor(step)
            found, first, _ = transform.update({"a": g}, states[0], plain, number)
            other, second, _ = transform.update({"a": rows @ g @ columns}, states[1], turned, number)
            states = first, second
        assert ((rows @ found["a"] @ columns - other["a"]).abs().max() < 1e-6) == same


def dion2_by_loops(matrix: Tensor, turned: bool, fraction: float, decay: float) -> Tensor:
    """Five updates as the authors' code makes them, of columns; the polar factor by singular values."""
    (rows, columns), momentum = matrix.shape, torch.zeros_like(matrix)
    for step in range(1, 6):
        momentum += gradient(step)
        sizes = [sum(abs(momentum[row, column].item()) for row in range(rows)) for column in range(columns)]
        taken = sorted(range(columns), key=lambda column: -sizes[column])[: max(1, math.ceil(fraction * columns))]
        left, _, right = torch.linalg.svd(momentum[:, taken], full_matrices=False)
        matrix = matrix * (1 - 0.02 * 0.1)
        matrix[:, taken] -= 0.02 * math.sqrt(columns / rows if turned else rows / columns) * left @ right
        momentum[:, taken] *= decay
    return matrix


@pytest.mark.parametrize(("fraction", "decay"), [(0.25, 0.95), (0.5, 0.6), (1.0, 0.9)])
@pytest.mark.parametrize("turned", [False, True])
def test_dion2_is_the_authors_of_fewer_rows_or_columns(fraction: float, decay: float, turned: bool) -> None:
    transform = fast(optim.scale_by_dion2(fraction, decay, method=NEWTON_SCHULZ))
    params: Tree = {"a": begin().mT if turned else begin()}
    state = transform.init(params)
    for step in range(1, 6):
        g = gradient(step).mT if turned else gradient(step)
        updates, state, _ = transform.update({"a": g}, state, params, torch.tensor(step))
        params = optim.apply_updates(params, updates)
    expected = dion2_by_loops(begin(), turned, fraction, decay)
    assert ((params["a"].mT if turned else params["a"]) - expected).abs().max() < 1e-9


def test_dion2_of_all_rows_is_muon_and_of_a_stack_that_of_each_matrix() -> None:
    muon = optim.chain(optim.momentum(0.95), optim.orthogonalize(NEWTON_SCHULZ), optim.scale_by_shape("spectral"))
    assert (after(fast(optim.scale_by_dion2(1.0, method=NEWTON_SCHULZ))) - after(fast(muon))).abs().max() < 1e-12
    stack = torch.stack([gradient(1), gradient(2), gradient(3)])
    each = torch.stack([one(optim.scale_by_dion2(0.5), matrix) for matrix in stack])
    assert torch.allclose(one(optim.scale_by_dion2(0.5), stack), each, rtol=0, atol=1e-12)
    assert (each == 0).sum() == 12  # a column of each three


def test_soap_goes_into_muon() -> None:
    chained = optim.chain(optim.scale_by_soap(), optim.orthogonalize(NEWTON_SCHULZ))
    params = {"a": begin()}
    state = chained.init(params)
    for step in range(1, 4):
        updates, state, _ = chained.update({"a": gradient(step)}, state, params, torch.tensor(step))
    assert torch.linalg.svdvals(updates["a"]).tolist() == pytest.approx([1, 1, 1], abs=1e-9)
