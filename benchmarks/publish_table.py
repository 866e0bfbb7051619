"""How a run of `benchmarks.publish` is shown: on the terminal, and as a row of its table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def show(result: Mapping[str, Any]) -> None:
    """Print a run for a person."""
    if folder := result.get("folder"):
        _show_folder(folder)
    if s3 := result.get("s3"):
        for name, counted in s3["bytes"].items():
            _show_bytes(name, counted)
        _show_time(s3["time"])
    if throughput := result.get("throughput"):
        _show_throughput(throughput)


def cells(result: Mapping[str, Any]) -> dict[str, str]:
    """The row of a run in the table of all runs; what was left out is a dash."""
    row = {}
    folder, s3, throughput = (result.get(part) for part in ("folder", "s3", "throughput"))
    row["folder: GB"] = f"{folder['file_bytes'] / 1e9:.1f}" if folder else "-"
    row["s"] = f"{folder['publish']['publish_s']:.1f}" if folder else "-"
    row["peak / allowed, MB"] = _memory(folder["memory"]) if folder else "-"
    counted = s3["bytes"]["GPT-NeoX-20B"] if s3 else None
    row["S3: GB"] = f"{s3['time']['file_bytes'] / 1e9:.2f}" if s3 else "-"
    row["up / edited"] = f"{counted['up_ratio']:.4f}" if counted else "-"
    row["down / edited"] = f"{counted['down_ratio']:.4f}" if counted else "-"
    row["S3: peak / allowed, MB"] = _memory(s3["time"]["memory"]) if s3 else "-"
    row["memedit, s"] = f"{s3['time']['memedit_s']:.1f}" if s3 else "-"
    row["whole copy, s"] = f"{s3['time']['whole_copy_s']:.1f}" if s3 else "-"
    row["ratio"] = f"{s3['time']['ratio']:.2f}x" if s3 else "-"
    row["file, MB"] = f"{throughput['size_bytes'] / 1e6:.0f}" if throughput else "-"
    for what in ("upload", "download", "read"):
        share = throughput["shares"][what]["share"] if throughput else None
        row[f"{what} / aws"] = "-" if share is None else f"{share:.2f}"
    return row


def _memory(memory: Mapping[str, Any]) -> str:
    return f"{memory['peak'] / 1e6:.0f} / {memory['allowed'] / 1e6:.0f}"


def _show_memory(memory: Mapping[str, Any]) -> None:
    print(
        f"  peak {memory['peak'] / 1e6:.0f} MB (after imports {memory['imports'] / 1e6:.0f}, with"
        f" the updates {memory['updates'] / 1e6:.0f}); allowed {memory['allowed'] / 1e6:.0f}:"
        f" {_met(memory['met'])}"
    )


def _show_folder(folder: Mapping[str, Any]) -> None:
    found, disk = folder["publish"], folder["disk_bytes"]
    print(
        f"\nfolder -> folder, {found['shards']} shards, {folder['file_bytes'] / 1e9:.1f} GB with"
        f" holes for weights, {found['edited_bytes'] / 1e9:.2f} GB edited"
    )
    print(
        f"  {found['publish_s']:.1f} s: patching {found['patch_s']:.1f}, others"
        f" {found['copy_s']:.1f}, commit {found['commit_s']:.1f}; once per base, to hash it"
        f" {folder['identify']['seconds']:.1f}"
    )
    _show_memory(folder["memory"])
    print(
        f"  disk: {disk['base'] / 1e6:.1f} MB before, {disk['with the version'] / 1e6:.0f} MB"
        f" after; {folder['hard_linked']} files are hard links"
    )


def _show_bytes(name: str, counted: Mapping[str, Any]) -> None:
    print(
        f"\nS3 -> S3, bytes of bodies at a proxy: {name}, {counted['size_bytes'] / 1e6:.0f} MB,"
        f" {counted['edited_bytes'] / 1e6:.1f} MB edited"
    )
    for way in ("up", "down"):
        parts = ", ".join(
            f"{k} {v / 1e6:.3f}" for k, v in counted[f"{way}_bytes"].items() if k != "whole"
        )
        print(
            f"  {way} {counted[f'{way}_bytes']['whole'] / 1e6:.3f} MB,"
            f" {counted[f'{way}_ratio']:.4f} of the edited tensors ({parts})"
        )
    print(f"  slack allowed: {counted['slack_allowed_bytes'] / 1e6:.1f} MB")
    for what, met in counted["met"].items():
        print(f"  {what}: {_met(met)}")


def _show_time(found: Mapping[str, Any]) -> None:
    print(
        f"\nS3 -> S3, {found['file_bytes'] / 1e9:.2f} GB ({found['blocks']} of 44 blocks):"
        f" memedit {found['memedit_s']:.1f} s, download-edit-upload {found['whole_copy_s']:.1f} s:"
        f" {found['ratio']:.2f}x ({found['ratio_without_start_up']:.2f}x without start-up)"
    )
    guess = found["estimate_for_46_shards"]
    print(
        f"  the whole model at these rates (not measured): {guess['memedit_s']:.0f} s against"
        f" {guess['whole_copy_s']:.0f} s, {guess['ratio']:.2f}x"
    )
    _show_memory(found["memory"])
    print(f"  the server's disk: {found['server_disk_bytes'] / 1e9:.2f} GB at most")


def _show_throughput(found: Mapping[str, Any]) -> None:
    start = found["start_up_s"]
    print(
        f"\nthroughput, {found['size_bytes'] / 1e6:.0f} MB, medians of {found['rounds']}; start-up:"
        f" aws {start['aws']:.2f} s, memedit {start['memedit']:.2f} s"
    )
    for name, side in found["sides"].items():
        print(
            f"  {name:<18}{side['mb_per_s']:>6.0f} MB/s, with start-up"
            f" {side['mb_per_s_with_start_up']:>4.0f}; {side['client_cpu_s_per_gb']:.2f} s of the"
            " client's processor a GB"
        )
    for what, share in found["shares"].items():
        print(
            f"  {what}: {share['share']:.2f} of aws ({share['share_of_aws_with_its_start_up']:.2f}"
            f" of aws with its start-up): {_met(share['met'])}"
        )


def _met(met: bool) -> str:
    return "met" if met else "NOT MET"
