"""A pipeline's arguments: each is refused by name, with its value and what to write instead."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .batch_size import Growth
from .checkpoints.plan import Checkpoints
from .corrections import Correction
from .corrections.beside import check_beside
from .grid import Grid
from .link import Link
from .loss import name_of
from .replicas import Hogwild, Replicas
from .rules import Rule
from .schedule import SCHEDULES, Schedule
from .world import World

__all__ = [
    "check_choices",
    "check_corrections",
    "check_counts",
    "check_fits_depths",
    "check_fitting",
    "check_growth",
    "check_kinds",
    "check_notes",
    "check_plan",
    "check_rules",
    "check_shared",
    "check_timeout",
    "lay_out",
]


def lay_out(stages: int | None, replicas: Any, world: World | None) -> Grid:
    """Who is who: as many stages as told, if there are as many ranks; or one for each rank."""
    ranks = world.size if world else None
    whole = isinstance(stages, int) and not isinstance(stages, bool)
    if stages is not None and not (whole and stages >= 1):
        raise ValueError(f"stages={stages!r}: give a whole number >= 1")
    rank = world.rank if world else 0
    if replicas is not None:
        return _lay_out_replicas(stages, replicas, ranks, rank)
    if stages is None:
        return Grid(ranks or 1, rank=rank)
    if ranks is not None and ranks != stages:
        if ranks < stages:
            hint = f"start with torchrun --nproc-per-node {stages}, or write stages={ranks}"
        else:
            hint = (
                f"start {stages} ranks, or write stages={ranks}; or, to have the others run copies "
                "of the pipeline, replicas=Allreduce()"
            )
        raise ValueError(f"stages={stages} but torchrun started {ranks} ranks: {hint}")
    return Grid(stages, rank=rank)


def _lay_out_replicas(stages: int | None, replicas: Any, ranks: int | None, rank: int) -> Grid:
    if not isinstance(replicas, Replicas):
        raise TypeError(
            f"replicas={replicas!r}: give an Allreduce, Hogwild, Downpour or Elastic, as in "
            "replicas=Allreduce(2) with from headrace.pipeline.replicas import Allreduce"
        )
    if stages is None:
        raise ValueError("replicas= needs stages=, the number of stages of each replica")
    if ranks is None:
        raise ValueError(
            "replicas= are processes beside each other: start the script with torchrun "
            f"--nproc-per-node {replicas.ranks(stages)}"
        )
    return replicas.lay_out(ranks, rank, stages)


def check_corrections(corrections: Any) -> None:
    """Refuse what is no correction, and what cannot be beside each other."""
    if not isinstance(corrections, Sequence) or isinstance(corrections, str):
        raise TypeError(f"corrections={corrections!r}: give a list of corrections")
    for correction in corrections:
        if not isinstance(correction, Correction):
            raise TypeError(
                f"corrections={list(corrections)!r}: give objects, as in "
                "corrections=[LearningRate('inverse')] with from headrace.pipeline.corrections "
                "import LearningRate"
            )
    check_beside(corrections)


def check_fitting(
    corrections: Sequence[Correction], rules: Sequence[Rule], schedule: Schedule
) -> None:
    """Refuse corrections of the stages' own that ask of a rule what it does not do."""
    late = [] if schedule.flushes else [rule for rule in rules[:-1] if rule.ahead is None]
    for correction in corrections:
        name = f"corrections= has a {type(correction).__name__}"
        if correction.needs_weights and not all(rule.keeps_weights for rule in late):
            raise ValueError(
                f"{name}, which compares with the weights of the forward, and a rule does not keep "
                "them: write rule=Delayed(weights='stash')"
            )
        if correction.predicts and not all(rule.looks_ahead for rule in late):
            raise ValueError(
                f"{name}, which predicts the weights of a forward for its backward to use again, "
                "and a rule does not keep them, or predicts its own: write "
                "rule=Delayed(weights='stash')"
            )
        if correction.stands_in and not all(rule.reads_newest for rule in late):
            raise ValueError(
                f"{name}, which stands in for weights of the forward that are not kept, and a rule "
                "keeps them, or runs the forward again: write rule=Delayed(weights='current'), or "
                "leave the correction out"
            )


def check_fits_depths(
    corrections: Sequence[Correction],
    schedule: Schedule,
    depths: Sequence[int],
    update_every: int | None,
    tunes: bool,
) -> None:
    """Refuse corrections that so many micro-batches in flight leave undefined."""
    for correction in corrections if not schedule.flushes else ():
        if tunes and type(correction).check is not Correction.check:
            raise ValueError(
                f"corrections= has a {type(correction).__name__}, which must know how many "
                "micro-batches are in flight, and slack='auto' decides that later: write a number"
            )
        correction.check(depths, update_every)


def check_shared(corrections: Sequence[Correction], replicas: Replicas, own: Any) -> None:
    """Refuse corrections that cannot be where weights are shared.

    Args:
        own: those that are left to the stages; a parameter server has the others.
    """
    for correction in corrections:
        name = f"corrections= has a {type(correction).__name__}"
        if not own and not correction.at_servers:
            raise ValueError(
                f"{name}, which works on a stage's own optimizer, and {type(replicas).__name__} "
                "moves the weights on servers: leave it out, or write LearningRate or "
                "DelayCompensation"
            )
        if correction.stands_in and isinstance(replicas, Hogwild):
            raise ValueError(
                f"{name}, which puts other values into the weights' memory during a backward, and "
                "under Hogwild other replicas read it: leave it out"
            )
        if correction.synchronous:
            raise ValueError(
                f"{name}, which drains the first updates of one pipeline, and with replicas= none "
                "waits for the others: leave it out"
            )


def check_choices(loss_fn: Any, optimizer: Any, schedule: str, on_nonfinite: str) -> None:
    """Refuse a loss, optimizer, schedule or policy that is none."""
    if not callable(loss_fn):
        raise TypeError(f"loss_fn={loss_fn!r} cannot be called: give a function or a module")
    if isinstance(loss_fn, nn.Module) and any(p.requires_grad for p in loss_fn.parameters()):
        raise ValueError(
            f"loss_fn={name_of(loss_fn)} has weights of its own, which no stage would train: put "
            "them into the model's last layer, or freeze them with requires_grad_(False)"
        )
    if isinstance(optimizer, torch.optim.Optimizer) or not callable(optimizer):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}: give a function that makes one for a "
            "stage's parameters, as in optimizer=lambda params: torch.optim.SGD(params, lr=0.1)"
        )
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r}: write one of {', '.join(SCHEDULES)}")
    if on_nonfinite not in ("stop", "skip"):
        raise ValueError(f"on_nonfinite={on_nonfinite!r}: write 'stop' or 'skip'")


def check_timeout(timeout: Sequence[float]) -> None:
    """Refuse what is not two numbers of seconds above 0, which a NaN is not."""
    numbers = [*timeout] if isinstance(timeout, Sequence) else []
    if len(numbers) != 2 or not all(isinstance(n, int | float) and n > 0 for n in numbers):
        raise ValueError(
            f"timeout={timeout!r}: give two numbers of seconds, until the first update and after "
            "it, as in (300, 60)"
        )


def check_kinds(
    rule: Any, slack: Any, autocast: Any, device: str | torch.device | None, emulated_link: Any
) -> None:
    """Refuse objects that are not what their names say."""
    rules = rule if isinstance(rule, list | tuple) else [] if rule is None else [rule]
    for each in rules:
        if not isinstance(each, Rule):
            raise TypeError(
                f"rule={each!r}: give an object, or a list of one for each stage, as in "
                "rule=Delayed('stash') with from headrace.pipeline.rules import Delayed"
            )
    if isinstance(slack, str) and slack != "auto":
        raise ValueError(f"slack={slack!r}: give a whole number, one for each hop, or 'auto'")
    if not isinstance(slack, str | Sequence) and type(slack) is not int:
        raise TypeError(f"slack={slack!r}: give a whole number, one for each hop, or 'auto'")
    if autocast is not None and not isinstance(autocast, torch.dtype):
        raise TypeError(f"autocast={autocast!r}: give a dtype, as in autocast=torch.bfloat16")
    if emulated_link is not None and not isinstance(emulated_link, Link):
        raise TypeError(
            f"emulated_link={emulated_link!r}: give a Link, as in emulated_link=Link(latency=0.02) "
            "with from headrace.pipeline import Link"
        )
    try:
        torch.device("cpu" if device is None else device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r}: write 'cpu', 'cuda' or 'cuda:0'") from error


def check_rules(rules: Sequence[Rule], schedule: Schedule, stages: int, slack: Any) -> None:
    """Refuse rules that cannot be right, alone or beside each other."""
    if len(rules) != stages:
        raise ValueError(
            f"rule= is a list of {len(rules)}, for {stages} stages: give one for each stage, or a "
            "single one for all"
        )
    for rule in rules:
        rule.check(schedule, stages)
    if len({rule.synthesizes_inputs for rule in rules[1:]}) > 1:
        raise ValueError(
            "inputs='synthetic' on some stages only: with it every stage takes the network's input "
            "from the first stage directly; give it to all stages, or to none"
        )
    late = [j for j, rule in enumerate(rules[:-1]) if rule.ahead is None]
    if slack == "auto" and len(late) < stages - 1:
        raise ValueError(
            "slack='auto' is for stages that all wait for their gradients; under this rule some do "
            "not: write a number"
        )
    if slack not in (0, "auto") and stages > 1 and not late and not schedule.flushes:
        raise ValueError(
            f"slack={slack!r} hides links from stages that wait for their gradients; under this "
            "rule none does: leave it out (a rule's own lag or ahead is what hides them there)"
        )


def check_counts(micro_batches: int, update_every: int, clip_grad_norm: float | None) -> None:
    """Refuse numbers that are none, or too small."""
    for name, value in (("micro_batches", micro_batches), ("update_every", update_every)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: give a whole number >= 1")
    clip = clip_grad_norm
    if clip is not None and (not isinstance(clip, int | float) or not clip > 0):
        raise ValueError(f"clip_grad_norm={clip_grad_norm!r}: give a number > 0, or None")


def check_growth(batch_size: Any, update_every: int, replicas: Replicas | None) -> None:
    """Refuse what does not tell how many samples an update has, or cannot beside the others."""
    if batch_size is None:
        return
    if not isinstance(batch_size, Growth):
        raise TypeError(
            f"batch_size={batch_size!r}: give an object, as in batch_size=Steps([64, 512], at=[5]) "
            "with from headrace.pipeline.batch_size import Steps; a constant size is "
            "update_every= micro-batches of the loader's"
        )
    if update_every != 1:
        raise ValueError(
            f"update_every={update_every} beside batch_size=: both say when an update is made, one "
            "in micro-batches and one in samples: leave one of them out"
        )
    if replicas is not None:
        raise ValueError(
            f"batch_size= beside replicas={type(replicas).__name__}(…): each replica would end its "
            "updates by its own count, and those who wait for each other would wait in vain: leave "
            "one of them out, or write update_every="
        )


def check_plan(plan: Checkpoints | None) -> None:
    """Refuse what is no plan.

    Raises:
        TypeError: with what to write instead.
    """
    if plan is not None and not isinstance(plan, Checkpoints):
        raise TypeError(
            f"checkpoints={plan!r}: give where and when, as in "
            f"Checkpoints({str(plan)!r}, every=500)"
        )


def check_notes(notes: Any) -> dict[str, Any]:
    """A copy of what a user wants kept, which must be JSON's.

    Raises:
        ValueError: something in it is not; with its name.
    """
    for name, value in dict(notes).items():
        try:
            json.dumps({name: value}, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"notes[{name!r}]={value!r} cannot be kept in a checkpoint ({error}): write a "
                "finite number, text, or a list or dict of such"
            ) from None
    return dict(notes)
