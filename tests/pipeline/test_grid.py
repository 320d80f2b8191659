"""Who is who: two replicas of three stages, and their servers."""

import pytest

from headrace.pipeline.grid import Grid

GRIDS = [Grid(3, 2, 3, rank) for rank in range(9)]


def test_ranks_are_dealt_out_replica_by_replica_and_servers_come_last() -> None:
    assert [(g.replica, g.stage, g.is_server) for g in GRIDS] == [
        (0, 0, False), (0, 1, False), (0, 2, False),
        (1, 0, False), (1, 1, False), (1, 2, False),
        (2, 0, True), (2, 1, True), (2, 2, True),
    ]  # fmt: skip
    assert all(g.pipelines == [[0, 1, 2], [3, 4, 5]] for g in GRIDS)


def test_names() -> None:
    assert GRIDS[4].names == [
        "replica 0 of 2, stage 0 of 3 (rank 0)",
        "replica 0 of 2, stage 1 of 3 (rank 1)",
        "replica 0 of 2, stage 2 of 3 (rank 2)",
        "replica 1 of 2, stage 0 of 3 (rank 3)",
        "replica 1 of 2, stage 1 of 3 (rank 4)",
        "replica 1 of 2, stage 2 of 3 (rank 5)",
        "the server of stage 0 (rank 6)",
        "the server of stage 1 (rank 7)",
        "the server of stage 2 (rank 8)",
    ]
    assert Grid(2).names == ["stage 0 of 2 (rank 0)", "stage 1 of 2 (rank 1)"]


@pytest.mark.parametrize("stages", [1, 3])
def test_a_pipeline_alone_is_the_only_replica(stages: int) -> None:
    grids = [Grid(stages, rank=rank) for rank in range(stages)]
    assert [(g.replica, g.stage, g.is_server) for g in grids] == [
        (0, j, False) for j in range(stages)
    ]
    assert grids[0].pipelines == [[*range(stages)]]
    assert grids[0].share == (0, 1)


def test_replicas_of_one_stage() -> None:
    grids = [Grid(1, 3, 1, rank) for rank in range(4)]
    assert [g.replica for g in grids] == [0, 1, 2, 3]
    assert [g.is_server for g in grids] == [False, False, False, True]
    assert grids[0].pipelines == [[0], [1], [2]]


def test_the_share_of_the_data_is_the_replicas_or_its_seats() -> None:
    assert [g.share for g in GRIDS[:6]] == [(0, 2)] * 3 + [(1, 2)] * 3
    assert Grid(2, rank=1, seat=3, seats=5).share == (3, 5)  # a job of its own
