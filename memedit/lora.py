"""An update as a LoRA adapter in PEFT's format: an exact or the best low-rank form of it.

PEFT adds B · A · (alpha / r) to a weight [O, I], with A [R, I] and B [O, R]; here alpha = r. Knows
matrices and PEFT's two files (its library is not needed to write them); does not know models, or
what the facts are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from memedit.delta import is_finite, write_safetensors
from memedit.errors import InputError, NumericalError
from memedit.solve import Update
from memedit.writing import whole_file

ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"

_CHUNK = 1 << 22
"""Elements of Δ that are made at once to measure the error."""

# Of a URI: `user:secret@`; a secret may hold slashes (those of AWS do), a port is none.
_USER = re.compile(r"^(\w[\w+.-]*://)(?:[^/?#]*@|[^/?#:@]*:(?!\d*/)[^@]*@)")
_SECRET_PARAMETER = re.compile(
    r"token|secret|signature|^sig$|passw|credential|(access|api).?key|^x-amz-|^x-goog-", re.I
)


@dataclass(frozen=True, kw_only=True)
class LoraFactors:
    """The low-rank form of one update, Δ ≈ B · A, in the dtype and with the bits that are stored.

    A_RI [R, I] and B_OR [O, R] share the singular values evenly: B = U √S, A = √S Vᵀ.
    """

    layer: int
    A_RI: Tensor
    B_OR: Tensor
    truncation_error: float
    """‖Δ - B · A‖ / ‖Δ‖ (Frobenius) of what is stored, the rounding to its dtype included; 0 where
    Δ is zero."""

    @property
    def rank(self) -> int:
        """R."""
        return len(self.A_RI)


@torch.no_grad()
def low_rank(update: Update, *, limit: int, dtype: torch.dtype = torch.float32) -> LoraFactors:
    """The best form of an update with rank min(edits, limit, O, I).

    Exact but for rounding where the factors' rank is within the limit; otherwise the truncated
    singular value decomposition, which no matrix of that rank comes closer than (Eckart and Young,
    1936). From factors with Δ = (Q T)(P W)ᵀ the small core T Wᵀ is decomposed, N × N; from a dense
    Δ, or with more edits than its smaller side M, the eigenvectors of its M × M Gram matrix are
    taken (whose squaring costs a share of 1e-8 at most). Equal updates give equal bits.

    Args:
        update: Float64, on any device, where the work is done and the result stays.
        limit: The largest rank; at least 1. (A dense update does not know its number of edits.)
        dtype: What the adapter is stored in. PEFT computes with float32 where it is half.

    Raises:
        InputError: `limit` is below 1.
        NumericalError: The update is not finite, or its factors not in `dtype`.
    """
    if limit < 1:
        raise InputError(f"the rank is at least 1, not {limit}", field="limit")
    left_NO, right_NI = update.left_NO, update.right_NI
    if not (is_finite(left_NO) and (right_NI is None or is_finite(right_NI))):
        raise NumericalError(f"the update of layer {update.layer} holds NaN or an infinity")
    try:
        if right_NI is None or len(left_NO) >= min(left_NO.shape[1], right_NI.shape[1]):
            B_OR, A_RI = _from_dense(update.delta_OI, limit)
        else:
            B_OR, A_RI = _from_factors(left_NO, right_NI, limit)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise NumericalError(
            f"the update of layer {update.layer} has no singular value decomposition: {error}"
        ) from error
    # Singular vectors have no sign of their own: the largest entry of each column of B is positive.
    sign_R = B_OR.gather(0, B_OR.abs().argmax(dim=0, keepdim=True))[0].sign()
    B_OR = (B_OR * sign_R).to(dtype).contiguous()
    A_RI = (A_RI * sign_R[:, None]).to(dtype).contiguous()
    if not (is_finite(A_RI) and is_finite(B_OR)):
        raise NumericalError(
            f"the adapter of layer {update.layer} holds numbers beyond {dtype}; store it in float32"
        )
    return LoraFactors(
        layer=update.layer,
        A_RI=A_RI,
        B_OR=B_OR,
        truncation_error=_error(update, B_OR=B_OR, A_RI=A_RI),
    )


def updates_of_lora(factors: Mapping[str, LoraFactors]) -> dict[str, Update]:
    """What an adapter adds to the weights, delta_OI = B · A in float64, under the same names.

    Applying it instead of the update that the adapter was made from shows what the adapter does.
    """
    return {
        name: Update(layer=part.layer, left_NO=part.B_OR.T.double(), right_NI=part.A_RI.double())
        for name, part in factors.items()
    }


def save_lora(
    folder: Path, factors: Mapping[str, LoraFactors], *, base_model: str, fan_in_fan_out: bool
) -> None:
    """Write an adapter that `peft.PeftModel.from_pretrained(base, folder)` loads.

    Two files, each written whole: the weights, then the config.

    Args:
        folder: Made if it is not there.
        factors: By module path in the causal language model (`model.layers.5.mlp.down_proj`). All
            of one dtype, which is stored.
        base_model: Name, path or URI of the model that the adapter belongs to. Credentials in a
            URI are left out.
        fan_in_fan_out: Whether the modules store their weight [in, out] (`Family.conv1d`). The
            factors are [out, in] all the same: PEFT transposes their product.

    Raises:
        ValueError: No factors, of several dtypes, or whose shapes do not fit each other.
    """
    if not factors or len({t.dtype for f in factors.values() for t in (f.A_RI, f.B_OR)}) != 1:
        raise ValueError("factors of one dtype are wanted")
    tensors: dict[str, Tensor] = {}
    for module, part in factors.items():
        if part.A_RI.ndim != 2 or part.B_OR.shape[1:] != part.A_RI.shape[:1]:
            raise ValueError(f"{module}: A {tuple(part.A_RI.shape)}, B {tuple(part.B_OR.shape)}")
        tensors[f"base_model.model.{module}.lora_A.weight"] = part.A_RI
        tensors[f"base_model.model.{module}.lora_B.weight"] = part.B_OR
    rank = max(part.rank for part in factors.values())
    others = {module: part.rank for module, part in factors.items() if part.rank != rank}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": _without_credentials(base_model),
        "inference_mode": True,
        # PEFT takes a module whose name is one of these or ends in a dot and one of these. Whole
        # paths, from the model down, therefore name themselves only: layer 1 is not layer 11.
        "target_modules": list(factors),
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / ADAPTER_WEIGHTS_NAME, tensors, {"format": "pt"})
    with whole_file(folder / ADAPTER_CONFIG_NAME) as partial:
        partial.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _from_factors(left_NO: Tensor, right_NI: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    Q_ON, T_NN = torch.linalg.qr(left_NO.T)
    P_IN, W_NN = torch.linalg.qr(right_NI.T)
    return _split(T_NN @ W_NN.T, Q_ON, P_IN, limit)


def _from_dense(delta_OI: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    if len(delta_OI) > delta_OI.shape[1]:
        B_IR, A_RO = _from_dense(delta_OI.T, limit)
        return A_RO.T, B_IR.T
    _, vectors_OO = torch.linalg.eigh(delta_OI @ delta_OI.T)
    U_OR = vectors_OO[:, -limit:]  # ascending eigenvalues
    # Singular values from Δ itself: those from the Gram matrix have lost half of their digits.
    P_IR, W_RR = torch.linalg.qr((U_OR.T @ delta_OI).T)
    return _split(W_RR.T, U_OR, P_IR, limit)


def _split(core: Tensor, Q: Tensor, P: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """B and A of Q · core · Pᵀ, where Q and P have orthonormal columns."""
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    root_R = S[:limit].sqrt()
    return Q @ (U[:, :limit] * root_R), (root_R[:, None] * Vh[:limit]) @ P.T


def _error(update: Update, *, B_OR: Tensor, A_RI: Tensor) -> float:
    """‖Δ - B A‖ / ‖Δ‖ from the difference itself, some rows of Δ at a time."""
    B_OR, A_RI = B_OR.double(), A_RI.double()
    missed = torch.zeros((), dtype=torch.float64, device=B_OR.device)
    total = missed.clone()
    for start, delta_PI in _rows(update):
        total += delta_PI.square().sum()
        missed += (delta_PI - B_OR[start : start + len(delta_PI)] @ A_RI).square().sum()
    return float((missed / total).sqrt()) if total else 0.0


def _rows(update: Update) -> Iterator[tuple[int, Tensor]]:
    """Δ in pieces of some rows, each with the number of its first."""
    left_ON, right_NI = update.left_NO.T, update.right_NI
    width = left_ON.shape[1] if right_NI is None else right_NI.shape[1]
    step = max(1, _CHUNK // width)
    for start in range(0, len(left_ON), step):
        rows = left_ON[start : start + step]
        yield start, rows if right_NI is None else rows @ right_NI


def _without_credentials(location: str) -> str:
    """A URI without user and password and without the parameters that hold a secret."""
    if "://" not in location:
        return location
    location = _USER.sub(r"\1", location)
    address, mark, query = location.partition("?")
    query, hash_mark, fragment = query.partition("#")
    kept = [p for p in query.split("&") if not _SECRET_PARAMETER.search(p.partition("=")[0])]
    return address + (mark if any(kept) else "") + "&".join(kept) + hash_mark + fragment
