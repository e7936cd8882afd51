"""Messages on a byte stream: a length, then CBOR; raw bytes may lie between frames.

    ┌───────────────┬──────────────────┐
    │ length, 4 B   │ CBOR, length B   │   length is unsigned, big endian, 1 ≤ length ≤ 1 MiB
    └───────────────┴──────────────────┘

Bytes are asked for exactly as the frame needs them, so nothing of what follows a frame is ever swallowed with it.
"""

from typing import Protocol, TypeVar

from hypha.errors import Refused, RemoteProtocolError
from hypha.protocol.codec import MESSAGE_BYTES_MAX, decode, encode
from hypha.protocol.messages import Failure, Message

M = TypeVar("M", bound=Message)

LENGTH_BYTES = 4


class ByteSource(Protocol):
    """What a frame can be read from."""

    async def receive_some(self, bytes_max: int) -> bytes | bytearray:
        """Return 1 to `bytes_max` bytes, or b"" at the end."""


class ByteStream(ByteSource, Protocol):
    """What `MessageFraming` is mixed into."""

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send every byte."""


def framed(data: bytes) -> bytes:
    """Return `data` with its length in front, ready to be sent."""
    return len(data).to_bytes(LENGTH_BYTES, "big") + data


async def receive_frame(source: ByteSource, *, bytes_max: int = MESSAGE_BYTES_MAX) -> bytes | None:
    """Return what one frame holds, or None when the stream ended cleanly before it.

    Raises RemoteProtocolError when it ended inside the frame, or when the frame is empty or longer than `bytes_max`
    (then nothing of it has been read), and what the source raises.
    """
    prefix = await _receive_exactly(source, LENGTH_BYTES)
    if prefix is None:
        return None
    length = int.from_bytes(prefix, "big")
    if not 0 < length <= bytes_max:
        raise RemoteProtocolError(f"frame of {length} bytes; the limit is {bytes_max}")
    data = await _receive_exactly(source, length)
    if data is None:
        raise RemoteProtocolError(f"stream ended before a frame of {length} bytes")
    return data


async def _receive_exactly(source: ByteSource, count: int) -> bytes | None:
    first = await source.receive_some(count)
    if not first:
        return None
    if len(first) == count:
        return bytes(first)
    gathered = bytearray(first)
    while len(gathered) < count:
        more = await source.receive_some(count - len(gathered))
        if not more:
            raise RemoteProtocolError(f"stream ended {count - len(gathered)} bytes before the end of a frame")
        gathered += more
    return bytes(gathered)


class MessageFraming:
    """Mixin that gives a byte stream the two message calls of `seam.Stream`."""

    async def send_message(self: ByteStream, message: Message) -> None:
        """Send one message. Raises LocalProtocolError when it is too long, and what `send_all` raises."""
        await self.send_all(framed(encode(message)))

    async def receive_message(self: ByteStream, kind: type[M]) -> M:
        """Receive one message of `kind`; `Message` stands for any, of which the caller picks.

        Raises Refused when it is a Failure, RemoteProtocolError when it is another kind, malformed or missing.
        """
        data = await receive_frame(self)
        if data is None:
            raise RemoteProtocolError(f"stream ended where {kind.__name__} was due")
        message = decode(data)
        if isinstance(message, Failure) and kind is not Failure:
            raise Refused(message.reason, code=message.code)
        if not isinstance(message, kind):
            raise RemoteProtocolError(f"{type(message).__name__} came where {kind.__name__} was due")
        return message
