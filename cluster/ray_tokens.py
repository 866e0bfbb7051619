"""The token of a Ray cluster: where Ray finds it, and how it travels. Imports no Ray."""

from __future__ import annotations

import os
from pathlib import Path

from memedit.errors import InputError


def authorization(token: str | None = None) -> dict[str, str]:
    """The header that holds the token, if there is one.

    Looked up here, because Ray's own look-up remembers the first answer of the process.

    Args:
        token: None takes the environment's, as Ray does.

    Raises:
        InputError: A token is asked for and there is none, or its file cannot be read.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    if token is None and mode != "disabled":
        token = os.environ.get("RAY_AUTH_TOKEN")
        if not token and (path := os.environ.get("RAY_AUTH_TOKEN_PATH")):
            token = _token_in(Path(path).expanduser(), "RAY_AUTH_TOKEN_PATH")
        kept = Path.home() / ".ray" / "auth_token"
        if not token and mode == "token" and kept.exists():
            token = _token_in(kept, str(kept))
    if not token and mode == "token":
        raise InputError(
            "RAY_AUTH_MODE is token, but there is none; set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH "
            "to the cluster's token or a file that holds it",
            field="address",
        )
    if not token:
        return {}
    token = token.strip()
    if not token.isprintable() or not token.isascii():
        raise InputError("the token holds characters that no token has", field="address")
    return {"Authorization": f"Bearer {token}"}


def refused(address: str, *, given: bool) -> InputError:
    """What to do where a token is missing or wrong."""
    wrong = "wrong token" if given else "no token"
    return InputError(
        f"the cluster at {address} asks for a token ({wrong} was given); set "
        "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's "
        "token or a file that holds it",
        field="address",
    )


def _token_in(path: Path, source: str) -> str:
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the token's file: {error}", source=source) from error
    if not token:
        raise InputError("the token's file is empty", source=source)
    return token
