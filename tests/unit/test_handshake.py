from __future__ import annotations

import platform
import struct

import pytest
from pamqp.commands import Basic, Channel, Connection

from leveret._version import __version__
from leveret.exceptions import (
    AMQPConnectionError,
    AuthenticationError,
    ConnectionClosed,
    ConnectionInternalError,
    ConnectionNotAllowed,
    IncompatibleProtocolError,
    LoginRefused,
    ProbableAuthenticationError,
    ProtocolError,
)
from leveret.url import ConnectionParameters
from leveret.wire.handshake import PROTOCOL_HEADER, Handshake
from leveret.wire.methods import decode_method, make
from leveret.wire.tables import decode_table

CAPABILITIES = {"publisher_confirms": True, "basic.nack": True, "direct_reply_to": True}


def start(**arguments):
    arguments.setdefault("server_properties", {"product": "RabbitMQ", "capabilities": CAPABILITIES})
    arguments.setdefault("mechanisms", "AMQPLAIN ANONYMOUS PLAIN")
    return make(Connection.Start, **arguments)


def tune(channel_max=2047, frame_max=131072, heartbeat=60):
    return make(Connection.Tune, channel_max=channel_max, frame_max=frame_max, heartbeat=heartbeat)


def close(code, text):
    return make(Connection.Close, reply_code=code, reply_text=text, class_id=10, method_id=40)


def before_start(**parameters):
    return Handshake(ConnectionParameters(**parameters))


def before_tune(**parameters):
    handshake = before_start(**parameters)
    handshake.receive(start())
    return handshake


def before_open_ok(**parameters):
    handshake = before_tune(**parameters)
    handshake.receive(tune())
    return handshake


def methods(data):
    """The methods in *data*, as the server reads them."""
    read = []
    while data:
        kind, channel, size = struct.unpack_from(">BHI", data)
        frame, data = data[: size + 8], data[size + 8 :]
        assert (kind, channel, frame[-1]) == (1, 0, 0xCE)
        read.append(decode_method(frame[7:-1]))
    return read


STAGES = [before_start, before_tune, before_open_ok]


def start_ok(client_properties=None, **parameters):
    """The start-ok as the server reads it."""
    handshake = Handshake(ConnectionParameters(**parameters), client_properties)
    (answer,) = methods(handshake.receive(start(mechanisms="PLAIN AMQPLAIN EXTERNAL")))
    assert isinstance(answer, Connection.StartOk)
    answer.response = answer.response.encode("utf-8", "surrogateescape")
    return answer


# ------------------------------------------------------------------------------------------------- the table


def test_protocol_header_is_that_of_0_9_1():
    assert PROTOCOL_HEADER == b"AMQP\x00\x00\x09\x01"


def test_start_tune_open():
    handshake = before_start(virtualhost="vh/é")
    assert handshake.stage == "waiting for connection.start"

    assert [type(answer) for answer in methods(handshake.receive(start()))] == [Connection.StartOk]
    assert handshake.stage == "waiting for connection.tune"

    answers = methods(handshake.receive(tune()))
    assert [type(answer) for answer in answers] == [Connection.TuneOk, Connection.Open]
    assert answers[1].virtual_host == "vh/é"
    assert handshake.stage == (
        "waiting for connection.open-ok (vhost 'vh/é', frame_max 131072, channel_max 2047, heartbeat 60)"
    )
    assert not handshake.done

    assert handshake.receive(make(Connection.OpenOk)) == b""
    assert handshake.done
    assert handshake.stage == "done"


def test_what_the_server_says_of_itself():
    handshake = before_tune()
    assert handshake.server_properties["product"] == "RabbitMQ"
    assert handshake.server_capabilities == CAPABILITIES
    assert handshake.mechanisms == ("AMQPLAIN", "ANONYMOUS", "PLAIN")


@pytest.mark.parametrize(
    ("properties", "capabilities"),
    [
        ({}, {}),
        ({"capabilities": None}, {}),
        ({"capabilities": "x"}, {}),
        ({"capabilities": {"a": True, "b": 7}}, {"a": True}),
    ],
)
def test_strange_server_properties_are_no_capabilities(properties, capabilities):
    handshake = before_start()
    handshake.receive(start(server_properties=properties))
    assert handshake.server_capabilities == capabilities


@pytest.mark.parametrize(
    ("stage", "method", "words"),
    [
        (before_start, tune(), r"Connection\.Tune came while waiting for connection\.start"),
        (
            before_start,
            make(Connection.Secure, challenge=""),
            r"Connection\.Secure came while waiting for connection\.start",
        ),
        (before_start, make(Basic.Ack), r"Basic\.Ack came while waiting for connection\.start"),
        (before_tune, start(), r"Connection\.Start came while waiting for connection\.tune"),
        (before_tune, make(Connection.OpenOk), r"Connection\.OpenOk came while waiting for connection\.tune"),
        (before_open_ok, tune(), r"Connection\.Tune came while waiting for connection\.open-ok"),
        (before_open_ok, make(Connection.Secure, challenge=""), r"waiting for connection\.open-ok"),
        (before_open_ok, make(Channel.OpenOk), r"Channel\.OpenOk came while waiting for connection\.open-ok"),
    ],
)
def test_a_method_out_of_place_is_a_protocol_error(stage, method, words):
    handshake = stage()
    with pytest.raises(ProtocolError, match=words) as caught:
        handshake.receive(method)
    assert caught.value.reply_code == 503
    # So the transport must not take it for a peer that speaks something else.
    assert handshake.explain(caught.value.data) is None


def test_a_method_after_the_end_is_a_protocol_error():
    handshake = before_open_ok()
    handshake.receive(make(Connection.OpenOk))
    with pytest.raises(ProtocolError, match=r"Connection\.OpenOk came while done"):
        handshake.receive(make(Connection.OpenOk))


@pytest.mark.parametrize(("major", "minor"), [(0, 8), (1, 0), (8, 0), (0, 10)])
def test_another_version_is_incompatible(major, minor):
    with pytest.raises(IncompatibleProtocolError, match=rf"localhost:5672 speaks AMQP {major}-{minor}, not 0-9-1"):
        before_start().receive(start(version_major=major, version_minor=minor))


# ----------------------------------------------------------------------------------------- client properties


def test_client_properties():
    assert start_ok().client_properties == {
        "product": "leveret",
        "version": __version__,
        "platform": f"Python {platform.python_version()}",
        "information": "An asyncio client for AMQP 0-9-1",
        "capabilities": {
            "authentication_failure_close": True,
            "basic.nack": True,
            "connection.blocked": True,
            "consumer_cancel_notify": True,
            "exchange_exchange_bindings": True,
            "publisher_confirms": True,
        },
    }


def test_the_name_of_the_connection_is_a_client_property():
    assert start_ok(name="orders").client_properties["connection_name"] == "orders"


def test_the_users_client_properties_win():
    given = {"connection_name": "mine", "product": "shop", "team": {"name": "x"}}
    properties = start_ok(given, name="orders").client_properties
    assert properties["connection_name"] == "mine"
    assert properties["product"] == "shop"
    assert properties["team"] == {"name": "x"}
    assert properties["version"] == __version__


def test_the_users_capabilities_are_merged():
    given = {"capabilities": {"connection.blocked": False, "mine": True}}
    capabilities = start_ok(given).client_properties["capabilities"]
    assert capabilities["connection.blocked"] is False
    assert capabilities["mine"] is True
    assert capabilities["publisher_confirms"] is True
    # neither the user's dict nor our own was changed by it
    assert given == {"capabilities": {"connection.blocked": False, "mine": True}}
    assert start_ok().client_properties["capabilities"]["connection.blocked"] is True


# ------------------------------------------------------------------------------------------- SASL mechanisms


def test_plain():
    answer = start_ok(login="joé", password="pä:ss\u2028")
    assert answer.mechanism == "PLAIN"
    assert answer.response == "\0joé\0pä:ss\u2028".encode()


def test_amqplain():
    answer = start_ok(auth="amqplain", login="joé", password="p\0ä")
    assert answer.mechanism == "AMQPLAIN"
    table, _ = decode_table(len(answer.response).to_bytes(4, "big") + answer.response)
    assert table == {"LOGIN": "joé", "PASSWORD": "p\0ä"}


def test_external():
    answer = start_ok(auth="external")
    assert (answer.mechanism, answer.response) == ("EXTERNAL", b"")


@pytest.mark.parametrize(
    ("auth", "offered"), [("external", "PLAIN AMQPLAIN"), ("plain", "EXTERNAL"), ("plain", "XPLAIN"), ("plain", "")]
)
def test_a_mechanism_that_is_not_offered(auth, offered):
    with pytest.raises(AuthenticationError) as caught:
        before_start(auth=auth).receive(start(mechanisms=offered))
    assert str(caught.value) == (
        f"localhost:5672 does not offer the SASL mechanism {auth.upper()}: it offers "
        f"{', '.join(offered.split()) or 'none'}; leveret has PLAIN, AMQPLAIN, EXTERNAL (auth=…)"
    )


def test_anonymous_is_never_chosen():
    with pytest.raises(AuthenticationError):
        before_start().receive(start(mechanisms="ANONYMOUS"))


def test_a_challenge_is_an_authentication_error():
    with pytest.raises(AuthenticationError, match=r"challenge \(connection\.secure\), which PLAIN does not have"):
        before_tune().receive(make(Connection.Secure, challenge="?"))


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"virtualhost": "v" * 256}, r"Connection\.Open virtual_host is 256 bytes"),
        ({"heartbeat": 65536}, r"Connection\.TuneOk heartbeat must be from 0 to 65535"),
        ({"heartbeat": -1}, r"Connection\.TuneOk heartbeat must be from 0 to 65535"),
        ({"channel_max": 65536}, r"Connection\.TuneOk channel_max must be from 0 to 65535"),
        ({"password": "hunter2\0"}, "must not contain NUL"),
        ({"login": "\0"}, "must not contain NUL"),
        ({"password": "hunter2\ud800"}, "cannot be encoded as UTF-8"),
        ({"password": "hunter2\ud800", "auth": "amqplain"}, "cannot be encoded as UTF-8"),
    ],
)
def test_what_amqp_cannot_carry_is_told_before_there_is_a_socket(parameters, words):
    with pytest.raises(ValueError, match=words) as caught:
        Handshake(ConnectionParameters(**parameters))
    assert "hunter2" not in str(caught.value)
    assert caught.value.__context__ is None


def test_client_properties_that_amqp_cannot_carry():
    with pytest.raises(TypeError, match=r"Connection\.StartOk client_properties 'x'"):
        Handshake(ConnectionParameters(), {"x": object()})


# ----------------------------------------------------------------------------------------------- negotiation


def tuned(server, **parameters):
    """What is agreed, on both sides."""
    handshake = before_tune(**parameters)
    tune_ok, _ = methods(handshake.receive(server))
    agreed = (tune_ok.channel_max, tune_ok.frame_max, tune_ok.heartbeat)
    assert agreed == (handshake.channel_max, handshake.frame_max, handshake.heartbeat)
    return handshake


@pytest.mark.parametrize(
    ("ours", "servers", "agreed"),
    [
        (131072, 131072, 131072),
        (131072, 65536, 65536),
        (8192, 131072, 8192),
        (131072, 8192, 8192),
        (131072, 0, 131072),  # 0: the server has no limit
        (131072, 0xFFFFFFFF, 131072),
        (0xFFFFFFFF, 0, 0xFFFFFFFF),
    ],
)
def test_frame_max(ours, servers, agreed):
    assert tuned(tune(frame_max=servers), frame_max=ours).frame_max == agreed


def test_a_frame_max_that_is_too_small():
    handshake = before_tune()
    with pytest.raises(AMQPConnectionError) as caught:
        handshake.receive(tune(frame_max=4096))
    assert str(caught.value) == (
        "localhost:5672 allows frames of 4096 bytes (frame_max); leveret was told to use 131072, "
        "and needs at least 8192"
    )


@pytest.mark.parametrize(
    ("ours", "servers", "agreed"),
    [
        (2047, 2047, 2047),
        (2047, 100, 100),
        (10, 2047, 10),
        (2047, 0, 2047),  # 0: no limit
        (0, 2047, 2047),
        (0, 0, 65535),
    ],
)
def test_channel_max(ours, servers, agreed):
    assert tuned(tune(channel_max=servers), channel_max=ours).channel_max == agreed


@pytest.mark.parametrize(
    ("ours", "servers", "agreed"),
    [
        (None, 60, 60),
        (None, 10, 10),
        (None, 580, 60),
        (None, 0, 60),
        (5, 60, 5),
        (300, 60, 300),
        (5, 0, 5),
        (0, 60, 0),
        (0, 0, 0),
    ],
)
def test_heartbeat(ours, servers, agreed):
    assert tuned(tune(heartbeat=servers), heartbeat=ours).heartbeat == agreed


# -------------------------------------------------------------------------------------- the broker closes


@pytest.mark.parametrize("stage", STAGES)
def test_a_refused_login_names_user_vhost_and_mechanism(stage):
    handshake = stage(login="joe", password="hunter2", virtualhost="shop", auth="amqplain")
    with pytest.raises(LoginRefused) as caught:
        handshake.receive(close(403, "ACCESS_REFUSED - Login was refused."))
    assert str(caught.value) == (
        "the broker refused the login of user 'joe' by AMQPLAIN (vhost 'shop'): ACCESS_REFUSED - Login was refused."
    )
    assert isinstance(caught.value, AuthenticationError)
    assert isinstance(caught.value, ProbableAuthenticationError)
    assert isinstance(caught.value.__cause__, ConnectionClosed)
    assert caught.value.__cause__.reply_code == 403


def test_guest_is_told_of_localhost():
    with pytest.raises(LoginRefused, match="guest may log in from localhost only"):
        before_tune(login="guest").receive(close(403, "ACCESS_REFUSED"))


def test_a_missing_vhost_is_not_allowed():
    with pytest.raises(ConnectionNotAllowed) as caught:
        before_open_ok(virtualhost="nope").receive(close(530, "NOT_ALLOWED - vhost nope not found"))
    assert str(caught.value) == "NOT_ALLOWED - vhost nope not found"
    assert (caught.value.reply_code, caught.value.class_id, caught.value.method_id) == (530, 10, 40)
    assert caught.value.by_broker


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("code", "kind"), [(320, ConnectionClosed), (541, ConnectionInternalError)])
def test_another_close_is_the_error_of_its_code(stage, code, kind):
    with pytest.raises(kind) as caught:
        stage().receive(close(code, "why"))
    assert type(caught.value) is kind
    assert (caught.value.reply_code, caught.value.reply_text) == (code, "why")


# ------------------------------------------------------------------------------------------------------ lost


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("error", [None, ConnectionResetError(104, "Connection reset by peer")])
def test_a_loss_has_what_the_socket_said_as_its_cause(stage, error):
    lost = stage(password="hunter2").lost(error)
    assert isinstance(lost, AMQPConnectionError)
    assert lost.__cause__ is error
    assert "hunter2" not in str(lost)


def test_lost_before_start():
    lost = before_start(host="h", port=80).lost(None)
    assert type(lost) is AMQPConnectionError
    assert str(lost) == "h:80 closed the connection before it said a word: is that an AMQP port?"


def test_lost_before_start_on_the_port_of_tls():
    assert "use amqps://" in str(before_start(port=5671).lost(None))
    assert "use amqps://" not in str(before_start(port=5671, ssl=True).lost(None))


def test_lost_before_start_after_tls_may_be_the_clients_certificate():
    """What the socket says of it may be a TLS alert, a reset or nothing: the alert races with the close."""
    assert "TLS 1.3" in str(before_start(port=5671, ssl=True).lost(None))
    assert "TLS" not in str(before_start(port=5672).lost(None))


def test_lost_during_the_login():
    lost = before_tune(login="joe", virtualhost="shop").lost(None)
    assert isinstance(lost, ProbableAuthenticationError)
    assert str(lost) == (
        "localhost:5672 closed the connection during the login of user 'joe' by PLAIN (vhost 'shop'), "
        "which RabbitMQ does when it refuses one."
    )
    assert "guest may log in from localhost only" in str(before_tune().lost(None))


def test_lost_while_opening_names_what_we_asked_for():
    lost = before_open_ok(virtualhost="shop", frame_max=8192, channel_max=7, heartbeat=5).lost(None)
    assert type(lost) is AMQPConnectionError
    assert "vhost 'shop', frame_max 8192, channel_max 7, heartbeat 5" in str(lost)


# --------------------------------------------------------------------------------------------------- explain


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"AMQP\x00\x01\x00\x00", "speaks AMQP 1.0.0, not 0-9-1"),
        (b"AMQP\x03\x01\x00\x00", "speaks AMQP 1.0.0, not 0-9-1"),
        (b"AMQP\x01\x01\x00\x0a", "speaks AMQP 1.0.10, not 0-9-1"),
        (b"\x15\x03\x03\x00\x02\x02\x28", "speaks TLS: use amqps:// (usually port 5671)"),
        (b"\x16\x03\x01\x02\x00\x01\x00", "speaks TLS: use amqps:// (usually port 5671)"),
        (
            b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n",
            "answered 'HTTP/1.1 400 Bad Request': is that the management port? AMQP is usually on 5672",
        ),
        (b"HTTP/1\xff", "answered 'HTTP/1\\\\xff': is that the management port? AMQP is usually on 5672"),
        (b"SSH-2.0-OpenSSH_9\r\n", r"does not speak AMQP: its first bytes are b'SSH-2.0-OpenSSH_9\r\n'"),
        (b"\xff" * 99, r"its first bytes are b'\xff\xff"),
    ],
)
def test_what_is_no_amqp_is_explained(data, words):
    explained = before_start(host="h", port=15672).explain(data)
    assert isinstance(explained, IncompatibleProtocolError)
    assert str(explained).startswith("h:15672 ")
    assert words in str(explained)
    assert str(explained).isprintable()


def test_a_long_answer_is_cut():
    assert len(str(before_start().explain(b"\xff" * 9999))) < 250


@pytest.mark.parametrize("data", [b"", b"\x01\x00\x00\xff\xff\xff\xff", b"\x00\x0a\x00\x0a\x00\x09\xff\xff"])
def test_a_fault_in_amqp_is_not_explained(data):
    assert before_start().explain(data) is None


@pytest.mark.parametrize("stage", [before_tune, before_open_ok])
def test_a_peer_that_spoke_amqp_is_not_explained(stage):
    assert stage().explain(b"HTTP/1.1 400 Bad Request") is None


# --------------------------------------------------------------------------------------------------- secrets


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("auth", ["plain", "amqplain"])
def test_the_password_is_in_no_repr(stage, auth):
    handshake = stage(password="hunter2", auth=auth)
    assert "hunter2" not in repr(handshake)
    assert "hunter2" not in repr(vars(handshake))
    assert "hunter2" not in repr(handshake.receive(start()) if stage is before_start else "")


def test_repr_says_with_whom_and_where():
    assert repr(before_tune()) == "<Handshake with localhost:5672: waiting for connection.tune>"
