"""AMQP transactions (class tx): publishes and acks that take effect at commit, or not at all."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from pamqp.commands import Tx

from leveret.types import TimeoutType, TransactionState
from leveret.wire.methods import make

if TYPE_CHECKING:
    from leveret.channel import Channel


class Transaction:
    """A transaction of *channel*, which must have been opened with ``publisher_confirms=False``.

    ``async with channel.transaction():`` commits at the end, or rolls back when the block raises. What a
    rollback undoes are publishes and acks; deliveries stay with the consumer, and a message that was acked stays
    ``processed`` although the broker waits for its ack again: it is redelivered when the channel is closed.

    A commit that times out or is cancelled goes on at the broker; what the channel sends meanwhile waits for its end.

    https://www.rabbitmq.com/docs/semantics#tx
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
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
        self.state = TransactionState.STARTED
        return result

    async def commit(self, timeout: TimeoutType = None) -> Tx.CommitOk:
        """Make it all take effect (``tx.commit``)."""
        result: Tx.CommitOk = await self.channel.call_after_publishes(make(Tx.Commit), timeout)
        self.state = TransactionState.COMMITED
        return result

    async def rollback(self, timeout: TimeoutType = None) -> Tx.RollbackOk:
        """Undo it all (``tx.rollback``)."""
        result: Tx.RollbackOk = await self.channel.call(make(Tx.Rollback), timeout)
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
        elif not self._channel.is_closed:
            await self.rollback()
