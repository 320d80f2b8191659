"""What the engine says of its arguments must be what a configuration's reader can write."""

import warnings
from pathlib import Path

import pytest

import headrace.pipeline
from headrace.launch.config import parse
from headrace.launch.wording import engine_in_yaml, in_yaml
from headrace.pipeline.errors import InputError, told


@pytest.mark.parametrize(
    ("python", "yaml"),
    [
        ("micro_batches=0: give a number", "pipeline.micro_batches is 0: give a number"),
        ("slack=[1, 1]: give one", "pipeline.slack is [1, 1]: give one"),
        ("balance=[3, 4] has 7 layers", "pipeline.balance: [3, 4] has 7 layers"),
        ("stages=3: give a number, or stages=2", "stages is 3: give a number, or stages: 2"),
        ("write rule=Exact()", "write pipeline.rule: exact"),
        (
            "write rule=Delayed(weights='stash'), or schedule='1f1b'",
            "write pipeline.rule: {class_path: delayed, init_args: {weights: stash}}, or "
            "pipeline.schedule: '1f1b'",
        ),
        (
            "as in rule=Delayed('stash') with from headrace.pipeline.rules import Delayed",
            "as in pipeline.rule: {class_path: delayed, init_args: {weights: stash}}",
        ),
        (
            "write replicas=Downpour(4, beside=True)",
            "write pipeline.replicas: {class_path: downpour, init_args: {count: 4, beside: true}}",
        ),
        ("batch_size= beside replicas=Allreduce(…): each", "pipeline.batch_size beside "
         "pipeline.replicas: allreduce: each"),
        (
            "write corrections=[LearningRate()] or corrections=[LearningRate('inverse')]",
            "write pipeline.corrections: [learning_rate] or pipeline.corrections: [{class_path: "
            "learning_rate, init_args: {factor: inverse}}]",
        ),
        ("or micro_batches= larger", "or pipeline.micro_batches larger"),
        ("clip_grad_norm=0: give a number > 0, or None", "pipeline.clip_grad_norm is 0: give a "
         "number > 0, or null"),
        ("pipeline.rule: weights='x': write one", "pipeline.rule: weights='x': write one"),
        ("the loader gave no mini-batch", "the loader gave no mini-batch"),
        ("reduction='mean', my_stages=3", "reduction='mean', my_stages=3"),
        ("there is no runs/None", "there is no runs/None"),
        ("True/timeout=5.yaml: no such file", "True/timeout=5.yaml: no such file"),
    ],
)  # fmt: skip
def test_keys_for_arguments(python: str, yaml: str) -> None:
    assert in_yaml(python) == yaml


ADVICE = {
    "pipeline.rule": "rule=Delayed(weights='stash')",
    "pipeline.replicas": "replicas=Downpour(4, beside=True)",
}


def test_what_the_engine_warns_of_is_in_keys_and_what_others_do_as_it_is() -> None:
    own = str(Path(headrace.pipeline.__file__).parent / "replicas" / "hogwild.py")
    say, text = warnings.formatwarning, "torn; write rule=Exact()"
    with engine_in_yaml():
        ours = warnings.formatwarning(text, UserWarning, own, 1)
        others = warnings.formatwarning(text, UserWarning, "other.py", 1, "")
    assert ours == "headrace: warning: torn; write pipeline.rule: exact\n"
    assert others == say(text, UserWarning, "other.py", 1, "")
    assert warnings.formatwarning is say


def test_what_is_quoted_of_a_users_error_is_as_he_wrote_it() -> None:
    theirs = "rule=None: give True, or timeout=5"
    try:
        raise InputError(
            f"layer '4' takes no x: {theirs}; write stages=2, or None"
        ) from ValueError(theirs)
    except InputError as error:
        with engine_in_yaml():
            assert told(error) == f"layer '4' takes no x: {theirs}; write stages: 2, or null"
        assert told(error) == str(error)


@pytest.mark.parametrize("key", list(ADVICE))
def test_what_is_advised_can_be_written(key: str) -> None:
    advice = ADVICE[key]
    written = in_yaml(advice).removeprefix(f"{key}: ")
    config = parse(["--config", "tiny", f"--{key}", written])
    found = config.pipeline.rule if key == "pipeline.rule" else config.pipeline.replicas
    assert getattr(found, "class_path", "") == advice.partition("=")[2].partition("(")[0].lower()
