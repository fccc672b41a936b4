"""AMQP transactions (class tx): publishes and acks that take effect at commit, or not at all."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import TYPE_CHECKING

from pamqp.commands import Tx

from leveret.exceptions import ChannelInvalidStateError
from leveret.lazy import pass_on
from leveret.older import OlderTransaction
from leveret.types import TimeoutType, TransactionState
from leveret.wire.methods import make

if TYPE_CHECKING:
    from leveret.channel import Channel
    from leveret.wire.channel import WireChannel

pass_on(__name__)


class Transaction(OlderTransaction):
    """A transaction of *channel*, which must have been opened with ``publisher_confirms=False``.

    ``async with channel.transaction():`` commits at the end, or rolls back when the block raises. What a
    rollback undoes are publishes and acks; deliveries stay with the consumer, and a message that was acked stays
    ``processed`` although the broker waits for its ack again: it is redelivered when the channel is closed.

    A commit that times out or is cancelled goes on at the broker; what the channel sends meanwhile waits for its end.

    https://www.rabbitmq.com/docs/semantics#tx
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._wire: WireChannel | None = None
        self.state = TransactionState.CREATED

    def __str__(self) -> str:
        return self.state.value

    def __repr__(self) -> str:
        return f"<Transaction: {self.state.value}>"

    @property
    def channel(self) -> Channel:
        """The channel.

        Raises:
            RuntimeError: it is closed.
        """
        if self._channel.is_closed:
            raise RuntimeError("the channel of the transaction is closed")
        return self._channel

    async def select(self, timeout: TimeoutType = None) -> Tx.SelectOk:
        """Begin (``tx.select``)."""
        result: Tx.SelectOk = await self.channel.call(make(Tx.Select), timeout)
        self._wire = self._channel.wire
        self._channel.enter_transaction()
        self.state = TransactionState.STARTED
        return result

    def _check_begun(self) -> None:
        if self._wire is not self._channel.wire or not self._channel.is_live:
            self._channel.leave_transaction()
            raise ChannelInvalidStateError("the transaction ended with its channel; the broker has undone it")

    async def commit(self, timeout: TimeoutType = None) -> Tx.CommitOk:
        """Make it all take effect (``tx.commit``).

        Raises:
            ChannelInvalidStateError: the channel was lost since :meth:`select`; what was done in between is undone.
            ChannelClosed, ConnectionClosed: it was lost meanwhile; the broker may have committed.
            TimeoutError: no answer in time; the commit goes on.
        """
        self._check_begun()
        try:
            result: Tx.CommitOk = await self.channel.call_after_publishes(make(Tx.Commit), timeout)
        finally:
            self._channel.leave_transaction()
        self.state = TransactionState.COMMITED
        return result

    async def rollback(self, timeout: TimeoutType = None) -> Tx.RollbackOk:
        """Undo it all (``tx.rollback``).

        Raises:
            ChannelInvalidStateError: the channel was lost since :meth:`select`, and all is undone.
            ChannelClosed, ConnectionClosed: it was lost meanwhile, and all is undone.
            TimeoutError: no answer in time.
        """
        self._check_begun()
        try:
            result: Tx.RollbackOk = await self.channel.wire.call(make(Tx.Rollback), self.channel.seconds(timeout))
        finally:
            self._channel.leave_transaction()
        self.state = TransactionState.ROLLED_BACK
        return result

    async def __aenter__(self) -> Transaction:
        await self.select()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if exc is None:
            await self.commit()
        else:
            with contextlib.suppress(ChannelInvalidStateError):  # then it is undone already
                await self.rollback()
