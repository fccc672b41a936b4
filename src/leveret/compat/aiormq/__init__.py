"""aiormq's names, for those who use aio-pika and import some of them; the errors are leveret's own classes.

There is no ``connect()``: use :func:`leveret.connect`.
"""

from pamqp import commands as spec

from leveret.compat.aiormq import abc, connection, exceptions
from leveret.compat.aiormq.exceptions import *  # noqa: F403 - all of them, as aiormq has them here too
from leveret.underlay import UnderlayChannel as Channel
from leveret.underlay import UnderlayConnection as Connection

__all__ = ["Channel", "Connection", "abc", "connection", "exceptions", "spec"]
__all__ += exceptions.__all__
