"""KubeRay's published schemas as a JSON-schema validator that also refuses unknown fields."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

Schema = dict[str, Any]


def strict(schema: Any) -> Any:
    """An `openAPIV3Schema` as a JSON schema.

    Kubernetes drops the fields that a schema does not name, without a word; here they are errors.
    """
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made = {}
    for key, value in schema.items():
        if key == "properties":
            made[key] = {name: strict(inner) for name, inner in value.items()}
        elif key in ("items", "additionalProperties", "anyOf", "allOf", "oneOf", "not"):
            made[key] = strict(value)
        elif not key.startswith("x-") and key not in ("default", "format", "description"):
            made[key] = value
    keeps = schema.get("x-kubernetes-preserve-unknown-fields")
    if schema.get("type") == "object" and not keeps:
        made.setdefault("additionalProperties", False)
    return made


@cache  # a megabyte of YAML
def validator_of(crds: Path, plural: str, version: str = "v1") -> Draft202012Validator:
    """The validator of a kind. Its metadata are Kubernetes' own, which no CRD describes."""
    crd = yaml.load((crds / f"ray.io_{plural}.yaml").read_text(), Loader=yaml.CSafeLoader)
    published = next(v for v in crd["spec"]["versions"] if v["name"] == version)
    schema = strict(published["schema"]["openAPIV3Schema"])
    schema["properties"] |= {
        "apiVersion": {"const": f"ray.io/{version}"},
        "kind": {"const": crd["spec"]["names"]["kind"]},
        "metadata": METADATA,
    }
    schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


_TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
METADATA: Schema = {
    "type": "object",
    "additionalProperties": False,
    "required": ["namespace", "labels"],
    "properties": {
        "name": {"type": "string"},
        "namespace": {"type": "string"},
        "labels": _TEXTS,
        "annotations": _TEXTS,
        "ownerReferences": {"type": "array"},
    },
}


def errors_of(validator: Draft202012Validator, manifest: object) -> list[str]:
    """What is wrong, each with its place."""
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]
