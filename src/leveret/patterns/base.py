"""What RPC and Master have in common: serialising, and proxies whose attributes are names."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

from leveret.exceptions import MessageDecodeError
from leveret.message import IncomingMessage
from leveret.patterns.serializers import JSONSerializer, Serializer, is_content_type

T = TypeVar("T")

CallbackType = Callable[..., Awaitable[T]]

AnyCallback = Callable[..., Any]
"""A coroutine function, or a plain one."""


class Method(Generic[T]):
    """A name that can be called. ``method.more`` is a longer name, with a dot between.

    Attributes:
        name: the name.
        func: what is called with it, and with the keyword arguments as ``kwargs``.
    """

    __slots__ = "func", "name"

    def __init__(self, name: str, func: Callable[..., T]) -> None:
        self.name = name
        self.func = func

    def __getattr__(self, item: str) -> Method[T]:
        return Method(f"{self.name}.{item}", self.func)

    def __call__(self, **kwargs: Any) -> T:
        return self.func(self.name, kwargs=kwargs)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"


class Proxy(Generic[T]):
    """Makes a :class:`Method` of each attribute: ``proxy.a.b(x=1)`` calls *func* with ``"a.b"`` and ``{"x": 1}``."""

    __slots__ = ("func",)

    def __init__(self, func: Callable[..., T]) -> None:
        self.func = func

    def __getattr__(self, item: str) -> Method[T]:
        return Method(item, self.func)


class Base:
    """Serialising, as a subclass may change it.

    There are three ways: ``serializer=`` where an instance is made; the class attribute ``SERIALIZER``, which is a
    :class:`~leveret.patterns.serializers.Serializer` or anything with ``dumps`` and ``loads``, such as a module; or
    methods :meth:`serialize` and :meth:`deserialize`. The last two want a ``CONTENT_TYPE`` beside them. Without one,
    whatever comes is deserialised.
    """

    SERIALIZER: Any = JSONSerializer()
    CONTENT_TYPE: str = JSONSerializer.content_type

    _reads_anything = False
    _serializer: Serializer | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        changed = vars(cls)
        if "CONTENT_TYPE" in changed:
            cls._reads_anything = False
        elif "SERIALIZER" in changed and hasattr(cls.SERIALIZER, "content_type"):
            cls.CONTENT_TYPE = cls.SERIALIZER.content_type
            cls._reads_anything = False
        elif "deserialize" in changed or "SERIALIZER" in changed:
            cls._reads_anything = True

    def use(self, serializer: Serializer | None) -> None:
        """Have this instance use *serializer*; None for that of the class."""
        if serializer is not None:
            self._serializer = serializer
            self.CONTENT_TYPE = serializer.content_type  # pyright: ignore[reportConstantRedefinition]
            self._reads_anything = False

    def serialize(self, data: Any) -> bytes:
        """Bytes for *data*; a subclass may have its own.

        Raises:
            TypeError, ValueError: *data* cannot be serialised; the serializer may raise others.
        """
        serializer: Any = self.SERIALIZER if self._serializer is None else self._serializer
        if hasattr(serializer, "serialize"):
            result: bytes = serializer.serialize(data)
            return result
        dumped: str | bytes = serializer.dumps(data)
        return dumped.encode() if isinstance(dumped, str) else dumped

    def deserialize(self, data: bytes) -> Any:
        """What *data* stands for; a subclass may have its own.

        Raises:
            MessageDecodeError: it cannot be read; serializers other than leveret's may raise others.
        """
        serializer: Any = self.SERIALIZER if self._serializer is None else self._serializer
        return serializer.deserialize(data) if hasattr(serializer, "deserialize") else serializer.loads(data)

    def check_content_type(self, message: IncomingMessage) -> None:
        """Raise MessageDecodeError for a *message* that another serializer made."""
        content_type = message.content_type
        if content_type != self.CONTENT_TYPE and not (
            self._reads_anything or is_content_type(content_type, self.CONTENT_TYPE)
        ):
            raise MessageDecodeError(
                f"the message is {content_type!r}, and {type(self).__name__} reads {self.CONTENT_TYPE!r}"
            )


def as_coroutine_function(func: AnyCallback) -> CallbackType[Any]:
    """*func*, or a coroutine function that calls it, and awaits what it returns if that can be awaited.

    Raises:
        TypeError: it cannot be called.
    """
    if not callable(func):
        raise TypeError(f"a function is needed, not {func!r}")
    if inspect.iscoroutinefunction(func):
        return func

    @functools.wraps(func, updated=())
    async def call(*args: Any, **kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        return await result if inspect.isawaitable(result) else result

    return call
