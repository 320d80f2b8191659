"""The commands as programs of a job's ranks, without torchrun's own start."""

from headrace.launch import serve, throughput, train

__all__ = ["run_serve", "run_throughput", "run_train"]


def run_train(arguments: list[str]) -> None:
    train.main(arguments)


def run_serve(arguments: list[str]) -> None:
    serve.main(arguments)


def run_throughput(arguments: list[str]) -> None:
    throughput.main(arguments)
