"""Compositions with the rates of OLMo-core's schedulers, at every step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from installed import SIZES, WARMUPS, check, in_turn, peer, two_groups

from nexus.schedules import Arc, Constant, Cosine, Exponential, Linear, join

HIGHS = (0.1, 3e-3)  # of the two groups
WARM = [warmup for warmup in WARMUPS if warmup > 0]


@pytest.fixture(scope="module")
def olmo():
    return peer("olmo_core.optim.scheduler")


def rates(scheduler, n, last=None):
    """The rates of OLMo's steps 0 to `last`, set as its trainer sets them."""
    optimizer = two_groups(*HIGHS)
    for step in range((n + 20 if last is None else last) + 1):
        run = SimpleNamespace(global_step=step, max_steps=n)
        yield [float(scheduler.set_lr(group, run)) for group in optimizer.param_groups]


def warmed(warmup, falls):
    return [fall.warmup(warmup) if warmup else fall for fall in falls]


@pytest.mark.parametrize("warmup", WARMUPS)
@pytest.mark.parametrize("n", SIZES)
def test_lines_and_cosines(olmo, n, warmup):
    left = n - warmup

    def compare(kind, fall, top=1.0):
        def whole(high):
            rise = (warmup, lambda: Linear(start_lr=0.0, end_lr=top * high, total_steps=warmup))
            return in_turn(rise, (left, lambda: fall(high)), last=Constant(0.1 * high))

        check(list(map(whole, HIGHS)), rates(kind(warmup=warmup, alpha_f=0.1), n))

    compare(olmo.LinearWithWarmup, lambda high: Linear(start_lr=high, end_lr=0.1 * high, total_steps=left))
    compare(olmo.CosWithWarmup, lambda high: Cosine(peak_lr=high, total_steps=left, min_lr=0.1 * high))
    half = 0.55  # of the peak: the lower half of a cosine begins there
    compare(
        olmo.HalfCosWithWarmup,
        lambda high: Arc("cosine", high=high, low=0.1 * high, span=2.0 * left, shift=float(left)),
        half,
    )


@pytest.mark.parametrize("warmup", WARM)
@pytest.mark.parametrize("n", SIZES)
def test_what_needs_a_warmup(olmo, n, warmup):
    check(list(map(Constant, HIGHS)), rates(olmo.ConstantScheduler(), n))
    check(warmed(warmup, map(Constant, HIGHS)), rates(olmo.ConstantWithWarmup(warmup=warmup), n))
    falls = [Arc("inverse", high=high, low=0.1 * high, span=float(warmup), q=0.5) for high in HIGHS]
    check(warmed(warmup, falls), rates(olmo.InvSqrtWithWarmup(warmup=warmup, alpha_f=0.1), n))


@pytest.mark.parametrize("warmup", WARM)
@pytest.mark.parametrize("n", SIZES)
def test_decays_at_the_end(olmo, n, warmup):
    decay = max(1, n // 3)
    stable = n - warmup - decay
    if stable < 0:  # to the last step, all is warm-up
        n, stable = warmup + decay, 0
    lasting = {"warmup": warmup, "decay": decay, "decay_fraction": None}

    def tails(curve):
        """The curve, and a line to 0 from where it is."""

        def whole(high):
            return in_turn(
                (stable, lambda: curve(high)),
                last=Linear(start_lr=curve(high)(stable), end_lr=0.0, total_steps=decay),
            )

        return warmed(warmup, map(whole, HIGHS))

    check(tails(Constant), rates(olmo.WSD(**lasting), n, last=n))
    powers = tails(lambda high: Arc("inverse", high=high, low=0.0, span=float(warmup), q=0.51))
    check(powers, rates(olmo.PowerLR(**lasting), n, last=n))
    waves = tails(lambda high: Cosine(peak_lr=high, total_steps=n - warmup, min_lr=0.1 * high))
    check(waves, rates(olmo.CosWithWarmupAndLinearDecay(**lasting, alpha_f=0.1), n, last=n))


@pytest.mark.parametrize("n", SIZES)
def test_stages(olmo, n):
    stage = olmo.ComposableSchedulerStage
    stages = [
        stage(duration=n, start_lr_fraction=0.0, end_lr_fraction=1.0),
        stage(duration=2 * n, shape=olmo.ComposableSchedulerStageType.cosine, end_lr_fraction=0.2),
        stage(duration=7, end_lr=1e-4),
    ]
    ours = [
        join(
            [
                Linear(start_lr=0.0, end_lr=high, total_steps=n),
                Cosine(peak_lr=high, total_steps=2 * n, min_lr=0.2 * high),
                Linear(start_lr=0.2 * high, end_lr=1e-4, total_steps=7),
            ],
            [n, 3 * n],
        )
        for high in HIGHS
    ]
    with pytest.warns(UserWarning, match="ignores 't_max'"):
        check(ours, rates(olmo.ComposableScheduler(stages=stages), 3 * n + 7))


@pytest.mark.parametrize("warmup", WARM)
@pytest.mark.parametrize("n", SIZES)
def test_one_after_the_other(olmo, n, warmup):
    first, then = olmo.ConstantWithWarmup(warmup=warmup), olmo.LinearWithWarmup(warmup=0, alpha_f=0.1)
    scheduler = olmo.SequentialScheduler(schedulers=[first, then], schedulers_max=[warmup + 3])
    ours = [join([Constant(high), Linear(start_lr=high, end_lr=0.1 * high, total_steps=n)], [3]) for high in HIGHS]
    check(warmed(warmup, ours), rates(scheduler, warmup + 3 + n, last=warmup + 3 + n))


@pytest.mark.parametrize("warmup", WARMUPS)
@pytest.mark.parametrize("n", SIZES)
def test_periods(olmo, n, warmup):
    """OLMo's WSDS restarts at the step after the end of a period; `nexus.schedules.WSDS` at the end."""
    decay = max(1, n // 3)
    scheduler = olmo.WSDS(period_lengths=[warmup + n, n], warmup=warmup, decay=decay)
    stable = n - decay

    def periods(high):
        def fall(shift=0.0):
            return Arc("linear", high=high, low=0.0, span=float(decay), shift=shift)

        first = [(stable, lambda: Constant(high)), (decay + 1, fall)]
        # The next begins at its own step 1.
        return in_turn(*first, (stable - 1, lambda: Constant(high)), last=fall(0.0 if stable else 1.0))

    check(warmed(warmup, map(periods, HIGHS)), rates(scheduler, warmup + 2 * n))


@pytest.mark.parametrize("n", SIZES)
def test_exponential_rise(olmo, n):
    ours = [join([Exponential(peak_lr=1e-6, gamma=high / 1e-6, every=n), Constant(high)], [n]) for high in HIGHS]
    check(ours, rates(olmo.ExponentialScheduler(lr_min=1e-6), n))


def test_warmups_of_0_steps_divide_by_0(olmo):
    for scheduler in (olmo.ConstantWithWarmup(warmup=0), olmo.WSD(warmup=0), olmo.PowerLR(warmup=0)):
        with pytest.raises(ZeroDivisionError):
            scheduler.get_lr(0.1, 0, 100)


@pytest.mark.parametrize("kind", ["WSD", "PowerLR", "CosWithWarmupAndLinearDecay"])
def test_past_the_last_step_the_rate_is_below_0(olmo, kind):
    scheduler = getattr(olmo, kind)(warmup=1, decay=10, decay_fraction=None)
    assert scheduler.get_lr(0.1, 100, 100) == 0.0
    assert scheduler.get_lr(0.1, 101, 100) < 0.0
