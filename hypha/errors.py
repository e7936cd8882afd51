"""Every error Hypha raises on purpose, by whose fault it is.

    HyphaError
    ├── ConfigError           the user's: configuration, command line, certificates   (exit code 2)
    ├── LocalProtocolError    our bug: we were about to break the protocol
    ├── RemoteProtocolError   their bug: a peer, executor or file broke a rule; names it
    │   └── Refused           a peer answered, and its answer is no; carries its reason
    ├── PeerUnreachable       nobody's: no answer from that peer within the caller's patience
    ├── StoreError            the disk's or the object store's: full, unwritable, corrupt
    └── JobFailed             an executor's: it exited, stalled or reported a failure

Foreign exceptions (OSError, libp2p's, httpx's) are translated once, at the seam that meets them.
"""


class HyphaError(Exception):
    """Base of every error raised on purpose."""


class ConfigError(HyphaError):
    """Configuration, usage or certificates are wrong; the message names the key and the file."""


class LocalProtocolError(HyphaError):
    """This program was about to break its own protocol: a bug here."""


class RemoteProtocolError(HyphaError):
    """A peer, an executor or a file broke a rule; the message names it."""


class Refused(RemoteProtocolError):
    """The peer answered the request with a refusal: its reason for people, its code for programs.

    Code "retry" says that the answer may change soon: the peer has not seen yet what the request builds on.
    """

    def __init__(self, reason: str, code: str = "refused") -> None:
        super().__init__(reason)
        self.code = code


class PeerUnreachable(HyphaError):
    """No answer could be had from the peer. Says nothing about whether it lives."""


class StoreError(HyphaError):
    """State could not be written or what was read back is damaged; names the path."""


class JobFailed(HyphaError):
    """A job ended without its result; the message holds the executor's last lines."""
