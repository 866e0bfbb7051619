"""Looking for secrets in what a program leaves, in the forms in which they may be written."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from urllib.parse import quote, quote_plus
from xml.sax.saxutils import escape


def forms(secret: str) -> set[bytes]:
    """A secret as it is, and as it looks in an address, in JSON, HTML, base64 and hexadecimal."""
    found = {secret, quote(secret, safe=""), quote(secret), quote_plus(secret), escape(secret)}
    found |= {secret.replace("/", "\\/"), quote(quote(secret, safe=""), safe="")}
    found |= {secret.encode().hex(), secret.encode().hex().upper()}
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        for before in range(3):
            # Inside of a longer text: without the digits that depend on its neighbours.
            text = encode(b"\0" * before + secret.encode()).decode().rstrip("=")
            found.add(text[(0, 2, 3)[before] : len(text) - 1])
    return {text.encode() for text in found}


def search(secrets: Iterable[str], places: Mapping[str, bytes]) -> list[str]:
    """Where a secret is found in any form; `places` are contents by name, names count too."""
    secrets = set(secrets)
    assert secrets and all(len(secret) >= 8 for secret in secrets), (
        "too short to be told from other text"
    )
    wanted = {form for secret in secrets for form in forms(secret)}
    return [
        name
        for name, content in places.items()
        if any(form in content or form in name.encode() for form in wanted)
    ]
