"""One request, one answer, one stream.

    asker     multistream lines · length · CBOR · FIN ─────────▶ dispatcher (role, handler, span)
    answerer  ◀──────────── multistream lines · length · CBOR · FIN

Both fit one frame each. The asker's stream is reset when it gives up; the handler is not cancelled by that, since the
request may have taken effect already.
"""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from hypha.errors import PeerUnreachable, RemoteProtocolError
from hypha.network.dispatch import Dispatcher, interpret, prepare
from hypha.network.framing import framed, receive_frame
from hypha.network.streams import Libp2pStream
from hypha.protocol.codec import encode
from hypha.protocol.messages import Message, Request, protocol_of
from hypha.telemetry import get_logger

R = TypeVar("R", bound=Message)

# A request is at most 1 MiB: whoever needs longer to send it holds a stream for nothing.
REQUEST_S = 20.0
# How long an answer may wait for the asker's window; it is at most 1 MiB, too.
ANSWER_S = 20.0

log = get_logger("network.rpc")

OpenStream = Callable[[str, str], Awaitable[Libp2pStream]]


async def ask(open_stream: OpenStream, peer_id: str, message: Request[R]) -> R:
    """Send a request and return its answer; raises as `seam.Network.request` says."""
    request = prepare(message)
    data = framed(encode(request))
    stream = await open_stream(peer_id, protocol_of(type(message)))
    try:
        await stream.send_last(data)
        answer = await receive_frame(stream)
    finally:
        await stream.aclose()
    if answer is None:
        raise PeerUnreachable(f"{peer_id} ended the stream without an answer")
    return interpret(peer_id, message, answer)


async def answer(stream: Libp2pStream, dispatcher: Dispatcher) -> None:
    """Answer the request on a stream that a peer opened. Raises nothing."""
    try:
        with trio.move_on_after(REQUEST_S) as patience:
            request = await receive_frame(stream)
        if patience.cancelled_caught or request is None:
            await stream.aclose()
            return
        reply = await dispatcher.handle(stream.peer, request)
        with trio.move_on_after(ANSWER_S):
            await stream.send_last(framed(reply))
            return
    except RemoteProtocolError as error:
        dispatcher.refusals.note(stream.peer.peer_id, "malformed", str(error))
    except PeerUnreachable as error:
        log.debug("Request broke", peer_id=stream.peer.peer_id, reason=str(error))
    await stream.aclose()
