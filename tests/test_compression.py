"""Compressed bodies: both formats round-trip, within the limit, and only what was asked for."""

import gzip
import tracemalloc
import zlib

import pytest

from app.compression import accepted, deflate, inflate
from app.errors import BadRequest, BodyTooLarge

BODY = b"pixels" * 1000


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_both_encodings_round_trip(encoding: str) -> None:
    packed = deflate(BODY, encoding)
    assert len(packed) < len(BODY)
    assert (gzip.decompress if encoding == "gzip" else zlib.decompress)(packed) == BODY
    assert inflate(packed, encoding, len(BODY)) == BODY


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_decompression_bomb_is_refused_within_bounded_memory(encoding: str) -> None:
    bomb = deflate(bytes(100_000_000), encoding)
    assert len(bomb) < 1_000_000
    tracemalloc.start()
    with pytest.raises(BodyTooLarge, match="the limit is 200,000 bytes"):
        inflate(bomb, encoding, 200_000)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2_000_000


def test_one_byte_over_the_limit_is_refused() -> None:
    with pytest.raises(BodyTooLarge):
        inflate(deflate(BODY, "gzip"), "gzip", len(BODY) - 1)


@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        pytest.param(b"", "gzip", id="empty"),
        pytest.param(BODY, "gzip", id="not compressed"),
        pytest.param(zlib.compress(BODY), "gzip", id="another encoding"),
        pytest.param(gzip.compress(BODY)[:-1], "gzip", id="cut short"),
        pytest.param(gzip.compress(BODY) + b"x", "gzip", id="trailing bytes"),
        pytest.param(zlib.compress(BODY)[2:], "deflate", id="without the zlib header"),
    ],
)
def test_an_invalid_or_incomplete_compressed_body_is_refused(body: bytes, encoding: str) -> None:
    with pytest.raises(BadRequest, match=encoding):
        inflate(body, encoding, 100_000)


@pytest.mark.parametrize(
    ("header", "encoding"),
    [
        ("", None),
        ("identity", None),
        ("br, zstd", None),
        ("*", None),
        ("gzip", "gzip"),
        ("GZIP", "gzip"),
        ("gzip, deflate, br", "gzip"),
        ("br;q=1.0, deflate;q=0.5, gzip", "gzip"),
        ("deflate;q=0.1, gzip;q=0.8", "gzip"),
        ("deflate, gzip", "deflate"),
        ("deflate;q=high, gzip;q=0.1", "gzip"),
        ("gzip;q=0, deflate; q=0.1", "deflate"),
        ("gzip;q=0.000", None),
    ],
)
def test_the_response_encoding_follows_accept_encoding(header: str, encoding: str | None) -> None:
    assert accepted(header) == encoding
