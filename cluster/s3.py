"""Objects of an S3-compatible storage: listed, read in ranges, written on conditions or in parts.

Knows buckets, keys, ETags and parts; does not know what is in an object. Each request is made by
`cluster.s3_requests`.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from cluster.s3_requests import NotAsExpected, ask, threads
from cluster.storage import StorageSettings
from memedit.errors import InputError, LockError, MemeditError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

RANGE_BYTES = 8 << 20
"""A larger read is made of ranges of this size, several at once."""
_MARK = "memedit-upload"
_LOCATION = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(/(?P<prefix>.*))?")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One object as it is now."""

    size_bytes: int
    etag: str
    checksum: str | None = None
    """The storage's own of the whole object, if it has one, as `CRC32:…` in base64."""
    mark: str | None = None
    """What `Upload` left in it, to know its own object by."""


@dataclass(frozen=True)
class Place:
    """A bucket and a prefix, with or without a slash at its end."""

    bucket: str
    prefix: str = ""
    storage: StorageSettings = field(default_factory=StorageSettings)
    timeout_s: float | None = None
    """How long small requests wait for an answer before they are made again."""

    @classmethod
    def of(cls, location: str, storage: StorageSettings | None = None) -> Place:
        """Read `s3://bucket/prefix`.

        Raises:
            InputError: It is something else.
        """
        match = _LOCATION.fullmatch(location)
        if match is None:
            # Not shown: it may hold a key.
            secret = "@" in location or ":" in location.partition("://")[2]
            shown = "a location with an @ or : in it" if secret else location
            raise InputError(
                "not s3://bucket/prefix; keys come from the environment or a profile, never from"
                " a location",
                source=shown,
            )
        prefix = (match["prefix"] or "").strip("/")
        if any(part in ("", ".", "..") for part in prefix.split("/")) and prefix:
            raise InputError("has an empty part, or . or .. in it", source=location)
        return cls(match["bucket"], prefix, storage or StorageSettings())

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def key(self, name: str) -> str:
        """The key of an object by its name under this prefix."""
        return f"{self.prefix}/{name}" if self.prefix else name

    def at(self, name: str) -> str:
        """The location of an object, for people."""
        return f"s3://{self.bucket}/{self.key(name)}"

    # ------------------------------------------------------------------------------- reading

    def listing(self, folder: str, *, deep: bool) -> tuple[dict[str, Entry], list[str]]:
        """Objects in `folder` by name, and the names of the folders directly in it."""
        start = self.key(f"{folder.rstrip('/')}/" if folder else "")
        start = f"{start}/" if self.prefix and not folder and not start.endswith("/") else start
        cut = len(self.prefix) + 1 if self.prefix else 0
        entries: dict[str, Entry] = {}
        folders: list[str] = []
        arguments: dict[str, Any] = {"Bucket": self.bucket, "Prefix": start}
        if not deep:
            arguments["Delimiter"] = "/"
        while True:
            page = ask(partial(_list, arguments), f"s3://{self.bucket}/{start}")
            for found in page.get("Contents", ()):
                if not found["Key"].endswith("/"):  # how some tools write an empty folder
                    entry = Entry(size_bytes=found["Size"], etag=_quoted(found["ETag"]))
                    entries[found["Key"][cut:]] = entry
            folders += [
                p["Prefix"][len(start) :].rstrip("/") for p in page.get("CommonPrefixes", ())
            ]
            if not page["IsTruncated"]:
                return dict(sorted(entries.items())), sorted(folders)
            arguments["ContinuationToken"] = page["NextContinuationToken"]

    def head(self, name: str) -> Entry | None:
        """What an object is now, or None where there is none."""
        arguments: Any = {"Bucket": self.bucket, "Key": self.key(name), "ChecksumMode": "ENABLED"}

        def head(s3: S3Client) -> dict[str, Any]:
            found: Any = s3.head_object(**arguments)
            return {**found, "ETag": _quoted(found["ETag"]), "Size": found["ContentLength"]}

        found: dict[str, Any] | None = ask(head, self.at(name), missing=None)
        if found is None:
            return None
        whole = found.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT"
        sums = [n for n in ("CRC64NVME", "CRC32", "CRC32C", "SHA256") if f"Checksum{n}" in found]
        checksum = f"{sums[0]}:{found[f'Checksum{sums[0]}']}" if sums and whole else None
        if checksum and "-" in checksum.partition(":")[2]:  # a checksum of checksums of parts
            checksum = None
        return Entry(
            size_bytes=found["Size"],
            etag=found["ETag"],
            checksum=checksum,
            mark=found.get("Metadata", {}).get(_MARK),
        )

    def read_into(self, name: str, start: int, buffer: memoryview, *, etag: str) -> None:
        """Fill `buffer` from byte `start` of an object; in ranges, several at once.

        Raises:
            InputError: The object is no longer the one with this ETag.
        """
        buffer = buffer.cast("B") if buffer.format != "B" else buffer

        def fetch(first: int) -> None:
            part = buffer[first : first + RANGE_BYTES]
            self._fetch(name, start + first, part, etag=etag)

        if len(buffer) <= RANGE_BYTES:
            if len(buffer):
                fetch(0)
            return
        done_all(threads().map(fetch, range(0, len(buffer), RANGE_BYTES)))

    def _fetch(self, name: str, start: int, buffer: memoryview, *, etag: str) -> None:
        arguments: Any = {
            "Bucket": self.bucket,
            "Key": self.key(name),
            "Range": f"bytes={start}-{start + len(buffer) - 1}",
            "IfMatch": etag,
        }

        def get(s3: S3Client) -> None:
            body: Any = s3.get_object(**arguments)["Body"]
            try:
                done = 0
                while done < len(buffer) and (count := body.readinto(buffer[done:])):
                    done += count
            finally:
                body.close()
            if done < len(buffer):
                raise EOFError(f"{done} of {len(buffer)} bytes")

        try:
            ask(get, self.at(name))
        except NotAsExpected as error:
            raise InputError(
                "has changed since this run began to read it; run again", source=self.at(name)
            ) from error

    def get(self, name: str) -> tuple[bytes, str] | None:
        """A small object whole, and its ETag."""
        arguments: Any = {"Bucket": self.bucket, "Key": self.key(name)}

        def get(s3: S3Client) -> tuple[bytes, str]:
            found = s3.get_object(**arguments)
            return found["Body"].read(), _quoted(found["ETag"])

        return ask(get, self.at(name), missing=None, timeout_s=self.timeout_s)

    # ------------------------------------------------------------------------------- writing

    def put(self, name: str, content: Any, *, etag: str | None = None, absent: bool = False) -> str:
        """Write an object whole; the new ETag.

        Args:
            name: Its name.
            content: Bytes.
            etag: Only if the object there has this ETag.
            absent: Only if there is no object.

        Raises:
            NotAsExpected: It is not so; nothing was written.
        """
        arguments: Any = {"Bucket": self.bucket, "Key": self.key(name), "Body": content}
        arguments |= self.storage.arguments
        if absent:
            arguments["IfNoneMatch"] = "*"
        elif etag is not None:
            arguments["IfMatch"] = etag
        doubt: list[Exception] = []
        try:
            written = ask(
                lambda s3: _quoted(s3.put_object(**arguments)["ETag"]),
                self.at(name),
                missing=None,
                doubt=doubt,
                timeout_s=self.timeout_s,
            )
            if written is None:  # how AWS says that there is nothing for the condition to hold of
                raise NotAsExpected(f"{self.at(name)}: is gone")
            return written
        except NotAsExpected:
            # An answer that was lost may have said that it is written.
            if doubt and (found := self.get(name)) is not None and found[0] == bytes(content):
                return found[1]
            raise

    def delete(self, names: list[str], *, etag: str | None = None) -> None:
        """Remove objects, one after the other in their order.

        Args:
            names: Their names.
            etag: Only if the object has this ETag, on a storage that knows such conditions.

        Raises:
            NotAsExpected: It has another one; it is still there.
        """
        condition = {} if etag is None else {"IfMatch": etag}
        for name in names:
            arguments: Any = {"Bucket": self.bucket, "Key": self.key(name)} | condition
            ask(partial(_delete, arguments), self.at(name), missing=None)

    def copy(self, name: str, source: Place, source_name: str, *, etag: str) -> str:
        """Let the storage copy an object of at most 5 GiB; the new ETag.

        Raises:
            InputError: The source is no longer the one with this ETag.
        """
        arguments: Any = self._copied_from(source, source_name, etag) | self.storage.arguments
        arguments |= {"Bucket": self.bucket, "Key": self.key(name), "ChecksumAlgorithm": "CRC32"}

        def copy(s3: S3Client) -> str:
            return _quoted(s3.copy_object(**arguments)["CopyObjectResult"]["ETag"])

        try:
            return ask(copy, source.at(source_name))
        except NotAsExpected as error:
            raise _changed(source.at(source_name)) from error

    def begin(self, name: str) -> Upload:
        """Begin an object that is made of parts."""
        arguments: Any = {"Bucket": self.bucket, "Key": self.key(name)} | self.storage.arguments
        # CRC32 can be computed everywhere; a storage that knows no such checksum ignores it.
        arguments |= {"ChecksumAlgorithm": "CRC32", "ChecksumType": "FULL_OBJECT"}
        mark = secrets.token_hex(16)
        arguments["Metadata"] = {_MARK: mark}
        upload_id = ask(
            lambda s3: s3.create_multipart_upload(**arguments)["UploadId"], self.at(name)
        )
        return Upload(self, name, upload_id, mark)

    def resume(self, name: str, upload_id: str) -> Upload:
        """An upload that began elsewhere; good for aborting it."""
        return Upload(self, name, upload_id, "")

    def uploads(self, folder: str) -> list[tuple[str, str]]:
        """(name, upload id) of the uploads in `folder` that began and did not end."""
        start = self.key(f"{folder.rstrip('/')}/" if folder else "")
        cut = len(self.prefix) + 1 if self.prefix else 0
        arguments: Any = {"Bucket": self.bucket, "Prefix": start}
        found: list[tuple[str, str]] = []
        while True:
            page: Any = ask(lambda s3: s3.list_multipart_uploads(**arguments), self.at(folder))
            found += [(u["Key"][cut:], u["UploadId"]) for u in page.get("Uploads", ())]
            if not page.get("IsTruncated"):
                return sorted(found)
            arguments["KeyMarker"] = page["NextKeyMarker"]
            arguments["UploadIdMarker"] = page["NextUploadIdMarker"]

    def _copied_from(self, source: Place, name: str, etag: str) -> dict[str, Any]:
        return {
            "CopySource": {"Bucket": source.bucket, "Key": source.key(name)},
            "CopySourceIfMatch": etag,
        }


@dataclass
class Upload:
    """An object in the making; its parts may come in any order, from any thread."""

    place: Place
    name: str
    upload_id: str
    mark: str
    _parts: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def _arguments(self) -> dict[str, Any]:
        key = self.place.key(self.name)
        return {"Bucket": self.place.bucket, "Key": key, "UploadId": self.upload_id}

    def put(self, number: int, content: Any) -> None:
        """Send a part (numbered from 1); the storage checks its CRC32."""
        arguments: Any = {**self._arguments, "PartNumber": number, "Body": content}
        arguments["ChecksumAlgorithm"] = "CRC32"
        self._parts[number] = ask(
            lambda s3: _part(number, s3.upload_part(**arguments)), self.place.at(self.name)
        )

    def copy(
        self, number: int, source: Place, name: str, start: int, end: int, *, etag: str
    ) -> None:
        """Let the storage take a part from bytes `start` to `end` of another object.

        Raises:
            InputError: That object is no longer the one with this ETag.
        """
        arguments: Any = {**self._arguments, "PartNumber": number}
        arguments |= self.place._copied_from(source, name, etag)
        arguments["CopySourceRange"] = f"bytes={start}-{end - 1}"

        def copy(s3: S3Client) -> dict[str, Any]:
            return _part(number, s3.upload_part_copy(**arguments)["CopyPartResult"])

        try:
            self._parts[number] = ask(copy, source.at(name))
        except NotAsExpected as error:
            raise _changed(source.at(name)) from error

    def complete(self, size_bytes: int) -> Entry:
        """Let the object appear, whole; what it is then.

        Raises:
            NotAsExpected: An object of this name is there already.
            LockError: The upload is gone.
        """
        arguments: Any = {**self._arguments, "IfNoneMatch": "*"}
        arguments["MultipartUpload"] = {"Parts": [p for _, p in sorted(self._parts.items())]}
        try:
            ask(lambda s3: s3.complete_multipart_upload(**arguments), self.place.at(self.name))
        except (NotAsExpected, InputError, LockError):
            # An answer that was lost may have said that it is done: the object is then our own.
            if (found := self._own(size_bytes)) is None:
                raise
            return found
        if (found := self._own(size_bytes)) is None:
            raise MemeditError(
                f"{self.place.at(self.name)}: is not what was just written; does another program"
                " write to this place?"
            )
        return found

    def _own(self, size_bytes: int) -> Entry | None:
        """The object, if it is the one that this upload made."""
        found = self.place.head(self.name)
        own = found is not None and (found.size_bytes, found.mark) == (size_bytes, self.mark)
        return found if own else None

    def abort(self) -> None:
        """Give up the upload and free its parts."""
        arguments: Any = self._arguments
        ask(
            lambda s3: s3.abort_multipart_upload(**arguments),
            self.place.at(self.name),
            missing=None,
        )


def _list(arguments: Any, s3: S3Client) -> Any:
    """A page; an answer without what every page has is none."""
    page: Any = s3.list_objects_v2(**arguments)
    if page["IsTruncated"]:
        page["NextContinuationToken"]
    return page


def _delete(arguments: Any, s3: S3Client) -> None:
    s3.delete_object(**arguments)


def _part(number: int, answer: Mapping[str, Any]) -> dict[str, Any]:
    """What completing an upload needs to know of a part."""
    part = {"PartNumber": number, "ETag": _quoted(answer["ETag"])}
    if "ChecksumCRC32" in answer:
        part["ChecksumCRC32"] = answer["ChecksumCRC32"]
    return part


def _quoted(etag: str) -> str:
    """An ETag as HTTP has it; some servers leave the quotes out, in some answers."""
    return f'"{etag.strip(chr(34))}"'


def _changed(place: str) -> InputError:
    return InputError("has changed since this run began to read it; run again", source=place)


def done_all(results: Iterator[Any]) -> None:
    """Wait for all of `threads().map`; raises what the first of them raised."""
    for _ in results:
        pass
