"""Each stage has a random state of its own, which moves on; the one around it does not notice."""

import torch

from headrace.pipeline.random_state import RandomState

CPU = torch.device("cpu")


def draw_from(state: RandomState) -> float:
    with state.in_force():
        return float(torch.rand(()))


def test_a_captured_state_gives_the_same_numbers_again() -> None:
    state = RandomState.capture(CPU)
    first = torch.rand(3)
    state.restore()
    assert torch.equal(torch.rand(3), first)


def test_it_moves_on_and_puts_the_outer_one_back() -> None:
    outer = RandomState.capture(CPU)
    state = RandomState.derive(1, 2, CPU)
    one, two = draw_from(state), draw_from(state)
    assert one != two
    assert torch.equal(outer.cpu, torch.get_rng_state())
    again = RandomState.derive(1, 2, CPU)
    assert [draw_from(again), draw_from(again)] == [one, two]


def test_it_is_put_back_after_an_error_too() -> None:
    outer, state = torch.get_rng_state(), RandomState.derive(0, 1, CPU)
    before = state.cpu
    try:
        with state.in_force():
            torch.rand(1)
            raise KeyError
    except KeyError:
        pass
    assert torch.equal(outer, torch.get_rng_state())
    assert not torch.equal(before, state.cpu)


def test_stages_and_seeds_differ() -> None:
    seeds = (0, 1, -3, 67280421310721, 2**64 - 1)
    first = {draw_from(RandomState.derive(s, j, CPU)) for s in seeds for j in range(5)}
    assert len(first) == 25
