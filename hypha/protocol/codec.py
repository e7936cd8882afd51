"""CBOR on the wire, frozen Structs inside; everything is bounded before it is decoded.

    Message ──to_builtins──▶ maps, lists, scalars ──cbor2──▶ bytes ──▶ peer ──▶ cbor2 ──convert──▶ Message

Unknown fields are ignored (newer peers may say more), missing or ill-typed ones are refused with their path.
"""

import io
from typing import Any

import cbor2
import msgspec

from hypha.errors import LocalProtocolError, RemoteProtocolError
from hypha.protocol.messages import ANY_MESSAGE, Message

# Control messages are small: the largest are manifests of contributions with their intervals.
MESSAGE_BYTES_MAX = 1 << 20
# Gossip floods every node, so it carries announcements only (security.md).
GOSSIP_BYTES_MAX = 64 << 10


def encode(message: Message, *, bytes_max: int = MESSAGE_BYTES_MAX) -> bytes:
    """Return the CBOR of a message. Raises LocalProtocolError when it would exceed `bytes_max`."""
    data: bytes = cbor2.dumps(msgspec.to_builtins(message, builtin_types=(bytes,)), canonical=True)
    if len(data) > bytes_max:
        kind = type(message).__name__
        raise LocalProtocolError(f"{kind} of {len(data)} bytes exceeds the limit of {bytes_max}")
    return data


def decode(data: bytes, *, bytes_max: int = MESSAGE_BYTES_MAX) -> Message:
    """Return the message in `data`. Raises RemoteProtocolError: too big, not CBOR, or wrong shape."""
    if len(data) > bytes_max:
        raise RemoteProtocolError(f"message of {len(data)} bytes exceeds the limit of {bytes_max}")
    try:
        with io.BytesIO(data) as source:
            plain: Any = cbor2.CBORDecoder(source, tag_hook=_refuse_tag).decode()
            trailing = source.tell() != len(data)
    except (cbor2.CBORDecodeError, RecursionError, OverflowError, MemoryError, ValueError) as error:
        raise RemoteProtocolError(f"message is not CBOR: {error}") from error
    if trailing:
        raise RemoteProtocolError("message has bytes after its end")
    try:
        message: Message = msgspec.convert(plain, ANY_MESSAGE, builtin_types=(bytes,))
    except (msgspec.ValidationError, RecursionError) as error:
        raise RemoteProtocolError(f"message has the wrong shape: {error}") from error
    return message


def _refuse_tag(_decoder: Any, tag: Any) -> Any:
    raise ValueError(f"CBOR tag {tag.tag} is not part of the protocol")
