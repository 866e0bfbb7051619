"""How objects are stored, as settings. Imports nothing, so that `memedit --help` is quick."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class StorageSettings:
    """How objects are stored; what is None is left to the bucket's own defaults."""

    server_side_encryption: Literal["AES256", "aws:kms", "aws:kms:dsse"] | None = None
    kms_key_id: str | None = None
    storage_class: str | None = None

    @property
    def of_notes(self) -> StorageSettings:
        """The same for small objects that are read and written again and again."""
        return replace(self, storage_class=None)

    @property
    def arguments(self) -> dict[str, Any]:
        """As boto3 names them."""
        named = {
            "ServerSideEncryption": self.server_side_encryption,
            "SSEKMSKeyId": self.kms_key_id,
            "StorageClass": self.storage_class,
        }
        return {name: value for name, value in named.items() if value is not None}
