"""URLs are read as aio-pika and RabbitMQ read them, mistakes are told, and passwords never get out."""

import math
import pickle
import traceback
import warnings

import pytest
from yarl import URL

from leveret.url import ConnectionParameters, make_url, parse_url, redact

SECRET = "s3cr3t"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("amqp://", {}),
        ("amqp:///", {}),
        ("amqp://host", {"host": "host"}),
        ("amqp://host:1234/", {"host": "host", "port": 1234}),
        ("amqps://host/", {"host": "host", "port": 5671, "ssl": True}),
        ("AMQPS://HOST:5672", {"host": "host", "port": 5672, "ssl": True}),
        ("amqp://[::1]:1234/v", {"host": "::1", "port": 1234, "virtualhost": "v"}),
        ("amqp://[::1]:1234/v@h", {"host": "::1", "port": 1234, "virtualhost": "v@h"}),
        ("amqp://user:word@host", {"host": "host", "login": "user", "password": "word"}),
        ("amqp://user@host", {"host": "host", "login": "user"}),
        ("amqp://user:@host", {"host": "host", "login": "user"}),
        ("amqp://user:word@/v", {"login": "user", "password": "word", "virtualhost": "v"}),
        ("amqp://u%40:p%23%3F%2F%25@host", {"host": "host", "login": "u@", "password": "p#?/%"}),
        ("amqp://u:p@ss@host", {"host": "host", "login": "u", "password": "p@ss"}),
    ],
)
def test_parts_of_the_url(url, expected):
    assert parse_url(url) == parse_url(URL(url)) == ConnectionParameters(**expected)


@pytest.mark.parametrize(
    ("path", "virtualhost"),
    [
        ("", "/"),
        ("/", "/"),
        ("//", "/"),
        ("/%2F", "/"),
        ("/test", "test"),
        ("//test", "/test"),
        ("/%2Ftest", "/test"),
        ("/a/b", "a/b"),
        ("/a%2Fb", "a/b"),
        ("/%252F", "%2F"),
        ("/a%20b+c", "a b+c"),
        ("/%C3%A9", "é"),
        ("/v@h", "v@h"),
        ("/a%3Fb%23", "a?b#"),
    ],
)
def test_the_vhost_is_the_path_without_its_first_slash_decoded_once(path, virtualhost):
    assert parse_url(f"amqp://host{path}").virtualhost == virtualhost


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("heartbeat=0", {"heartbeat": 0}),
        ("heartbeat=65535", {"heartbeat": 65535}),
        ("timeout=2.5", {"connect_timeout": 2.5}),
        ("connect_timeout=2.5", {"connect_timeout": 2.5}),
        ("connection_timeout=2500", {"connect_timeout": 2.5}),
        ("operation_timeout=5", {"operation_timeout": 5}),
        ("operation_timeout=inf", {"operation_timeout": math.inf}),
        ("name=my%20app", {"name": "my app"}),
        ("connection_name=app", {"name": "app"}),
        ("auth=plain", {}),
        ("auth=amqplain", {"auth": "amqplain"}),
        ("auth_mechanism=EXTERNAL", {"auth": "external"}),
        ("cafile=/a&capath=/b&cadata=c&certfile=/d&keyfile=/e",
         {"cafile": "/a", "capath": "/b", "cadata": "c", "certfile": "/d", "keyfile": "/e"}),
        ("cacertfile=/a", {"cafile": "/a"}),
        ("no_verify_ssl=0", {}),
        ("no_verify_ssl=false", {}),
        ("verify=verify_peer", {}),
        ("server_name_indication=name", {"server_hostname": "name"}),
        ("server_hostname=name", {"server_hostname": "name"}),
        ("channel_max=0", {"channel_max": 0}),
        ("channel_max=10", {"channel_max": 10}),
        ("frame_max=8192", {"frame_max": 8192}),
        ("interleave=1", {"interleave": 1}),
        ("happy_eyeballs_delay=0.25", {"happy_eyeballs_delay": 0.25}),
        ("happy_eyeballs_delay=0", {"happy_eyeballs_delay": 0}),
        ("reconnect_interval=5&fail_fast=0", {"reconnect_interval": 5, "fail_fast": False}),
        ("fail_fast=on", {"fail_fast": True}),
        ("heartbeat=1&heartbeat=2", {"heartbeat": 1}),
    ],
)  # fmt: skip
def test_query_parameters(query, expected):
    assert parse_url(f"amqp://localhost/?{query}") == ConnectionParameters(**expected)


@pytest.mark.parametrize("query", ["no_verify_ssl=1", "no_verify_ssl=yes", "verify=verify_none", "verify=0"])
def test_switching_off_verification_warns(query):
    with pytest.warns(UserWarning, match="verification"):
        assert not parse_url(f"amqps://host/?{query}").verify


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("heartbeat=abc", "heartbeat=abc.* 0 to 65535"),
        ("heartbeat=-1", "heartbeat=-1"),
        ("heartbeat=65536", "heartbeat=65536"),
        ("heartbeat=", "heartbeat="),
        ("heartbeat=1.5", "heartbeat=1.5"),
        ("heartbeat=٣", "heartbeat=.* integer"),
        (f"heartbeat={'9' * 5000}", "heartbeat="),
        ("timeout=0", "timeout=0.*seconds"),
        ("timeout=nan", "timeout=nan"),
        ("connect_timeout=soon", "connect_timeout=soon"),
        ("connection_timeout=-1", "connection_timeout=-1.*milliseconds"),
        ("operation_timeout=none", "operation_timeout=none.*inf"),
        ("auth=anonymous", "auth=anonymous.*plain or amqplain or external"),
        ("verify=maybe", "verify=maybe.*verify_peer or verify_none"),
        ("server_name_indication=disable", "server_name_indication=disable"),
        ("channel_max=65536", "channel_max=65536"),
        ("frame_max=8191", "frame_max=8191.* 8192"),
        ("interleave=x", "interleave=x"),
        ("happy_eyeballs_delay=x", "happy_eyeballs_delay=x"),
        ("cafile=", "cafile=.*empty"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_key_value_and_what_is_expected(query, expected):
    with pytest.raises(ValueError, match=expected) as caught:
        parse_url(f"amqp://user:{SECRET}@host/?{query}")
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("heartbeet", "heartbeat"),
        ("conect_timeout", "connect_timeout"),
        ("verify_ssl", "no_verify_ssl"),
        ("zzz", "auth"),
    ],
)
def test_an_unknown_key_warns_with_the_nearest_known_name(key, nearest):
    with pytest.warns(UserWarning, match=f"'{key}'.*{nearest}") as caught:
        parse_url(f"amqp://user:{SECRET}@host/?{key}=value")
    assert caught[0].filename == __file__
    assert "value" not in str(caught[0].message)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://host", "'http'.*amqp and amqps"),
        ("host", "''.*amqp://"),
        ("localhost:5672", "'localhost'.*amqp://"),
        ("", "amqp://"),
        ("amqp:host", "two slashes"),
        ("amqp://host:0", "port 0"),
        ("amqp://host:70000", "port"),
        ("amqp://host:5672/v@h", "percent-encode"),  # or was 5672/v the password?
        ("amqp://h1:5672,h2:5673/v", "connect_robust"),
        ("amqp://user:word@h1:5672,h2:5673/v", "connect_robust"),
    ],
)
def test_a_wrong_url_is_told_with_the_fix(url, expected):
    with pytest.raises(ValueError, match=expected):
        parse_url(url)


@pytest.mark.parametrize("char", ["#", "?", "/"])
@pytest.mark.parametrize("password", [f"{SECRET}{{}}{SECRET}", "123{}" + SECRET, "{}" + SECRET, f"[{{}}{SECRET}"])
@pytest.mark.parametrize("read", [parse_url, make_url])
def test_a_special_character_in_the_password_is_told_without_the_password(char, password, read):
    with pytest.raises(ValueError, match="percent-encode") as caught:
        read(f"amqp://user:{password.format(char)}@host/vhost")
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert caught.value.__cause__ is caught.value.__context__ is None


def test_the_rest_of_a_password_is_not_printed_as_an_unknown_parameter():
    with pytest.warns(UserWarning, match="percent-encode") as caught:
        parse_url(f"amqp://user:pass@wo?{SECRET}@host")
    assert SECRET not in str(caught[0].message)


def test_parameters_are_immutable_and_hide_secrets():
    parameters = parse_url(f"amqp://user:{SECRET}@host/?cadata={SECRET}")
    assert SECRET not in repr(parameters)
    assert SECRET not in f"{parameters} {[parameters]}"
    assert "login='user'" in repr(parameters)
    assert "password=******" in repr(parameters)
    assert "cadata=******" in repr(parameters)
    assert not hasattr(parameters, "__dict__")
    with pytest.raises(AttributeError):
        parameters.host = "other"
    assert pickle.loads(pickle.dumps(parameters)) == parameters


def test_a_frame_max_that_no_broker_takes_is_refused():
    with pytest.raises(ValueError, match="frame_max=4096"):
        parse_url("amqp://localhost/?frame_max=4096")


@pytest.mark.parametrize(
    ("arguments", "url"),
    [
        ({}, "amqp://guest:guest@localhost:5672//"),
        ({"virtualhost": "foo"}, "amqp://guest:guest@localhost:5672/foo"),
        ({"virtualhost": "/foo"}, "amqp://guest:guest@localhost:5672//foo"),
        ({"ssl": True}, "amqps://guest:guest@localhost:5671//"),
        ({"ssl": True, "port": 1}, "amqps://guest:guest@localhost:1//"),
        ({"login": "a", "password": "b", "host": "c", "port": 1}, "amqp://a:b@c:1//"),
        ({"heartbeat": 5, "name": None, "fail_fast": True}, "amqp://guest:guest@localhost:5672//?heartbeat=5&fail_fast=1"),
        ({"ssl_options": {"cafile": "x", "no_verify_ssl": False}},
         "amqp://guest:guest@localhost:5672//?cafile=x&no_verify_ssl=0"),
        ({"client_properties": {"a": 1}}, "amqp://guest:guest@localhost:5672//"),
        ({"url": "amqp://h/v?heartbeat=1"}, "amqp://h/v?heartbeat=1"),
        ({"url": "amqp://h/v?heartbeat=1&name=n", "heartbeat": 2, "name": None}, "amqp://h/v?heartbeat=2&name=n"),
        ({"url": URL("amqp://h/v"), "ssl_options": {"cafile": "x"}}, "amqp://h/v?cafile=x"),
    ],
)  # fmt: skip
def test_make_url(arguments, url):
    assert str(make_url(**arguments)) == url


def test_parts_beside_a_url_are_ignored_with_a_warning_that_shows_no_value():
    with pytest.warns(UserWarning, match="login, password beside a URL") as caught:
        assert str(make_url("amqp://h/v", login="bob", password="s3cret")) == "amqp://h/v"
    assert "s3cret" not in str(caught[0].message)
    assert caught[0].filename == __file__


def test_make_url_leaves_its_arguments_alone():
    ssl_options, arguments = {"no_verify_ssl": True, "cafile": None}, {"fail_fast": True}
    make_url("amqp://h", ssl_options=ssl_options, **arguments)
    assert ssl_options == {"no_verify_ssl": True, "cafile": None}


@pytest.mark.parametrize("text", ["plain", "a b", "p#?/@:[]%2F+&=", "%", "é", "/", "/a", "a/b", "%2F"])
def test_what_make_url_takes_parse_url_gives_back(text):
    parameters = parse_url(make_url(login=text, password=text, virtualhost=text, name=text, host="h"))
    assert (parameters.login, parameters.password, parameters.virtualhost, parameters.name) == (text,) * 4


def test_keyword_values_go_through_the_url():
    url = make_url(operation_timeout=math.inf, happy_eyeballs_delay=0.25, heartbeat=0, verify=True)
    assert parse_url(url) == ConnectionParameters(operation_timeout=math.inf, happy_eyeballs_delay=0.25, heartbeat=0)


def test_redact_hides_the_password_and_secrets_in_the_query():
    url = URL(f"amqps://user:{SECRET}@host:1/v?cadata={SECRET}&password={SECRET}&heartbeat=5&api_token={SECRET}")
    assert redact(url) == ("amqps://user:******@host:1/v?cadata=******&password=******&heartbeat=5&api_token=******")
    assert redact(URL("amqp://user@host/%2F")) == "amqp://user@host/%2F"
    assert redact(URL("amqp:///v")) == "amqp:/v"


def test_the_usual_url_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parse_url("amqp://guest:guest@localhost/?heartbeat=30&reconnect_interval=1&fail_fast=0&name=n")


@pytest.mark.parametrize("separator", "#/?")
def test_a_separator_in_the_user_name_is_told(separator):
    with pytest.raises(ValueError, match="percent-encode"):
        parse_url(f"amqp://gu{separator}est:secret@localhost:5672/")
