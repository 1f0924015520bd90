"""Bodies in gzip, or in deflate, which in HTTP means the zlib format (RFC 9110, section 8.4.1)."""

import zlib

from app.errors import BadRequest, BodyTooLarge

ENCODINGS = {"gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS}
"""The content codings, and zlib's code for each."""


def inflate(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """Decompress, but stop at the limit: a few bytes that expand to gigabytes cost neither memory nor time.

    Raises:
        BodyTooLarge: It is larger than `max_bytes` when decompressed.
        BadRequest: It is damaged, cut short, or something follows it.
    """
    inflater = zlib.decompressobj(ENCODINGS[encoding])
    try:
        plain = inflater.decompress(body, max_bytes + 1)
    except zlib.error:
        raise BadRequest(f"The body is not in the content encoding {encoding!r} that the request names.") from None
    if len(plain) > max_bytes:
        raise BodyTooLarge(
            f"The request body is too large when decompressed; the limit is {max_bytes:,} bytes. Send smaller or fewer "
            "pictures.",
            detail={"max_body_bytes": max_bytes},
        )
    if not inflater.eof or inflater.unused_data:
        raise BadRequest(f"The body in the content encoding {encoding!r} is cut short, or something follows its end.")
    return plain


def deflate(body: bytes, encoding: str) -> bytes:
    """Compress at the fastest level, because somebody is waiting."""
    return zlib.compress(body, 1, ENCODINGS[encoding])


def accepted(header: str) -> str | None:
    """Which of our encodings an Accept-Encoding header prefers; ;q=0 rules one out (RFC 9110, section 12.5.3)."""
    best, most = None, 0.0
    for offer in header.lower().replace(" ", "").split(","):
        name, _, quality = offer.partition(";q=")
        try:
            weight = float(quality or 1)
        except ValueError:
            continue
        if name in ENCODINGS and weight > most:
            best, most = name, weight
    return best
