"""The command line: training a pipeline, and planning its partition, from a YAML file."""

__all__: list[str] = []
