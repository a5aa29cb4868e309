"""What lies in the state directory: the identity, the peers, the lock."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from vmferry.errors import Refused
from vmferry.host.identity import load_or_create, normalised
from vmferry.host.peers import Peer, PeerBook
from vmferry.host.state import SOCKET_PATH_BYTES_MAX, occupy, socket_path, state_dir
from vmferry.host.statefile import write_atomically


def test_the_identity_is_an_end_entity_certificate_and_stays(tmp_path: Path) -> None:
    first = load_or_create(tmp_path, "a")
    assert first == load_or_create(tmp_path, "a")
    certificate = x509.load_pem_x509_certificate(first.certificate)
    assert isinstance(certificate.public_key(), Ed25519PublicKey)
    extensions = certificate.extensions
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["vmferry"]
    assert first.key_file.stat().st_mode & 0o777 == 0o600


def test_an_unreadable_identity_is_refused_not_replaced(tmp_path: Path) -> None:
    identity = load_or_create(tmp_path, "a")
    identity.key_file.write_bytes(b"not a key")
    with pytest.raises(Refused, match="cannot be read"):
        load_or_create(tmp_path, "a")
    assert identity.key_file.read_bytes() == b"not a key"


def _peer(folder: Path, name: str) -> Peer:
    folder.mkdir()
    return Peer(name, "192.0.2.1", 7450, load_or_create(folder, name).certificate.decode())


def test_peers_are_kept_and_found_by_certificate(tmp_path: Path) -> None:
    identity = load_or_create(tmp_path, "a")
    b, c = _peer(tmp_path / "b", "b"), _peer(tmp_path / "c", "c")
    book = PeerBook(tmp_path, identity)
    book.add(c)
    book.add(b)
    again = PeerBook(tmp_path, identity)
    assert again.all() == [b, c]
    assert again.by_fingerprint(c.fingerprint) == c
    again.remove("c")
    assert PeerBook(tmp_path, identity).by_fingerprint(c.fingerprint) is None
    with pytest.raises(Refused, match="vmferry invite"):
        again.find("c")


def test_a_host_that_moved_keeps_its_place(tmp_path: Path) -> None:
    book = PeerBook(tmp_path, load_or_create(tmp_path, "a"))
    b = _peer(tmp_path / "b", "b")
    book.add(b)
    book.add(Peer("b2", "192.0.2.9", 1, b.certificate))
    assert [(peer.name, peer.address) for peer in book.all()] == [("b2", "192.0.2.9")]


def test_another_host_does_not_take_a_name_that_is_given(tmp_path: Path) -> None:
    identity = load_or_create(tmp_path, "a")
    book = PeerBook(tmp_path, identity)
    book.add(_peer(tmp_path / "b", "b"))
    with pytest.raises(Refused, match="unpair b"):
        book.add(_peer(tmp_path / "other", "b"))
    with pytest.raises(Refused, match="--name"):
        book.add(_peer(tmp_path / "same", "a"))
    with pytest.raises(Refused, match="itself"):
        book.add(Peer("x", "192.0.2.1", 1, identity.certificate.decode()))


@pytest.mark.parametrize("content", [b"{", b"[1]", b"[" * 5000, b'[{"name": "b"}]'])
def test_a_damaged_list_of_peers_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "peers.json").write_bytes(content)
    with pytest.raises(Refused, match="paired hosts"):
        PeerBook(tmp_path, load_or_create(tmp_path, "a"))


def test_a_failed_write_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(_: int) -> None:
        raise OSError("no space")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_only_one_certificate_and_no_ca_is_taken(tmp_path: Path) -> None:
    good = load_or_create(tmp_path, "a").certificate.decode()
    other = tmp_path / "b"
    other.mkdir()
    second = load_or_create(other, "b").certificate.decode()
    assert normalised(good + second) == good
    with pytest.raises(ValueError, match="parsing asn1"):
        normalised("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    # What is stored is what OpenSSL will be given as an anchor.
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata=normalised(good))


def test_one_daemon_a_state_directory(tmp_path: Path) -> None:
    occupy(tmp_path / "state")
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    with pytest.raises(Refused, match="runs already"):
        occupy(tmp_path / "state")


def test_the_state_directory_is_named_or_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMFERRY_STATE", str(tmp_path / "env"))
    assert state_dir(None) == tmp_path / "env"
    assert state_dir(tmp_path / "named") == tmp_path / "named"
    with pytest.raises(Refused, match="shorter --state"):
        socket_path(Path("/" + "x" * SOCKET_PATH_BYTES_MAX))
