"""Each schedule against closed forms written without torch, fairseq2's own rates, and those of transformers and torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pytest
import torch
import transformers

from fnrecipe import optim
from fnrecipe.config import resolve
from fnrecipe.config.find import find_component
from fnrecipe.config.sections.optim import LR_SCHEDULERS
from fnrecipe.recipes.lm.config import config
from fnrecipe.transforms import jit

Form = Callable[[int], float]


def rates(schedule: optim.Schedule, last: int) -> list[float]:
    return [schedule(torch.tensor(step)).item() for step in range(1, last + 1)]


def by_hand(peak: float, warmup: int, after: Form, start: float = 0.0) -> Form:
    """A line from `start` to `peak` at step max(warmup, 1), and `after` of the steps behind it."""
    top = max(warmup, 1)
    return lambda step: start + (peak - start) * step / top if step < top else after(step - top)


def power(peak: float, warmup: int, steps: int, exponent: float, start: float, final: float) -> Form:
    left = steps - max(warmup, 1)

    def after(n: int) -> float:
        return final if n >= left else final + (peak - final) * ((left - n) / left) ** exponent

    return by_hand(peak, warmup, after, start)


def stages(peak: float, up: int, flat: int, steps: int, start: float, final: float) -> Form:
    def form(step: int) -> float:
        if step < up:
            return peak * (start + (1 - start) * step / up)
        if step <= up + flat:
            return peak
        return peak * math.exp(math.log(final) * min(step - up - flat, steps - up - flat) / (steps - up - flat))

    return form


def cycles(peak: float, warmup: int, lengths: list[int], lr_mul: float, final: float) -> Form:
    """Every step behind the peak in a list, one cycle after the other; the lengths are those that the schedule shall find."""
    found = [peak]
    for number, length in enumerate(lengths):
        high, low = peak * lr_mul**number, final * peak * lr_mul**number
        found += [low + (high - low) * (1 + math.cos(math.pi * n / length)) / 2 for n in range(1, length + 1)]
    return by_hand(peak, warmup, found.__getitem__)


def stable(warmup: int, decay: int, steps: int, final: float, tail: Form) -> Form:
    """Peak 2; `tail`, of percent of the decay: what is left of the way to the final rate."""
    return by_hand(2.0, warmup, lambda n: 2 * (final + (1 - final) * tail(n + max(warmup, 1) - (steps - decay))))


def one_minus_sqrt(n: int, decay: int = 40) -> float:
    return 1 - math.sqrt(min(max(n, 0), decay) / decay)


def half_cosine(n: int, decay: int = 40) -> float:
    return math.cos(math.pi * min(max(n, 0), decay) / decay / 2) ** 2


CASES: Mapping[str, tuple[optim.Schedule, Form]] = {
    "constant": (optim.constant(0.3, num_warmup_steps=7), by_hand(0.3, 7, lambda n: 0.3)),
    "constant from a start": (optim.constant(0.9, num_warmup_steps=7, start_lr=0.5), by_hand(0.9, 7, lambda n: 0.9, 0.5)),
    "constant from the start": (optim.constant(0.3), lambda step: 0.3),
    "linear": (
        optim.linear(0.3, num_warmup_steps=7, num_steps=90, final_scale=0.1),
        power(0.3, 7, 90, 1.0, 0.0, 0.03),
    ),
    "linear to nothing": (optim.linear(0.3, num_warmup_steps=0, num_steps=90), power(0.3, 0, 90, 1.0, 0.0, 0.0)),
    "polynomial_decay": (
        optim.polynomial_decay(0.3, num_warmup_steps=9, num_steps=70, power=2.5, start_lr=0.1, final_lr=0.02),
        power(0.3, 9, 70, 2.5, 0.1, 0.02),
    ),
    "noam": (optim.noam(2.0, num_warmup_steps=11), lambda step: 2 * min(step**-0.5, step * 11**-1.5)),
    "noam without warm-up": (optim.noam(2.0, num_warmup_steps=0), lambda step: 2 * step**-0.5),
    "inverse_sqrt": (
        optim.inverse_sqrt(2.0, num_warmup_steps=5, timescale=30, start_lr=0.5),
        by_hand(2.0, 5, lambda n: 2 * math.sqrt(30 / (30 + n)), 0.5),
    ),
    "tri_stage": (
        optim.tri_stage(2.0, num_steps=80, stage_ratio=(0.1, 0.4, 0.5), start_scale=0.05, final_scale=0.02),
        stages(2.0, 8, 32, 80, 0.05, 0.02),
    ),
    "tri_stage that only falls": (
        optim.tri_stage(2.0, num_steps=80, stage_ratio=(0.0, 0.0, 1.0), start_scale=0.05, final_scale=0.02),
        stages(2.0, 0, 0, 80, 0.05, 0.02),
    ),
    "tri_stage that never falls": (
        optim.tri_stage(2.0, num_steps=80, stage_ratio=(0.25, 0.75, 0.0), start_scale=0.05, final_scale=0.02),
        lambda step: 2 * min(0.05 + 0.95 * step / 20, 1.0),
    ),
    "exponential": (
        optim.exponential(2.0, start_scale=0.01, final_scale=100.0, first_step=11, last_step=91),
        lambda step: 2 * 10 ** min(max((step - 11) / 20 - 2, -2), 2),
    ),
    "cosine_with_restarts": (
        optim.cosine_with_restarts(2.0, num_warmup_steps=3, cycle_len=20, final_scale=0.1),
        cycles(2.0, 3, [20] * 8, 1.0, 0.1),
    ),
    "cosine_with_restarts, longer and lower": (
        optim.cosine_with_restarts(2.0, num_warmup_steps=3, cycle_len=5, cycle_mul=2.0, lr_mul=0.5, final_scale=0.1),
        cycles(2.0, 3, [5, 10, 20, 40, 80], 0.5, 0.1),
    ),
    "cosine_with_restarts, three times": (
        optim.cosine_with_restarts(2.0, num_warmup_steps=0, cycle_len=1, cycle_mul=3.0, lr_mul=0.9, final_scale=0.0),
        cycles(2.0, 0, [1, 3, 9, 27, 81], 0.9, 0.0),
    ),
    "wsd, 1-sqrt": (
        optim.wsd(2.0, num_warmup_steps=6, num_decay_steps=40, num_steps=100, final_scale=0.1, decay_type="1-sqrt"),
        stable(6, 40, 100, 0.1, one_minus_sqrt),
    ),
    "wsd from a start": (
        optim.wsd(0.9, num_warmup_steps=6, num_decay_steps=40, num_steps=100, final_scale=0.5, start_lr=0.3),
        by_hand(0.9, 6, lambda n: 0.9 - 0.45 * min(max(n - 54, 0), 40) / 40, 0.3),
    ),
    "wsd, cosine": (
        optim.wsd(2.0, num_warmup_steps=6, num_decay_steps=40, num_steps=100, final_scale=0.1, decay_type="cosine"),
        stable(6, 40, 100, 0.1, half_cosine),
    ),
}


@pytest.mark.parametrize(("schedule", "form"), CASES.values(), ids=CASES.keys())
def test_every_step_has_the_closed_form_also_when_traced(schedule: optim.Schedule, form: Form) -> None:
    found, traced = rates(schedule, 115), jit(schedule)
    assert found == pytest.approx([form(step) for step in range(1, 116)], rel=1e-12, abs=1e-15)
    assert found[0] > 0
    for step in range(1, 116, 7):
        rate = traced(torch.tensor(step))
        assert (rate.item(), rate.dtype, rate.shape) == (found[step - 1], torch.float64, ())


FAIRSEQ2 = {
    "polynomial_decay": ({"num_warmup_steps": 2}, 10, [0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0, 0]),
    "tri_stage": ({"stage_ratio": [0.2, 0.3, 0.5]}, 10, [0.505, 1, 1, 1, 1, 0.3981, 0.1585, 0.0631, 0.0251, 0.01]),
    "noam": ({"num_warmup_steps": 4}, None, [0.125, 0.25, 0.375, 0.5, 0.4472, 0.4082]),
    "myle": ({"num_warmup_steps": 4}, None, [0.25, 0.5, 0.75, 1, 0.8944, 0.8165, 0.7559]),
    "cosine_annealing": (
        {"num_warmup_steps": 2, "cycle_len": 8, "final_lr_scale": 0.1},
        None,
        [0.5, 1, 0.9657, 0.8682, 0.7222, 0.55, 0.3778, 0.2318, 0.1343, 0.1, 0.1],
    ),
}


def of_config(name: str, values: Mapping[str, object], num_steps: int | None) -> optim.Schedule:
    pairs = [f"regime={{num_steps: {num_steps or 'null'}, num_data_epochs: 1}}", f"lr_scheduler.name={name}"]
    given, _ = resolve(config, pairs=[*pairs, *(f"lr_scheduler.config.{key}={value}" for key, value in values.items())])
    return find_component(name, LR_SCHEDULERS).make(given.lr_scheduler.config, num_steps)(1.0)


@pytest.mark.parametrize("name", FAIRSEQ2)
def test_the_rates_are_fairseq2s_one_step_earlier(name: str) -> None:
    """fairseq2 makes its first update at the rate of step 0, which mostly is 0; here it is that of step 1."""
    values, num_steps, expected = FAIRSEQ2[name]
    assert rates(of_config(name, values, num_steps), len(expected)) == pytest.approx(expected, abs=5e-5)


def lambda_of(made: torch.optim.lr_scheduler.LambdaLR) -> Form:
    """The function of a schedule of transformers, whose step 0 is the first."""
    return made.lr_lambdas[0]


@pytest.mark.parametrize(
    ("name", "values", "make"),
    [
        ("constant", {"num_warmup_steps": 4}, lambda o: transformers.get_constant_schedule_with_warmup(o, 4)),
        ("linear", {"num_warmup_steps": 4}, lambda o: transformers.get_linear_schedule_with_warmup(o, 4, 30)),
        (
            "polynomial_decay",
            {"num_warmup_steps": 4, "power": 1.7, "final_lr": 0.01},
            lambda o: transformers.get_polynomial_decay_schedule_with_warmup(o, 4, 30, lr_end=0.01, power=1.7),
        ),
        ("inverse_sqrt", {"num_warmup_steps": 4}, lambda o: transformers.get_inverse_sqrt_schedule(o, 4)),
        ("inverse_sqrt", {}, lambda o: transformers.get_inverse_sqrt_schedule(o, 1, timescale=10_000)),
        *(
            (
                "wsd",
                {"num_warmup_steps": 4, "num_decay_steps": 9, "decay_type": kind},
                lambda o, kind=kind: transformers.get_wsd_schedule(o, 4, 9, num_stable_steps=17, decay_type=kind),
            )
            for kind in ("linear", "1-sqrt", "cosine")
        ),
    ],
)
def test_the_rates_are_those_of_transformers(name: str, values: dict[str, object], make: Callable[..., object]) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = lambda_of(make(optimizer))  # type: ignore[arg-type]
    assert rates(of_config(name, values, 30), 40) == pytest.approx([theirs(step) for step in range(1, 41)], rel=1e-12)


def test_an_exponential_ends_with_the_training_unless_its_config_says_where() -> None:
    assert rates(of_config("exponential", {}, 3), 4) == pytest.approx([1, 0.1, 0.01, 0.01])
    given = {"start_lr_scale": 1e-3, "final_lr_scale": 10, "first_step": 2, "last_step": 4}
    assert rates(of_config("exponential", given, None), 5) == pytest.approx([1e-3, 1e-3, 0.1, 10, 10])


@pytest.mark.parametrize("cycle_mul", [1, 2, 3])
def test_cycles_begin_where_torchs_do(cycle_mul: int) -> None:
    """Between restarts the rates are those of CosineAnnealingWarmRestarts, which has the next peak where a cycle here ends."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 4, cycle_mul, eta_min=0.1)
    ours = optim.cosine_with_restarts(1.0, num_warmup_steps=0, cycle_len=4, cycle_mul=cycle_mul, final_scale=0.1)
    restarts = 0
    for rate in rates(ours, 60):
        (expected,) = theirs.get_last_lr()
        at_end = abs(rate - 0.1) < 1e-9
        assert rate == pytest.approx(0.1 if at_end else expected, rel=1e-9)
        assert expected == 1.0 or not at_end
        restarts += at_end
        optimizer.step()
        theirs.step()
    assert restarts >= 3


@pytest.mark.parametrize(("cycle_len", "cycle_mul"), [(7, 1.0), (10, 1.5), (3, 2.0), (1000, 1.1), (1, 3.0)])
def test_no_rate_is_outside_of_its_cycle(cycle_len: int, cycle_mul: float) -> None:
    """Where cycles do not end at whole steps, and where logarithms are rounded."""
    schedule = optim.cosine_with_restarts(
        1.0, num_warmup_steps=0, cycle_len=cycle_len, cycle_mul=cycle_mul, lr_mul=0.5, final_scale=0.6
    )
    steps = torch.arange(1, 100_000)
    found, begin, cycle = schedule(steps), 1.0, 0
    while begin < len(steps) and cycle < 40:
        end = begin + cycle_len * cycle_mul**cycle
        inside = found[(steps > begin + 1e-6) & (steps < end - 1e-6)] / 0.5**cycle
        assert ((inside >= 0.6 - 1e-9) & (inside <= 1)).all(), cycle
        assert (inside.diff() < 0).all()
        begin, cycle = end, cycle + 1


@pytest.mark.parametrize("name", ["constant", "noam", "myle", "inverse_sqrt", "wsd"])
def test_a_longer_training_does_not_change_the_rates_of_its_beginning(name: str) -> None:
    values = {"num_warmup_steps": 5} | ({"num_decay_steps": 10} if name == "wsd" else {})
    assert rates(of_config(name, values, 40), 30) == rates(of_config(name, values, 400), 30)


def test_the_cycle_of_restarts_is_all_that_warmup_leaves_unless_it_is_given() -> None:
    whole = of_config("cosine_with_restarts", {"num_warmup_steps": 0.1}, 50)
    assert rates(whole, 50) == pytest.approx(rates(of_config("cosine_annealing", {"num_warmup_steps": 5}, 50), 50), rel=1e-12)
    assert rates(whole, 50)[-1] == pytest.approx(0.1)
