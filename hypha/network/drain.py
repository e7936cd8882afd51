"""How much may wait before a connection: as much as it takes in a moment, so that a small message is soon through.

writes of n bytes in all took t seconds ─▶ n / t · WAIT_S ─▶ frame size, and what may wait unsent in the kernel

512 KiB of each are nothing at 100 MB/s, and are 13 s on an uplink of 80 kB/s: longer than a renewal has.
"""

# So long a small message may wait for the frame before it, and again for what waits in the kernel.
WAIT_S = 0.1
# Smaller ones cost more in headers and calls than they save: one is a TLS record.
FRAME_BYTES_MIN = 16 << 10
# Large frames cost less; reached by whatever moves 5.2 MB/s. Half as large, a stream is 0.9 × as fast, and a request
# beside it takes 6 ms in place of 8.
FRAME_BYTES_MAX = 512 << 10
# What a new connection begins with, of which nothing is known yet: one that is fast grows within 2 MiB.
FRAME_BYTES_FIRST = 32 << 10
# A write that does not wait has found room in the kernel, which says nothing; of so many frames, some have waited.
FRAMES_MEASURED = 4


class Drain:
    """The frame size for one connection, from what its writes took; all times in seconds of one clock."""

    def __init__(self) -> None:
        self.frame_bytes = FRAME_BYTES_FIRST
        self._began: float | None = None
        self._bytes = 0

    def took(self, count: int, began: float, ended: float) -> bool:
        """Note a write of `count` bytes; returns whether the frame size is another one now.

        Down as soon as one write waits long, since others wait for it already; up by doubling.
        """
        if count < FRAME_BYTES_MIN:
            return False
        if self._began is None or ended - began > 2 * WAIT_S:
            self._began, self._bytes = began, 0
        self._bytes += count
        before, seconds = self.frame_bytes, ended - self._began
        if seconds <= 2 * WAIT_S and self._bytes < FRAMES_MEASURED * before:
            return False
        passes = int(self._bytes / seconds * WAIT_S) if seconds > 0 else FRAME_BYTES_MAX
        self.frame_bytes = max(FRAME_BYTES_MIN, min(passes, 2 * before, FRAME_BYTES_MAX))
        self._began = None
        return self.frame_bytes != before
