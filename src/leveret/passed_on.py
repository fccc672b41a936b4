"""Names that aio-pika's modules have from each other, which much code imports from any of them.

They are found here when they are asked for: nothing of this is loaded, or in the way, before.
"""

from __future__ import annotations

import importlib

from leveret.log import get_logger

_HOMES = {
    "leveret.abc": """
        AbstractChannel AbstractConnection AbstractExchange AbstractIncomingMessage AbstractMessage
        AbstractProcessContext AbstractQueue AbstractQueueIterator AbstractRobustChannel AbstractRobustConnection
        AbstractRobustExchange AbstractRobustQueue AbstractTransaction ConnectionType ConsumerTag DeliveredMessage
        ExceptionType ExchangeParamType NoneType PublishResultType ReturnCallback UnderlayChannel UnderlayConnection
        get_exchange_name
    """,
    "leveret.callbacks": "CallbackCollection",
    "leveret.compat": "aiormq",
    "leveret.compat.aiormq.abc": "FieldTable",
    "leveret.compat.aiormq.connection": "parse_bool parse_int parse_timeout",
    "leveret.exceptions": "MessageProcessError",
    "leveret.log": "get_logger",
    "leveret.message": "IncomingMessage Message",
    "leveret.patterns.base": "Base CallbackType",
    "leveret.tools": "create_task ensure_awaitable weak_method_callback",
    "leveret.types": "Arguments MILLISECONDS TimeoutType",
    "pamqp": "commands",
    "yarl": "URL",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}


def find(name: str, module: str) -> object:
    """What *name* stands for in *module*; None where it stands for nothing."""
    if name == "log":
        return get_logger(module)
    home = _HOME_OF.get(name)
    if home is None:
        return None
    found = getattr(importlib.import_module(home), name, None)
    return importlib.import_module(f"{home}.{name}") if found is None else found
