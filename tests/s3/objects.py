"""What lies on the tests' server, by location: put there, listed, fetched; not through memedit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tests.s3.server import SeaweedServer

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")


class Objects:
    """The objects of a server, as its administrator sees them."""

    def __init__(self, server: SeaweedServer) -> None:
        self.bucket = server.bucket
        self.client: S3Client = server.client()

    def put(self, location: str, content: bytes) -> str:
        """Write an object; its location."""
        self.client.put_object(Bucket=self.bucket, Key=self._key(location), Body=content)
        return location

    def put_folder(self, folder: Path, location: str) -> str:
        """Write every file below a folder; the location."""
        paths = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
        _at_once(lambda name: self.put(f"{location}/{name}", paths[name].read_bytes()), paths)
        return location

    def get(self, location: str) -> bytes:
        found = self.client.get_object(Bucket=self.bucket, Key=self._key(location))
        return found["Body"].read()

    def delete(self, location: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=self._key(location))

    def names(self, location: str) -> list[str]:
        """Names below a location, relative to it, sorted."""
        start = f"{self._key(location)}/"
        return [key.removeprefix(start) for key in self.all() if key.startswith(start)]

    def below(self, location: str) -> dict[str, bytes]:
        """Every object below a location, by name."""
        return _at_once(lambda name: self.get(f"{location}/{name}"), self.names(location))

    def fetch(self, location: str, folder: Path) -> Path:
        """Write every object below a location into a folder."""
        for name, content in self.below(location).items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return folder

    def all(self) -> dict[str, str]:
        """The ETag of every object of the bucket by its key."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket)
        return {o["Key"]: o["ETag"] for page in pages for o in page.get("Contents", ())}

    def storage_classes(self, location: str) -> dict[str, str | None]:
        """What was asked for of every object below a location, by name."""
        return {
            name: self._head(location, name).get("StorageClass") for name in self.names(location)
        }

    def metadata(self, location: str) -> dict[str, Any]:
        """What is written beside every object below a location, by name."""
        return _at_once(lambda name: self._head(location, name)["Metadata"], self.names(location))

    def clear(self, location: str) -> None:
        """Remove every object below a location."""
        keys: Any = [{"Key": self._key(f"{location}/{n}")} for n in self.names(location)]
        if keys:
            self.client.delete_objects(Bucket=self.bucket, Delete={"Objects": keys})

    def uploads(self) -> list[str]:
        """Keys whose upload began and did not end."""
        found = self.client.list_multipart_uploads(Bucket=self.bucket)
        return [upload["Key"] for upload in found.get("Uploads", ())]

    def _head(self, location: str, name: str) -> Any:
        return self.client.head_object(Bucket=self.bucket, Key=self._key(f"{location}/{name}"))

    def _key(self, location: str) -> str:
        start = f"s3://{self.bucket}/"
        assert location.startswith(start), location
        return location.removeprefix(start)


def _at_once(find: Callable[[str], T], names: Iterable[str]) -> dict[str, T]:
    """`find` of many names, several at once."""
    names = list(names)
    with ThreadPoolExecutor(max_workers=8) as threads:
        return dict(zip(names, threads.map(find, names), strict=True))
