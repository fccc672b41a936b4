"""A small AMQP 0-9-1 broker for tests and for trying out: see :class:`Broker`.

It is for programs that use RabbitMQ and for their tests: real frames on a loopback socket, nothing on disk, no cluster.
"""

from leveret.testing.access import Permissions
from leveret.testing.broker import Broker
from leveret.testing.views import BindingView, ConnectionView, ConsumerView, ExchangeView, MessageView, QueueView

__all__ = [
    "BindingView",
    "Broker",
    "ConnectionView",
    "ConsumerView",
    "ExchangeView",
    "MessageView",
    "Permissions",
    "QueueView",
]
