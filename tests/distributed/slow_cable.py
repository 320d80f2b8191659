"""A cable that takes its time: two network interfaces, and what one sends the other gets later.

For systems without netem. Run in a namespace, `python slow_cable.py LEFT RIGHT SECONDS` makes two
interfaces of these names, which can then be moved to others; it ends with its standard input.
"""

import fcntl
import os
import select
import struct
import sys
import time
from collections import deque

__all__: list[str] = []

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
FRAME = 65536


def make_interface(name: str) -> int:
    """An interface whose frames are read and written here."""
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return end


def carry(left: int, right: int, seconds: float) -> None:
    """Carry frames both ways until the standard input ends."""
    others = {left: right, right: left}
    late: deque[tuple[float, int, bytes]] = deque()
    while True:
        wait = max(0.0, late[0][0] - time.monotonic()) if late else None
        ready, _, _ = select.select([left, right, 0], [], [], wait)
        if 0 in ready:
            return
        for end in ready:
            late.append((time.monotonic() + seconds, others[end], os.read(end, FRAME)))
        while late and late[0][0] <= time.monotonic():
            _, end, frame = late.popleft()
            try:
                os.write(end, frame)
            except OSError:  # that interface is down, or full: a frame is lost, as on a cable
                continue


if __name__ == "__main__":
    ends = [make_interface(name) for name in sys.argv[1:3]]
    print("ready", flush=True)
    carry(*ends, float(sys.argv[3]))
