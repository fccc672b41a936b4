"""Patterns on top of the API: remote procedure calls, and tasks for workers."""

from leveret.patterns.master import (
    CompressedJsonMaster,
    JsonMaster,
    Master,
    NackMessage,
    PickleMaster,
    RejectMessage,
    Worker,
)
from leveret.patterns.rpc import RPC, JsonRPC, PickleRPC

__all__ = [
    "RPC",
    "CompressedJsonMaster",
    "JsonMaster",
    "JsonRPC",
    "Master",
    "NackMessage",
    "PickleMaster",
    "PickleRPC",
    "RejectMessage",
    "Worker",
]
