"""Channels inside one process behave as those between processes."""

import torch

from headrace.pipeline.channel import LocalChannel, connect_locally
from headrace.pipeline.message import Kind, Message


def test_a_local_channel_copies_as_the_wire_does() -> None:
    channel = LocalChannel()
    sent = torch.arange(6.0).view(2, 3).t().requires_grad_()
    channel.send(Message(Kind.MICRO_BATCH, 4, body=[sent, None]))
    with torch.no_grad():
        sent.zero_()
    message = channel.poll()
    assert message is not None and message.index == 4 and isinstance(message.body, list)
    got, nothing = message.body
    assert nothing is None and isinstance(got, torch.Tensor)
    assert got.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert got.is_contiguous() and got.requires_grad and got.is_leaf
    assert channel.poll() is None


def test_each_stage_reaches_its_neighbours() -> None:
    first, second, third = connect_locally(3)
    assert first.from_upstream is None and first.to_upstream is None
    assert third.from_downstream is None and third.to_downstream is None
    assert first.to_downstream is second.from_upstream
    assert second.to_upstream is first.from_downstream
    assert second.to_downstream is third.from_upstream
    assert third.to_upstream is second.from_downstream
    assert second.flush()
