"""When to try again to connect, and whether at all."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator

from leveret.exceptions import (
    AuthenticationError,
    ConnectionClosed,
    IncompatibleProtocolError,
    ProtocolError,
)


def is_retryable(error: BaseException) -> bool:
    """Whether connecting again may help without anybody changing anything: a password, a vhost, a certificate, a URL.

    False for a refused login, a vhost that is missing or closed to the user, a limit that is reached, a server that
    does not speak AMQP or whose certificate does not pass, and for what is no error of connecting at all.
    """
    if isinstance(error, ConnectionClosed):
        return error.retryable
    if isinstance(error, AuthenticationError | IncompatibleProtocolError | FileNotFoundError | PermissionError):
        return False
    if isinstance(error, ValueError) or isinstance(error.__cause__, ValueError):  # a certificate, a host that is none
        return False
    return isinstance(error, OSError | ProtocolError)  # AMQPConnectionError and TimeoutError are OSErrors


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How to go on after a failed attempt to connect: exponential pauses, each random between 0 and its bound.

    The random part ("full jitter") keeps a thousand clients of a restarted broker from coming back all at once.

    Args:
        initial: bound of the first pause, in seconds.
        maximum: bound of all later ones, in seconds.
        multiplier: how much the bound grows from one pause to the next; 1 for equal ones.
        jitter: False to pause for as long as the bound.
        max_attempts: give up after so many failed attempts; None to go on.
        max_time: give up when the attempts have taken so many seconds; None to go on.
        retryable: which errors are worth another attempt soon. Others are final on the first connect; later they are
            retried after ``maximum`` seconds, and logged as errors.

    Raises:
        ValueError: a number that makes no sense.
    """

    initial: float = 0.1
    maximum: float = 30.0
    multiplier: float = 2.0
    jitter: bool = True
    max_attempts: int | None = None
    max_time: float | None = None
    retryable: Callable[[BaseException], bool] = is_retryable

    def __post_init__(self) -> None:
        if not 0 <= self.initial <= self.maximum:
            raise ValueError(f"expected 0 <= initial <= maximum, not {self.initial} and {self.maximum}")
        if not self.multiplier >= 1:
            raise ValueError(f"multiplier must be at least 1, not {self.multiplier}")
        if self.max_attempts is not None and self.max_attempts < 1:
            raise ValueError(f"max_attempts must be at least 1 or None, not {self.max_attempts}")
        if self.max_time is not None and not self.max_time > 0:
            raise ValueError(f"max_time must be over 0 or None, not {self.max_time}")

    @classmethod
    def every(cls, seconds: float) -> RetryPolicy:
        """Always the same pause, for ever: what ``reconnect_interval`` means."""
        return cls(initial=seconds, maximum=seconds, multiplier=1, jitter=False)

    def pauses(self, random_number: Callable[[], float] = random.random) -> Iterator[float]:
        """The pauses between attempts, in seconds; it ends when ``max_attempts`` are used up.

        Args:
            random_number: from 0 to 1.
        """
        bound, attempts = self.initial, 1
        while self.max_attempts is None or attempts < self.max_attempts:
            yield bound * random_number() if self.jitter else bound
            bound = min(bound * self.multiplier, self.maximum)
            attempts += 1
