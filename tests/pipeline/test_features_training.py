"""What a torch user expects of training: dropout, BatchNorm, modes, autocast, clipping, rates."""

import copy
import itertools
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from headrace.pipeline import Pipeline
from headrace.pipeline.rules import Delayed

from .helpers import SIZES, assert_close, assert_same, batches_of, tanh_net
from .odd_models import Do, linears, vectors

POLICIES = ["current", "stash", "replay", "predict"]
MSE = nn.MSELoss()


def momentum(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def pipeline(model: nn.Sequential, stages: int, optimizer: Any = momentum, **more: Any) -> Pipeline:
    each, rest = divmod(len(model), stages)
    balance = [each + (j < rest) for j in range(stages)]
    return Pipeline(
        model, MSE, optimizer, stages=stages, **{"balance": balance, "device": "cpu", **more}
    )


class Recorder(nn.Module):
    """Passes its input on, and notes it, or what a function makes of it."""

    def __init__(self, note: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.note, self.seen = note, list[Any]()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.note(x))
        return x


class Masks(nn.Module):
    """Dropout that notes its masks."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.seen = nn.Dropout(0.5), list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.drop(torch.ones_like(x)))
        return x * self.seen[-1]


def masks_of(rule: str) -> list[list[Tensor]]:
    torch.manual_seed(0)
    stages = [[nn.Linear(5, 5), Masks(), nn.Tanh()] for _ in range(2)]
    model = nn.Sequential(*stages[0], *stages[1], nn.Linear(5, 5), Masks(), nn.Linear(5, 3))
    pipe = pipeline(model.double(), 3, rule=Delayed(rule), slack=1, seed=5)
    pipe.train(vectors([4] * 12))
    pipe.drain()
    return [layer.seen for layer in model if isinstance(layer, Masks)]


def test_replay_runs_its_second_forward_with_the_masks_of_the_first() -> None:
    once, twice = masks_of("stash"), masks_of("replay")
    for depth, first, both in zip((4, 2, 0), once, twice, strict=True):
        assert len(first) == 12
        assert not any(torch.equal(a, b) for a, b in itertools.pairwise(first))
        if depth == 0:  # the last stage goes back at once
            assert all(torch.equal(a, b) for a, b in zip(first, both, strict=True))
            continue
        # F0 … Fd, then B and F in turn, a B being a second forward; at the end the Bs left.
        order = [*range(depth + 1)]
        for k in range(12):
            order += [k, k + depth + 1] if k + depth + 1 < 12 else [k]
        assert len(both) == 24
        assert all(torch.equal(mask, first[i]) for mask, i in zip(both, order, strict=True))


def test_masks_differ_between_stages() -> None:
    first, second, third = masks_of("stash")
    assert not torch.equal(first[0], second[0]) and not torch.equal(second[0], third[0])


def test_one_stage_with_dropout_is_the_plain_loop_bitwise() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(*linears(5, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    plain = copy.deepcopy(model)
    optimizer = momentum(plain.parameters())
    torch.manual_seed(2)
    for x, y in vectors():
        optimizer.zero_grad()
        MSE(plain(x), y).backward()
        optimizer.step()
    for rule in POLICIES:
        copied = copy.deepcopy(model)
        torch.manual_seed(2)
        pipeline(copied, 1, rule=Delayed(rule)).train(vectors())
        assert_same(copied.state_dict(), plain.state_dict())


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("rule", [*POLICIES, "1f1b", "gpipe"])
def test_batch_norm_counts_every_micro_batch_once(rule: str, stages: int) -> None:
    data = vectors([8, 6, 8, 4])
    model = nn.Sequential(
        nn.BatchNorm1d(5), nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.BatchNorm1d(4),
        nn.Linear(4, 3),
    ).double()  # fmt: skip
    how = {"schedule": rule} if rule in ("1f1b", "gpipe") else {"rule": Delayed(rule), "slack": 1}
    pipe = pipeline(model, stages, micro_batches=2, **how)
    pipe.train(data)
    pipe.train(data)
    state = pipe.state_dict()
    assert [int(state[f"{k}.num_batches_tracked"]) for k in (0, 2, 4)] == [16] * 3
    # The first one sees the data alone, so its statistics do not depend on any weights.
    alone = nn.BatchNorm1d(5).double()
    for x, _ in data * 2:
        for piece in torch.tensor_split(x, 2):
            alone(piece)
    assert torch.equal(state["0.running_mean"], alone.running_mean)  # type: ignore[arg-type]
    assert torch.equal(state["0.running_var"], alone.running_var)  # type: ignore[arg-type]


def test_the_optimizer_sees_what_can_learn_and_only_that() -> None:
    model = nn.Sequential(*linears(5, 4, 4, 4), nn.Linear(4, 3)).double()
    for k in (0, 4):
        model[k].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    calls: list[list[str]] = []

    def spy(params: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        calls.append([name for name, _ in params])
        return momentum(params)

    before = copy.deepcopy(model.state_dict())
    pipe = pipeline(model, 4, spy, balance=[2, 2, 2, 1])
    pipe.train(vectors([4] * 10))
    pipe.close()
    assert calls == [["2.weight"], ["6.weight", "6.bias"]]
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert moved == {"2.weight", "6.weight", "6.bias"}
    rates = [engine.stage.learning_rate for engine in pipe._engines]
    assert [rate == 0.05 for rate in rates] == [False, True, False, True]  # NaN for none


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules() if name}


def test_each_module_gets_its_own_mode_back() -> None:
    seen = Recorder(lambda _: None)
    norm = nn.BatchNorm1d(4).eval()
    model = nn.Sequential(nn.Linear(5, 4), norm, nn.Dropout(0.5), seen, nn.Linear(4, 3)).double()
    before = modes(model)
    seen.note = lambda _: modes(model)
    pipe = pipeline(model, 2)
    pipe.train(vectors([4]))
    pipe.evaluate(vectors([4]))
    assert modes(model) == before
    pipe.train(vectors([4]))
    pipe.close()
    assert seen.seen[0] == before and seen.seen[2] == before
    assert not any(seen.seen[1].values())
    assert norm.num_batches_tracked is not None and norm.num_batches_tracked.item() == 0


def autocast_run(rule: str, autocast: torch.dtype | None) -> tuple[dict[str, Tensor], list[Any]]:
    torch.manual_seed(0)
    dtypes = Recorder(lambda x: x.dtype)
    model = nn.Sequential(*linears(5, 16, 16), dtypes, *linears(16, 16), nn.Linear(16, 3))
    data = [(x.float(), y.float()) for x, y in vectors([8] * 10)]
    pipe = pipeline(model, 3, rule=Delayed(rule), balance=[2, 3, 3], autocast=autocast)
    reports = [pipe.train(data) for _ in range(2)]
    assert 0 < reports[1].loss < reports[0].loss < 10
    return pipe.state_dict(), dtypes.seen


def test_autocast_sends_bfloat16_between_stages() -> None:
    state, dtypes = autocast_run("stash", torch.bfloat16)
    assert set(dtypes) == {torch.bfloat16}
    assert all(t.dtype is torch.float32 for t in state.values())
    assert set(autocast_run("stash", None)[1]) == {torch.float32}


def test_current_is_a_stash_under_autocast_and_says_so() -> None:
    with pytest.warns(UserWarning, match="under autocast .* weights='stash'") as caught:
        current, _ = autocast_run("current", torch.bfloat16)
    stages = [f"on stage {j}:" in str(w.message) for j, w in enumerate(caught)]
    assert stages == [True, True]  # the two with something in flight
    assert_same(current, autocast_run("stash", torch.bfloat16)[0])


def test_current_is_no_stash_without_autocast() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        current, stash = autocast_run("current", None)[0], autocast_run("stash", None)[0]
    different = {name for name in current if not torch.equal(current[name], stash[name])}
    assert different == set(current)


@pytest.mark.parametrize(("schedule", "stages"), [("stream", 3), ("stream", 1), ("1f1b", 3)])
def test_clipping_is_per_stage_in_a_stream_and_over_the_model_under_a_flush(
    schedule: str, stages: int
) -> None:
    norms: list[list[float]] = []

    def spying(params: Any) -> torch.optim.Optimizer:
        optimizer = momentum(params)
        mine: list[float] = []
        norms.append(mine)

        def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            grads = [p.grad for p in optimizer.param_groups[0]["params"] if p.grad is not None]
            mine.append(float(torch.stack([g.norm() for g in grads]).norm()))

        optimizer.register_step_pre_hook(look)
        return optimizer

    pipe = pipeline(
        tanh_net(), stages, spying, balance=SIZES[stages], schedule=schedule, clip_grad_norm=1e-3
    )
    pipe.train(batches_of(40, 4))
    pipe.drain()
    assert [len(mine) for mine in norms] == [10] * stages
    if schedule == "stream":
        assert all(norm == pytest.approx(1e-3, rel=1e-2) for mine in norms for norm in mine)
    else:
        together = [sum(norm**2 for norm in step) ** 0.5 for step in zip(*norms, strict=True)]
        assert together == pytest.approx([1e-3] * 10, rel=1e-2)
        assert max(max(mine) for mine in norms) < 0.99e-3


def rates_of(scheduler: Any, updates: int, **options: Any) -> tuple[list[list[float]], Pipeline]:
    rates: list[list[float]] = []

    def spying(params: Any) -> torch.optim.Optimizer:
        optimizer = momentum(params)
        mine: list[float] = []
        rates.append(mine)
        optimizer.register_step_pre_hook(lambda o, *_: mine.append(o.param_groups[0]["lr"]))
        return optimizer

    pipe = pipeline(
        tanh_net(), 3, spying, balance=SIZES[3], scheduler=scheduler,
        **options,
    )  # fmt: skip
    pipe.train(batches_of(4 * updates, 4))
    pipe.close()
    return rates, pipe


@pytest.mark.parametrize("schedule", ["stream", "gpipe"])
def test_a_scheduler_is_stepped_once_an_update(schedule: str) -> None:
    def decay(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (1 + k))

    rates, pipe = rates_of(decay, 9, schedule=schedule)
    assert rates == [[pytest.approx(0.05 / (1 + k)) for k in range(9)]] * 3
    assert [e.stage.learning_rate for e in pipe._engines] == [pytest.approx(0.005)] * 3


def test_one_cycle_gets_exactly_its_steps() -> None:
    def cycle(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.4, total_steps=13)

    reference = momentum(nn.Linear(1, 1).parameters())
    scheduler, expected = cycle(reference), []
    for _ in range(12):
        expected.append(reference.param_groups[0]["lr"])
        reference.step()
        scheduler.step()
    rates, _ = rates_of(cycle, 12)
    assert rates == [expected] * 3
    halves, _ = rates_of(cycle, 24, update_every=2)
    assert halves == [expected] * 3


def test_several_optimizers_of_one_factory() -> None:
    """Matrices by SGD, vectors by Adam, each with its own scheduler."""

    def two(params: list[tuple[str, nn.Parameter]]) -> list[torch.optim.Optimizer]:
        matrices = [(name, p) for name, p in params if p.dim() == 2]
        vectors = [(name, p) for name, p in params if p.dim() == 1]
        return [torch.optim.SGD(matrices, lr=0.1), torch.optim.Adam(vectors, lr=0.01)]

    def halve(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    model, data = tanh_net(), batches_of(20, 4)
    plain = copy.deepcopy(model)
    optimizers = two(list(plain.named_parameters()))
    schedulers = [halve(o) for o in optimizers]
    for x, y in data:
        plain.zero_grad()
        MSE(plain(x), y).backward()
        for each in (*optimizers, *schedulers):
            each.step()
    for stages in (1, 3):
        copied = copy.deepcopy(model)
        pipe = pipeline(
            copied, stages, two, balance=SIZES[stages], schedule="1f1b", scheduler=halve
        )
        pipe.train(data)
        assert_close(pipe.state_dict(), plain.state_dict())


def compiled_run(rule: str, compile: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    data = [(x.float(), y.float()) for x, y in vectors([6] * 6)]
    pipe = pipeline(model, 2, rule=Delayed(rule), compile=compile)
    pipe.train(data)
    return pipe.state_dict()


@pytest.mark.parametrize("rule", POLICIES)
@pytest.mark.filterwarnings("ignore:weights='current'", "ignore::DeprecationWarning")
def test_compiled_stages_give_the_same_numbers(rule: str) -> None:
    torch._dynamo.reset()
    eager = compiled_run(rule, False)
    assert_close(compiled_run(rule, {"backend": "aot_eager"}), eager, 1e-6)


def test_current_warns_under_compile() -> None:
    with pytest.warns(UserWarning, match=r"on stage 0: under torch\.compile"):
        pipeline(tanh_net(), 2, rule=Delayed("current"), compile={"backend": "eager"})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_the_default_compiler_gives_the_same_numbers() -> None:
    torch._dynamo.reset()
    assert_close(compiled_run("stash", True), compiled_run("stash", False), 1e-5)


class Checkpointed(nn.Module):
    """Keeps no activations: it runs a second time in the backward."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.reentrant = reentrant

    def inside(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.second(self.first(x).tanh()))

    def forward(self, x: Tensor) -> Any:
        if self.reentrant is None:
            return self.inside(x)
        return checkpoint(self.inside, x, use_reentrant=self.reentrant)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("rule", ["stash", "predict", "replay"])
def test_checkpointed_layers_train_as_they_would_without(rule: str) -> None:
    """The second run once found the newest weights, and a reentrant one's gradient got lost."""
    states = []
    for reentrant in (None, False, True):
        torch.manual_seed(0)
        blocks = [layer for _ in range(3) for layer in (nn.Linear(5, 5), Checkpointed(reentrant))]
        model = nn.Sequential(*blocks, nn.Linear(5, 3)).double()
        pipe = pipeline(model, 3, rule=Delayed(rule), balance=[2, 2, 3])
        pipe.train(vectors([4] * 12))
        states.append(pipe.state_dict())
    assert_same(states[1], states[0])
    assert_same(states[2], states[0])


@pytest.mark.parametrize("rule", POLICIES)
def test_a_buffer_the_user_moves_in_the_forward(rule: str) -> None:
    """As spectral norm does: moved in place, and a copy used, so that graphs in flight are safe."""
    torch.manual_seed(0)
    norm = nn.utils.parametrizations.spectral_norm
    model = nn.Sequential(norm(nn.Linear(5, 4)), nn.Tanh(), norm(nn.Linear(4, 4)), nn.Linear(4, 3))
    pipe = pipeline(model.double(), 2, rule=Delayed(rule), slack=1)
    losses = [pipe.train(vectors([8] * 6)).loss for _ in range(4)]
    assert losses[3] < losses[0]
    assert {"0.parametrizations.weight.original", "0.bias"} < set(pipe.state_dict())


@pytest.mark.parametrize("rule", POLICIES)
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_loader_may_use_its_memory_again(rule: str, stages: int) -> None:
    """What is in flight must not change with it, as it would unnoticed by way of numpy."""
    x, y = vectors([4])[0]
    memory = x.numpy(), y.numpy()

    def reusing() -> Any:
        for a, b in vectors([4] * 8):
            memory[0][:], memory[1][:] = a.numpy(), b.numpy()
            yield x, y

    states = []
    for loader in (reusing(), vectors([4] * 8)):
        torch.manual_seed(0)
        model = nn.Sequential(Do(lambda x: x.flatten(1)), *linears(5, 4, 4, 3)).double()
        pipe = pipeline(model, stages, rule=Delayed(rule))
        pipe.train(loader)
        states.append(pipe.state_dict())
    assert_same(*states)


def test_clipping_counts_sparse_gradients_in() -> None:
    """A bag of sparse rows, and one of dense: the same weights."""

    def train(sparse: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.EmbeddingBag(9, 4, mode="sum", sparse=sparse), nn.Linear(4, 2))
        generator = torch.Generator().manual_seed(1)
        loader = [
            (
                torch.randint(0, 9, (5, 3), generator=generator),
                torch.randn(5, 2, generator=generator),
            )
            for _ in range(12)
        ]
        with Pipeline(
            model, nn.MSELoss(), lambda p: torch.optim.SGD(p, lr=1.0), clip_grad_norm=0.05
        ) as pipe:
            pipe.train(loader)
        return model.state_dict()

    one, other = train(True), train(False)
    for name, value in one.items():
        torch.testing.assert_close(value, other[name])
