"""TLS is verified unless switched off by name, and mistakes name the file."""

import base64
import logging
import ssl

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from leveret.url import ConnectionParameters
from leveret.wire.tls import create_context


@pytest.fixture(scope="module")
def ca():
    return trustme.CA()


@pytest.fixture(scope="module")
def ca_pem(ca):
    return ca.cert_pem.bytes().decode()


@pytest.fixture
def files(ca, tmp_path):
    certificate = ca.issue_cert("client@example.org")
    paths = {name: tmp_path / f"{name}.pem" for name in ("cafile", "certfile", "keyfile", "junk")}
    ca.cert_pem.write_to_path(paths["cafile"])
    certificate.cert_chain_pems[0].write_to_path(paths["certfile"])
    certificate.private_key_pem.write_to_path(paths["keyfile"])
    paths["junk"].write_text("junk")
    return {name: str(path) for name, path in paths.items()}


def context(**attributes):
    return create_context(ConnectionParameters(ssl=True, **attributes))


def test_by_default_chain_and_host_name_are_verified_and_tls_is_at_least_1_2():
    made = context()
    assert made.verify_mode == ssl.CERT_REQUIRED
    assert made.check_hostname
    assert made.minimum_version >= ssl.TLSVersion.TLSv1_2


def test_verification_is_switched_off_by_name_only_and_with_a_warning(caplog):
    made = context(verify=False)
    assert made.verify_mode == ssl.CERT_NONE
    assert not made.check_hostname
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_ca_file_replaces_the_systems_certificates(files):
    assert len(context(cafile=files["cafile"]).get_ca_certs()) == 1


def test_a_ca_directory_is_taken(tmp_path):
    assert context(capath=str(tmp_path)).get_ca_certs() == []


@pytest.mark.parametrize("encode", ["pem", "base64 of PEM", "base64 of DER", "with spaces for plus"])
def test_cadata_is_pem_or_base64(ca_pem, encode):
    cadata = {
        "pem": ca_pem,
        "base64 of PEM": base64.b64encode(ca_pem.encode()).decode(),
        "base64 of DER": base64.b64encode(ssl.PEM_cert_to_DER_cert(ca_pem)).decode(),
        "with spaces for plus": base64.b64encode(ssl.PEM_cert_to_DER_cert(ca_pem)).decode().replace("+", " "),
    }[encode]
    assert len(context(cadata=cadata).get_ca_certs()) == 1


def test_a_client_certificate_is_loaded(files):
    context(certfile=files["certfile"], keyfile=files["keyfile"])


@pytest.mark.parametrize("name", ["cafile", "capath", "certfile", "keyfile"])
def test_a_missing_file_is_named(name, files):
    attributes = {"certfile": files["certfile"], name: "/no/such.pem"}
    with pytest.raises(FileNotFoundError, match=f"{name} .*'/no/such.pem'"):
        context(**attributes)


@pytest.mark.parametrize("name", ["cafile", "certfile", "keyfile"])
def test_a_file_with_the_wrong_content_is_named(name, files):
    attributes = {"certfile": files["certfile"], "keyfile": files["keyfile"], name: files["junk"]}
    with pytest.raises(ValueError, match=r"junk\.pem"):
        context(**attributes)


@pytest.mark.parametrize("cadata", ["!", "abc", base64.b64encode(b"junk").decode()])
def test_wrong_cadata_is_told(cadata):
    with pytest.raises(ValueError, match="cadata"):
        context(cadata=cadata)


def test_a_key_without_certificate_is_told(files):
    with pytest.raises(ValueError, match="certfile"):
        context(keyfile=files["keyfile"])


def test_an_encrypted_key_does_not_ask_on_the_terminal(files, tmp_path):
    with open(files["keyfile"], "rb") as file:
        key = serialization.load_pem_private_key(file.read(), None)
    encrypted = tmp_path / "encrypted.pem"
    encrypted.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"x"),
        )
    )
    with pytest.raises(ValueError, match="encrypted"):
        context(certfile=files["certfile"], keyfile=str(encrypted))
