"""An error as one sentence, with what to do about it. No I/O."""

from __future__ import annotations

from leveret import exceptions as e
from leveret.cli.options import hide_passwords
from leveret.log import printable


class CommandFailed(Exception):
    """The command cannot go on.

    Args:
        text: what went wrong, as a sentence.
        fix: what to do about it, as another.
    """

    def __init__(self, text: str, fix: str = "") -> None:
        super().__init__(text)
        self.fix = fix


BROKER = "`python -m leveret broker` starts one for trying out"
_FIXES: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...] = (
    # The first that fits counts.
    (e.LoginRefused, "Correct the user or the password in --url or AMQP_URL."),
    (e.IncompatibleProtocolError, "Correct the port or the scheme in --url."),
    (e.ConnectTimeout, "Is the host right, and does a firewall let the port through?"),
    (
        e.ConnectionNotAllowed,
        "Correct the vhost, which is the path of --url, or have it made: `rabbitmqctl add_vhost`, `set_permissions`.",
    ),
    (
        e.ConnectionNotImplemented,
        "If it is about a stream: it is read, and kept, by `consume --argument x-stream-offset=first`.",
    ),
    (e.ChannelNotFoundEntity, "Is the name right? --declare creates a queue that is missing."),
    (e.ChannelAccessRefused, "Ask for the permission, or choose another name or user."),
    (e.ChannelLockedResource, "It is exclusive to another connection: choose another queue."),
    (e.ConnectionBlocked, "The broker is short of memory or disk: consume, or give it more."),
    (e.PublishOutcomeUnknown, "The broker may have it, or not: look, before you publish it again."),
    (e.MessageNacked, "Is the queue full (`x-max-length` with `reject-publish`)? Else look into the broker's log."),
    (e.ConsumerCancelled, "Was its queue deleted?"),
)

_PRECONDITIONS = (
    # What RabbitMQ's text has in it, and the fix.
    ("inequivalent arg", "It exists with other properties: leave out what declares it, or choose another name."),
    ("message size", "Send less in one message, or have `max_message_size` raised in rabbitmq.conf."),
    ("user_id", "The user id has to be the user that is logged in: correct it, or leave it out."),
    ("expiration", "Correct the expiration."),
    ("invalid arg", "Correct that argument, or leave it out."),
)
"""406 PRECONDITION_FAILED says many things."""


def sentence(error: BaseException) -> str:
    """*error* in words for people: what went wrong, and what to do about it; without passwords."""
    return " ".join(filter(None, (what_happened(error), fix_for(error))))


def what_happened(error: BaseException) -> str:
    """What went wrong; without passwords."""
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError) and error.filename is not None:
        return hide_passwords(f"{error.strerror}: {printable(str(error.filename))}.")
    text = _words(error)
    return hide_passwords(text if text.endswith((".", "?", "!")) else f"{text}.")


def fix_for(error: BaseException) -> str:
    """What to do about it, as far as the kind of the error tells; else nothing."""
    if isinstance(error, CommandFailed):
        return error.fix
    if isinstance(error, e.ChannelNotFoundEntity) and "no exchange" in error.reply_text:
        return "Is the name right? Exchanges are declared by the programs that use them."
    if isinstance(error, e.AMQPConnectionError) and "is that an AMQP port?" in str(error):
        return "Correct the port or the scheme in --url."
    if isinstance(error, e.ChannelPreconditionFailed):
        return next((fix for words, fix in _PRECONDITIONS if words in error.reply_text), "")
    fix = next((fix for kind, fix in _FIXES if isinstance(error, kind)), "")
    return f"If there is none, {BROKER}." if not fix and is_refused(error) else fix


def _words(error: BaseException) -> str:
    """Its text, or the broker's words where it brings them; its class where it has none."""
    if isinstance(error, e.Closed) and error.by_broker and error.reply_text:
        return f"the broker says: {printable(error.reply_text)}"
    if isinstance(error, TimeoutError) and not str(error):
        return "it took too long"
    return printable(str(error)) or type(error).__name__


def is_refused(error: BaseException) -> bool:
    """Whether nothing listens at that port, or at any of several."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ConnectionRefusedError):
            return True
        seen = seen.__cause__
    return "Connect call failed" in str(error) or "onnection refused" in str(error)
