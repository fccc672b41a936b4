"""aiormq's names for types."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

from pamqp import commands as spec
from pamqp.common import FieldArray, FieldTable, FieldValue
from pamqp.header import ContentHeader

from leveret.delivered import DeliveredMessage
from leveret.types import TimeoutType
from leveret.underlay import UnderlayChannel as AbstractChannel
from leveret.underlay import UnderlayConnection as AbstractConnection

ArgumentsType: TypeAlias = FieldTable
ConfirmationFrameType: TypeAlias = spec.Basic.Ack | spec.Basic.Nack | spec.Basic.Reject
GetResultType: TypeAlias = spec.Basic.GetEmpty | spec.Basic.GetOk
ExceptionType: TypeAlias = BaseException | type[BaseException]
CallbackCoro: TypeAlias = Coroutine[Any, Any, Any]
ConsumerCallback: TypeAlias = Callable[[DeliveredMessage], CallbackCoro]
ReturnCallback: TypeAlias = Callable[[DeliveredMessage], Any]

__all__ = [
    "AbstractChannel",
    "AbstractConnection",
    "ArgumentsType",
    "CallbackCoro",
    "ConfirmationFrameType",
    "ConsumerCallback",
    "ContentHeader",
    "DeliveredMessage",
    "ExceptionType",
    "FieldArray",
    "FieldTable",
    "FieldValue",
    "GetResultType",
    "ReturnCallback",
    "TimeoutType",
    "spec",
]
