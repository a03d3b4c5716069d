"""Requests that go wrong, in bulk: what a server's own description allows and forbids, and broken pictures.

Each is sent to a running server and its answer held against the description; what a server process holds in memory is
read from the kernel.
"""

from __future__ import annotations

import base64
import io
import json
import random
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import hypothesis
import PIL.Image
import requests
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis.checks import not_a_server_error
from schemathesis.generation.modes import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


def ask_by_description(
    root: str,
    key: str | None,
    count: int,
    *,
    seed: int = 0,
    models: Sequence[str] = (),
    checks: Sequence[Any] = tuple(CHECKS),
) -> Counter[str]:
    """Send `count` requests, shared out over a server's operations, three of four against its description.

    `models`: names that chat requests ask for, else most would end at an unknown one. Returns how many had which
    status; raises what schemathesis finds.
    """
    session = requests.Session()
    session.trust_env = False
    if key:
        session.headers["authorization"] = f"Bearer {key}"
    described = session.get(f"{root}/openapi.json", timeout=10).json()
    if models:
        for schema in described["components"]["schemas"].values():
            if {"model", "messages"} <= set(schema.get("properties", ())):
                schema["properties"]["model"] = {"enum": list(models)}
    operations = [found.ok() for found in schemathesis.openapi.from_dict(described).get_all_operations()]
    # Where nothing can differ from one request to the next, one is enough.
    weights = {one.label: 8 if one.body else 1 if one.path_parameters else 0 for one in operations}
    statuses: Counter[str] = Counter()

    for operation in operations:
        share = count * weights[operation.label] // sum(weights.values())
        for mode, part in ((GenerationMode.NEGATIVE, 3), (GenerationMode.POSITIVE, 1)):
            if not operation.body:
                mode = GenerationMode.POSITIVE  # any text may be in a path
            left = max(1, share * part // 4)

            @hypothesis.seed(seed)
            @hypothesis.settings(
                max_examples=left,
                database=None,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @hypothesis.given(operation.as_strategy(generation_mode=mode))
            def ask(case: Any) -> None:
                response = case.call(base_url=root, session=session, timeout=60)
                statuses[str(response.status_code)] += 1
                case.validate_response(response, checks=list(checks))

            ask()
    return statuses


def encoded(picture: PIL.Image.Image, kind: str, **options: Any) -> bytes:
    made = io.BytesIO()
    picture.save(made, kind, **options)
    return made.getvalue()


def _drawn(rng: random.Random, mode: str = "RGB", size: tuple[int, int] = (37, 29)) -> PIL.Image.Image:
    pixels = PIL.Image.frombytes("RGB", size, rng.randbytes(size[0] * size[1] * 3))
    return pixels.convert(mode)


def good_pictures(rng: random.Random) -> dict[str, bytes]:
    """Pictures that are unusual and whole; every one can be seen."""
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # lies on its side
    sixteen = PIL.Image.frombytes("I;16", (9, 9), rng.randbytes(162))
    frames = [_drawn(rng).convert("P") for _ in range(3)]
    return {
        "rgb.jpeg": encoded(_drawn(rng), "JPEG"),
        "cmyk.jpeg": encoded(_drawn(rng, "CMYK"), "JPEG"),
        "grey.jpeg": encoded(_drawn(rng, "L"), "JPEG", progressive=True),
        "rotated.jpeg": encoded(_drawn(rng), "JPEG", exif=exif),
        "profile of rubbish.jpeg": encoded(_drawn(rng), "JPEG", icc_profile=rng.randbytes(900)),
        "profile of rubbish.png": encoded(_drawn(rng), "PNG", icc_profile=rng.randbytes(900)),
        "exif of rubbish.jpeg": encoded(_drawn(rng), "JPEG", exif=b"Exif\0\0" + rng.randbytes(200)),
        "rgba.png": encoded(_drawn(rng, "RGBA"), "PNG"),
        "palette.png": encoded(_drawn(rng).convert("P"), "PNG", transparency=3),
        "one bit.png": encoded(_drawn(rng, "1"), "PNG"),
        "16 bits.png": encoded(sixteen, "PNG"),
        "16 bits.tiff": encoded(sixteen, "TIFF"),
        "one pixel.png": encoded(_drawn(rng, size=(1, 1)), "PNG"),
        "one line.png": encoded(_drawn(rng, size=(300, 1)), "PNG"),
        "animated.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated.webp": encoded(_drawn(rng), "WEBP", save_all=True, append_images=[_drawn(rng)]),
        "animated.png": encoded(_drawn(rng), "PNG", save_all=True, append_images=[_drawn(rng)]),
        "pages.tiff": encoded(_drawn(rng), "TIFF", save_all=True, append_images=[_drawn(rng)]),
        "lossless.webp": encoded(_drawn(rng, "RGBA"), "WEBP", lossless=True),
        "lzw.tiff": encoded(_drawn(rng), "TIFF", compression="tiff_lzw"),
        "bmp.bmp": encoded(_drawn(rng), "BMP"),
        "ppm.ppm": encoded(_drawn(rng), "PPM"),
        # a picture that is something else too: what is behind its end is never looked at
        "zip.jpeg": encoded(_drawn(rng), "JPEG") + b"PK\x05\x06" + bytes(18),
        "gifar.gif": encoded(frames[0], "GIF") + b"PK\x03\x04" + rng.randbytes(60),
        "html.jpeg": encoded(_drawn(rng), "JPEG", comment=b"<script>alert(1)</script>"),
    }


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 2) -> bytes:
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + _chunk(b"IEND", b"")


def bad_pictures(rng: random.Random) -> dict[str, bytes]:
    """Bombs, foreign formats, and headers that lie; none can be seen."""
    zeros = zlib.compress(bytes(30 << 20), 9)
    gif = encoded(_drawn(rng).convert("P"), "GIF")
    webp = encoded(_drawn(rng), "WEBP", lossless=True)
    tiff = struct.pack("<2sHI", b"II", 42, 8) + struct.pack("<H", 9)
    for number, kind, value in ((256, 4, 1 << 30), (257, 4, 1 << 30), (258, 3, 8), (259, 3, 1), (262, 3, 2),
                                (273, 4, 8), (277, 3, 3), (278, 4, 1 << 30), (279, 4, 0xFFFFFFFF)):  # fmt: skip
        tiff += struct.pack("<HHII", number, kind, 1, value)
    return {
        "nothing": b"",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "xml": b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><svg>&b;</svg>',
        "html": b"<!doctype html><script>alert(1)</script>",
        "pdf": b"%PDF-1.7\n1 0 obj<<>>endobj",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run",
        "zip": b"PK\x05\x06" + bytes(18),
        "huge.png": _png(60_000, 60_000, _chunk(b"IDAT", zeros)),
        "wide.png": _png(2**31 - 1, 1, _chunk(b"IDAT", b"")),
        "beyond.png": _png(2**32 - 1, 2**32 - 1, _chunk(b"IDAT", b"")),
        "empty.png": _png(0, 0, _chunk(b"IDAT", b"")),
        "no data.png": _png(20, 20),
        "text bomb.png": _png(20, 20, _chunk(b"zTXt", b"a\0\0" + zeros), _chunk(b"IDAT", zlib.compress(bytes(9)))),
        "profile bomb.png": _png(20, 20, _chunk(b"iCCP", b"a\0\0" + zeros), _chunk(b"IDAT", zlib.compress(bytes(9)))),
        "depth.png": _png(20, 20, _chunk(b"IDAT", zlib.compress(bytes(99))), depth=7),
        "colour.png": _png(20, 20, _chunk(b"IDAT", zlib.compress(bytes(99))), colour=9),
        "huge.gif": gif[:6] + struct.pack("<HH", 65535, 65535) + gif[10:],
        "huge.webp": webp[:21] + b"\xff\xff\xff\x0f" + webp[25:],
        "huge.tiff": tiff + bytes(4),
        "circle.tiff": struct.pack("<2sHI", b"II", 42, 8) + struct.pack("<HI", 0, 8),
        "huge.bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0),
        "huge.ppm": b"P6 99999 99999 255\n",
        "float.tiff": encoded(PIL.Image.new("F", (9, 9)), "TIFF"),
        "start.jpeg": b"\xff\xd8\xff\xe0" + rng.randbytes(400),
        "jp2": b"\0\0\0\x0cjP  \r\n\x87\n" + rng.randbytes(100),
        "ico": b"\0\0\1\0\1\0" + rng.randbytes(60),
        "psd": b"8BPS\0\1" + rng.randbytes(60),
        "dds": b"DDS |\0\0\0" + rng.randbytes(120),
    }


def broken_pictures(rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """For ever: a whole picture that was cut, or in which bytes were changed; a few of them can be seen still."""
    while True:
        whole = good_pictures(rng)
        for name, data in whole.items():
            cut = rng.randrange(1, len(data))
            yield f"cut {name}", data[:cut]
            hit = bytearray(data)
            for _ in range(rng.choice((1, 2, 8, 40))):
                place = rng.randrange(min(len(hit), rng.choice((64, 1 << 30))))
                hit[place] = rng.randrange(256)
            yield f"hit {name}", bytes(hit)
            yield f"joined {name}", data[:cut] + rng.choice(list(whole.values()))[cut:]
            yield f"stretched {name}", data[:cut] + rng.randbytes(rng.randrange(1, 300)) + data[cut:]


def data_urls(rng: random.Random) -> Iterator[str]:
    """For ever: addresses of pictures that are odd in themselves."""
    whole = base64.b64encode(encoded(_drawn(rng), "PNG")).decode()
    odd = [
        "", "data:", "data:,", "data:;base64,", "data:image/png", "data:image/png,", "data:image/png;base64",
        "data:image/png;base64,=", "data:image/png;base64,====", "data:image/png;base64,A",
        "data:image/png;base64,AA=A",
        "data:image/png;base64,%41", "data:image/png;base64,\u0661", "data:image/png;base64,\ud800",
        f"data:image/png;base64,{whole[:-1]}", f"data:image/png;base64,{whole}\n", f"data:image/png;base64, {whole}",
        f"data:image/png;base64,{whole.replace('+', '-').replace('/', '_')}!", f"data:text/html;base64,{whole}",
        f"data:image/png;charset=x;base64,{whole[:40]}", f"data:image/svg+xml;base64,{whole[:40]}",
        f"data:application/octet-stream;base64,{whole}", f"data:image/png;base32,{whole}",
        f"DATA:IMAGE/PNG;BASE64,{whole[:9]}",
        "http://169.254.169.254/latest/meta-data", "http://localhost:1/x", "file:///etc/passwd", "/etc/passwd",
        "\\\\host\\share",
        "ftp://localhost/x", "blob:http://localhost/1", "javascript:alert(1)", "cid:1", "\0",
        "data:image/png;base64,\0",
    ]  # fmt: skip
    while True:
        yield rng.choice(odd)
        yield "data:image/png;base64," + "".join(rng.choices("AQgw/+=-_ \n%", k=rng.randrange(400)))


def as_url(data: bytes, media: str = "image/png") -> str:
    return f"data:{media};base64,{base64.b64encode(data).decode()}"


def chat_body(model: str, url: str, **more: Any) -> bytes:
    """A chat request with one picture, as JSON."""
    parts = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url}}]
    body = {"model": model, "messages": [{"role": "user", "content": parts}], "max_tokens": 4, "temperature": 0}
    return json.dumps(body | more).encode()


def broken_bodies(rng: random.Random, whole: bytes) -> Iterator[bytes]:
    """For ever: a request's bytes, cut and changed below JSON's level."""
    odd = [
        b"", b"null", b"[]", b"0", b'""', b"{}", b"{", b"\xff\xfe{\0}\0", b"\xef\xbb\xbf{}", b"[" * 50_000,
        b'{"a":' * 5_000,
        b"1" * 5_000, b"-", b"NaN", b"1e999", b'{"model":"a","model":"b"}', b'{"n":' + b"9" * 4_400 + b"}",
        b'{"messages":[{"role":"user","content":"\\ud800"}],"model":"parrot"}', b"{}{}", b"\0", b'"' + b"a" * 9_999,
    ]  # fmt: skip
    while True:
        yield rng.choice(odd)
        yield whole[: rng.randrange(len(whole))]
        hit = bytearray(whole)
        for _ in range(rng.choice((1, 3, 20))):
            hit[rng.randrange(len(hit))] = rng.randrange(256)
        yield bytes(hit)
