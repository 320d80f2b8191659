"""The predicted period: against a simulation action by action, and against closed forms."""

import random
import time
from itertools import pairwise

import pytest

from headrace.pipeline import Link
from headrace.pipeline.schedule import SCHEDULES, Backward, Forward, Schedule, Update, play
from headrace.pipeline.throughput import StageWork, data_parallel_period, period


def by_actions(
    schedule: Schedule,
    stages: list[StageWork],
    links: list[Link],
    slack: list[int],
    micro_batches: int,
    update_every: int,
    mini_batches: int,
) -> list[float]:
    """When the first stage ended each mini-batch: every action in the order that the schedule
    gives to each stage, as soon as what it waits for is there.
    """
    n = len(stages)
    depths = schedule.depths(n, slack)
    total = micro_batches * mini_batches
    queues = []
    for depth in depths:
        if schedule.flushes:
            queue = []
            for k in range(mini_batches):
                stretch = schedule.actions(depth, k * micro_batches)
                last = (k + 1) % update_every == 0
                marks = [False] * (micro_batches - 1) + [last]
                queue += [*play(stretch, marks), "end"]
        else:
            marks = [(k + 1) % update_every == 0 for k in range(total)]
            queue = [*play(schedule.actions(depth, 0), marks)]
        queues.append(queue)
    arrived: dict[tuple[type, int, int], float] = {}
    free = {(kind, hop): 0.0 for kind in (Forward, Backward) for hop in range(n - 1)}
    clock = [0.0] * n
    ends = []
    while any(queues):
        for j, queue in enumerate(queues):
            while queue:
                action = queue[0]
                if action == "end":
                    if j == 0:
                        ends.append(clock[0])
                elif isinstance(action, Update):
                    clock[j] += stages[j].update
                else:
                    down = isinstance(action, Forward)
                    source = j - 1 if down else j + 1
                    if 0 <= source < n:
                        if (type(action), j, action.index) not in arrived:
                            break
                        clock[j] = max(clock[j], arrived[type(action), j, action.index])
                    clock[j] += stages[j].forward if down else stages[j].backward
                    target = j + 1 if down else j - 1
                    if 0 <= target < n:
                        hop, work = min(j, target), stages[j]
                        size = work.activation_bytes if down else work.gradient_bytes
                        left = max(clock[j], free[type(action), hop]) + size / links[hop].bandwidth
                        free[type(action), hop] = left
                        arrived[type(action), target, action.index] = left + links[hop].latency
                    if j == 0 and not schedule.flushes and not down:
                        ends.append(clock[0])
                queue.pop(0)
    return ends


def random_case(dice: random.Random) -> tuple[list[StageWork], list[Link], list[int]]:
    n = dice.randint(1, 6)
    stages = [
        StageWork(
            dice.uniform(0, 2), dice.uniform(0, 3), dice.uniform(0, 1), dice.choice([0, 5, 20]), 8
        )
        for _ in range(n)
    ]
    links = [
        Link(dice.choice([0, 0.2, 3]) * dice.random(), dice.choice([4, 40, float("inf")]))
        for _ in range(n - 1)
    ]
    return stages, links, [dice.choice([0, 0, 1, 3]) for _ in range(n - 1)]


@pytest.mark.parametrize("name", ["1f1b", "gpipe"])
def test_flushing_schedules_action_by_action(name: str) -> None:
    dice = random.Random(name)
    schedule = SCHEDULES[name]
    for _ in range(60):
        stages, links, _ = random_case(dice)
        parts, every = dice.randint(1, 9), dice.randint(1, 3)
        none = [0] * len(links)
        ends = by_actions(schedule, stages, links, none, parts, every, 6 * every)
        wanted = (ends[-1] - ends[-1 - every]) / every
        got = period(schedule, stages, links, 0, parts, every)
        assert got == pytest.approx(wanted, rel=1e-9)


def test_a_stream_action_by_action() -> None:
    dice = random.Random(5)
    schedule = SCHEDULES["stream"]
    for _ in range(12):
        stages, links, slack = random_case(dice)
        every = dice.choice([1, 1, 2, 3])
        cycle = (sum(slack) + len(stages)) * every * 12
        # The first stage's backwards; its update comes after, and waits for the next to show.
        ends = by_actions(schedule, stages, links, slack, 1, every, 45 * cycle)
        wanted = (ends[40 * cycle] - ends[20 * cycle]) / (20 * cycle)
        got = period(schedule, stages, links, slack, 1, every)
        assert got == pytest.approx(wanted, rel=3e-3)
        assert period(schedule, stages, links, slack, 4, every) == pytest.approx(4 * got)


def test_a_balanced_stream_takes_one_stage_s_time() -> None:
    stages = [StageWork(1, 2, 0.5)] * 7
    assert period(SCHEDULES["stream"], stages, [Link()] * 6) == pytest.approx(3.5)


@pytest.mark.parametrize("name", ["1f1b", "gpipe"])
def test_a_flush_pays_its_bubble(name: str) -> None:
    """(m + n - 1) slots for m micro-batches (Huang et al. 2019)."""
    for n, m in ((2, 1), (4, 4), (4, 16), (8, 3)):
        got = period(SCHEDULES[name], [StageWork(1, 2)] * n, [Link()] * (n - 1), 0, m)
        assert got == pytest.approx(3 * (m + n - 1))


def test_a_link_s_bandwidth_bounds_a_stream() -> None:
    stages = [StageWork(1, 1, 0, activation_bytes=100, gradient_bytes=10)] * 3
    slow = [Link(bandwidth=20), Link()]
    assert period(SCHEDULES["stream"], stages, slow, 8) == pytest.approx(5)


def test_hops_cost_a_stream_without_slack_their_share() -> None:
    for n in (2, 3, 8):
        got = period(SCHEDULES["stream"], [StageWork(1, 2)] * n, [Link(0.3)] * (n - 1))
        assert got == pytest.approx(3 + 2 * (n - 1) / n * 0.3, rel=1e-6)


def test_a_thousand_stages_are_quick() -> None:
    start = time.monotonic()
    stages, links = [StageWork(1, 2)] * 1024, [Link()] * 1023
    assert period(SCHEDULES["stream"], stages, links) == pytest.approx(3)
    assert period(SCHEDULES["1f1b"], stages, links, 0, 256) == pytest.approx(3 * 1279)
    assert time.monotonic() - start < 60


def test_data_parallel() -> None:
    whole = StageWork(1, 2, 0.5)
    assert data_parallel_period(whole, 1e9, 1, Link(1, 1)) == 3.5, "alone it sends nothing"
    # One bucket: the ring begins when the backward is done.
    ring = 2 * 3 * (4e6 / 4 / 1e6 + 0.01)
    assert data_parallel_period(whole, 4e6, 4, Link(0.01, 1e6)) == pytest.approx(3.5 + ring)
    # Many buckets on a quick link: all but the last are hidden.
    # Reducing takes 2 s of the processor, too: all of it before the last bucket can leave.
    assert data_parallel_period(whole, 4e6, 4, Link(0.01, 1e6), 5e-7) == pytest.approx(5.5 + ring)
    many = data_parallel_period(whole, 100 * 25 * 2**20, 2, Link(0, 1e12))
    assert many == pytest.approx(3.5 + 25 * 2**20 / 1e12)
    rates = [data_parallel_period(whole, 1e9, 4, Link(0, b)) for b in (1e7, 1e8, 1e9, 1e10)]
    assert all(a > b for a, b in pairwise(rates))
